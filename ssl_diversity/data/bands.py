"""Candidates for near copies among up to 10^8 images, without comparing every pair.

A *code* is the 64 lowest frequencies of an image's hash. Each image has one of its own and nine of its
*views*: what its hash would be if it were slightly cropped, worked out from its thumbnail, for a crop changes more
bits than a hash can bear. A *band* looks at some of the 64 bits: where the code of an image and any code of
another agree in them, the two are candidates (locality-sensitive hashing by bit sampling, Indyk and Motwani, STOC
1998). A band has about log2(n) bits, so that the number of candidates grows like n, not like n^2.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data.likeness import LUMA, Numbers, cosines, frequencies, warp, whole

Codes = NDArray[np.uint64]

BANDS = 24
VIEWS = 9
MAX_DISTANCE = 10  # bits of 64 in which the codes of candidates may differ
WINDOW = 64  # candidates per code and band: the nearest in the order of the band
_SPARE_BITS = 3  # of a band, beyond log2(n): pixels are not random, so a bit tells less than one
_CROPS = ((0.0, 0.045), (0.02, 0.02), (0.045, 0.0))  # of each axis of a view: off its start, off its end
_BIN_RECORDS = 1 << 21  # sorted and searched at once
_MAX_LOG_BINS = 9  # open files
_BYTES_PER_RECORD = 128  # while a bin is worked on
_ROWS = 1 << 15  # rows worked on at once
_QUERIES = 1 << 12  # with up to WINDOW candidates each
_CODE_BYTES = 8 * (2 + VIEWS)
INDEX_BYTES = BANDS * (1 + VIEWS) * 40  # of an Index, per row, while it is made
RECORD = np.dtype([("key", "<u8"), ("row", "<u4")])
_VIEW = np.uint32(1 << 31)  # flag of a row number: the key is of one of its views
_ONE = np.uint64(1)
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _to_views() -> NDArray[np.float32]:
    """(LUMA * LUMA, VIEWS * 64): luma of a thumbnail, less 128, to the 64 lowest frequencies of its views.

    Whole numbers so small that sums of products are exact in float32.
    """
    down, across = frequencies(64)
    crops = [cosines(LUMA) @ warp(LUMA, *crop) for crop in _CROPS]
    views = [np.einsum("fi,fj->fij", a[down], b[across]).reshape(64, -1) for a in crops for b in crops]
    matrix = np.concatenate(views)
    return whole(matrix, int((1 << 23) / (128 * np.abs(matrix).sum(1).max()))).T.astype(np.float32)


_TO_VIEWS = _to_views()


def codes(signatures: NDArray[np.uint8], thumbnails: NDArray[np.uint8]) -> Codes:
    """(m, 1 + VIEWS): the own code of each image, then those of its views."""
    own = np.ascontiguousarray(signatures[:, :8]).view("<u8")
    bits = (thumbnails[:, : LUMA**2].astype(np.float32) - 128) @ _TO_VIEWS > 0
    views = np.packbits(bits.reshape(-1, 64), axis=1, bitorder="little").view("<u8").reshape(-1, VIEWS)
    return np.concatenate([own, views], axis=1)


def _tables() -> NDArray[np.uint64]:
    """(BANDS, 8, 256): for each byte of a code, where a band moves its bits; each band in an order of its own."""
    tables = np.zeros((BANDS, 8, 256), np.uint64)
    values = np.arange(256, dtype=np.uint64)
    for band in range(BANDS):
        order = sorted(range(64), key=lambda bit: hashlib.blake2b(bytes([band, bit])).digest())
        for place, bit in enumerate(order):
            moved = ((values >> np.uint64(bit % 8)) & _ONE) << np.uint64(place)
            tables[band, bit // 8] |= moved
    return tables


_TABLES = _tables()


def keys(code: Codes, band: int) -> Codes:
    """Codes (any shape) with their bits in the order of a band, whose own bits come first."""
    of_bytes = np.ascontiguousarray(code).view(np.uint8).reshape(*code.shape, 8)
    out = _TABLES[band, 0][of_bytes[..., 0]]
    for number in range(1, 8):
        out |= _TABLES[band, number][of_bytes[..., number]]
    return np.asarray(out)


def band_bits(pairs: float) -> int:
    """Bits of a band where `pairs` pairs of images are looked at."""
    return min(62, max(1, round(math.log2(max(pairs, 1)) / 2) + _SPARE_BITS))


def close(sorted_keys: Codes, queries: Codes, bits: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Places (in `sorted_keys`, in `queries`) of keys that agree in their first `bits` and nearly in the rest.

    Per query at most WINDOW are looked at: those next to it in order.
    """
    rest = np.uint64((1 << (64 - bits)) - 1)
    first = np.searchsorted(sorted_keys, queries & ~rest)
    found = np.flatnonzero(first < len(sorted_keys))
    found = found[(sorted_keys[first[found]] ^ queries[found]) <= rest]
    query, first = queries[found], first[found]
    middle = np.searchsorted(sorted_keys, query)
    first = np.maximum(first, middle - WINDOW // 2)
    stop = np.minimum(np.searchsorted(sorted_keys, query | rest, "right"), first + WINDOW)
    count = stop - first
    for low in range(0, len(found), _QUERIES):
        part = slice(low, low + _QUERIES)
        which = np.repeat(np.arange(low, low + len(count[part])), count[part])
        step = np.arange(len(which)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        place = first[which] + step
        near = np.bitwise_count(sorted_keys[place] ^ query[which]) <= MAX_DISTANCE
        yield place[near], found[which[near]]


class _Table:
    """Keys in order, with the row of each."""

    def __init__(self, key: Codes, rows: Numbers, bits: int) -> None:
        """`key` (m, k) of `rows` (m,)."""
        order = np.argsort(key, axis=None, kind="stable")
        self.bits, self.keys = bits, key.ravel()[order]
        self.rows = rows[order // max(1, key.shape[1])].astype(np.int32)
        log_size = min(bits, max(0, math.ceil(math.log2(max(1, 8 * key.size)))))
        self.shift = np.uint64(63 - log_size)  # and one more: a shift by 64 is none
        self.present = np.zeros(1 << log_size, bool)  # which first bits there are: most queries end here
        self.present[self.keys >> self.shift >> _ONE] = True

    def close(self, queries: Codes) -> Iterator[tuple[Numbers, Numbers]]:
        """(row, number of the query)."""
        hits = np.flatnonzero(self.present[queries >> self.shift >> _ONE])
        for place, query in close(self.keys, queries[hits], self.bits):
            yield self.rows[place].astype(np.int64), hits[query]


class CodeFile:
    """The codes of many rows on disk: written once, read for each band."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return self.path.stat().st_size // _CODE_BYTES

    def write(self, parts: Iterable[tuple[Numbers, Codes]]) -> None:
        """(row numbers, their codes) in turn."""
        with self.path.open("wb") as file:
            for rows, values in parts:
                file.write(np.column_stack([rows.astype("<u8"), values]).tobytes())

    def read(self) -> Iterator[tuple[Numbers, Codes]]:
        with self.path.open("rb") as file:
            while data := file.read(_ROWS * _CODE_BYTES):
                values = np.frombuffer(data, "<u8").reshape(-1, 2 + VIEWS)
                yield values[:, 0].astype(np.int64), values[:, 1:]


def candidates(
    file: CodeFile, band: int, scratch: Path, memory_bytes: int
) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs of different rows of `file` that a band finds; either may be the earlier, some come twice."""
    bits = band_bits(float(len(file)) ** 2)
    records = len(file) * (1 + VIEWS)
    for record in binned(_records(file, band), records, bits, scratch, memory_bytes):
        own = record[record["row"] < _VIEW]
        table = _Table(own["key"][:, None], own["row"], bits)
        for low in range(0, len(record), _ROWS):
            query = record[low : low + _ROWS]
            other = (query["row"] & ~_VIEW).astype(np.int64)
            for a, number in table.close(query["key"].copy()):
                b = other[number]
                yield a[a != b], b[a != b]


def _records(file: CodeFile, band: int) -> Iterator[NDArray[np.void]]:
    for rows, values in file.read():
        record = np.empty(values.shape, RECORD)
        record["key"] = keys(values, band)
        record["row"] = rows[:, None]
        record["row"][:, 1:] |= _VIEW
        yield record.ravel()


def binned(
    records: Iterable[NDArray[np.void]], count: int, bits: int, scratch: Path, memory_bytes: int
) -> Iterator[NDArray[np.void]]:
    """`count` RECORDs, dealt by way of files to bins of bounded size that keep together equal first `bits`.

    Within a bin they keep their order.
    """
    wanted = max(1, count // min(_BIN_RECORDS, memory_bytes // _BYTES_PER_RECORD))
    log_bins = min(_MAX_LOG_BINS, math.ceil(math.log2(wanted)))
    paths = [scratch / f"bin-{number:03d}" for number in range(1 << log_bins)]
    with ExitStack() as stack:
        outs = [stack.enter_context(path.open("wb")) for path in paths]
        for record in records:
            mixed = (record["key"] >> np.uint64(64 - bits)) * _ODD  # so that bins are equally full
            bin_of = (mixed >> _ONE >> np.uint64(63 - log_bins)).astype(np.int16)
            ends = np.cumsum(np.bincount(bin_of, minlength=len(paths)))
            dealt = record[np.argsort(bin_of, kind="stable")]
            for out, start, stop in zip(outs, [0, *ends[:-1]], ends, strict=True):
                out.write(dealt[start:stop].tobytes())
    for path in paths:
        record = np.fromfile(path, RECORD)
        path.unlink()
        yield record


class Index:
    """Codes of a few rows in the order of every band, to look up those of many."""

    def __init__(self, rows: Numbers, values: Codes, hashes: Codes, bits: int) -> None:
        keys_of = [keys(values, band) for band in range(BANDS)]
        self.own = [_Table(key[:, :1], rows, bits) for key in keys_of]
        self.views = [_Table(key[:, 1:], rows, bits) for key in keys_of]
        self.hashes = _Table(hashes[:, None], np.arange(len(hashes)), 64)

    def candidates(self, rows: Numbers, values: Codes, hashes: Codes) -> Iterator[tuple[Numbers, Numbers]]:
        """Pairs (row of the index, one of `rows`) that some band finds, or whose hashes are equal."""
        yield from self.hashes.close(hashes)
        for band in range(BANDS):
            key = keys(values, band)
            for row, query in self.own[band].close(key.ravel()):
                yield row, rows[query // key.shape[1]]
            for row, query in self.views[band].close(key[:, 0]):
                yield row, rows[query]
