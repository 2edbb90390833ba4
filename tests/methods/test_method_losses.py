"""Losses on fixed inputs against slow, obvious formulas."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss, VICRegLoss
from method_helpers import tiny
from torch import Tensor


def _inputs(count: int, rows: int = 6, columns: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def _cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_simclr_is_nt_xent() -> None:
    a, b = _inputs(2)
    z, n, t = torch.cat([a, b]), len(a), 0.3
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [math.exp(_cos(z[i], z[k]) / t) for k in range(2 * n) if k != i]
        total -= math.log(math.exp(_cos(z[i], z[partner]) / t) / sum(others))
    module = tiny("simclr", overrides={"temperature": t})
    assert module.criterion(a, b).item() == pytest.approx(total / (2 * n), rel=1e-6)


def test_mocov3_contrasts_each_query_with_the_other_view_s_keys() -> None:
    q1, q2, k1, k2 = _inputs(4)
    t = 0.3

    def one(queries: Tensor, keys: Tensor) -> float:
        rows = []
        for i, query in enumerate(queries):
            scores = [math.exp(_cos(query, key) / t) for key in keys]
            rows.append(-math.log(scores[i] / sum(scores)))
        return 2 * t * sum(rows) / len(rows)

    module = tiny("mocov3", overrides={"temperature": t})
    assert module.criterion(q1, q2, k1, k2).item() == pytest.approx(one(q1, k2) + one(q2, k1), rel=1e-6)


def test_byol_is_the_squared_distance_of_unit_vectors() -> None:
    p1, p2, z1, z2 = _inputs(4)
    total = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        total += sum(
            float((a / a.norm() - b / b.norm()).square().sum()) for a, b in zip(p, z, strict=True)
        ) / len(p)
    assert tiny("byol").criterion(p1, p2, z1, z2).item() == pytest.approx(total, rel=1e-6)


def test_barlow_twins_draws_the_cross_correlation_to_the_identity() -> None:
    a, b = _inputs(2)
    n, d = a.shape
    total = 0.0
    for i in range(d):
        for j in range(d):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            c = float((x * y).sum() / n / (x.square().mean() * y.square().mean() + 1e-5).sqrt())
            total += (1 - c) ** 2 if i == j else 0.02 * c**2
    module = tiny("barlow_twins", overrides={"redundancy_weight": 0.02, "loss_scale": 0.1})
    assert module.criterion(a, b).item() == pytest.approx(0.1 * total, rel=1e-4)


def test_vicreg_is_invariance_variance_and_covariance() -> None:
    a, b = _inputs(2)
    n, d = a.shape
    invariance = float((a - b).square().mean())
    variance = covariance = 0.0
    for z in (a, b):
        centred = z - z.mean(0)
        matrix = centred.T @ centred / (n - 1)
        variance += sum(max(0.0, 1 - math.sqrt(float(matrix[i, i]) + 1e-4)) for i in range(d)) / d / 2
        covariance += sum(float(matrix[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / d
    module = tiny(
        "vicreg", overrides={"invariance_weight": 20.0, "variance_weight": 10.0, "covariance_weight": 2.0}
    )
    expected = 20 * invariance + 10 * variance + 2 * covariance
    assert module.criterion(a, b).item() == pytest.approx(expected, rel=1e-6)


def _softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum()


def test_dino_is_cross_entropy_between_different_views_and_moves_its_centre() -> None:
    module = tiny("dino", overrides={"prototypes": 5, "student_temperature": 0.2, "center_momentum": 0.8})
    teacher, student = torch.stack(_inputs(2)).float(), torch.stack(_inputs(6)).float()
    centre = torch.zeros(5)
    for _ in range(2):  # the second time with a centre that is not zero
        terms = []
        for t in range(2):
            for s in range(6):
                if s != t:
                    for row in range(6):
                        target = _softmax((teacher[t, row] - centre) / module.teacher_temperature())
                        terms.append(float(-(target * _softmax(student[s, row] / 0.2).log()).sum()))
        assert module.criterion(teacher, student).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        centre = 0.8 * centre + 0.2 * teacher.reshape(-1, 5).mean(0)
        torch.testing.assert_close(module.loss.center.flatten(), centre)


def test_dino_s_temperature_warms_up_and_its_last_layer_thaws() -> None:
    overrides = {
        "warmup_teacher_temperature": 0.02,
        "teacher_temperature": 0.06,
        "warmup_teacher_fraction": 0.5,
    }
    module = tiny("dino", overrides={**overrides, "freeze_fraction": 0.25}, budget=16 * 100)
    last = module.head.last_layer.weight_v
    thawed = {}
    for step in (0, 24, 25, 49, 50, 99):
        module.samples_seen = 16 * step
        last.grad = torch.ones_like(last)
        module.before_update()
        thawed[step] = last.grad is not None
        expected = 0.02 + 0.04 * min(1.0, (step + 0.5) / 50)
        assert module.teacher_temperature() == pytest.approx(expected)
    assert thawed == {0: False, 24: False, 25: True, 49: True, 50: True, 99: True}


def test_mae_compares_hidden_patches_after_normalising_each() -> None:
    module = tiny("mae")
    images, positions = torch.randn(3, 3, 16, 16), torch.arange(3)
    with torch.no_grad():
        painted, pixels = module([images], positions)
    _, hidden = module.masks(positions)
    total = []
    for i in range(3):
        for k, token in enumerate(hidden[i].tolist()):
            row, column = divmod(token - 1, 4)
            patch = images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            target = patch.permute(1, 2, 0).flatten()  # the reference's order: row, column, channel
            torch.testing.assert_close(pixels[i, k], target)
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total.append(float((painted[i, k] - target).square().mean()))
    assert module.criterion(painted, pixels).item() == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_mae_s_masks_depend_on_seed_and_position_alone() -> None:
    module = tiny("mae")
    visible, hidden = module.masks(torch.arange(1000))
    assert visible.shape == (1000, 1 + 4)
    assert hidden.shape == (1000, 12)
    assert (visible[:, 0] == 0).all()
    assert (torch.cat([visible, hidden], 1).sort(1).values == torch.arange(17)).all()
    torch.testing.assert_close(
        torch.bincount(visible[:, 1:].flatten(), minlength=17)[1:] / 1000,
        torch.full((16,), 0.25),
        atol=0.05,
        rtol=0,
    )
    torch.rand(5)
    assert torch.equal(module.masks(torch.tensor([700, 3]))[0], visible[[700, 3]])
    assert not torch.equal(tiny("mae", seed=1).masks(torch.arange(1000))[0], visible)


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (64, 48), (257, 96)])
def test_lightly_s_losses_bit_for_bit(rows: int, columns: int) -> None:
    a, b = (x.float().requires_grad_() for x in _inputs(2, rows, columns))
    pairs = [
        (tiny("simclr", overrides={"temperature": 0.2}), NTXentLoss(0.2)),
        (tiny("vicreg"), VICRegLoss(*tiny("vicreg").weights)),  # type: ignore[misc]
    ]
    for module, theirs in pairs:
        ours, expected = module.criterion(a, b), theirs(a, b)
        assert torch.equal(ours, expected)
        for mine, other in zip(
            torch.autograd.grad(ours, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True
        ):
            assert torch.equal(mine, other)
