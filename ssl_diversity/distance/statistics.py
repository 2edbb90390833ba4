"""Mergeable sufficient statistics of embedded images, kept apart from the measures computed from them.

Everything is a sum over images, so the statistics of a union are the sum of the parts': one pass over a
pool, cut anywhere, serves every prefix, and shards may be embedded on different machines.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Self

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Statistics:
    """Sums over n images of their features f (d,) and of their neurons' histograms."""

    n: Int  # (), how many images
    sum: Float  # (d,), of f
    outer: Float  # (d, d), of f fᵀ
    cosine: Float  # (d, d), of f fᵀ / |f|²
    counts: Int  # (neurons, bins), activations per bin over all positions

    @classmethod
    def of(cls, features: NDArray[np.floating], counts: Int) -> Self:
        """Statistics of a batch: `features` (n, d), any float type; `counts` (neurons, bins)."""
        f = features.astype(np.float64)
        unit = normalised(f)
        return cls(np.array(len(f)), f.sum(0), f.T @ f, unit.T @ unit, counts)

    def __add__(self, other: Self) -> Self:
        """Statistics of both sets of images together."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return type(self)(*(a + b for a, b in pairs))

    def arrays(self) -> dict[str, NDArray]:
        """As named arrays, for `np.savez`; `Statistics(**arrays)` reads them back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def mean(self) -> Float:
        return self.sum / self.n

    def covariance(self) -> Float:
        """(d, d), unbiased; needs n >= 2."""
        mean = self.mean()
        return (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of disjoint sets of images together; at least one."""
    return reduce(lambda a, b: a + b, parts)


def normalised(features: Float) -> Float:
    """Rows scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)
