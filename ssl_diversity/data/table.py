"""Rows of one numpy dtype in a file, read and written in slices: what has N rows need not be in memory.

No memory maps: their pages count as memory of the process that looks at them.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Rows = NDArray[Any]


class Table:
    """A file of rows without a header."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path = path
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    def __len__(self) -> int:
        return self.path.stat().st_size // self.dtype.itemsize if self.path.exists() else 0

    def read(self, start: int, stop: int) -> Rows:
        return np.fromfile(self.path, self.dtype, stop - start, offset=start * self.dtype.itemsize)

    def take(self, numbers: Rows) -> Rows:
        """The rows of those numbers, each read by itself."""
        size = self.dtype.itemsize
        with self.path.open("rb") as file:
            found = [os.pread(file.fileno(), size, number * size) for number in numbers.tolist()]
        return np.frombuffer(b"".join(found), self.dtype)

    def append(self, rows: Rows) -> None:
        with self.path.open("ab") as file:
            file.write(as_bytes(rows, self.dtype))

    def put(self, numbers: Rows, rows: Rows) -> None:
        """Overwrite the rows of those numbers, each by itself."""
        size = self.dtype.itemsize
        data = as_bytes(rows, self.dtype)
        with self.path.open("r+b") as file:
            for i, number in enumerate(numbers.tolist()):
                os.pwrite(file.fileno(), data[i * size : (i + 1) * size], number * size)

    def slices(self, rows_at_once: int) -> Iterator[slice]:
        size = len(self)
        for start in range(0, size, rows_at_once):
            yield slice(start, min(start + rows_at_once, size))


def as_bytes(rows: Rows, dtype: DTypeLike) -> memoryview:
    """The rows as a file has them. (`ndarray.tofile` would hide what is wrong with a full disk.)"""
    return np.ascontiguousarray(rows, dtype).reshape(-1).view(np.uint8).data


def gathered(tables: Sequence[Table], rows_at_once: int) -> Iterator[tuple[NDArray[np.int64], Rows]]:
    """All rows of `tables`, each sorted by its field `key` (uniform hashes, big-endian), in ranges of the key.

    Yields about `rows_at_once` rows of the next range, unsorted, and the number of each one's table.
    """
    buckets = max(1, -(-sum(map(len, tables)) // rows_at_once))
    bounds = [(bucket << 64) // buckets for bucket in range(1, buckets)]
    cuts = np.zeros((len(tables), buckets + 1), np.int64)
    for table, cut in zip(tables, cuts, strict=True):
        cut[-1] = len(table)
        if bounds and cut[-1]:
            heads = np.memmap(table.path, table.dtype, "r")["key"][:, 0]
            cut[1:-1] = [bisect.bisect_left(heads, bound) for bound in bounds]
    for bucket in range(buckets):
        counts = cuts[:, bucket + 1] - cuts[:, bucket]
        chosen = np.flatnonzero(counts)
        if chosen.size:
            reads = ((tables[i], *cuts[i, bucket : bucket + 2].tolist()) for i in chosen.tolist())
            rows = np.concatenate([table.read(start, stop) for table, start, stop in reads])
            yield np.repeat(chosen, counts[chosen]), rows


def equal_to_previous(*columns: Rows) -> NDArray[np.bool_]:
    """(n,): whether a row has the values of the one before it in all of `columns`, each (n,)."""
    equal = np.ones(len(columns[0]), np.bool_)
    equal[:1] = False
    for column in columns:
        equal[1:] &= column[1:] == column[:-1]
    return equal


def native(key: Rows) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Big-endian (n, 2) as two columns that sort quickly."""
    return key[:, 0].astype(np.uint64), key[:, 1].astype(np.uint64)


def as_keys(hashes: NDArray[np.uint8]) -> Rows:
    """Hashes (n, 16) as big-endian (n, 2)."""
    return np.ascontiguousarray(hashes).view(">u8")


class Keys:
    """A sorted set of 128-bit keys, 16 bytes each in memory."""

    def __init__(self, key: Rows) -> None:
        """Big-endian (n, 2), in any order."""
        head, tail = native(key)
        order = np.lexsort((tail, head))
        self.head, self.tail = head[order], tail[order]

    @classmethod
    def of(cls, keys: list[bytes]) -> "Keys":
        return cls(np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2))

    def have(self, key: Rows) -> NDArray[np.bool_]:
        """bool (n,) for big-endian keys (n, 2)."""
        head, tail = native(key)
        found = np.zeros(len(head), np.bool_)
        place = np.searchsorted(self.head, head)
        waiting = np.flatnonzero(place < len(self.head))
        while waiting.size:  # heads are all but unique: one round
            waiting = waiting[self.head[np.minimum(place[waiting], len(self.head) - 1)] == head[waiting]]
            found[waiting] |= self.tail[place[waiting]] == tail[waiting]
            place[waiting] += 1
            waiting = waiting[~found[waiting] & (place[waiting] < len(self.head))]
        return found
