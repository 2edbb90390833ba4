"""Multinomial logistic regression, many problems at once.

A problem is a set of sample weights and an L2 strength; problems on the same features share every matrix
product, so a grid of strengths, folds and draws costs little more than its slowest member. Each problem
has its own L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4 with backtracking), with
Böhning's bound on the Hessian (Böhning 1992: at most 1/2 XᵀX) as its initial metric. On principal
axes that bound is diagonal, which undoes the bad conditioning of correlated features: random features of
digits need 50 evaluations where L-BFGS on the joint loss (torch.optim.LBFGS) needs 470.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHOOSING = 1e-3  # tolerance that is enough to compare strengths
MEMORY = 10  # curvature pairs kept
MAX_ITERATIONS = 1000
MAX_HALVINGS = 30
_BLOCK = 1 << 24  # logits held at once


@dataclass(frozen=True)
class Axes:
    """Principal axes of B sets of features: x -> (x - mean) @ basis, an isometry on their span."""

    mean: Tensor  # (B, 1, d)
    basis: Tensor  # (B, d, r)

    def __call__(self, x: Tensor) -> Tensor:
        """float64 (B, n, r) coordinates of x (B, n, d) or (n, d)."""
        return (x - self.mean) @ self.basis


def principal_axes(x: Tensor) -> Axes:
    """Axes of x, float64 (B, n, d), without those along which nothing varies: r <= min(n, d), at least 1.

    L2-regularised solutions lie in the span of the centred rows, so nothing is lost and no penalty changes.
    """
    mean = x.mean(1, keepdim=True)
    x = x - mean
    wide = x.shape[1] < x.shape[2]
    energy, vectors = torch.linalg.eigh(x @ x.mT if wide else x.mT @ x)
    varies = energy > 1e-12 * energy[:, -1:]
    kept = varies.any(0)
    kept[-1] = True
    if wide:
        vectors = x.mT @ (vectors * torch.where(varies, energy, torch.inf).rsqrt()[:, None])
    return Axes(mean, vectors[:, :, kept])


def fit(
    z: Tensor,
    labels: Tensor,
    weights: Tensor,
    l2: Tensor,
    classes: int,
    *,
    start: Tensor | None = None,
    tol: float = 1e-4,
) -> Tensor:
    """Coefficients (B, r + 1, P, K), the last row the unpenalised intercepts, of B x P problems.

    Minimises sum_i w_i CE_i + l2/2 |W|² for features z float64 (B, n, r), int64 labels (B, n) in [0, K),
    weights (B, n, P), scaled here to sum to 1, and l2 (B, P). `start` may hold coefficients to begin from;
    `tol` bounds the gradient's norm in the metric of the Hessian's bound.
    """
    problem = _Problem(z, labels, weights, l2, classes)
    point = z.new_zeros(z.shape[0], z.shape[2] + 1, l2.shape[1], classes) if start is None else start
    value, gradient = problem(point)
    state = _State(
        point, value, gradient, torch.ones_like(value), torch.ones_like(value, dtype=torch.bool), []
    )
    solution = torch.empty_like(point)
    columns = torch.arange(l2.shape[1], device=z.device)
    for _ in range(MAX_ITERATIONS):
        state.running &= _dot(state.gradient, state.gradient * problem.metric) > tol**2
        left = state.running.any(0)
        if not bool(left.all()):  # go on without the columns that are done in every set of features
            solution[:, :, columns[~left]] = state.point[:, :, ~left]
            if not bool(left.any()):
                return solution
            problem, state, columns = problem.keep(left), state.keep(left), columns[left]
        _step(problem, state)
    solution[:, :, columns] = state.point
    return solution


@dataclass
class _State:
    """Where L-BFGS stands: tensors of shape (B, r + 1, P, K) or (B, P)."""

    point: Tensor
    value: Tensor
    gradient: Tensor
    scale: Tensor  # of the metric
    running: Tensor
    pairs: list[tuple[Tensor, Tensor, Tensor]]  # step, change of gradient, 1 / their product or 0

    def keep(self, left: Tensor) -> "_State":
        pairs = [(step[:, :, left], change[:, :, left], rho[:, left]) for step, change, rho in self.pairs]
        wide = (self.point[:, :, left], self.value[:, left], self.gradient[:, :, left])
        return _State(*wide, self.scale[:, left], self.running[:, left], pairs)


def _step(problem: "_Problem", state: _State) -> None:
    """One iteration of all problems; those that do not run stay where they are."""
    direction = -_inverse_hessian(state.gradient, state.pairs, problem.metric * _wide(state.scale))
    slope = _dot(state.gradient, direction)
    length = state.running.to(slope.dtype)
    for _ in range(MAX_HALVINGS):
        point = state.point + _wide(length) * direction
        value, gradient = problem(point)
        too_far = state.running & ~(value <= state.value + 1e-4 * length * slope)
        if not bool(too_far.any()):
            break
        length = torch.where(too_far, length / 2, length)
    else:  # no step of any length helps any more: as good as float64 gets
        state.running &= ~too_far
    step, change = point - state.point, gradient - state.gradient
    product = _dot(step, change)
    curved = product > 0
    rho = torch.where(curved, 1 / product, 0.0)
    state.scale = torch.where(curved, product / _dot(change * problem.metric, change), state.scale)
    state.pairs = [*state.pairs[1 - MEMORY :], (step, change, rho)]
    state.point, state.value, state.gradient = point, value, gradient


def best_strength(held_out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which of P fits answers most held-out images right, with the least cross-entropy where several do.

    Logits (..., n, P, K) and labels (..., n) to the fit's index (...) and its held-out accuracy (...), float64.
    Cross-entropy alone would prefer fits that guess to ones that are right but overconfident.
    """
    target = labels[..., None].expand(held_out.shape[:-1])
    correct = (held_out.argmax(-1) == target).sum(-2)
    loss = -held_out.log_softmax(-1).gather(-1, target[..., None])[..., 0].sum(-2)
    best = torch.where(correct == correct.amax(-1, keepdim=True), loss, torch.inf).argmin(-1)
    return best, correct.gather(-1, best[..., None])[..., 0].double() / labels.shape[-1]


