"""LARS against solo-learn's rule written out."""

import pytest
import torch

from ssl_diversity.methods.optim import LARS


@pytest.mark.parametrize("clip", [True, False])
def test_lars_is_the_rule_written_out(clip: bool) -> None:
    eta, decay, momentum, lr = 0.02, 0.1, 0.9, 0.05
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (2, 3, 1, 1), (5,), (4, 4)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    params[3].data.zero_()  # no norm to adapt to
    slow = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in slow]
    matrices = {"params": [params[0], params[1], params[3]], "weight_decay": decay, "eta": eta, "clip": clip}
    optimizer = LARS([matrices, {"params": [params[2]]}], lr=lr, momentum=momentum)
    for _ in range(3):
        grads = [torch.randn(s, generator=generator) * 0.01 for s in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, g in enumerate(grads):
            p_norm, g_norm = slow[i].norm().item(), g.norm().item()
            update = g
            if slow[i].ndim > 1 and p_norm > 0:
                scale = eta * p_norm / (g_norm + decay * p_norm)
                if clip:
                    scale = min(scale / lr, 1)
                update = scale * (g + decay * slow[i])
            buffers[i] = momentum * buffers[i] + update
            slow[i] = slow[i] - lr * buffers[i]
    for p, expected in zip(params, slow, strict=True):
        torch.testing.assert_close(p.data, expected)


def test_parameters_without_a_gradient_stay_and_the_closure_has_gradients() -> None:
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([{"params": [p, q], "eta": 0.02, "clip": True}], lr=0.1, momentum=0.9)

    def closure() -> torch.Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert torch.equal(q, torch.ones(2, 2))
    assert not torch.equal(p, torch.ones(2, 2))
