"""`verify`: whether a pool's files are still what they were when it was made."""

import contextlib
import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ssl_diversity.data import image
from ssl_diversity.data.config import Shard
from ssl_diversity.data.growing import unfinished
from ssl_diversity.data.pool import COLUMNS, OPTIONAL_COLUMNS, Pool
from ssl_diversity.data.remote import FetchError
from ssl_diversity.data.transports import local_path, shown
from ssl_diversity.data.writer import file_digest
from ssl_diversity.errors import UserError


def verify(
    pool: Pool | Path | str, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Every difference found, each naming its file; [] for a whole pool. `progress` counts rows.

    Rechecks checksums of shards, index and list of dropped images, the chained digests against the index,
    the index against the members of each shard, and that each row decodes to a size of the pool. Shards of a remote
    pool are fetched for it, one at a time.
    """
    try:
        pool = Pool.open(pool.path if isinstance(pool, Pool) else pool)
        grown = unfinished(pool.path)  # some of its files may be in their places already
    except UserError as error:
        return [str(error)]
    problems = []
    if grown:
        problems.append(
            f"{pool.path}: a growth to {grown.size} rows is under way or was interrupted; run it again"
        )
    for name, expected in pool.info.files.items():
        path = pool.path / name
        if not path.exists():
            problems.append(f"{path}: missing")
        elif file_digest(path) not in (expected, grown and grown.files.get(name)):
            problems.append(f"{path}: checksum differs")
    try:
        problems += _chain(pool)
        names = [*COLUMNS, *(OPTIONAL_COLUMNS if pool.info.near_duplicates else ())]
        columns: Pool | None = pool if all(len(getattr(pool, name)) == pool.size for name in names) else None
    except UserError:
        columns = None  # its file is named above
    row = 0
    for number, shard in enumerate(pool.info.shards):
        name = shown(pool.address(number))
        try:
            with _shard_file(pool, number) as path:
                if not path.exists():
                    problems.append(f"{name}: missing")
                elif file_digest(path) != shard.blake2b:
                    problems.append(f"{name}: checksum differs")
                elif columns is not None:
                    problems += [
                        f"{name}: {problem}" for problem in _members(columns, path, number, shard, row)
                    ]
        except FetchError as error:
            problems.append(str(error))
        row += shard.rows
        progress(row, pool.size)
    if problems and Pool.open(pool.path).info != pool.info:  # it grew meanwhile
        return verify(pool.path, progress)
    return problems


@contextlib.contextmanager
def _shard_file(pool: Pool, number: int) -> Iterator[Path]:
    """A shard as a file, which may be missing; of a remote pool fetched, and there within alone (or FetchError)."""
    address = pool.address(number)
    path = local_path(address)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        pool._client.download(address, path, expected_bytes=pool.info.shards[number].bytes)
        yield path


def _chain(pool: Pool) -> list[str]:
    state = hashlib.blake2b(digest_size=16)
    row = 0
    for shard in pool.info.shards:
        state.update(pool.chained(slice(row, row + shard.rows)))
        row += shard.rows
        if state.hexdigest() != shard.chained:
            return [f"{pool.path / 'index'}: rows of {shard.file} differ from the digest in pool.json"]
    return [] if row == pool.size else [f"{pool.path / 'pool.json'}: shards hold {row} rows, not {pool.size}"]


def _members(pool: Pool, path: Path, number: int, shard: Shard, row: int) -> list[str]:
    """Problems of one shard whose bytes are as written: its members against the index."""
    problems = []
    end = row + shard.rows
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # they would all stay in memory
            key, _, suffix = member.name.partition(".")
            data = tar.extractfile(member)
            assert data is not None
            if suffix == "cls":
                if int(data.read()) != pool.label[row - 1]:
                    problems.append(f"{member.name}: label differs from the index")
            elif suffix != "json":
                place = (pool.shard[row], pool.offset[row], pool.length[row]) if row < end else None
                if int(key) != row or place != (number, member.offset_data, member.size):
                    return [*problems, f"{member.name}: not where the index says"]
                problems += [f"{member.name}: {problem}" for problem in _image(pool, row, data.read())]
                row += 1
    return problems if row == end else [*problems, f"{end - row} rows are missing"]


def _image(pool: Pool, row: int, data: bytes) -> list[str]:
    if zlib.crc32(data) != pool.crc[row]:
        return ["checksum differs from the index"]
    try:
        pixels = image.decode_source(data)
    except Exception as error:
        return [f"does not decode ({error})"]
    shape = pixels.shape
    as_they_were = pool.info.resize == "none" and pool.info.codec != "jpeg"
    if as_they_were and image.content_hash(pixels) != pool.content[row].tobytes():
        return ["its pixels are not those that the index has the hash of"]
    square = (pool.image_size, pool.image_size, 3)
    fits = {"square": shape == square, "short": min(shape[:2]) <= pool.image_size, "none": True}
    return [] if fits[pool.info.resize] else [f"has shape {shape}"]
