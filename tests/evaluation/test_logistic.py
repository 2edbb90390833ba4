"""The batched solver against scikit-learn, one problem at a time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_diversity.evaluation import logistic
from ssl_diversity.evaluation.logistic import fit, logits, principal_axes

CLASSES = 4
L2 = (1e-3, 1e-1, 1.0)


def problem(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of very different scales, with overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    x = (
        torch.randn(n, d, generator=generator, dtype=torch.float64)
        @ torch.randn(d, d, generator=generator).double()
    )
    return x + 2 * torch.randn(CLASSES, d, generator=generator).double()[labels] + 5, labels


def solve(
    x: Tensor, labels: Tensor, weights: Tensor, l2: tuple[float, ...] = L2, tol: float = 1e-9
) -> Tensor:
    """Logits (n, P, K) at x itself."""
    axes = principal_axes(x[None])
    z = axes(x)
    strengths = torch.tensor(l2, dtype=torch.float64)[None]
    return logits(z, fit(z, labels[None], weights[None], strengths, CLASSES, tol=tol))[0]


def reference(x: Tensor, labels: Tensor, weights: Tensor, l2: float) -> np.ndarray:
    strength = 1 / (l2 * float(weights.sum()))
    model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit(x.numpy(), labels.numpy(), sample_weight=weights.numpy())
    return x.numpy() @ model.coef_.T + model.intercept_


def centred(scores: np.ndarray) -> np.ndarray:
    """Logits up to a constant per image, which no probability depends on."""
    return scores - scores.mean(-1, keepdims=True)


@pytest.mark.filterwarnings("ignore:Line search of Newton")
@pytest.mark.parametrize(("n", "d"), [(120, 6), (24, 60)])
def test_equals_scikit_learn_at_every_strength(n: int, d: int) -> None:
    x, labels = problem(n, d)
    weights = torch.rand(n, len(L2), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    ours = solve(x, labels, weights)
    for i, l2 in enumerate(L2):
        expected = reference(x, labels, weights[:, i], l2)
        np.testing.assert_allclose(centred(ours[:, i].numpy()), centred(expected), atol=1e-3)


def test_default_tolerance_is_enough_for_probabilities() -> None:
    x, labels = problem(200, 10)
    weights = torch.ones(200, len(L2), dtype=torch.float64)
    loose, tight = (
        solve(x, labels, weights, tol=1e-4).softmax(-1),
        solve(x, labels, weights, tol=1e-8).softmax(-1),
    )
    assert float((loose - tight).abs().max()) < 5e-3


def test_weight_zero_is_as_good_as_absent() -> None:
    x, labels = problem(60, 5)
    weights = torch.ones(60, 1, dtype=torch.float64)
    weights[40:] = 0
    np.testing.assert_allclose(
        solve(x, labels, weights, (0.1,))[:40].softmax(-1).numpy(),
        solve(x[:40], labels[:40], weights[:40], (0.1,)).softmax(-1).numpy(),
        atol=1e-5,
    )


def test_problems_solved_together_are_those_solved_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [problem(30, 12, seed) for seed in range(3)]
    x, labels = torch.stack([s[0] for s in sets]), torch.stack([s[1] for s in sets])
    axes = principal_axes(x)
    z = axes(x)
    weights = torch.ones(3, 30, 2, dtype=torch.float64)
    l2 = torch.tensor([[1e-3, 0.3]], dtype=torch.float64).expand(3, 2)
    together = logits(z, fit(z, labels, weights, l2, CLASSES, tol=1e-7)).softmax(-1)
    monkeypatch.setattr(logistic, "_BLOCK", 50)  # and in blocks of a few rows
    for b in range(3):
        for p in range(2):
            one = fit(
                z[b : b + 1], labels[b : b + 1], weights[:1, :, :1], l2[:1, p : p + 1], CLASSES, tol=1e-7
            )
            alone = logits(z[b : b + 1], one).softmax(-1)
            torch.testing.assert_close(together[b, :, p], alone[0, :, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50)])
def test_principal_axes_keep_all_distances(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    z = principal_axes(x[None])(x)[0]
    assert z.shape[1] <= min(shape)
    torch.testing.assert_close(torch.cdist(z, z), torch.cdist(x, x), atol=1e-6, rtol=1e-6)


def test_constant_features_leave_the_intercept_alone() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    for d in (2, 9):
        scores = solve(
            torch.ones(4, d, dtype=torch.float64), labels, torch.ones(4, 1, dtype=torch.float64), (0.1,)
        )
        found = scores[0, 0].softmax(-1)
        torch.testing.assert_close(
            found[:2], torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-3, rtol=0
        )