def logits(z: Tensor, coefficients: Tensor) -> Tensor:
    """(B, n, P, K) logits of features (B, n, r) under coefficients (B, r + 1, P, K)."""
    b, _, p, k = coefficients.shape
    flat = coefficients.flatten(2)
    return (z @ flat[:, :-1] + flat[:, -1:]).view(b, -1, p, k)


class _Problem:
    """Loss (B, P) and gradient (B, r + 1, P, K) of all problems, in blocks of rows."""

    def __init__(self, z: Tensor, labels: Tensor, weights: Tensor, l2: Tensor, classes: int) -> None:
        self.arguments = (z, labels, weights, l2, classes)
        self.z, self.labels = z, labels[:, :, None, None].expand(-1, -1, l2.shape[1], -1)
        self.weights = (weights / weights.sum(1, keepdim=True))[..., None]
        self.penalty = torch.cat([_wide(l2).expand(-1, z.shape[2], -1, -1), torch.zeros_like(_wide(l2))], 1)
        energy = torch.cat([z.square().mean(1), torch.ones_like(z[:, 0, :1])], 1)
        self.metric = 1 / (0.5 * energy[:, :, None, None] + self.penalty)
        self.rows = max(1, _BLOCK // (z.shape[0] * l2.shape[1] * classes))

    def keep(self, left: Tensor) -> "_Problem":
        z, labels, weights, l2, classes = self.arguments
        return _Problem(z, labels, weights[:, :, left], l2[:, left], classes)

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        loss = 0.5 * (self.penalty * point * point).sum((1, 3))
        gradient = self.penalty * point
        for z, labels, weights in zip(
            *(t.split(self.rows, 1) for t in (self.z, self.labels, self.weights)), strict=True
        ):
            log_p = logits(z, point).log_softmax(-1)
            loss = loss - (log_p.gather(-1, labels) * weights).sum((1, 3))
            residual = log_p.exp_().scatter_add_(-1, labels, -torch.ones_like(weights)).mul_(weights)
            gradient[:, :-1] += (z.mT @ residual.flatten(2)).view_as(gradient[:, :-1])
            gradient[:, -1] += residual.sum(1)
        return loss, gradient


def _inverse_hessian(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]], metric: Tensor) -> Tensor:
    """The two-loop recursion. Pairs without curvature have factor 0 and change nothing."""
    q = gradient.clone()
    factors = []
    for step, change, rho in reversed(pairs):
        alpha = rho * _dot(step, q)
        q -= _wide(alpha) * change
        factors.append(alpha)
    q *= metric
    for (step, change, rho), alpha in zip(pairs, reversed(factors), strict=True):
        q += _wide(alpha - rho * _dot(change, q)) * step
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, P) inner products of (B, r, P, K)."""
    return (a * b).sum((1, 3))


def _wide(x: Tensor) -> Tensor:
    """(B, P) as (B, 1, P, 1)."""
    return x[:, None, :, None]
