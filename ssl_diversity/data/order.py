"""Which image stands at which position: the global order, a function of (N, B, seed) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from ssl_diversity import budget as budgets
from ssl_diversity.config import Config
from ssl_diversity.data.subset import Piece
from ssl_diversity.errors import UserError

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]


class Windowed(Config):
    """What one says of a windowed order: `shards` make a window, `lanes` share a batch (data/windowed.py)."""

    shards: int = Field(4, ge=1)
    lanes: int = Field(64, ge=1)


class Order(Protocol):
    """Which images of a subset form which batch: a function of the position, nothing is consumed."""

    unique_samples: int  # N
    batch_size: int  # B, global
    total: int  # C_used: positions 0 to total - 1
    steps: int

    @property
    def units(self) -> int:
        """Equal runs of slots that a batch falls into; a rank owns whole ones."""
        ...

    def batch(self, step: int) -> Indices: ...

    def at(self, positions: ArrayLike) -> Indices: ...


def slots(order: Order, rank: int, world: int) -> slice:
    """What rank `rank` of `world` owns of every batch; UserError where the ranks cannot share it evenly."""
    if order.units % world:
        allowed = [str(n) for n in range(1, order.units + 1) if order.units % n == 0]
        raise UserError(
            f"{world} ranks cannot share batches of {order.units} equal parts (images of the global order,"
            f" lanes of the windowed one); the number of ranks must be one of {', '.join(allowed)}"
        )
    share = order.batch_size // world
    return slice(rank * share, (rank + 1) * share)


class Need(NamedTuple):
    """A piece that is fetched ahead from step `soonest` on, when what it takes the place of has been read through.

    It is read up to step `until`; None: at any time, so that it takes no other's place.
    """

    piece: Piece
    soonest: int
    until: int | None


def upcoming(
    order: Order, pieces: Sequence[Piece], step: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Need]:
    """The pieces of a subset that a rank needs from `step` on, in the order of first need, epoch after epoch.

    A windowed order knows (`WindowedOrder.upcoming`); a global one needs all of them at any time.
    """
    ahead = getattr(order, "upcoming", None)
    return ahead(step, rank, world) if ahead else (Need(piece, 0, None) for piece in pieces)


class GlobalOrder:
    """order(t) for 0 <= t < total: index in [0, N) of the image at position t (DESIGN 4.2).

    Every epoch (N positions) is a fresh keyed permutation, evaluated per position (`permuted`). Each image is
    seen floor or ceil of total/N times and never twice in a batch: where a batch spans two epochs, those of
    the later epoch's first B images that stand in the earlier one's share of the batch move, in order, behind
    the others of the B.

    Raises UserError where N > C, or N is neither B nor at least 2B.
    """

    def __init__(self, unique_samples: int, batch_size: int, seed: int, budget: int) -> None:
        budgets.check_unique(unique_samples, budget, batch_size, pool_size=unique_samples, pool="")
        self.unique_samples = unique_samples
        self.batch_size = batch_size
        self.seed = seed
        self.total = budgets.used(budget, batch_size)
        self.steps = self.total // batch_size
        self._domain = Domain.of(unique_samples)
        self._key = seed_key(seed)

    @property
    def units(self) -> int:
        return self.batch_size

    def batch(self, step: int) -> Indices:
        """int64 (B,): the images of one batch."""
        return self.at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def at(self, positions: ArrayLike) -> Indices:
        """int64, shaped like `positions`: any of them, in any order, so that any rank or worker can ask."""
        t = checked(positions, self.total)
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
        return permuted(place, self._domain, numbered(self._key, epoch))


def checked(positions: ArrayLike, total: int) -> Indices:
    """`positions` as int64; IndexError where one is not in [0, total)."""
    t = np.asarray(positions, dtype=np.int64)
    if t.size and (t.min() < 0 or t.max() >= total):
        raise IndexError(f"position outside [0, {total})")
    return t


@dataclass(frozen=True)
class Domain:
    """[0, size) as `permuted` wants it: one size for all places (scalars), or one for each (arrays)."""

    size: Words
    low_bits: Words
    high: Words  # ceil(size / 2^low_bits)

    @classmethod
    def of(cls, size: int | Indices) -> "Domain":
        """Sizes from 1 to 2^53."""
        bits = np.frexp(np.asarray(size, np.float64) - 0.5)[1]  # of size - 1
        low_bits = np.maximum(bits // 2, 1).astype(np.uint64)
        sizes = np.asarray(size, np.uint64)
        return cls(sizes, low_bits, ((sizes - np.uint64(1)) >> low_bits) + np.uint64(1))

    def of_each(self, where: Indices) -> "Domain":
        """Of many sizes, those numbered `where`."""
        return Domain(self.size[where], self.low_bits[where], self.high[where])


def permuted(place: Indices, domain: Domain, key: Words) -> Indices:
    """int64, shaped like `place` (1-d where it has many sizes): a keyed bijection of [0, size), for each alone.

    A generalised Feistel network on a 2^low_bits x high rectangle, whose few cells outside are walked over
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    out = _feistel(place.astype(np.uint64), domain, key)
    outside = np.flatnonzero(out >= domain.size)
    flat, keys = out.reshape(-1), key.reshape(-1)
    while outside.size:
        here = domain.of_each(outside) if domain.size.ndim else domain
        moved = _feistel(flat[outside], here, keys[outside])
        flat[outside] = moved
        outside = outside[moved >= here.size]
    return flat.reshape(place.shape).astype(np.int64)


def _feistel(x: Words, domain: Domain, key: Words) -> Words:
    mask, half = (np.uint64(1) << domain.low_bits) - np.uint64(1), np.uint64(32)
    low, high = x & mask, x >> domain.low_bits
    for number in range(0, _ROUNDS, 2):
        low = low ^ (mix(high + (key + _round_key(number))) & mask)
        high = high + ((mix(low + (key + _round_key(number + 1))) >> half) * domain.high >> half)
        high = np.minimum(high, high - domain.high)  # modulo domain.high: below 0 is a huge number here
    return (high << domain.low_bits) | low


def _round_key(number: int) -> np.uint64:
    return np.uint64(((number + 1) * _GOLDEN) & _MASK)


def mix(x: Words) -> Words:
    """SplitMix64 finaliser."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def seed_key(seed: int) -> np.uint64:
    """A 64-bit key of a seed."""
    return np.uint64(mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))[0])


def numbered(key: Words | np.uint64, numbers: ArrayLike) -> Words:
    """A key of its own for each of int64 `numbers` (n,)."""
    return mix(np.asarray(numbers, np.int64).astype(np.uint64) * np.uint64(_GOLDEN) + key)
