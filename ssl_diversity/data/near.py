"""Near copies: the same image re-encoded, resized, slightly cropped or a little brighter.

Hashes find candidates by banding (bands.py), a comparison of thumbnails confirms them (likeness.py).
"""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data import bands
from ssl_diversity.data.likeness import (
    SIGNATURE_BYTES,
    THUMBNAIL_BYTES,
    Bytes,
    Flags,
    Floats,
    Numbers,
    describe,
    distance,
    faint,
)
from ssl_diversity.data.table import as_bytes
from ssl_diversity.errors import Interrupted
from ssl_diversity.runtime import Runtime

__all__ = ["SIGNATURE_BYTES", "THUMBNAIL_BYTES", "Described", "describe", "matched", "near_copies", "pairs"]

MAX_BITS = 128  # of a hash, in which copies may differ at all: unrelated ones do so in 128 on average
_BLOCK = 4096  # pairs compared at once
_ROWS = 1 << 14  # rows read at once
_PAIRS = 1 << 15  # candidates gathered before they are looked at
_NONE = np.uint64((1 << 64) - 1)  # the row number that says none; -1 as int64
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Described:
    """What `describe` says of n images: uint8 (n, SIGNATURE_BYTES) and (n, THUMBNAIL_BYTES), in memory or mapped."""

    signatures: Bytes
    thumbnails: Bytes

    def __len__(self) -> int:
        return len(self.signatures)

    def take(self, rows: Any) -> "Described":
        return Described(np.asarray(self.signatures[rows]), np.asarray(self.thumbnails[rows]))

    def parts(self, rows: int) -> Iterator[tuple[int, "Described"]]:
        """The first row of each part of at most `rows`, and the part."""
        for low in range(0, len(self), rows):
            yield low, self.take(slice(low, low + rows))
            self.release()

    def release(self) -> None:
        """Let go of the pages of mapped files, which the system would keep and count as ours."""
        for array in (self.signatures, self.thumbnails):
            base: Any = array
            while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                base = base.base
            if isinstance(base, np.memmap) and base.mode == "r":
                base._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def apart(self, rows: Numbers, other: "Described", other_rows: Numbers) -> Floats:
        """Distances of pairs of rows; inf where the hashes alone tell."""
        out = np.full(len(rows), np.inf, np.float32)
        for low in range(0, len(rows), _BLOCK):
            block = slice(low, low + _BLOCK)
            a, b = rows[block], other_rows[block]
            bits = np.bitwise_count(self.signatures[a] ^ other.signatures[b]).sum(1, dtype=np.int64)
            close = np.flatnonzero(bits <= MAX_BITS)
            x, y = self.take(a[close]), other.take(b[close])
            out[low + close] = distance(x.signatures, x.thumbnails, y.signatures, y.thumbnails)
            self.release()
            other.release()
        return out

    def codes(self) -> tuple[Numbers, bands.Codes]:
        """Rows that are not faint, and their codes."""
        rows = np.flatnonzero(~faint(self.thumbnails))
        return rows, bands.codes(self.signatures[rows], self.thumbnails[rows])

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of everything, to find equal rows by."""
        both = np.concatenate([self.signatures, self.thumbnails], axis=1)
        words = np.pad(both, ((0, 0), (0, -both.shape[1] % 8))).view(np.uint64)
        factors = (2 * np.arange(words.shape[1], dtype=np.uint64) + np.uint64(1)) * _ODD
        words = words * factors
        return np.asarray(((words ^ (words >> np.uint64(32))) * _ODD * factors).sum(1))


def near_copies(
    signatures: Bytes,
    thumbnails: Bytes,
    *,
    scratch: Path,
    memory_bytes: int,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Numbers:
    """int64 (n,): the first earlier row that is found to be the same image, else -1.

    Arrays are uint8 (n, SIGNATURE_BYTES) and (n, THUMBNAIL_BYTES), n below 2^31. `scratch` is a folder of this
    call's own, for about 220 bytes per row; after a kill or `Interrupted` the same call goes on from there. The
    result depends on the arrays alone.
    """
    images = Described(signatures, thumbnails)
    n = len(images)
    if n == 0:
        return np.zeros(0, np.int64)
    scratch.mkdir(parents=True, exist_ok=True)
    match, state, equal = scratch / "match", scratch / "bands-done", scratch / "equal"
    file = bands.CodeFile(scratch / "codes")
    if not (state.exists() and equal.exists()):
        match.write_bytes(as_bytes(np.full(n, _NONE), np.uint64))
        rows, firsts = _equal_rows(images, scratch, memory_bytes, runtime)
        equal.write_bytes(as_bytes(np.stack([rows, firsts]), np.int64))
        distinct = np.ones(n, bool)
        distinct[rows] = False
        file.write(_codes(images, distinct, runtime))
        files.write_atomic(state, "0")
    earliest = np.memmap(match, np.uint64, "r+")
    rows, firsts = np.fromfile(equal, np.int64).reshape(2, -1)
    for band in range(int(state.read_text()), bands.BANDS):
        for a, b in _batches(bands.candidates(file, band, scratch, memory_bytes)):
            _heed(runtime)
            pair = np.unique(np.minimum(a, b) * n + np.maximum(a, b))
            early, late = np.divmod(pair[(pair // n).astype(np.uint64) < earliest[pair % n]], n)
            copies = images.apart(early, images, late) <= 1
            np.minimum.at(earliest, late[copies], early[copies].astype(np.uint64))
        earliest.flush()
        files.write_atomic(state, str(band + 1))
        runtime.progress((band + 1) * n, bands.BANDS * n)
    earliest[rows] = np.minimum(earliest[firsts], firsts.astype(np.uint64))
    return earliest.view(np.int64)


def _heed(runtime: Runtime) -> None:
    if runtime.stop():
        raise Interrupted("stopped while looking for near copies; finished bands are kept")


def _codes(images: Described, distinct: Flags, runtime: Runtime) -> Iterator[tuple[Numbers, bands.Codes]]:
    """Rows that are `distinct` and not faint, and their codes."""
    for low, part in images.parts(_ROWS):
        _heed(runtime)
        rows, codes = part.codes()
        wanted = distinct[low + rows]
        yield low + rows[wanted], codes[wanted]


def _equal_rows(
    images: Described, scratch: Path, memory_bytes: int, runtime: Runtime
) -> tuple[Numbers, Numbers]:
    """Rows that equal an earlier one in hash and thumbnail, and the first such row of each."""

    def records() -> Iterator[NDArray[np.void]]:
        for low, part in images.parts(_ROWS):
            _heed(runtime)
            record = np.empty(len(part), bands.RECORD)
            record["key"], record["row"] = part.hashes(), np.arange(low, low + len(part))
            yield record

    found = [np.zeros((2, 0), np.int64)]
    for unsorted in bands.binned(records(), len(images), 62, scratch, memory_bytes):
        record = unsorted[np.argsort(unsorted["key"], kind="stable")]
        starts = np.flatnonzero(np.diff(record["key"], prepend=~record["key"][:1]))
        first = np.repeat(starts, np.diff(starts, append=len(record)))
        later = np.flatnonzero(first != np.arange(len(record)))
        pair = record["row"][np.stack([later, first[later]])].astype(np.int64)
        found.append(pair[:, images.apart(pair[0], images, pair[1]) == 0])
    rows, firsts = np.concatenate(found, axis=1)
    return rows, firsts


def _batches(pairs: Iterable[tuple[Numbers, Numbers]]) -> Iterator[tuple[Numbers, Numbers]]:
    """The same pairs, in fewer pieces."""
    held, count = [], 0
    for pair in pairs:
        held.append(pair)
        count += len(pair[0])
        if count >= _PAIRS:
            yield np.concatenate([a for a, _ in held]), np.concatenate([b for _, b in held])
            held, count = [], 0
    if count:
        yield np.concatenate([a for a, _ in held]), np.concatenate([b for _, b in held])


def pairs(
    few: Described,
    many: Described,
    *,
    memory_bytes: int,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Numbers:
    """int64 (2, m): rows of `few` and rows of `many` that are the same image, sorted."""
    found = [np.zeros((2, 0), np.int64)]
    bits = bands.band_bits(float(len(few)) * len(many))
    block_rows = max(1, memory_bytes // bands.INDEX_BYTES)
    total = len(many) * -(-len(few) // block_rows)
    for number, (start, block) in enumerate(few.parts(block_rows)):
        index = bands.Index(*block.codes(), block.hashes(), bits)
        for low, part in many.parts(_ROWS):
            _heed(runtime)
            for place, row in _batches(index.candidates(*part.codes(), part.hashes())):
                a, b = np.divmod(np.unique(place * len(part) + row), len(part))
                copies = block.apart(a, part, b) <= 1
                found.append(np.stack([a[copies] + start, b[copies] + low]))
            runtime.progress(number * len(many) + low + len(part), total)
    return np.unique(np.concatenate(found, axis=1), axis=1)


def matched(
    signatures_a: Bytes,
    thumbnails_a: Bytes,
    signatures_b: Bytes,
    thumbnails_b: Bytes,
    *,
    scratch: Path,
    memory_bytes: int,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Flags:
    """bool (len(a),): rows of a that are the same image as some row of b. Made for one of the two being small.

    Nothing is written to `scratch`, and nothing kept for a second call.
    """
    a, b = Described(signatures_a, thumbnails_a), Described(signatures_b, thumbnails_b)
    out = np.zeros(len(a), bool)
    if len(a) <= len(b):
        out[pairs(a, b, memory_bytes=memory_bytes, runtime=runtime)[0]] = True
    else:
        out[pairs(b, a, memory_bytes=memory_bytes, runtime=runtime)[1]] = True
    return out
