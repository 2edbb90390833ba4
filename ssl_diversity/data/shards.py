"""Byte ranges of a pool's shards, wherever these lie; neighbours in one read."""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.errors import UserError

if TYPE_CHECKING:
    from ssl_diversity.data.remote import Client

AGAIN = "remove the pool's folder and prepare it again"
_GAP_BYTES = 4096  # between two images that are read in one go: a tar header, a label, another header
_SPAN_BYTES = 1 << 23  # bound of one go


class ShardReader(Protocol):
    """One shard of a pool, wherever it lies; `read` gives exactly `length` bytes or raises UserError."""

    def read(self, offset: int, length: int) -> bytes: ...


OpenShard = Callable[[int], ShardReader]


class LocalShard:
    """An open file that closes when its last user lets go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"missing shard {path}: put it back, or {AGAIN}") from None
        except OSError as error:
            raise UserError(f"shard {path} cannot be opened: {error.strerror}") from None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.descriptor, length, offset)
        except OSError as error:
            raise UserError(f"shard {self.path} cannot be read: {error.strerror}") from None
        if len(data) != length:
            raise UserError(f"truncated shard {self.path}: put it back, or {AGAIN}")
        return data


class RemoteShard:
    """Each read is one request."""

    def __init__(self, client: "Client", url: str, size_bytes: int) -> None:
        self.client, self.url, self.size_bytes = client, url, size_bytes

    def read(self, offset: int, length: int) -> bytes:
        return self.client.get(self.url, start=offset, stop=offset + length, expected_bytes=self.size_bytes)


def read_ranges(
    open_shard: OpenShard, shard: NDArray[np.int32], start: NDArray[np.int64], length: NDArray[np.int32]
) -> Iterator[bytes]:
    """The bytes of each range, which must be in the order of shards and of places in them."""
    if not len(shard):
        return
    stop = start + length
    apart = (
        (start[1:] - stop[:-1] > _GAP_BYTES) | (np.diff(start // _SPAN_BYTES) != 0) | (np.diff(shard) != 0)
    )
    cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(shard)]
    shards, starts, stops = shard.tolist(), start.tolist(), stop.tolist()
    for first, end in pairwise(cuts):
        begin = starts[first]
        span = open_shard(shards[first]).read(begin, stops[end - 1] - begin)
        for i in range(first, end):
            yield span[starts[i] - begin : stops[i] - begin]
