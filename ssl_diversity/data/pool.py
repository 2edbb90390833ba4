"""A prepared pool on disk: its rows, their pixels, its subsets."""

import functools
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_diversity import files
from ssl_diversity.config import validate
from ssl_diversity.data import image
from ssl_diversity.data.config import FORMAT, PoolInfo
from ssl_diversity.errors import UserError

COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {  # name -> dtype, shape of one row
    "label": ("<i4", ()),  # -1: unlabelled
    "content": ("|u1", (16,)),  # hash of the source image's pixels
    "shard": ("<i4", ()),
    "offset": ("<i8", ()),  # of the encoded image in its shard, bytes
    "length": ("<i4", ()),  # bytes
}
_GOLDEN = 0.6180339887498949  # frac(phi)
_OPEN_SHARDS = 256  # file handles kept
_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Rows:
    """`count` consecutive rows of a pool of `size`, from `start`, wrapping at the end."""

    start: int
    count: int
    size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Row numbers of int64 `indices` in [0, count)."""
        i = np.asarray(indices, dtype=np.int64)
        if i.size and (i.min() < 0 or i.max() >= self.count):
            raise IndexError(f"index outside the {self.count} rows of the subset")
        return (self.start + i) % self.size

    def numbers(self) -> NDArray[np.int64]:
        return self[np.arange(self.count)]

    def chunks(self) -> list[slice]:
        """The same rows in order, as slices of the pool's columns of bounded length."""
        end = self.start + self.count
        spans = [(self.start, min(end, self.size)), (0, end - self.size)]
        return [
            slice(low, min(low + _CHUNK_ROWS, stop))
            for start, stop in spans
            for low in range(start, stop, _CHUNK_ROWS)
        ]


class _Shard:
    """An open file that closes when its last user lets go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(
                f"missing shard {path}: put it back, or remove the pool's folder and prepare it again"
            ) from None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise UserError(f"truncated shard {self.path}: remove the pool's folder and prepare it again")
        return data


class Pool:
    """A finished pool. Opening reads pool.json alone; columns are memory-mapped when first used."""

    def __init__(self, path: Path, info: PoolInfo) -> None:
        self.path = path
        self.info = info
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
        if values.get("format", 0) > FORMAT:
            raise UserError(
                f"{folder / 'pool.json'}: written by a newer ssl-diversity (format {values['format']}, this one"
                f" reads up to {FORMAT}); update ssl-diversity or prepare the pool again under another home"
            )
        return cls(folder, validate(PoolInfo, values, str(folder / "pool.json")))

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

    def _column(self, name: str) -> NDArray[Any]:
        path = self.path / "index" / f"{name}.npy"
        dtype, row_shape = COLUMNS[name]
        try:
            column = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            problem = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            raise UserError(
                f"{problem} index {path}: remove the pool's folder and prepare it again"
            ) from None
        if column.shape != (self.size, *row_shape) or column.dtype != np.dtype(dtype):
            raise UserError(f"damaged index {path}: remove the pool's folder and prepare it again")
        return np.asarray(column)

    def _open_shard(self, number: int) -> _Shard:
        return _Shard(self.path / self.info.shards[number].file)

    def check_shards(self) -> None:
        """UserError that names the first shard which is missing or of another length."""
        for shard in self.info.shards:
            path = self.path / shard.file
            if not path.exists():
                raise UserError(
                    f"missing shard {path}: put it back, or remove the pool's folder and prepare again"
                )
            if path.stat().st_size != shard.bytes:
                raise UserError(
                    f"shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}:"
                    " remove the pool's folder and prepare it again"
                )

    def rows(self, n: int, replicate: int = 0) -> Rows:
        """Draw number `replicate` of `n` unique rows; draws of one replicate are nested in n."""
        if not 0 < n <= self.size:
            raise UserError(
                f"unique_samples={n}: pool {self.name!r} has {self.size} images; ask for 1 to {self.size}"
            )
        start = int(replicate * _GOLDEN % 1.0 * self.info.first_size)
        return Rows(start, n, self.size)

    def rows_digest(self, rows: Rows) -> str:
        """Hex digest of the pixels, in order, that `rows` stand for: encoding and content hashes."""
        state = blake2b(files.digest(self.info.encoding).encode(), digest_size=16)
        for chunk in rows.chunks():
            state.update(np.ascontiguousarray(self.content[chunk]).data)
        return state.hexdigest()

    def read_bytes(self, row_numbers: ArrayLike) -> list[bytes]:
        """The encoded image of each row."""
        numbers = np.asarray(row_numbers, dtype=np.int64)
        places = zip(
            self.shard[numbers].tolist(),
            self.offset[numbers].tolist(),
            self.length[numbers].tolist(),
            strict=True,
        )
        return [self._shard(shard).read(offset, length) for shard, offset, length in places]

    def images(self, row_numbers: ArrayLike) -> NDArray[np.uint8]:
        """uint8 (n, H, W, 3)."""
        numbers = np.asarray(row_numbers, dtype=np.int64)
        out = np.empty((len(numbers), self.image_size, self.image_size, 3), np.uint8)
        for i, data in enumerate(self.read_bytes(numbers)):
            try:
                out[i] = image.decode(data)
            except Exception as error:
                shard = self.path / self.info.shards[int(self.shard[numbers[i]])].file
                raise UserError(
                    f"row {numbers[i]} in {shard} does not decode ({error}); see `ssl-diversity data verify"
                    f" {self.path.name}`"
                ) from None
        return out

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


def overlap(pool: Pool, n: int, replicates: Sequence[int]) -> float:
    """Mean over pairs of `replicates` of the fraction of their `n` rows that both have; 0 for one."""
    starts = [pool.rows(n, replicate).start for replicate in replicates]
    shared = []
    for a, b in combinations(starts, 2):
        ahead = (b - a) % pool.size
        behind = pool.size - ahead
        shared.append((max(0, n - ahead) + (max(0, n - behind) if ahead else 0)) / n)
    return float(np.mean(shared)) if shared else 0.0


def leaked(test_pool: Pool, pool: Pool, rows: Rows) -> int:
    """How many test images have an exact copy (equal source pixels) among `rows` of `pool`."""
    test = [bytes(row) for row in test_pool.content]
    heads = np.unique(_heads(np.asarray(test_pool.content)))
    copies: set[bytes] = set()
    wanted = set(test)
    for chunk in rows.chunks():
        content = pool.content[chunk]
        candidates = content[np.isin(_heads(content), heads)]
        copies.update(wanted.intersection(bytes(row) for row in candidates))
    return sum(row in copies for row in test)


def _heads(content: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first 64 bits of each hash: enough to find candidates."""
    return np.ascontiguousarray(content[:, :8]).view(np.uint64)[:, 0]
