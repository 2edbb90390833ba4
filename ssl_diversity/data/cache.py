"""Blocks of remote shards on a node's disk: fetched once for all its processes, bounded, least recently used out.

A block is a byte range of a shard. It lies in `<folder>/<digest of the shards>/<shard>-<start>-<stop>`, appears
whole or not at all, and is fetched by whoever holds its lock, which dies with its holder. A block that is thrown out
while a process reads it stays readable for that one, for a moment: what is read is not thrown out.
"""

import contextlib
import fcntl
import os
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ssl_diversity import files
from ssl_diversity.data.remote import Client
from ssl_diversity.errors import UserError

_OPEN_BLOCKS = 256  # file handles kept by a process
_LOCKS = 4093  # that the blocks share
_USE_NOTED_S = 1.0  # how exactly the last use of a block is known
_SLACK = 20  # a full cache is emptied by a 20th, so that it is not listed for every block


class Key(NamedTuple):
    """Bytes [start, stop) of a shard of the pool whose shards have that digest."""

    pool: str
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.pool}/{self.shard:06d}-{self.start}-{self.stop}"


class Origin(NamedTuple):
    """Where a shard is, its size and its checksum."""

    url: str
    size_bytes: int
    blake2b: str


class Block:
    """An open block, which closes when its last user lets go."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._noted_at = 0.0

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def note_use(self, now: float) -> None:
        if now > self._noted_at + _USE_NOTED_S:
            self._noted_at = now
            _note_use(self._descriptor)

    @property
    def thrown_out(self) -> bool:
        return os.fstat(self._descriptor).st_nlink == 0


class ShardCache:
    """At most `max_bytes` of blocks in `folder`, those in flight included, shared by all processes of a node.

    Safe for threads and for kill -9 at any moment. Where other blocks cannot give way, being in flight
    themselves, it is exceeded by these. `counts` has what this process found (hits), fetched (fetches, bytes),
    threw out (evicted) and found damaged (damaged).
    """

    def __init__(self, folder: Path, max_bytes: int, client: Client) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.client = client
        self.counts: Counter[str] = Counter()
        self._blocks: OrderedDict[Key, Block] = OrderedDict()  # open ones
        self._swept_at = self._kept_at = 0.0
        self._lock = threading.Lock()
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        for temporary in folder.glob("*/.*.tmp"):  # of processes that were killed, unless its lock is held
            with self._locked(_lock_of(temporary), wait=False) as held:
                if held:
                    temporary.unlink(missing_ok=True)

    def block(self, key: Key, origin: Origin, *, wait: bool = True) -> Block | None:
        """A block, fetched if it is not there; None where another process is fetching it and one will not `wait`.

        Raises UserError where it cannot be had, is another shard's or the disk is full.
        """
        with self._lock:
            block = self._blocks.get(key)
        if block is None:
            block = self._find(key) or self._fetch(key, origin, wait)
        if block is None:
            return None
        now = time.monotonic()
        block.note_use(now)
        with self._lock:
            self._blocks[key] = block
            self._blocks.move_to_end(key)
            if len(self._blocks) > _OPEN_BLOCKS:
                self._blocks.popitem(last=False)
            if now > self._swept_at + _USE_NOTED_S:  # their disk space is free once nobody has them open
                self._swept_at = now
                for gone in [key for key, block in self._blocks.items() if block.thrown_out]:
                    del self._blocks[gone]
        return block

    def keep(self, keys: Iterable[Key]) -> None:
        """Blocks that will be read are not the least recently used, though others were read after they came."""
        now = time.monotonic()
        if now > self._kept_at + _USE_NOTED_S:
            self._kept_at = now
            for key in keys:
                with contextlib.suppress(OSError):
                    _note_use(self.folder / key.name)

    def forget(self, key: Key) -> None:
        """Throw out a block whose content is wrong, unless another process has done so already."""
        with self._lock:
            block = self._blocks.pop(key, None)
            self.counts["damaged"] += 1
        if block is None or not block.thrown_out:
            self._remove(self.folder / key.name)

    def used_bytes(self) -> int:
        with self._locked("room"):
            return sum(size for _, size, _ in self._entries())

    def _find(self, key: Key) -> Block | None:
        """An existing block. One of another size is not ours, or was damaged: it goes."""
        path = self.folder / key.name
        try:
            block, size = Block(os.open(path, os.O_RDONLY)), path.stat().st_size
        except FileNotFoundError:
            return None
        if size != key.stop - key.start:
            self.forget(key)
            return None
        self._count("hits")
        return block

    def _fetch(self, key: Key, origin: Origin, wait: bool) -> Block | None:
        path = self.folder / key.name
        temporary = path.with_name(f".{path.name}.tmp")
        with self._locked(_lock_of(temporary), wait) as held:
            if not held:
                return None
            found = self._find(key)  # another process may have brought it meanwhile
            if found:
                return found
            path.parent.mkdir(exist_ok=True)
            try:
                with temporary.open("wb+") as file:
                    self._reserve(file, key.stop - key.start)
                    self.client.copy(
                        origin.url,
                        file,
                        start=key.start,
                        stop=key.stop,
                        expected_bytes=origin.size_bytes,
                        blake2b=origin.blake2b if key.stop - key.start == origin.size_bytes else None,
                    )
                self._count("fetches")  # before it is there for others, who may look at once
                self._count("bytes", key.stop - key.start)
                _note_use(temporary)
                with self._locked("room"):  # not synced: what a power cut leaves, checksums of images find
                    temporary.rename(path)
            except BaseException as error:
                self._remove(temporary)
                if files.is_disk_full(error) and not isinstance(error, UserError):
                    raise UserError(
                        f"disk full in the shard cache {self.folder}, which may have {self.max_bytes / 2**30:,.2f} GiB:"
                        " lower `cache_gb` in the launch profile, or give another folder (`cache_dir`)"
                    ) from error
                raise
            return Block(os.open(path, os.O_RDONLY))

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give a block in flight its size, after others gave way. The sum kept is never below what is there."""
        with self._locked("room") as room:
            used = int(os.pread(room, 20, 0) or -1)
            if used < 0 or used + size > self.max_bytes:
                used = self._evict(self.max_bytes - size - self.max_bytes // _SLACK)
            os.pwrite(room, f"{used + size:020d}".encode(), 0)
            file.truncate(size)

    def _remove(self, path: Path) -> None:
        with self._locked("room") as room, contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            used = int(os.pread(room, 20, 0) or -1)
            if used >= size:
                os.pwrite(room, f"{used - size:020d}".encode(), 0)

    def _evict(self, limit: int) -> int:
        """Throw out the least recently used until `limit` bytes are left, if possible; the bytes left."""
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if used <= limit:
                break
            if not path.name.startswith("."):
                path.unlink(missing_ok=True)
                used -= size
                self._count("evicted")
        return used

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of every block, those in flight included."""
        for path in self.folder.glob("*/*"):
            if path.parent.name != ".locks":
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path

    def _count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[what] += amount

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[int]:
        """Hold a lock among all threads and processes of the node: its file's descriptor, or 0 if not held."""
        descriptor = os.open(self.folder / ".locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield 0
            else:
                yield descriptor
        finally:
            os.close(descriptor)


def room_for(needed: int) -> int:
    """How large a cache must be that always keeps `needed` bytes: one that is full is emptied by a 20th."""
    return needed + -(-needed // (_SLACK - 1))


def _note_use(file: int | Path) -> None:
    """Now, and to the nanosecond: the kernel's own stamps of what comes within milliseconds are equal."""
    now = time.time_ns()
    try:
        os.utime(file, ns=(now, now))
    except PermissionError:
        # another user's, who shares the cache: only the kernel's stamp may be set, if that
        with contextlib.suppress(PermissionError):
            os.utime(file)


def _lock_of(temporary: Path) -> str:
    return f"{zlib.crc32(f'{temporary.parent.name}/{temporary.name}'.encode()) % _LOCKS:04d}"


def default_folder() -> Path:
    return files.home() / "cache" / "shards"
