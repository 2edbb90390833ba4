"""A prepared pool on disk: its rows, their pixels, its subsets."""

import functools
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_diversity import files
from ssl_diversity.config import validate
from ssl_diversity.data import image
from ssl_diversity.data.config import FORMAT, PoolInfo
from ssl_diversity.data.shards import AGAIN, LocalShard, OpenShard, RemoteShard, ShardReader, read_ranges
from ssl_diversity.data.transports import join, local_path, shown
from ssl_diversity.errors import UserError

if TYPE_CHECKING:
    from ssl_diversity.data.remote import Client

COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {  # name -> dtype, shape of one row
    "label": ("<i4", ()),  # -1: unlabelled
    "content": ("|u1", (16,)),  # hash of the source image's pixels
    "shard": ("<i4", ()),
    "offset": ("<i8", ()),  # of the encoded image in its shard, bytes
    "length": ("<i4", ()),  # bytes
    "crc": ("<u4", ()),  # zlib.crc32 of the encoded image
}
OPTIONAL_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {  # where info.near_duplicates (data/near.py)
    "signature": ("|u1", (32,)),
    "thumbnail": ("|u1", (242,)),
}
REMOTE = "remote.json"  # {"url": where the folder of an attached pool is}
_GOLDEN = 0.6180339887498949  # frac(phi)
_OPEN_SHARDS = 256  # file handles kept
_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Rows:
    """`count` rows of a pool: from `start` on, wrapping at the end of its first `ring` rows, then those behind them.

    Index i < ring is row (start + i) % ring, any other is row i. `ring` is the pool's `first_size`: a draw within it
    is what it was before the pool grew, and draws of one `start` are nested, however often the pool grew.
    """

    start: int
    count: int
    ring: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Row numbers of int64 `indices` in [0, count)."""
        i = np.asarray(indices, dtype=np.int64)
        if i.size and (i.min() < 0 or i.max() >= self.count):
            raise IndexError(f"index outside the {self.count} rows of the subset")
        return np.where(i < self.ring, (self.start + i) % self.ring, i)

    def holds(self, row_numbers: ArrayLike) -> NDArray[np.bool_]:
        """Whether each of int64 `row_numbers` is one of these rows."""
        number = np.asarray(row_numbers, dtype=np.int64)
        index = np.where(number < self.ring, (number - self.start) % self.ring, number)
        return index < self.count

    def numbers(self) -> NDArray[np.int64]:
        return self[np.arange(self.count)]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The same rows in order, as the fewest ranges (start, stop) of row numbers."""
        if not self.start:
            return [(0, self.count)] if self.count else []
        end = self.start + min(self.count, self.ring)
        spans = (self.start, min(end, self.ring)), (0, end - self.ring), (self.ring, self.count)
        return [(start, stop) for start, stop in spans if start < stop]

    def chunks(self) -> list[slice]:
        """The same rows in order, as slices of the pool's columns of bounded length."""
        return [
            slice(low, min(low + _CHUNK_ROWS, stop))
            for start, stop in self.spans
            for low in range(start, stop, _CHUNK_ROWS)
        ]


