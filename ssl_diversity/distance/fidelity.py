"""How like real images made ones are, from features alone: kernel distance, precision, recall, neighbours. numpy only.

Memory is bounded: distances are taken in blocks, and the images that are searched come as a stream.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.distance.statistics import Float, Int

Features = NDArray[Any]  # (n, d), any type of number

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as its authors report it
NEIGHBOURS = 3  # k of the manifolds, their authors' choice
LEAST = 4  # images of a set for which all of this is defined
_BLOCK = 1 << 22  # distances at once: 32 MiB
_TIE = 1e-10  # of the mean squared length: squared distances nearer to each other than this are equal


class Kid(NamedTuple):
    """Mean and standard deviation of `mmd2` over `subsets` draws of `subset_size` images of either set."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def kid(a: Features, b: Features, *, seed: int = 0) -> Kid:
    """Kernel inception distance (Bińkowski et al., ICLR 2018, arXiv 1801.01401); n, m >= 4.

    Subsets have 1,000 images as in the paper, or half of the smaller set where that is fewer: subsets that
    hold everything would all be the same, and their deviation 0.
    """
    rng = np.random.default_rng(seed)
    size = min(SUBSET_SIZE, len(a) // 2, len(b) // 2)
    values = [mmd2(*(x[rng.choice(len(x), size, replace=False)] for x in (a, b))) for _ in range(SUBSETS)]
    return Kid(float(np.mean(values)), float(np.std(values)), SUBSETS, size)


def mmd2(a: Features, b: Features) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y / d + 1)³; n, m >= 2.

    Its expectation does not depend on n and m. For equal distributions that is 0, and estimates fall on both sides.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)

    def within(z: Float) -> float:
        k = _kernel(z, z)
        return float((k.sum() - np.trace(k)) / (len(z) * (len(z) - 1)))

    return within(x) + within(y) - 2 * float(_kernel(x, y).mean())


def precision_recall(made: Features, real: Features, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991); n, m > k.

    A set's manifold is the union of balls around its points, each as large as the distance to the k-th nearest
    other one. Precision: the share of `made` in the manifold of `real`; recall: of `real` in that of `made`.
    Both depend on n and m: compare values at equal ones only.
    """
    return _covered(made, real, k), _covered(real, made, k)


def _covered(points: Features, manifold: Features, k: int) -> float:
    """The share of `points` that lie in the manifold; those on its edge do."""
    y = manifold.astype(np.float64)
    reach = _radii(y, k) + _TIE * float((y**2).sum(1).mean())
    inside = [(squared <= reach).any(1) for _, squared in _distances(points, y)]
    return float(np.concatenate(inside).mean())


def _radii(points: Float, k: int) -> Float:
    """(n,): squared distance to the k-th nearest other point."""
    found = []
    for rows, squared in _distances(points, points):
        squared[np.arange(len(rows)), rows] = np.inf
        found.append(np.partition(squared, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def nearest(
    queries: Features, blocks: Iterable[tuple[int, Features]], k: int, *, own: Int | None = None
) -> tuple[Float, Int]:
    """Euclidean distances and rows, both (q, k), ascending, of the k rows of a stream that are nearest to `queries` (q, d).

    `blocks` yields the number of a block's first row, and the block (m, d). `own` (q,) is the row that is
    a query itself and does not count, -1 where none is. Distances are exact to rounding even where they are tiny.
    """
    best, rows = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1)
    for first, block in blocks:
        y = block.astype(np.float64)
        for part, squared in _distances(queries, y):
            if own is not None:
                mine = own[part] - first
                here = np.flatnonzero((mine >= 0) & (mine < len(y)))
                squared[here, mine[here]] = np.inf
            few = min(k, len(y))
            chosen = np.argpartition(squared, few - 1, axis=1)[:, :few]
            exact = np.sqrt(((queries[part, None] - y[chosen]) ** 2).sum(2))
            exact[np.isinf(np.take_along_axis(squared, chosen, 1))] = np.inf
            both = np.hstack([best[part], exact]), np.hstack([rows[part], chosen + first])
            order = np.argsort(both[0], axis=1, kind="stable")[:, :k]
            best[part], rows[part] = (np.take_along_axis(each, order, 1) for each in both)
    return best, rows


def closeness(distance: Float, neighbours_own: Float) -> Float:
    """(q,): a query's distance to its nearest real image, over that image's to its nearest other real one.

    Below 1 the query is nearer to a real image than any other real image is (Alaa et al., ICML 2022, arXiv 2102.08921, who
    count how often, as the complement of authenticity). 1 where both are 0: the real set has that image twice.
    """
    twice = (distance == 0) & (neighbours_own == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(twice, 1.0, distance / neighbours_own)


def _kernel(x: Float, y: Float) -> Float:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _distances(x: Features, y: Float) -> Iterator[tuple[Int, Float]]:
    """Numbers of some rows of x, and their squared distances from all of y."""
    lengths = (y**2).sum(1)
    step = max(1, _BLOCK // max(len(y), NEIGHBOURS * y.shape[1]))  # `nearest` holds that many differences
    for start in range(0, len(x), step):
        part = x[start : start + step].astype(np.float64)
        squared = part @ y.T
        squared *= -2
        squared += lengths
        squared += (part**2).sum(1)[:, None]
        yield np.arange(start, start + len(part)), np.maximum(squared, 0, out=squared)
