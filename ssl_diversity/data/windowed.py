"""The windowed order: as exact as the global one, for pools that are read in sequence from afar (DESIGN 4.2)."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_diversity import budget as budgets
from ssl_diversity import files
from ssl_diversity.data.order import Domain, Indices, Need, checked, numbered, permuted, seed_key, slots
from ssl_diversity.data.subset import Piece
from ssl_diversity.errors import UserError

_EPOCHS_KEPT = 3  # tables of the epochs in use
_PIECES, _WINDOWS = 1, 2  # streams of an epoch's key


class WindowedOrder:
    """Lanes: each of L lanes gives b = B/L neighbouring slots of every batch, from its own stretch of the subset.

    `pieces` are a subset's (`Subset.pieces`): its N images cut at shard boundaries. In every epoch lane l owns
    consecutive images and reads them once: its pieces in a keyed random order, `shards` pieces at a time as a
    *window*, the images of a window in a keyed random order. A rank owns whole lanes.

    Through epoch e, lane l has supplied floor(((e+1) N + c_l) / L) images, c a permutation of 0 to L-1: by
    Hermite's identity the lanes together have then supplied (e+1) N. So every epoch is dealt out exactly, no
    lane is ever ahead of another by more than one image, and each image is seen floor or ceil of total/N
    times. c is the bit reversal, which keeps the lanes' cuts where they are, up to `drift` images (at most 4
    for 256 lanes; 0 where L divides N). So a rank reads the same images in every epoch but for `drift`
    at its two cuts; a shard on a cut is read by two ranks, each its own byte range. Within a batch the
    shares of the lanes are fixed: of a mixture, every batch has the same proportions, up to one lane's.

    None twice in a batch: one batch per epoch spans two epochs, at the same place in all lanes. Of the first
    b + drift images of a lane's later epoch, those that stand in the earlier one's share of that batch move, in
    order, behind the others. That wants N = B, or N >= 2B + L drift.

    Nothing of size N is stored; an epoch in use has tables of the size of `pieces`. Raises UserError where L does
    not divide B, N > C, or N does not allow the above.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        batch_size: int,
        seed: int,
        budget: int,
        *,
        shards: int,
        lanes: int = 64,
    ) -> None:
        n = pieces[-1].first_index + pieces[-1].count
        check_lanes(n, batch_size, lanes)
        budgets.check_unique(n, budget, batch_size, pool_size=n, pool="")
        self.unique_samples = n
        self.batch_size = batch_size
        self.seed = seed
        self.total = budgets.used(budget, batch_size)
        self.steps = self.total // batch_size
        self.shards = shards
        self.lanes = lanes
        self.drift = drift(n, lanes)
        self._pieces = pieces
        self._cuts = np.array([piece.first_index for piece in pieces])
        self._share = batch_size // lanes
        self._carry = _bit_reversal(lanes)
        self._key = seed_key(seed)
        self._tables: dict[int, _Epoch] = {}

    @property
    def units(self) -> int:
        return self.lanes

    def batch(self, step: int) -> Indices:
        """int64 (B,): the images of one batch."""
        return self.at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def at(self, positions: ArrayLike) -> Indices:
        """int64, shaped like `positions`: any of them, in any order, so that any rank or worker can ask."""
        asked = checked(positions, self.total)
        t = asked.ravel()
        step = t // self.batch_size
        slot = t - step * self.batch_size
        lane = slot // self._share
        given = step * self._share + slot - lane * self._share  # by the lane, before this position
        epoch = ((given + 1) * self.lanes - self._carry[lane] - 1) // self.unique_samples
        out = np.empty_like(t)
        for e, here in _by_number(epoch):
            lanes = lane[here]
            out[here] = self._at(e, lanes, given[here] - self._supplied(e)[lanes])
        return out.reshape(asked.shape)

    def upcoming(self, step: int = 0, rank: int = 0, world: int = 1) -> Iterator[Need]:
        """The pieces of the rank's windows from `step` on, cut to its lanes, in the order of first need.

        A piece comes again in every epoch. Those of one lane's window come one after the other, and are fetched
        ahead once the lane has begun with the window before: it needs no more than two at a time.
        """
        mine = slots(self, rank, world)
        lanes = np.arange(mine.start // self._share, mine.stop // self._share)
        begin, end = step * self._share, self.steps * self._share  # of what each lane gives
        first, last = begin * self.lanes // self.unique_samples, (self.total - 1) // self.unique_samples
        begun = np.zeros(self.lanes, np.int64)  # where each lane's window before opens
        for e in range(first, last + 1):
            table, before = self._epoch(e), self._supplied(e)
            window = np.flatnonzero(np.isin(table.lane_of_window, lanes))
            lane = table.lane_of_window[window]
            opens = table.windows.begins[window] - table.starts[lane]
            closes = table.windows.begins[window + 1] - table.starts[lane]
            earlier = np.roll(opens + before[lane], 1)
            is_first = np.diff(lane, prepend=-1) != 0
            earlier[is_first] = begun[lane[is_first]]
            begun[lane] = opens + before[lane]  # the last of each stays
            if self._tail(e):  # the head's images change places, across windows where it holds several
                head = opens < self._head_size
                opens[head], closes[head] = 0, np.maximum(closes[head], self._head_size)
            opens, closes = opens + before[lane], closes + before[lane]
            soonest = np.minimum(-(-earlier // self._share), opens // self._share)
            until = (closes - 1) // self._share
            for i in np.lexsort((window, opens)).tolist():
                if opens[i] < end and closes[i] > begin:
                    for piece in self._window(table, int(window[i])):
                        yield Need(piece, int(soonest[i]), int(until[i]))

    def _window(self, table: "_Epoch", number: int) -> Iterator[Piece]:
        begins = table.pieces.begins
        start, stop = np.searchsorted(begins, table.windows.begins[number : number + 2]).tolist()
        for i in range(start, stop):
            first, count = int(table.first[i]), int(begins[i + 1] - begins[i])
            whole = self._pieces[int(np.searchsorted(self._cuts, first, side="right")) - 1]
            yield whole._replace(
                first_row=whole.first_row + first - whole.first_index, first_index=first, count=count
            )

    def _supplied(self, epoch: int) -> Indices:
        """int64 (L,): images that each lane has given before `epoch`."""
        return (epoch * self.unique_samples + self._carry) // self.lanes

    @property
    def _head_size(self) -> int:
        return self._share + self.drift

    def _tail(self, epoch: int) -> int:
        """Images of the epoch before that stand in the first batch of `epoch`."""
        return epoch * self.unique_samples % self.batch_size

    def _at(self, epoch: int, lane: Indices, place: Indices) -> Indices:
        """The images at `place` of the lanes' own parts of an epoch."""
        out = self._epoch(epoch).images(lane, place)
        if self._tail(epoch):
            head = place < self._head_size
            if head.any():
                out[head] = self._head(epoch)[lane[head], place[head]]
        return out

    def _head(self, epoch: int) -> Indices:
        """int64 (L, b + drift): the first images of every lane in an epoch that begins inside a batch."""
        table = self._epoch(epoch)
        if table.head is None:
            lane, place = np.indices((self.lanes, self._head_size)).reshape(2, -1)
            head = table.images(lane, place).reshape(self.lanes, self._head_size)
            before, begin = self._epoch(epoch - 1), self._supplied(epoch - 1)
            batch = (
                epoch * self.unique_samples // self.batch_size * self._share
            )  # where it begins in each lane
            given = np.broadcast_to(np.arange(batch, batch + self._share), (self.lanes, self._share))
            lane, place = np.nonzero(given < self._supplied(epoch)[:, None])
            tail = before.images(lane, batch + place - begin[lane])
            moved = np.argsort(np.isin(head, tail), axis=1, kind="stable")
            table.head = np.take_along_axis(head, moved, axis=1)
        return table.head

    def _epoch(self, number: int) -> "_Epoch":
        table = self._tables.get(number)
        if table is None:
            table = self._tables[number] = self._make_epoch(number)
            for old in list(self._tables)[:-_EPOCHS_KEPT]:
                self._tables.pop(old, None)  # another thread may have been here
        return table

    def _make_epoch(self, number: int) -> "_Epoch":
        lengths = self._supplied(number + 1) - self._supplied(number)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        first = np.union1d(self._cuts, starts[:-1])
        counts = np.diff(first, append=self.unique_samples)
        lane = np.searchsorted(starts, first, side="right") - 1
        key = numbered(self._key, [number])
        order = np.lexsort((numbered(numbered(key, [_PIECES]), np.arange(len(first))), lane))
        first, counts = first[order], counts[order]
        begins = np.concatenate([[0], np.cumsum(counts)])
        nth = np.arange(len(first)) - np.searchsorted(lane, lane)  # `lane` is sorted, before and after
        opens = np.flatnonzero(nth % self.shards == 0)
        windows = np.append(begins[opens], self.unique_samples)
        keys = numbered(numbered(key, [_WINDOWS]), np.arange(len(opens)))
        return _Epoch(
            starts, _Runs(begins), first, _Runs(windows), lane[opens], Domain.of(np.diff(windows)), keys
        )


class _Runs:
    """Run i is [begins[i], begins[i + 1]), the first begins at 0. `find` is several times np.searchsorted's speed."""

    def __init__(self, begins: Indices) -> None:
        self.begins = begins
        self._shift = max(0, int(begins[-1] // (4 * len(begins))).bit_length() - 1)
        every = np.arange(0, begins[-1], 1 << self._shift)
        self._guess = np.searchsorted(begins, every, side="right") - 1

    def find(self, places: Indices) -> Indices:
        """The run of each place."""
        run = self._guess[places >> self._shift]
        later = np.flatnonzero(places >= self.begins[run + 1])
        while later.size:
            run[later] += 1
            later = later[places[later] >= self.begins[run[later] + 1]]
        return run


@dataclass
class _Epoch:
    """One epoch: its lanes, windows and pieces, each one after the other in the order in which they are read."""

    starts: Indices  # (L + 1,) where the lanes begin; also the subset index of their first image
    pieces: _Runs
    first: Indices  # (pieces,) subset index of a piece's first image
    windows: _Runs
    lane_of_window: Indices
    domain: Domain  # of each window
    keys: NDArray[np.uint64]
    head: Indices | None = None

    def images(self, lane: Indices, place: Indices) -> Indices:
        """int64 (n,): the images at `place` (n,) of each `lane` (n,), before any seam is mended."""
        at = self.starts[lane] + place
        window = self.windows.find(at)
        begin = self.windows.begins[window]
        at = begin + permuted(at - begin, self.domain.of_each(window), self.keys[window])
        piece = self.pieces.find(at)
        return self.first[piece] + at - self.pieces.begins[piece]


def _by_number(numbers: Indices) -> Iterator[tuple[int, slice | Indices]]:
    """(number, where it stands) for each that occurs in `numbers`, which are close to each other."""
    if not numbers.size:
        return
    low = int(numbers.min())
    occur = np.flatnonzero(np.bincount(numbers - low))
    if len(occur) == 1:  # most often
        yield low, slice(None)
    else:
        yield from ((low + number, np.flatnonzero(numbers == low + number)) for number in occur.tolist())


def layout_digest(pieces: Sequence[Piece]) -> str:
    """What a windowed order depends on beside (N, B, seed): where the shards end."""
    return files.digest([piece.count for piece in pieces])


def drift(unique_samples: int, lanes: int) -> int:
    """How many images a lane has at most in one epoch that were another lane's in the epoch before."""
    supplied = (np.arange(lanes + 2)[:, None] * unique_samples + _bit_reversal(lanes)) // lanes
    ends = np.cumsum(np.diff(supplied, axis=0), axis=1)  # (epochs, lanes); then it repeats
    moved = np.diff(ends, axis=0, prepend=ends[:1])
    gained_left = np.maximum(0, -moved[:, :-1])
    gained_right = np.maximum(0, moved)
    gained_right[:, 1:] += gained_left
    return int(gained_right.max())


def check_lanes(unique_samples: int, batch_size: int, lanes: int) -> None:
    """Refuse, naming the nearest that work, lanes that cannot share a batch and an N too small for them."""
    if batch_size % lanes:
        fits = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        near = [max(n for n in fits if n < lanes), *[n for n in fits if n > lanes][:1]]
        raise UserError(
            f"order.windowed.lanes={lanes} does not divide batch_size={batch_size};"
            f" the nearest that do are {' and '.join(map(str, near))}"
        )
    if unique_samples < 2 * batch_size:
        return  # N = B, or refused by the budget

    def works(n: int) -> bool:
        return n == batch_size or n >= 2 * batch_size + lanes * drift(n, lanes)

    if not works(unique_samples):
        away = (n for d in itertools.count(1) for n in (unique_samples - d, unique_samples + d))
        nearest = next(n for n in away if n >= 2 * batch_size and works(n))
        raise UserError(
            f"unique_samples={unique_samples} does not work with {lanes} lanes and batch_size={batch_size}"
            f" (an image could stand twice in a batch); the nearest that works is {nearest}"
        )


def _bit_reversal(lanes: int) -> Indices:
    """int64 (L,): a permutation of 0 to L-1 whose every prefix is spread evenly (van der Corput)."""
    bits = max(1, (lanes - 1).bit_length())
    reversed_bits = [int(format(lane, f"0{bits}b")[::-1], 2) for lane in range(lanes)]
    return np.argsort(np.argsort(reversed_bits))
