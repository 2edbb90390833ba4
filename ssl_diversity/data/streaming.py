"""The streaming tier: shards from afar through the node's cache, fetched ahead in the order of first need."""

import contextlib
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data.cache import Key, Origin, ShardCache, default_folder, room_for
from ssl_diversity.data.order import Need, Order, upcoming
from ssl_diversity.data.reading import Decode, Images, RandomReader
from ssl_diversity.data.remote import Client, FetchError
from ssl_diversity.data.shards import ShardReader
from ssl_diversity.data.subset import Piece, Subset
from ssl_diversity.data.transports import has_ranges, local_path, shown
from ssl_diversity.data.windowed import WindowedOrder
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime

BLOCK_BYTES = 1 << 23
_FETCHERS = 4  # blocks that a process fetches ahead at a time
_NOTE_S = 5.0
_KEEP_S = 30.0
_FETCHES_OF_DAMAGED = 3  # of a block with an image that is not what the index says, before that is an error


class StreamingReader(RandomReader):
    """As `RandomReader`, with the shards of pools at an address read through the node's `ShardCache`.

    Threads fetch ahead what the rank needs next (`begin`), two windows of each lane at most; a block that is not
    there yet is fetched when it is read, so what is read never depends on them. An image that is not what the
    index says is fetched again, twice, before it is an error. `counts` has the cache's hits, fetches and bytes, and
    requests, bytes and retry:CAUSE of this process. A pool at a path is read where it is.

    Raises UserError where the cache cannot hold what the order needs at a time on one of `nodes`: two windows of
    every lane and a twentieth more, or of a global order the whole subset.
    """

    tier = "streaming"

    def __init__(
        self,
        subset: Subset,
        *,
        image_size: int,
        decode: Decode = "exact",
        order: Order | None = None,
        runtime: Runtime = Runtime(),  # noqa: B008
        threads: int = 1,
        nodes: int = 1,
        client: Client | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._ahead: _Ahead | None = None
        super().__init__(subset, image_size=image_size, decode=decode, threads=threads, open_shard=self._open)
        self.order = order
        self.runtime = runtime
        self.client = client or Client(stop=runtime.stop)
        self._far = _Far(subset, block_bytes)
        self._lock = threading.Lock()
        self._shards: dict[tuple[int, int], _CachedShard] = {}  # read so far
        self._share, self._noted_at = 1, time.monotonic()
        needed = self._far.needed_bytes(order, nodes)
        if runtime.cache_bytes < needed:
            raise UserError(_too_small(self._far, order, needed, runtime.cache_bytes))
        if self._far.parts:
            folder = Path(runtime.cache_dir) if runtime.cache_dir else default_folder()
            self.cache = ShardCache(folder, runtime.cache_bytes, self.client)

    def begin(self, start: int = 0, rank: int = 0, world: int = 1, workers: int = 1) -> None:
        """From now on step `start` and those after it are read, for rank `rank`, by `workers` such readers."""
        self.close()
        self._share = workers
        if self.order is not None and self._far.parts:
            needs = upcoming(self.order, self.subset.pieces, start, rank, world)
            self._ahead = _Ahead(self.cache, self._far, needs, start, self.order.batch_size // world)

    def close(self) -> None:
        """End the threads that fetch ahead."""
        if self._ahead:
            self._ahead.close()

    def __del__(self) -> None:
        self.close()

    @property
    def counts(self) -> Counter[str]:
        """Of this process, so far."""
        counts = Counter(self.client.counts)
        if self._far.parts:
            counts += Counter({f"cache:{what}": n for what, n in self.cache.counts.items()})
        return counts

    def read_into(self, indices: NDArray[np.int64], out: Images) -> Images:
        with self._lock:
            if self._ahead is None:
                self.begin()
        for further in reversed(range(_FETCHES_OF_DAMAGED)):
            try:
                super().read_into(indices, out)
                break
            except FetchError:
                raise
            except UserError:
                if not further or not self._far.parts:
                    raise
                self._drop_damaged(indices)  # unless another process has done so already
        if self._ahead:
            self._ahead.was_read(len(indices) * self._share)
            self._note()
        return out

    def _note(self) -> None:
        now = time.monotonic()
        if now > self._noted_at + _NOTE_S:
            self._noted_at = now
            counts = self.counts
            retries = sum(number for what, number in counts.items() if what.startswith("retry:"))
            self.runtime.note(
                f"{counts['cache:bytes'] / 2**30:,.2f} GiB fetched, {counts['cache:hits']:,} blocks found in the cache,"
                f" {retries:,} retries"
            )

    def _open(self, part: int, shard: int) -> ShardReader:
        if part not in self._far.parts:
            return self.subset.parts[part][0]._shard(shard)
        found = self._shards.get((part, shard))
        if found is None:
            found = self._shards[part, shard] = _CachedShard(self.cache, self._far, part, shard)
        return found

    def _drop_damaged(self, indices: NDArray[np.int64]) -> None:
        """Throw out the blocks of remote images that are not what the index says."""
        for part, _, numbers in self.subset.locate(indices):
            for row in numbers.tolist() if part in self._far.parts else ():
                pool = self.subset.parts[part][0]
                shard = self._open(part, int(pool.shard[row]))
                span = int(pool.offset[row]), int(pool.length[row])
                if zlib.crc32(shard.read(*span)) != pool.crc[row]:
                    for key in self._far.keys(part, int(pool.shard[row]), span[0], sum(span)):
                        self.cache.forget(key)


def needed_bytes(subset: Subset, order: Order) -> int:
    """How large the cache of a node must be to read `subset` in that order; 0 where nothing is at an address."""
    return _Far(subset, BLOCK_BYTES).needed_bytes(order)


class _Far:
    """The blocks of the pools of a subset that lie at an address."""

    def __init__(self, subset: Subset, block_bytes: int) -> None:
        self.subset = subset
        self.block_bytes = block_bytes
        addresses = {part: pool.remote for part, (pool, _) in enumerate(subset.parts) if pool.remote}
        self.parts = {part: url for part, url in addresses.items() if local_path(url) is None}
        shards = {part: subset.parts[part][0].info.shards for part in self.parts}
        self._digest = {part: files.digest([s.blake2b for s in shards[part]]) for part in self.parts}
        self._sizes = {part: [s.bytes for s in shards[part]] for part in self.parts}
        self._cut = {part: has_ranges(url) for part, url in self.parts.items()}

    def origin(self, part: int, shard: int) -> Origin:
        pool = self.subset.parts[part][0]
        return Origin(pool.address(shard), pool.info.shards[shard].bytes, pool.info.shards[shard].blake2b)

    def keys(self, part: int, shard: int, first: int, stop: int) -> Iterator[Key]:
        """The blocks that hold bytes [first, stop) of a shard; the whole shard where it comes through a pipe."""
        size = self._sizes[part][shard]
        block = self.block_bytes if self._cut[part] else size
        for start in range(first // block * block, stop, block):
            yield Key(self._digest[part], shard, start, min(start + block, size))

    def span(self, piece: Piece) -> tuple[int, int]:
        """The bytes of its shard that a piece's images take."""
        pool = self.subset.parts[piece.part][0]
        last = piece.first_row + piece.count - 1
        return int(pool.offset[piece.first_row]), int(pool.offset[last] + pool.length[last])

    def of_piece(self, piece: Piece) -> Iterator[tuple[Key, Origin]]:
        if piece.part in self.parts:
            for key in self.keys(piece.part, piece.shard, *self.span(piece)):
                yield key, self.origin(piece.part, piece.shard)

    def _bytes_of_piece(self, piece: Piece) -> int:
        """Of all its blocks."""
        if piece.part not in self.parts:
            return 0
        size = self._sizes[piece.part][piece.shard]
        block = self.block_bytes if self._cut[piece.part] else size
        first, stop = self.span(piece)
        return min(-(-stop // block) * block, size) - first // block * block

    def needed_bytes(self, order: Order | None, nodes: int = 1) -> int:
        """What must be in a node's cache at a time, so that nothing is fetched twice for lack of room."""
        if not self.parts:
            return 0
        if order is None:  # read in some sequence, nothing twice
            return 2 * _FETCHERS * self.block_bytes
        sizes = sorted(map(self._bytes_of_piece, self.subset.pieces))
        if not isinstance(order, WindowedOrder):
            return sum(sizes)
        return room_for(sum(sizes[-2 * order.shards * -(-order.lanes // nodes) :]))  # two windows a lane


def _too_small(far: _Far, order: Order | None, needed: int, given: int) -> str:
    remedy = "raise `cache_gb` in the launch profile"
    if not isinstance(order, WindowedOrder):
        remedy += ", or let the order be `windowed: {shards: 1}`, which reads in sequence"
    else:
        remedy += ", or let the windowed order have fewer lanes or shards"
    return (
        f"pool at {shown(next(iter(far.parts.values())))}: this order needs {needed / 2**30:,.4f} GiB of shard cache at a"
        f" time, and there are {given / 2**30:,.4f}; {remedy}"
    )


class _Ahead:
    """Threads that bring the blocks of what is needed from step `start` on, before they are read.

    A failure is left to whoever reads the block, to be raised there.
    """

    def __init__(self, cache: ShardCache, far: _Far, needs: Iterator[Need], start: int, batch: int) -> None:
        self._cache, self._far = cache, far
        self._start, self._batch = start, batch
        self._read = 0  # images
        self._given: list[tuple[int, list[Key]]] = []  # blocks that are needed up to a step
        self._ended = False
        self._moved = threading.Condition()
        self._taking = threading.Lock()
        self._blocks = self._paced(needs)
        for _ in range(_FETCHERS):
            threading.Thread(target=self._fetch, daemon=True, name="fetch-ahead").start()

    def was_read(self, images: int) -> None:
        with self._moved:
            self._read += images
            self._moved.notify_all()

    def close(self) -> None:
        with self._moved:
            self._ended = True
            self._moved.notify_all()

    @property
    def _step(self) -> int:
        """That is read now."""
        return self._start + self._read // self._batch

    def _paced(self, needs: Iterator[Need]) -> Iterator[tuple[Key, Origin]]:
        for need in needs:
            while not self._is_due(need):
                self._keep()
            blocks = list(self._far.of_piece(need.piece))
            if need.until is not None:
                self._given.append((need.until, [key for key, _ in blocks]))
            for block in blocks:
                self._keep()
                yield block
        while self._given and not self._ended:
            with self._moved:
                self._moved.wait(_KEEP_S)
            self._keep()

    def _is_due(self, need: Need) -> bool:
        with self._moved:
            return self._moved.wait_for(lambda: self._ended or need.soonest <= self._step, _KEEP_S)

    def _keep(self) -> None:
        """What was fetched and is still to be read does not give way, to others of this node either."""
        self._given = [(until, keys) for until, keys in self._given if until >= self._step]
        self._cache.keep(key for _, keys in self._given for key in keys)

    def _fetch(self) -> None:
        while not self._ended:
            with self._taking:
                block = next(self._blocks, None)
            if block is None or self._ended:
                return
            with contextlib.suppress(Exception):
                self._cache.block(*block, wait=False)


class _CachedShard:
    """One remote shard, read through the cache block by block."""

    def __init__(self, cache: ShardCache, far: _Far, part: int, shard: int) -> None:
        self._cache, self._far, self._part, self._shard = cache, far, part, shard
        self._origin = far.origin(part, shard)

    def read(self, offset: int, length: int) -> bytes:
        end = offset + length
        if end > self._origin.size_bytes:
            raise UserError(
                f"{shown(self._origin.url)}: ends before byte {end}, where the index has an image"
            )
        found = []
        for key in self._far.keys(self._part, self._shard, offset, end):
            block = self._cache.block(key, self._origin)
            assert block is not None  # it waited
            first, stop = max(offset, key.start), min(end, key.stop)
            found.append(block.read(first - key.start, stop - first))
        return found[0] if len(found) == 1 else b"".join(found)