class Pool:
    """A finished pool. Opening reads pool.json alone; columns are memory-mapped when first used."""

    def __init__(self, path: Path, info: PoolInfo) -> None:
        self.path = path
        self.info = info
        self.place = path.name if path.parent == files.pools_dir() else str(path)  # for `open`
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The pool in a folder, or of that folder name under `pools_dir()`.

        Raises UserError where there is none, where it is half-written, or where newer code wrote it.
        """
        folder = Path(path).expanduser()
        if not folder.is_absolute() and not folder.is_dir():
            folder = files.pools_dir() / folder
        try:
            values = files.read_json(folder / "pool.json")
        except FileNotFoundError:
            state = "is half-written: prepare it again" if folder.is_dir() else "does not exist"
            raise UserError(
                f"pool {folder} {state} (`ssl-diversity data list` shows what there is)"
            ) from None
        except ValueError:
            raise UserError(
                f"{folder / 'pool.json'}: damaged; remove the folder and prepare it again"
            ) from None
        cls.check_format(values, str(folder / "pool.json"))
        return cls(folder, validate(PoolInfo, values, str(folder / "pool.json")))

    @staticmethod
    def check_format(values: Mapping[str, Any], where: str) -> None:
        """UserError where a pool.json is of a newer format than this code reads."""
        if values.get("format", 0) > FORMAT:
            raise UserError(
                f"{where}: written by a newer ssl-diversity (format {values['format']}, this one reads up to"
                f" {FORMAT}); update ssl-diversity or prepare the pool again under another home"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Pool, (self.path, self.info)

    def __len__(self) -> int:
        return self.size

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def size(self) -> int:
        return self.info.size

    @property
    def image_size(self) -> int:
        return self.info.image_size

    @property
    def digest(self) -> str:
        return self.info.digest

    @functools.cached_property
    def label(self) -> NDArray[np.int32]:
        """int32 (size,): class number, -1 where unlabelled."""
        return self._column("label")

    @functools.cached_property
    def content(self) -> NDArray[np.uint8]:
        """uint8 (size, 16): hash of each source image's pixels."""
        return self._column("content")

    @functools.cached_property
    def shard(self) -> NDArray[np.int32]:
        return self._column("shard")

    @functools.cached_property
    def offset(self) -> NDArray[np.int64]:
        return self._column("offset")

    @functools.cached_property
    def length(self) -> NDArray[np.int32]:
        return self._column("length")

    @functools.cached_property
    def crc(self) -> NDArray[np.uint32]:
        """uint32 (size,): zlib.crc32 of each encoded image."""
        return self._column("crc")

    @functools.cached_property
    def signature(self) -> NDArray[np.uint8]:
        """uint8 (size, 32): what near copies are found by; only where `info.near_duplicates`."""
        return self._column("signature")

    @functools.cached_property
    def thumbnail(self) -> NDArray[np.uint8]:
        """uint8 (size, 242): what near copies are confirmed by; only where `info.near_duplicates`."""
        return self._column("thumbnail")

    def _column(self, name: str) -> NDArray[Any]:
        path = self.path / "index" / f"{name}.npy"
        dtype, row_shape = (COLUMNS | OPTIONAL_COLUMNS)[name]
        if name in OPTIONAL_COLUMNS and not self.info.near_duplicates:
            raise UserError(
                f"pool {self.path.name} has no index of near copies: prepare it with near_duplicates=true"
            )
        try:
            column = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            problem = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            raise UserError(f"{problem} index {path}: {AGAIN}") from None
        if column.shape[1:] != row_shape or len(column) < self.size or column.dtype != np.dtype(dtype):
            raise UserError(f"damaged index {path}: {AGAIN}")
        return np.asarray(column[: self.size])  # the pool may have grown since it was opened

    @functools.cached_property
    def remote(self) -> str | None:
        """Where the shards are, a URL or path, if not in the pool's own folder (`data attach`)."""
        path = self.path / REMOTE
        return str(files.read_json(path)["url"]) if path.exists() else None

    def address(self, shard: int) -> str:
        """Path or URL of a shard."""
        file = self.info.shards[shard].file
        return str(self.path / file) if self.remote is None else join(self.remote, file)

    def _open_shard(self, number: int) -> ShardReader:
        address = self.address(number)
        path = local_path(address)
        if path is not None:
            return LocalShard(path)
        return RemoteShard(self._client, address, self.info.shards[number].bytes)

    @functools.cached_property
    def _client(self) -> "Client":
        from ssl_diversity.data.remote import Client

        return Client()

    def check_shards(self, numbers: Iterable[int] | None = None) -> None:
        """UserError that names the first shard (of `numbers`) which is missing or of another length.

        Those of a remote pool are checked as they are read.
        """
        if self.remote is not None:
            return
        for number in range(len(self.info.shards)) if numbers is None else numbers:
            shard = self.info.shards[number]
            path = self.path / shard.file
            try:
                size_bytes = path.stat().st_size
            except FileNotFoundError:
                raise UserError(f"missing shard {path}: put it back, or {AGAIN}") from None
            if size_bytes != shard.bytes:
                raise UserError(f"shard {path} has {size_bytes} bytes instead of {shard.bytes}: {AGAIN}")

    def rows(self, n: int, replicate: int = 0, *, first: int | None = None) -> Rows:
        """Draw number `replicate` of `n` unique rows; draws of one replicate are nested in n.

        They wrap within the pool's first size, or within its `first` rows where that is less.
        """
        if not 0 < n <= self.size:
            raise UserError(
                f"unique_samples={n}: pool {self.name!r} has {self.size} images; ask for 1 to {self.size}"
            )
        ring = min(self.info.first_size, first or self.info.first_size)
        return Rows(int(replicate * _GOLDEN % 1.0 * ring), n, ring)

    def chained(self, rows: slice) -> bytes:
        """What the shards' chained digests are of: content hash and label (little-endian int32) of each row."""
        labels = np.ascontiguousarray(self.label[rows], "<i4").view(np.uint8).reshape(-1, 4)
        return np.concatenate([self.content[rows], labels], axis=1).tobytes()

    def rows_digest(self, rows: Rows) -> str:
        """Hex digest of the pixels, in order, that `rows` stand for: encoding and content hashes."""
        state = blake2b(files.digest(self.info.encoding).encode(), digest_size=16)
        for chunk in rows.chunks():
            state.update(np.ascontiguousarray(self.content[chunk]).data)
        return state.hexdigest()

    def read_bytes(self, row_numbers: ArrayLike, open_shard: OpenShard | None = None) -> list[bytes]:
        """The encoded image of each row, verified; `open_shard` gives another place to read from (a cache).

        UserError where a shard is missing, cut, or no longer the one that the index speaks of.
        """
        numbers = np.asarray(row_numbers, dtype=np.int64)
        order = np.argsort(numbers, kind="stable")  # rows lie in their shards in order
        rows = numbers[order]
        if len(rows) and self.shard[rows].max() >= len(self.info.shards):
            raise UserError(f"damaged index {self.path / 'index' / 'shard.npy'}: {AGAIN}")
        read = read_ranges(open_shard or self._shard, self.shard[rows], self.offset[rows], self.length[rows])
        found = [b""] * len(rows)
        for place, data in zip(order.tolist(), read, strict=True):
            found[place] = data
        crcs = np.fromiter(map(zlib.crc32, found), np.uint32, len(found))
        for bad in numbers[crcs != self.crc[numbers]][:1].tolist():
            raise UserError(
                f"row {bad} of {shown(self.address(int(self.shard[bad])))} is not what the index says:"
                f" the shard was damaged or replaced; put it back, or {AGAIN}"
            )
        return found

    def decode(
        self,
        encoded: Sequence[bytes],
        row_numbers: ArrayLike,
        out: NDArray[np.uint8],
        places: Iterable[int],
        *,
        scaled: bool = False,
    ) -> None:
        """Write the image that each of `encoded` holds to out[place], `out` being uint8 (n, S, S, 3) of any strides.

        UserError that names the row (of `row_numbers`) which does not decode. How: `image.decoder`.
        """
        stored = self.info.resize == "square" and out.shape[1] == self.image_size
        read = image.decoder(
            self.info.codec, None if stored else out.shape[1], self.info.filter, scaled=scaled
        )
        for i, (place, data) in enumerate(zip(places, encoded, strict=True)):
            try:
                out[place] = read(data)
            except MemoryError:
                raise
            except Exception as error:
                row = int(np.asarray(row_numbers)[i])
                raise UserError(
                    f"row {row} in {shown(self.address(int(self.shard[row])))} does not decode ({error});"
                    f" see `ssl-diversity data verify {self.path.name}`"
                ) from None

    def images(self, row_numbers: ArrayLike, size: int | None = None) -> NDArray[np.uint8]:
        """uint8 (n, S, S, 3); S is `size`, by default the pool's own, which only a pool of squares has."""
        numbers = np.asarray(row_numbers, dtype=np.int64)
        side = size or self.square_size
        out = np.empty((len(numbers), side, side, 3), np.uint8)
        self.decode(self.read_bytes(numbers), numbers, out, range(len(numbers)))
        return out

    @property
    def square_size(self) -> int:
        """Side of the pool's images, pixels; UserError where they differ."""
        if self.info.resize != "square":
            raise UserError(f"pool {self.path.name} keeps images of different sizes; say image_size")
        return self.image_size

    def provenance(self, row: int) -> dict[str, Any]:
        """What its maker noted about one row of a generated pool; {} where nothing was."""
        shard = self._shard(int(self.shard[row]))
        end = self.info.shards[int(self.shard[row])].bytes
        position = int(self.offset[row]) + padded(int(self.length[row]))
        while position < end - 1024:
            member = tarfile.TarInfo.frombuf(shard.read(position, 512), "utf-8", "strict")
            if not member.name.startswith(f"{row:09d}."):
                break
            if member.name.endswith(".json"):
                return dict(json.loads(shard.read(position + 512, member.size)))
            position += 512 + padded(member.size)
        return {}


