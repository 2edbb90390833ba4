"""Near copies among images that come one after another, judged so that later ones change nothing for earlier ones."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data import bands
from ssl_diversity.data.near import Described
from ssl_diversity.errors import Interrupted
from ssl_diversity.runtime import Runtime

_LEAF = 32  # rows among which every pair is compared
_INDEX_ROWS = 1 << 14  # at most, in memory at once (bands.INDEX_BYTES each)
_QUERY_ROWS = 1 << 12

Numbers = NDArray[np.int64]


def earlier_copies(images: Described, known: Numbers, runtime: Runtime) -> Numbers:
    """int64 (n,): the first earlier row that is found to be the same image, else -1.

    `known` is that of the first rows, from a call with fewer: it is what a call with all of them gives too. For that,
    rows are not banded all together (data/near.py: how closely it looks depends on how many there are), but looked
    up in indices of whole blocks of earlier rows: rows 2^k·i to 2^k·(i + 1) in that of the 2^k before, for odd i.
    """
    n = len(images)
    found = np.full(n, n, np.int64)
    found[: len(known)] = np.where(known < 0, n, known)
    for all_early, all_late in _pairs(images, len(known), runtime):
        better = all_early < found[all_late]
        early, late = all_early[better], all_late[better]
        copies = images.apart(early, images, late) <= 1
        np.minimum.at(found, late[copies], early[copies])
    return np.where(found == n, -1, found)


def _pairs(images: Described, start: int, runtime: Runtime) -> Iterator[tuple[Numbers, Numbers]]:
    """Candidates (earlier row, later row from `start` on)."""
    n = len(images)
    for low in range(start - start % _LEAF, n, _LEAF):
        early, late = np.triu_indices(min(_LEAF, n - low), 1)
        wanted = late + low >= start
        yield early[wanted] + low, late[wanted] + low
    size = _LEAF
    while size < n:
        step = min(size, _INDEX_ROWS)
        bits = bands.band_bits(float(size) ** 2)
        first = max(0, start // (2 * size) * 2 * size)
        for left in range(first, n - size, 2 * size):
            for block in range(left, left + size, step):
                if runtime.stop():
                    raise Interrupted("stopped while looking for near copies")
                few = images.take(slice(block, block + step))
                index = bands.Index(*few.codes(), few.hashes(), bits)
                for low in range(max(start, left + size), min(n, left + 2 * size), _QUERY_ROWS):
                    many = images.take(slice(low, min(n, left + 2 * size, low + _QUERY_ROWS)))
                    for place, row in index.candidates(*many.codes(), many.hashes()):
                        pair = np.unique(place * len(many) + row)
                        early, late = np.divmod(pair, len(many))
                        yield early + block, late + low
        size *= 2
