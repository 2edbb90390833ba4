"""Leaks: test images that are among the images of a cell's subset, exactly or as near copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data import near
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.runtime import Runtime

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]

NUMERICS = 1  # raised when what counts as a copy changes
_CHUNK_ROWS = 1 << 20  # of a pool, searched at once and remembered
_MEMORY_BYTES = 1 << 29


@dataclass(frozen=True)
class Leaks:
    """Test images that leak, bool (n_test,), in the order of the test pool.

    `exact`: equal source pixels. `near`: exact or near copies, None where a pool was prepared without
    `near_duplicates`.
    """

    exact: Flags
    near: Flags | None

    @property
    def known(self) -> Flags:
        """All that are known to leak."""
        return self.exact if self.near is None else self.near


def find_leaks(test: Pool, parts: Sequence[tuple[Pool, Rows]], runtime: Runtime = Runtime()) -> Leaks:  # noqa: B008
    """Which images of `test` are among the rows of `parts`.

    The pool's part that rows lie in is searched once, whatever the rows; `store/statistics/` remembers what was found.
    """
    exact, alike = np.zeros(len(test), bool), np.zeros(len(test), bool)
    for pool, rows in parts:
        for first in _chunks(rows):
            copies = _copies(test, pool, first, runtime)
            exact[_within(copies["exact"], rows)] = True
            if "near" in copies:
                alike[_within(copies["near"], rows)] = True
    searched = all(each.info.near_duplicates for each in (test, *(pool for pool, _ in parts)))
    return Leaks(exact, alike | exact if searched else None)


def leaked(test: Pool, pool: Pool, rows: Rows) -> int:
    """How many test images have an exact copy (equal source pixels) among `rows` of `pool`."""
    return int(find_leaks(test, [(pool, rows)]).exact.sum())


def _chunks(rows: Rows) -> list[int]:
    """The first row of each chunk of the pool that `rows` touch."""
    spans = ((part.start - part.start % _CHUNK_ROWS, part.stop) for part in rows.chunks())
    return sorted({first for start, stop in spans for first in range(start, stop, _CHUNK_ROWS)})


def _within(copies: Numbers, rows: Rows) -> Numbers:
    """Test rows of (test row, pool row) pairs (2, m) whose pool row is one of `rows`."""
    return copies[0, rows.holds(copies[1])]


@lru_cache(maxsize=256)
def _copies(test: Pool, pool: Pool, first: int, runtime: Runtime) -> dict[str, Numbers]:
    """Pairs (test row, pool row), int64 (2, m), of `exact` and, where both pools can tell, `near` copies.

    Of the pool's chunk that begins with row `first`.
    """
    searched = test.info.near_duplicates and pool.info.near_duplicates
    key = files.digest(["leaks", NUMERICS, test.digest, pool.digest, first, searched])
    path = files.home() / "store" / "statistics" / key[:2] / f"{key}.npz"
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, BadZipFile):
        pass
    chunk = slice(first, first + _CHUNK_ROWS)
    found = {"exact": _equal(test.content, pool.content[chunk])}
    if searched:
        found["near"] = near.pairs(
            near.Described(test.signature, test.thumbnail),
            near.Described(pool.signature[chunk], pool.thumbnail[chunk]),
            memory_bytes=_MEMORY_BYTES,
            runtime=runtime,
        )
    for copies in found.values():
        copies[1] += first
    with files.replacing(path) as temporary, temporary.open("wb") as out:
        np.savez_compressed(out, allow_pickle=False, **found)
    return found


def _equal(few: NDArray[np.uint8], many: NDArray[np.uint8]) -> Numbers:
    """int64 (2, m): rows of content hashes (n, 16) that are equal."""
    heads = [np.ascontiguousarray(content[:, :8]).view(np.uint64)[:, 0] for content in (few, many)]
    order = np.argsort(heads[0], kind="stable")
    first, stop = (np.searchsorted(heads[0][order], heads[1], side) for side in ("left", "right"))
    hits = np.repeat(np.arange(len(many)), stop - first)
    start = np.cumsum(stop - first) - (stop - first)
    place = np.arange(len(hits)) - (start - first)[hits]
    pairs = np.stack([order[place], hits])
    return np.asarray(pairs[:, (few[pairs[0]] == many[pairs[1]]).all(1)])
