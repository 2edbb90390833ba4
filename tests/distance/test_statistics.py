"""Sufficient statistics and the measures computed from them, against slow obvious formulas."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ssl_diversity.distance.frechet import frechet
from ssl_diversity.distance.statistics import Statistics, merge
from ssl_diversity.distance.visual_dna import Ranges, histograms, visual_dna

Array = NDArray[np.float64]


def statistics(features: Array, counts: NDArray[np.int64] | None = None) -> Statistics:
    return Statistics.of(features, np.zeros((1, 2), np.int64) if counts is None else counts)


def draw(seed: int, n: int, d: int, shift: float = 0.0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


def scipy_frechet(a: Array, b: Array) -> float:
    """The textbook formula on the images' features."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(covariance_a + covariance_b - 2 * np.real(root)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(0, 10))
def test_statistics_of_any_cut_are_those_of_the_whole(cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, per_image = rng.normal(size=(40, 5)) * 3 + 7, rng.integers(0, 9, (40, 3, 4))
    whole = statistics(features, per_image.sum(0))
    edges = [0, *sorted(cuts), 40]
    parts = [statistics(features[a:b], per_image[a:b].sum(0)) for a, b in itertools.pairwise(edges)]
    for merged in (merge(parts), merge(parts[::-1])):
        assert merged.n == 40
        assert (merged.counts == whole.counts).all()
        for name in ("sum", "outer", "cosine"):
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12)
    np.testing.assert_allclose(whole.mean(), features.mean(0))
    np.testing.assert_allclose(whole.covariance(), np.cov(features, rowvar=False), atol=1e-10)


def test_merging_is_associative() -> None:
    a, b, c = (statistics(draw(seed, 9, 4)) for seed in range(3))
    for x, y in zip(((a + b) + c).arrays().values(), (a + (b + c)).arrays().values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize(("n", "d"), [(200, 3), (500, 24), (64, 30)])
def test_frechet_equals_the_formula_with_scipys_root(n: int, d: int) -> None:
    a, b = draw(0, n, d), draw(1, n, d, shift=0.5)
    assert frechet(statistics(a), statistics(b)) == pytest.approx(scipy_frechet(a, b), rel=1e-8)


def test_frechet_of_one_dimension_is_the_wasserstein_distance_of_two_normals() -> None:
    a, b = draw(0, 50, 1), draw(1, 70, 1, shift=3.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet(statistics(a), statistics(b)) == pytest.approx(expected)


def test_frechet_stands_rank_deficient_covariances() -> None:
    """Fewer images than features, constant features, and two sets in different subspaces."""
    a, b = draw(0, 10, 30), draw(1, 10, 30)
    assert frechet(statistics(a), statistics(a)) == pytest.approx(
        0, abs=1e-6 * np.trace(np.cov(a, rowvar=False))
    )
    assert frechet(statistics(a), statistics(b)) == pytest.approx(frechet(statistics(b), statistics(a)))
    left, right = np.zeros((20, 4)), np.zeros((20, 4))
    left[:, 0], right[:, 1] = draw(2, 20, 1)[:, 0], draw(3, 20, 1)[:, 0]
    assert frechet(statistics(left), statistics(right)) == pytest.approx(scipy_frechet(left, right))
    assert frechet(statistics(np.ones((5, 3))), statistics(np.zeros((5, 3)))) == pytest.approx(3)


def test_frechet_is_biased_upwards_by_about_one_over_n() -> None:
    values = []
    for n in (100, 1000, 10000):
        features = np.random.default_rng(n).normal(size=(2 * n, 16))
        values.append(frechet(statistics(features[:n]), statistics(features[n:])))
    for small, large in itertools.pairwise(values):
        assert 5 < small / large < 20


def brute_force(layer: torch.Tensor, low: Array, high: Array, bins: int) -> NDArray[np.int64]:
    """numpy's histogram of each neuron's standardised and clamped activations."""
    rows = []
    for neuron in range(layer.shape[1]):
        x = layer[:, neuron].double().numpy().ravel()
        standardised = np.clip((x - low[neuron]) / (high[neuron] - low[neuron]) * 2 - 1, -1, 1)
        rows.append(np.histogram(standardised, bins=bins, range=(-1, 1))[0])
    return np.stack(rows)


@pytest.mark.parametrize("bins", [2, 8, 64])
def test_histograms_equal_numpys_on_and_off_the_edges(bins: int) -> None:
    """Activations are multiples of 1/64 in a range of 2, so that many lie exactly on an edge."""
    rng = np.random.default_rng(bins)
    layers = [
        torch.from_numpy(rng.integers(-200, 201, shape) / 64).float() for shape in ((5, 3, 16), (5, 2, 1))
    ]
    low, high = np.full(5, -1, np.float32), np.full(5, 1, np.float32)
    counts = histograms(layers, Ranges(low, high), bins)
    assert counts.dtype == np.int64
    assert (counts[:3] == brute_force(layers[0], low, high, bins)).all()
    assert (counts[3:] == brute_force(layers[1], low, high, bins)).all()


def test_every_activation_counts_once_and_near_where_numpy_puts_it() -> None:
    """A thousand bins in float32: a value within rounding of an edge may fall to its other side."""
    layer = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 4, 50))).float()
    ranges = Ranges.of([layer[:10]])
    counts = histograms([layer], ranges, 1000)
    assert (counts.sum(1) == 30 * 50).all()
    expected = brute_force(layer, ranges.low.astype(float), ranges.high.astype(float), 1000)
    assert np.abs(counts.cumsum(1) - expected.cumsum(1)).max() <= 1