def padded(size: int) -> int:
    """Bytes that `size` bytes take in a tar."""
    return -(-size // 512) * 512


def list_pools() -> list[Pool]:
    """Every finished pool under `pools_dir()`, by folder name."""
    found = sorted(files.pools_dir().glob("*/pool.json"))
    return [Pool.open(path.parent) for path in found if not path.parent.name.startswith(".")]


def find(name: str) -> Pool:
    """The pool with that folder name, else that name, else the only one whose folder name begins so."""
    names = sorted(path.parent.name for path in files.pools_dir().glob("*/pool.json"))
    stem = {folder: folder.rpartition("-")[0] for folder in names}
    tests = (lambda f: f == name, lambda f: stem[f] == name, lambda f: f.startswith(name))
    for test in tests:
        hits = [folder for folder in names if not folder.startswith(".") and test(folder)]
        if len(hits) == 1:
            return Pool.open(files.pools_dir() / hits[0])
        if hits:
            raise UserError(f"pool {name!r} is ambiguous: {', '.join(hits)}; give one of these")
    if (files.pools_dir() / name).is_dir():
        return Pool.open(files.pools_dir() / name)
    raise UserError(
        f"no pool {name!r} in {files.pools_dir()}; there are: {', '.join(names) or 'none'}"
        " (make one with `ssl-diversity data prepare RECIPE`)"
    )


def overlap(pool: Pool, n: int, replicates: Sequence[int], *, first: int | None = None) -> float:
    """Mean over pairs of `replicates` of the fraction of their `n` rows (`Pool.rows`) that both have; 0 for one."""
    draws = [pool.rows(n, replicate, first=first) for replicate in replicates]
    starts, ring = [rows.start for rows in draws], draws[0].ring if draws else 1
    inside = min(n, ring)  # behind the ring all draws are the same
    shared = []
    for a, b in combinations(starts, 2):
        ahead = (b - a) % ring
        behind = ring - ahead
        both = max(0, inside - ahead) + (max(0, inside - behind) if ahead else 0)
        shared.append((both + n - inside) / n)
    return float(np.mean(shared)) if shared else 0.0
