"""Reading a subset: the same bytes from memory (resident tier) or from the shards (random tier)."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data.pool import Pool, Rows

Tier = Literal["auto", "resident", "random"]
Images = NDArray[np.uint8]
_CHUNK_ROWS = 512


class Reader(Protocol):
    """`read(indices)`: uint8 (B, 3, H, W), contiguous, for int64 (B,) indices into the subset."""

    tier: str

    def read(self, indices: NDArray[np.int64]) -> Images: ...


def open_reader(
    pool: Pool, rows: Rows, *, tier: Tier = "auto", resident_bytes: int = 1 << 31, threads: int = 1
) -> Reader:
    """A reader of `rows`; `auto` is resident where they fit `resident_bytes` decoded, else random.

    The tier decides speed and memory, never a byte. Raises UserError that names a missing or cut shard.
    """
    pool.check_shards()
    if tier == "auto":
        needed = len(rows) * 3 * pool.image_size**2
        tier = "resident" if needed <= resident_bytes else "random"
    return ResidentReader(pool, rows, threads) if tier == "resident" else RandomReader(pool, rows, threads)


class RandomReader:
    """Each batch by byte range from the shards, decoded in a few threads."""

    tier = "random"

    def __init__(self, pool: Pool, rows: Rows, threads: int = 1) -> None:
        self.pool = pool
        self.rows = rows
        self.threads = threads

    @functools.cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def read(self, indices: NDArray[np.int64]) -> Images:
        numbers = self.rows[indices]
        if self.threads > 1 and len(numbers) > 1:
            shares = self._executor.map(self.pool.images, np.array_split(numbers, self.threads))
            pixels = np.concatenate(list(shares))
        else:
            pixels = self.pool.images(numbers)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


class ResidentReader:
    """The whole subset decoded once into memory: uint8 (N, 3, H, W)."""

    tier = "resident"

    def __init__(self, pool: Pool, rows: Rows, threads: int = 1) -> None:
        source = RandomReader(pool, rows, threads)
        size = pool.image_size
        self.images = np.empty((len(rows), 3, size, size), np.uint8)
        for start in range(0, len(rows), _CHUNK_ROWS):
            indices = np.arange(start, min(start + _CHUNK_ROWS, len(rows)))
            self.images[start : start + len(indices)] = source.read(indices)

    def read(self, indices: NDArray[np.int64]) -> Images:
        out: Images = self.images[indices]
        return out
