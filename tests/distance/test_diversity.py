"""Vendi score, effective rank and collapse, against the formulas of their papers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ssl_diversity.distance.diversity import (
    collapsed,
    effective_rank,
    effective_rank_of,
    spread,
    vendi,
    vendi_of,
)
from ssl_diversity.distance.statistics import Statistics

Array = NDArray[np.float64]
COUNTS = np.zeros((1, 2), np.int64)


def exp_entropy(weights: Array) -> float:
    p = weights[weights > 1e-12 * weights.max()] / weights.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def full_kernel_vendi(features: Array) -> float:
    """The definition: n x n cosine kernel, its eigenvalues over n."""
    kernel = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in features] for b in features])
    return exp_entropy(np.linalg.eigvalsh(kernel / len(features)))


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 12), (9, 50)])
def test_vendi_equals_the_full_kernels_in_both_forms(n: int, d: int) -> None:
    features = np.random.default_rng(n).normal(size=(n, d)) + 0.5
    expected = full_kernel_vendi(features)
    assert vendi(features) == pytest.approx(expected)
    assert vendi_of(Statistics.of(features, COUNTS).cosine) == pytest.approx(expected)


def test_vendi_counts_distinct_images() -> None:
    orthogonal = np.eye(8)[:5]
    assert vendi(orthogonal) == pytest.approx(5)
    assert vendi(np.repeat(orthogonal, 7, axis=0) * 3) == pytest.approx(5)
    assert vendi(np.ones((6, 4))) == pytest.approx(1)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (7, 20)])
def test_effective_rank_equals_the_singular_values(n: int, d: int) -> None:
    features = np.random.default_rng(d).normal(size=(n, d)) * np.arange(1, d + 1)
    expected = exp_entropy(np.linalg.svd(features, compute_uv=False))
    assert effective_rank(features) == pytest.approx(expected)
    assert effective_rank_of(Statistics.of(features, COUNTS).outer) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_of_equal_singular_values_is_their_number() -> None:
    assert effective_rank(np.eye(6)) == pytest.approx(6)
    assert effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, abs=1e-5)


def healthy(n: int = 500, d: int = 128) -> Array:
    """Ten classes in rectified features with a large common mean, as a pooled ResNet gives them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, d))
    return np.maximum(3 + centres[rng.integers(0, 10, n)] + 0.3 * rng.normal(size=(n, d)), 0)


def test_healthy_features_are_not_collapsed() -> None:
    assert not collapsed(healthy())
    assert not collapsed(healthy().astype(np.float16))
    assert not collapsed(healthy(n=16))
    assert not collapsed(np.random.default_rng(0).normal(size=(64, 128)))


def test_a_point_is_collapsed_whatever_its_scale_and_noise() -> None:
    rng = np.random.default_rng(0)
    point = np.abs(rng.normal(size=128)) + 1
    assert collapsed(np.tile(point, (300, 1)))
    assert collapsed(np.tile(point, (300, 1)).astype(np.float16))
    assert collapsed(point * (1 + 1e-3 * rng.normal(size=(300, 128))))
    assert collapsed(np.outer(rng.uniform(0.1, 10, 300), point))  # directions equal, lengths not
    assert collapsed(np.zeros((20, 128)))


def test_a_line_is_collapsed() -> None:
    rng = np.random.default_rng(0)
    along = rng.normal(size=(300, 1)) * rng.normal(size=(1, 128)) * 0.02
    assert collapsed(1 + along + 1e-5 * rng.normal(size=(300, 128)))


def test_features_that_are_not_finite_are_collapsed() -> None:
    features = healthy()
    features[3, 5] = np.nan
    assert collapsed(features)


def test_spread_is_between_a_point_and_a_sphere() -> None:
    assert spread(np.ones((10, 4))) == pytest.approx(0)
    assert spread(np.concatenate([np.eye(128), -np.eye(128)])) == pytest.approx(1)
