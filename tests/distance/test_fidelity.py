"""Kernel distance, precision and recall, neighbours: against a reference implementation and the definitions."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.image.kid import poly_mmd

from ssl_diversity.distance import fidelity
from ssl_diversity.distance.fidelity import closeness, kid, mmd2, nearest, precision_recall

Array = NDArray[np.float64]


def normal(n: int, d: int = 8, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Array:
    return scale * np.random.default_rng(seed).normal(size=(n, d)) + shift


def apart(x: Array, y: Array) -> Array:
    """Every distance by its definition."""
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in y] for a in x])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_BLOCK", 100)


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (0.5, 1), (0, 2)])
def test_mmd_is_torchmetrics(shift: float, scale: float) -> None:
    a, b = normal(60), normal(60, seed=1, shift=shift, scale=scale)
    expected = poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert mmd2(a, b) == pytest.approx(expected, rel=1e-9)


def test_mmd_of_sets_of_different_size_is_its_definition() -> None:
    a, b = normal(7), normal(5, seed=1, shift=1)

    def mean(x: Array, y: Array, *, same: bool) -> float:
        values = [
            (float(p @ q) / 8 + 1) ** 3
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (same and i == j)
        ]
        return float(np.mean(values))

    expected = mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False)
    assert mmd2(a, b) == pytest.approx(expected)


def test_kid_is_unbiased_at_every_n_and_grows_with_the_shift() -> None:
    """Over many pairs of draws of one distribution its mean is 0 within its own error."""
    for n in (10, 100):
        values = [mmd2(normal(n, seed=2 * i), normal(n, seed=2 * i + 1)) for i in range(400)]
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
        assert 0.3 < np.mean(np.array(values) < 0) < 0.8
    shifted = [kid(normal(400), normal(400, seed=1, shift=shift)).mean for shift in (0.0, 0.2, 0.4, 0.8)]
    assert shifted == sorted(shifted)
    assert shifted[1] > 5 * abs(shifted[0])


def test_kid_says_what_it_averaged_and_is_the_same_each_time() -> None:
    a, b = normal(500), normal(600, seed=1, shift=0.3)
    found = kid(a, b)
    assert (found.subsets, found.subset_size) == (100, 250)
    assert found == kid(a, b) != kid(a, b, seed=1)
    assert found.mean == pytest.approx(mmd2(a, b), abs=found.deviation)
    assert found.deviation > 0
    assert kid(a[:4], b[:4]).subset_size == 2
    assert kid(a.astype(np.float16), b).mean == pytest.approx(found.mean, rel=0.01)


def test_kid_takes_subsets_of_a_thousand_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "SUBSETS", 2)
    assert kid(normal(2500), normal(3000))[2:] == (2, 1000)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.usefixtures("small_blocks")
def test_precision_and_recall_are_their_definition(k: int) -> None:
    made, real = normal(90, 3, seed=1, scale=0.6), normal(110, 3)

    def covered(points: Array, manifold: Array) -> float:
        own = np.sort(apart(manifold, manifold), axis=1)[:, k]
        return float((apart(points, manifold) <= own).any(1).mean())

    assert precision_recall(made, real, k) == (covered(made, real), covered(real, made))


def test_precision_is_of_the_made_and_recall_of_the_real() -> None:
    """A narrow set within a wide one is precise and recalls little; the other way round, the reverse."""
    narrow, wide = normal(500, 2, scale=0.1), normal(500, 2, seed=1)
    precision, recall = precision_recall(narrow, wide)
    assert precision > 0.95
    assert recall < 0.1
    assert precision_recall(wide, narrow) == (recall, precision)
    assert precision_recall(normal(50, shift=100), normal(50, seed=1)) == (0, 0)


def test_a_set_covers_itself_however_often_an_image_is_there() -> None:
    x = normal(60, shift=50)
    repeated = np.concatenate([x, x[:20], x[:20], x[:20], x[:20]])
    assert precision_recall(repeated, repeated) == (1, 1)
    assert precision_recall(x[:5] * 0, x[:5] * 0) == (1, 1)


@pytest.mark.parametrize("cuts", [[], [3, 4, 50], [1, 2, 3, 4, 5, 6]])
@pytest.mark.usefixtures("small_blocks")
def test_nearest_finds_what_a_full_search_finds_however_the_stream_is_cut(cuts: list[int]) -> None:
    queries, real = normal(30), normal(120, seed=1)
    expected = apart(queries, real)
    starts = [0, *cuts]
    blocks = [(start, real[start:stop]) for start, stop in zip(starts, [*cuts, len(real)], strict=True)]
    distances, rows = nearest(queries, iter(blocks), 3)
    np.testing.assert_array_equal(rows, np.argsort(expected, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :3])


def test_a_query_that_is_among_the_rows_is_not_its_own_neighbour() -> None:
    real = normal(40)
    own = np.concatenate([np.arange(20), np.full(20, -1)])
    distances, rows = nearest(real, [(0, real[:25]), (25, real[25:])], 2, own=own)
    full = apart(real, real)
    np.testing.assert_array_equal(rows[20:, 0], np.arange(20, 40))
    assert (distances[20:, 0] == 0).all()
    np.testing.assert_array_equal(rows[:20], np.argsort(full[:20], axis=1)[:, 1:3])


def test_tiny_distances_are_exact_far_from_the_origin() -> None:
    """|x|² + |y|² − 2 x·y would round them away."""
    real = normal(50, shift=1e6)
    queries = real[:10] + 1e-7
    distances, rows = nearest(queries, [(0, real)], 1)
    np.testing.assert_array_equal(rows[:, 0], np.arange(10))
    np.testing.assert_allclose(distances[:, 0], np.sqrt(((queries - real[:10]) ** 2).sum(1)))


def test_closeness_is_below_one_for_copies_alone() -> None:
    real = normal(200)
    fresh, copies, far = normal(200, seed=1), real + 1e-3, normal(200, seed=2, shift=9)
    blocks = [(0, real)]
    own, _ = nearest(real, blocks, 1, own=np.arange(200))

    def of(queries: Array) -> Array:
        distances, rows = nearest(queries, blocks, 1)
        return closeness(distances[:, 0], own[rows[:, 0], 0])

    assert (of(copies) < 0.01).all()
    assert (of(far) > 1).all()
    assert 0.2 < (of(fresh) < 1).mean() < 0.8
    assert closeness(np.array([0.0, 0.0, 1.0]), np.array([0.0, 2.0, 0.0])).tolist() == [1, 0, np.inf]
