"""LARS, as solo-learn's recipes use it: trust coefficient, clipping, biases and norms left out; no host waits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled per parameter (You et al., arXiv 1708.03888).

    In groups with `eta` set, g <- s (g + weight_decay p), with s = eta |p| / (|g| + weight_decay |p|), and with
    `clip` s = min(s / lr, 1), so that lr is a ceiling (LARC); s = 1 and no decay where |p| or |g| is 0. Groups
    with `eta` None (biases, norms) are plain SGD. Reference: solo-learn's solo/utils/lars.py.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "eta": None, "clip": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            if group["eta"] is not None:
                updates = _scaled(params, updates, group)
            buffers = [self._buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def _scaled(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    decay = group["weight_decay"]
    p_norm, g_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
    scale = group["eta"] * p_norm / (g_norm + decay * p_norm + 1e-8)
    if group["clip"]:
        scale = (scale / group["lr"]).clamp(max=1)
    adapted = (p_norm > 0) & (g_norm > 0)
    updates = torch._foreach_mul(grads, list(torch.where(adapted, scale, 1).unbind()))
    decays = torch.where(adapted, scale * decay, 0).unbind()
    torch._foreach_add_(updates, torch._foreach_mul(params, list(decays)))
    return list(updates)
