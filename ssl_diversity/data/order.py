"""The global order: which image stands at which position, as a function of (N, B, seed) alone."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_diversity import budget as budgets

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1

Indices = NDArray[np.int64]


class GlobalOrder:
    """order(t) for 0 <= t < total: index in [0, N) of the image at position t (DESIGN 4.2).

    Every epoch (N positions) is a fresh keyed permutation, evaluated per position: a Feistel network on
    ceil(log2 N) bits with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains",
    CT-RSA 2002). Each image is seen floor or ceil of total/N times and never twice in a batch: where a batch
    spans two epochs, those of the later epoch's first B images that stand in the earlier one's share of the
    batch move, in order, behind the others of the B.

    Raises UserError where N > C, or N is neither B nor at least 2B.
    """

    def __init__(self, unique_samples: int, batch_size: int, seed: int, budget: int) -> None:
        budgets.check_unique(unique_samples, budget, batch_size, pool_size=unique_samples, pool="")
        self.unique_samples = unique_samples
        self.batch_size = batch_size
        self.seed = seed
        self.total = budgets.used(budget, batch_size)
        self.steps = self.total // batch_size
        bits = max(2, (unique_samples - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << (bits // 2)) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        self._key = np.uint64(_mix_int(seed + _GOLDEN))

    def batch(self, step: int) -> Indices:
        """int64 (B,): the images of one batch."""
        return self.at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def at(self, positions: ArrayLike) -> Indices:
        """int64, shaped like `positions`: any of them, in any order, so that any rank or worker can ask."""
        t = np.asarray(positions, dtype=np.int64)
        if t.size and (t.min() < 0 or t.max() >= self.total):
            raise IndexError(f"position outside [0, {self.total})")
        epoch, place = np.divmod(t, self.unique_samples)
        out = self._permuted(epoch, place)
        at_seam = (place < self.batch_size) & (epoch * self.unique_samples % self.batch_size > 0)
        for e in np.unique(epoch[at_seam]).tolist():
            here = at_seam & (epoch == e)
            out[here] = self._head(e)[place[here]]
        return out

    def _head(self, epoch: int) -> Indices:
        """The first B images of an epoch that begins inside a batch."""
        n = self.unique_samples
        tail = epoch * n % self.batch_size
        head = self._permuted(np.full(self.batch_size, epoch), np.arange(self.batch_size))
        before = self._permuted(np.full(tail, epoch - 1), np.arange(n - tail, n))
        collides = np.isin(head, before)
        return np.concatenate([head[~collides], head[collides]])

    def _permuted(self, epoch: Indices, place: Indices) -> Indices:
        """Image at `place` of each epoch's permutation, before any seam is mended."""
        key = _mix(epoch.astype(np.uint64) * np.uint64(_GOLDEN) + self._key)
        out = self._feistel(place.astype(np.uint64), key)
        outside = np.flatnonzero(out >= self.unique_samples)
        flat, keys = out.reshape(-1), key.reshape(-1)
        while outside.size:
            flat[outside] = self._feistel(flat[outside], keys[outside])
            outside = outside[flat[outside] >= self.unique_samples]
        return flat.reshape(place.shape).astype(np.int64)

    def _feistel(self, x: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = x & self._low, x >> self._low_bits
        for number in range(0, _ROUNDS, 2):
            low = low ^ (_mix(high + (key + _round_key(number))) & self._low)
            high = high ^ (_mix(low + (key + _round_key(number + 1))) & self._high)
        return (high << self._low_bits) | low


def _round_key(number: int) -> np.uint64:
    return np.uint64(((number + 1) * _GOLDEN) & _MASK)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 finaliser."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value & _MASK], dtype=np.uint64))[0])
