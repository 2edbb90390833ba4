"""Sorted runs of decoded images: the external sort that shuffles and deduplicates a pool.

A run is two files: rows (`row_dtype`) in ascending (key, label, name), and in the same order each row's name
and encoded image. Keys are hashes, so that ranges of keys (`table.gathered`) are the merge: one pass, whatever
the number of runs.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data.table import Rows, Table, as_bytes, equal_to_previous, gathered, native
from ssl_diversity.errors import UserError

# key, content hash, hash after resizing, label, run, bytes of name and image, offset, decoded
_FIELDS = [
    ("key", ">u8", (2,)),  # of the pool's order
    ("content", "u1", (16,)),
    ("resized", ">u8", (2,)),
    ("label", "<i4"),
    ("name_bytes", "<u4"),
    ("image_bytes", "<u4"),  # of the encoded image, or of the reason why it did not decode
    ("decoded", "?"),
    ("offset", "<i8"),  # of the name in the run's data; the image follows it
    ("run", "<i4"),  # number of the run, once it has one
]
_PACKED = "<16s16s16siII?qi"
_SORT_BYTES = 160  # per row, while a run is sorted and written, beside two copies of the row


def row_dtype(near_bytes: Sequence[int] = ()) -> np.dtype[Any]:
    """`near_bytes`: of signature and thumbnail, where rows carry them."""
    near = [(name, "u1", (size,)) for name, size in zip(("signature", "thumbnail"), near_bytes, strict=False)]
    return np.dtype(_FIELDS + near)


class RunWriter:
    """Collects rows and writes them as run after run, each when its memory is used."""

    def __init__(self, folder: Path, name: str, near_bytes: Sequence[int], memory_bytes: int) -> None:
        self.folder = folder
        self.name = name
        self.dtype = row_dtype(near_bytes)
        self.memory_bytes = memory_bytes
        self.runs: list[str] = []
        self._pack = struct.Struct(_PACKED + "".join(f"{size}s" for size in near_bytes)).pack
        self._no_near = [bytes(size) for size in near_bytes]
        self._row_bytes = 3 * self.dtype.itemsize + _SORT_BYTES
        self._start()

    def _start(self) -> None:
        self._count = 0
        self._rows = bytearray()
        self._data = bytearray()

    def add(
        self,
        key: bytes,
        label: int,
        name: bytes,
        image: bytes,
        *,
        decoded: bool = True,
        content: bytes = bytes(16),
        resized: bytes = bytes(16),
        near: Sequence[bytes] = (),
    ) -> None:
        """`near`: signature and thumbnail, where rows carry them and the image was decoded."""
        used = len(self._data) + self._count * self._row_bytes
        if self._count and used + len(name) + len(image) + self._row_bytes > self.memory_bytes:
            self.flush()
        self._rows += self._pack(
            key,
            content,
            resized,
            label,
            len(name),
            len(image),
            decoded,
            len(self._data),
            0,
            *(near or self._no_near),
        )
        self._data += name
        self._data += image
        self._count += 1

    def flush(self) -> None:
        if not self._count:
            return
        rows = np.frombuffer(self._rows, self.dtype)
        data = memoryview(self._data)
        starts, middles, ends = _places(rows)

        def names(numbers: Rows) -> list[bytes]:
            return [bytes(data[starts[i] : middles[i]]) for i in numbers.tolist()]

        order = sorting(rows, names)
        path = self.folder / f"{self.name}-{len(self.runs)}"
        with files.replacing(path.with_suffix(".data")) as temporary, temporary.open("wb", 1 << 20) as file:
            for start, end in zip(starts[order].tolist(), ends[order].tolist(), strict=True):
                file.write(data[start:end])
        ordered = rows[order]
        lengths = (ends - starts)[order]
        ordered["offset"] = np.cumsum(lengths) - lengths
        with files.replacing(path.with_suffix(".rows")) as temporary:
            temporary.write_bytes(as_bytes(ordered, self.dtype))
        self.runs.append(path.name)
        self._start()


def _places(rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where each row's name begins and ends in the data of its run, and where its image ends."""
    start = rows["offset"].astype(np.int64)
    middle = start + rows["name_bytes"]
    return start, middle, middle + rows["image_bytes"]


