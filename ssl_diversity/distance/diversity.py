"""How many directions a set of features uses: Vendi score, effective rank, collapse. numpy only."""

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.distance.statistics import Float, normalised

Features = NDArray[np.floating]

COLLAPSED_SPREAD = 0.01  # features within 1 % of one direction: the same vector for every image
COLLAPSED_RANK = 1.5  # what variation there is lies on one line


def vendi(features: Features) -> float:
    """Vendi score of (n, d) features under the cosine kernel, in [1, n] (Friedman and Dieng, TMLR 2023).

    exp of the entropy of the eigenvalues of K / n, the effective number of distinct images; by way of the
    smaller of the n x n kernel and its d x d dual. Saturates with n: compare values at equal n only.
    """
    return vendi_of(_smaller_gram(normalised(features.astype(np.float64))))


def vendi_of(cosine: Float) -> float:
    """Vendi score from the sum (d, d) of the images' f fᵀ / |f|², in O(d³) whatever n was."""
    return _exp_entropy(np.linalg.eigvalsh(cosine))


def effective_rank(features: Features) -> float:
    """Effective rank of the (n, d) feature matrix, in [1, min(n, d)] (Roy and Vetterli, EUSIPCO 2007).

    exp of the entropy of the normalised singular values; on embeddings this is RankMe (Garrido et al.,
    ICML 2023), which does not centre them either.
    """
    return effective_rank_of(_smaller_gram(features.astype(np.float64)))


def effective_rank_of(outer: Float) -> float:
    """Effective rank from the sum (d, d) of the images' f fᵀ."""
    return _exp_entropy(np.sqrt(np.linalg.eigvalsh(outer).clip(0)))


def spread(features: Features) -> float:
    """Root mean square distance of the length-1 features from their mean, in [0, 1]; 0: all the same.

    sqrt(d) times the per-feature standard deviation by which SimSiam watches for collapse (Chen and He,
    CVPR 2021, section 4.1), so that it does not depend on d.
    """
    unit = normalised(features.astype(np.float64))
    return float(np.sqrt(((unit - unit.mean(0)) ** 2).sum(1).mean()))


def collapsed(features: Features, least_spread: float = COLLAPSED_SPREAD) -> bool:
    """Whether (n, d) features have collapsed to a point or to a line.

    A point: `spread` below `least_spread`. A line: the centred features of length 1 have effective rank below 1.5.
    Centred, since features after a ReLU share a large mean, which says nothing about what tells images
    apart. Features that are not finite count as collapsed.
    """
    if not np.isfinite(features).all() or spread(features) < least_spread:
        return True
    unit = normalised(features.astype(np.float64))
    return effective_rank(unit - unit.mean(0)) < COLLAPSED_RANK


def _smaller_gram(x: Float) -> Float:
    return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x


def _exp_entropy(weights: Features) -> float:
    """exp of the Shannon entropy of non-negative weights, scaled to sum to 1; 1 if all are zero."""
    weights = weights[weights > 0]
    p = weights / weights.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
