"""Reading a subset: the same bytes from memory (resident tier), from the shards (random), or streamed."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data.pool import Pool
from ssl_diversity.data.shards import ShardReader
from ssl_diversity.data.subset import Subset
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from ssl_diversity.data.order import Order

Tier = Literal["auto", "resident", "random", "streaming"]
Decode = Literal["exact", "scaled"]
Images = NDArray[np.uint8]
Numbers = NDArray[np.int64]
RESIDENT_BYTES = 1 << 31  # of decoded images, up to which a subset is kept in memory
_CHUNK_BYTES = 1 << 25  # decoded at once into memory


class Reader(Protocol):
    """`read(indices)`: uint8 (B, 3, S, S), contiguous, the caller's; for int64 (B,) indices into the subset."""

    tier: str

    def read(self, indices: Numbers) -> Images: ...


def open_reader(
    subset: Subset,
    *,
    image_size: int | None = None,
    decode: Decode = "exact",
    tier: Tier = "auto",
    resident_bytes: int = RESIDENT_BYTES,
    threads: int = 1,
    order: "Order | None" = None,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Reader:
    """A reader of `subset`, each image a square of `image_size` pixels (None: the size that its pools store).

    Images stored otherwise are decoded and resized (`image.square`); `scaled` lets a JPEG be decoded at a
    fraction of its size (`image.decoder`). The tier decides speed and memory, never a byte; `auto` streams
    where a pool is remote, else is resident where the subset fits `resident_bytes` decoded, else random.
    `order` is the one that batches will be asked in, as far as streaming needs to know.

    Raises UserError that names a missing or cut shard, or says that `image_size` is needed.
    """
    size = image_size or _stored_size(subset)
    for part, (pool, _) in enumerate(subset.parts):
        pool.check_shards(sorted({piece.shard for piece in subset.pieces if piece.part == part}))
    if tier == "auto":
        remote = any(pool.remote for pool, _ in subset.parts)
        tier = choose_tier(len(subset), size, remote=remote, resident_bytes=resident_bytes)
    if tier == "streaming":
        from ssl_diversity.data.streaming import StreamingReader

        return StreamingReader(
            subset,
            image_size=size,
            decode=decode,
            order=order,
            runtime=runtime,
            threads=threads,
            nodes=runtime.group.ranks.nodes,
        )
    reader = RandomReader(subset, image_size=size, decode=decode, threads=threads)
    return ResidentReader(reader, runtime) if tier == "resident" else reader


def choose_tier(count: int, image_size: int, *, remote: bool, resident_bytes: int = RESIDENT_BYTES) -> Tier:
    """How so many images are read where nothing else is said."""
    fits = count * 3 * image_size**2 <= resident_bytes
    return "streaming" if remote else "resident" if fits else "random"


def _stored_size(subset: Subset) -> int:
    sizes = {pool.square_size for pool, _ in subset.parts}
    if len(sizes) > 1:
        raise UserError(f"the pools of this mixture store images of {sorted(sizes)} pixels; say image_size")
    return sizes.pop()


class RandomReader:
    """Each batch by byte range from the shards, decoded in a few threads.

    `open_shard(part, number)` gives another place to read a shard of `subset.parts[part]` from (a cache).
    """

    tier = "random"

    def __init__(
        self,
        subset: Subset,
        *,
        image_size: int,
        decode: Decode = "exact",
        threads: int = 1,
        open_shard: "Callable[[int, int], ShardReader] | None" = None,
    ) -> None:
        self.subset = subset
        self.image_size = image_size
        self.decode = decode
        self.threads = threads
        self.open_shard = open_shard

    @functools.cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def read(self, indices: Numbers) -> Images:
        size = self.image_size
        return self.read_into(indices, np.empty((len(indices), 3, size, size), np.uint8))

    def read_into(self, indices: Numbers, out: Images) -> Images:
        """`out`, uint8 (B, 3, S, S), filled."""
        shares: list[
            tuple[int, Numbers, Numbers]
        ] = []  # part, places in `out`, row numbers: neighbours together
        for part, places, numbers in self.subset.locate(indices):
            order = np.argsort(numbers, kind="stable")
            count = max(1, min(self.threads, len(order)))
            shares += [(part, places[share], numbers[share]) for share in np.array_split(order, count)]
        fill = functools.partial(self._fill, out.transpose(0, 2, 3, 1))
        if self.threads > 1 and len(shares) > 1:
            list(self._executor.map(fill, shares))
        else:
            for share in shares:
                fill(share)
        return out

    def _fill(self, out: Images, share: tuple[int, Numbers, Numbers]) -> None:
        part, places, numbers = share
        pool: Pool = self.subset.parts[part][0]
        opened = functools.partial(self.open_shard, part) if self.open_shard else None
        encoded = pool.read_bytes(numbers, opened)
        pool.decode(encoded, numbers, out, places.tolist(), scaled=self.decode == "scaled")


class ResidentReader:
    """The whole subset decoded once into memory: uint8 (N, 3, S, S)."""

    tier = "resident"

    def __init__(self, source: RandomReader, runtime: Runtime = Runtime()) -> None:  # noqa: B008
        n, size = len(source.subset), source.image_size
        self.images = np.empty((n, 3, size, size), np.uint8)
        chunk = max(1, _CHUNK_BYTES // (3 * size * size))
        for start in range(0, n, chunk):
            if runtime.stop():
                raise Interrupted("stopped while reading images into memory")
            indices = np.arange(start, min(start + chunk, n))
            source.read_into(indices, self.images[start : start + chunk])

    def read(self, indices: Numbers) -> Images:
        out: Images = self.images[indices]
        return out
