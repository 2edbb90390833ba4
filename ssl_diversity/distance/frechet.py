"""Fréchet distance between two Gaussians fitted to features (Heusel et al., NeurIPS 2017, arXiv 1706.08500)."""

import numpy as np

from ssl_diversity.distance.statistics import Float, Statistics


def frechet(a: Statistics, b: Statistics) -> float:
    """|μ₁ − μ₂|² + Tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), covariances unbiased; squared, as FID is reported.

    Biased upwards by about 1/n: compare values at equal n only. The trace of the root is the sum of the
    root eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: real for rank-deficient covariances too.
    """
    covariance_a, covariance_b = a.covariance(), b.covariance()
    root = _sqrt(covariance_a)
    product = np.linalg.eigvalsh(root @ covariance_b @ root)
    shift = a.mean() - b.mean()
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(product.clip(0)).sum()
    return float(max(shift @ shift + trace, 0.0))


def _sqrt(covariance: Float) -> Float:
    """Symmetric root of a positive semi-definite matrix; rounding below zero is taken for zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