def sorting(rows: Rows, names: Callable[[Rows], list[bytes]]) -> NDArray[np.int64]:
    """The order of ascending (key, label, name); `names(numbers)` is asked only where key and label are equal."""
    head, tail = native(rows["key"])
    label = rows["label"]
    order = np.lexsort((label, tail, head))
    equal = equal_to_previous(head[order], tail[order], label[order])
    edges = np.flatnonzero(np.diff(np.concatenate([equal, [False]]).astype(np.int8), prepend=0))
    for first, stop in edges.reshape(-1, 2).tolist():  # rows first - 1 to stop - 1 are equal
        group = order[first - 1 : stop]
        texts = names(group)
        order[first - 1 : stop] = group[sorted(range(len(group)), key=texts.__getitem__)]
    return order


class Runs:
    """The runs of all parts, numbered."""

    def __init__(self, folder: Path, names: Sequence[str], near_bytes: Sequence[int] = ()) -> None:
        self.folder = folder
        self.run_names = names
        self.dtype = row_dtype(near_bytes)

    def merged(self, memory_bytes: int) -> Iterator[Rows]:
        """All rows in ascending (key, label, name), in slices that do not cut equal keys."""
        tables = [Table(self.folder / f"{name}.rows", self.dtype) for name in self.run_names]
        for numbers, rows in gathered(
            tables, max(1, memory_bytes // (4 * self.dtype.itemsize + _SORT_BYTES))
        ):
            rows["run"] = numbers
            yield rows[sorting(rows, partial(self._names_of, rows))]

    def _names_of(self, rows: Rows, chosen: Rows) -> list[bytes]:
        return self.names(rows[chosen])

    def names(self, rows: Rows) -> list[bytes]:
        """The name of each row."""
        starts, middles, _ = _places(rows)
        return self._each(rows, starts, middles)

    def images(self, rows: Rows) -> list[bytes]:
        """The encoded image of each row, or the reason why it did not decode; each read by itself."""
        _, middles, ends = _places(rows)
        return self._each(rows, middles, ends)

    def _each(self, rows: Rows, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[bytes]:
        found = [b""] * len(rows)
        for descriptor, numbers in self._by_run(rows):
            for i in numbers.tolist():
                found[i] = _read(descriptor, int(stops[i] - starts[i]), int(starts[i]))
        return found

    def stretch(self, rows: Rows) -> list[memoryview]:
        """The encoded images of consecutive merged rows, read a stretch of each run at a time."""
        images = [memoryview(b"")] * len(rows)
        starts, middles, ends = _places(rows)
        for descriptor, numbers in self._by_run(rows):
            first, last = int(starts[numbers].min()), int(ends[numbers].max())
            stretch = memoryview(_read(descriptor, last - first, first))
            places = (middles[numbers] - first).tolist(), (ends[numbers] - first).tolist()
            for i, middle, end in zip(numbers.tolist(), *places, strict=True):
                images[i] = stretch[middle:end]
        return images

    def _by_run(self, rows: Rows) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """For each run that `rows` are of: its open data, and which of them."""
        order = np.argsort(rows["run"], kind="stable")
        runs, firsts = np.unique(rows["run"][order], return_index=True)
        groups = np.split(order, firsts[1:])  # no rows: one empty group
        for run, numbers in zip(runs.tolist(), groups, strict=False):
            with (self.folder / f"{self.run_names[run]}.data").open("rb") as file:
                yield file.fileno(), numbers


def _read(descriptor: int, length: int, offset: int) -> bytes:
    """One pread gives at most 2 GiB."""
    pieces = []
    while length > 0 and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        length, offset = length - len(piece), offset + len(piece)
    if length > 0:
        raise UserError(
            "an intermediate file of this pool is damaged; remove its .work folder and prepare again"
        )
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