def test_histograms_add_up_over_batches() -> None:
    layer = torch.randn(20, 3, 7, generator=torch.Generator().manual_seed(0))
    ranges = Ranges.of([layer])
    whole = histograms([layer], ranges, 50)
    assert (whole == sum(histograms([part], ranges, 50) for part in layer.split(6))).all()


def test_ranges_of_a_union_and_of_a_neuron_that_never_varied() -> None:
    a, b = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[1.0], [2.0]]])
    ranges = Ranges.of([a]) | Ranges.of([b])
    assert ranges.low.tolist() == [0, 2]
    assert ranges.high.tolist() == [1, 2]
    # a constant neuron: its value in the lowest of four bins, half a unit above in the third
    assert histograms([torch.tensor([[[0.0], [2.0]], [[0.0], [2.5]]])], ranges, 4)[1].tolist() == [1, 0, 1, 0]


def test_visual_dna_equals_the_earth_movers_distance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 50, (6, 40)), rng.integers(0, 50, (6, 40))
    places = np.arange(40)
    expected = [
        scipy.stats.wasserstein_distance(places, places, x, y) / 39 for x, y in zip(a, b, strict=True)
    ]
    assert visual_dna(a, b) == pytest.approx(np.mean(expected))
    assert visual_dna(a, 3 * a) == pytest.approx(0)


def test_visual_dna_is_one_between_the_two_ends() -> None:
    ends = np.zeros((2, 3, 1000), np.int64)
    ends[0, :, 0] = 5
    ends[1, :, -1] = 7
    assert visual_dna(ends[0], ends[1]) == pytest.approx(1)


def test_counts_beyond_int32_do_not_overflow() -> None:
    huge = np.full((1, 4), 2**40, np.int64)
    part = statistics(np.ones((1, 1)), huge)
    merged = merge([part] * 8)
    assert merged.counts.sum() == 2**45
    assert visual_dna(merged.counts, huge) == pytest.approx(0)


def test_measures_do_not_depend_on_the_scale_of_counts() -> None:
    counts = np.array([[1, 2, 3, 4]])
    assert visual_dna(counts, counts[:, ::-1]) == pytest.approx(visual_dna(10 * counts, 7 * counts[:, ::-1]))
