"""Writing a pool: WebDataset tar shards, index columns, pool.json last, all in a folder renamed at the end."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ssl_diversity import files
from ssl_diversity.config import Config, validate
from ssl_diversity.data import image
from ssl_diversity.data.config import Codec, Filter, PoolInfo, Shard
from ssl_diversity.data.pool import COLUMNS, OPTIONAL_COLUMNS, Pool, Rows, padded
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

_LOCK_POLL_S = 0.2
_PENDING_ROWS = 8192  # whose index waits in memory


class ShardWriter:
    """Appends rows to the shards and index columns of a pool's folder, in order and in bounded memory.

    `after` is a pool whose rows come first: the columns begin with them, numbers and chained digests go on from
    them, and its shards stay where they are.
    """

    def __init__(
        self,
        folder: Path,
        codec: str,
        shard_bytes: int,
        *,
        near_duplicates: bool = False,
        after: Pool | None = None,
    ) -> None:
        self.folder = folder
        self.codec = codec
        self.shard_bytes = shard_bytes
        self.near = tuple(OPTIONAL_COLUMNS) if near_duplicates else ()
        self.rows = 0
        self.shards: list[Shard] = []
        self.chain = hashlib.blake2b(digest_size=16)
        (folder / "shards").mkdir(parents=True)
        (folder / "index").mkdir()
        self.dropped = (folder / "dropped.jsonl").open("wb")
        self.columns = {
            name: (folder / "index" / f"{name}.npy").open("wb+") for name in (*COLUMNS, *self.near)
        }
        self._pending: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for name in self.columns:
            self._column_header(name)
        if after is not None:
            self._follow(after)
        self._open_shard()

    def _follow(self, pool: Pool) -> None:
        for part in Rows(0, pool.size, pool.size).chunks():
            self.chain.update(pool.chained(part))
            for name, file in self.columns.items():
                file.write(np.ascontiguousarray(getattr(pool, name)[part]).data)
        self.rows = pool.size
        self.shards = list(pool.info.shards)

    def _open_shard(self) -> None:
        self.path = self.folder / "shards" / f"{len(self.shards):06d}.tar"
        self.file = self.path.open("wb", 1 << 18)
        self.hash = hashlib.blake2b(digest_size=16)
        self.position = 0
        self.first_row = self.rows

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)

    def _member(self, suffix: str, data: bytes | memoryview) -> None:
        header = tar_header(f"{self.rows:09d}.{suffix}".encode(), len(data))
        self._write(b"".join((header, data, bytes(padded(len(data)) - len(data)))))

    def add(
        self,
        content: bytes,
        label: int,
        encoded: bytes | memoryview,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """The next row: hash of the source pixels, class number or -1, encoded image."""
        if self.position >= self.shard_bytes:
            self._close_shard()
            self._open_shard()
        place = (label, content, len(self.shards), self.position + 512, len(encoded), zlib.crc32(encoded))
        for column, value in zip(self._pending.values(), place, strict=True):
            column.append(value)
        self.chain.update(content + label.to_bytes(4, "little", signed=True))
        self._member(
            image.suffix(bytes(encoded)) if self.codec == "original" else image.SUFFIX[self.codec], encoded
        )
        if label >= 0:
            self._member("cls", b"%d" % label)
        if provenance is not None:
            self._member("json", json.dumps(provenance, sort_keys=True).encode())
        self.rows += 1
        if len(self._pending["label"]) >= _PENDING_ROWS:
            self._write_columns()

    def add_all(self, rows: NDArray[Any], encoded: Sequence[memoryview]) -> None:
        """The next rows: fields `content`, `label` and those of the near columns, and their encoded images."""
        content = np.ascontiguousarray(rows["content"]).tobytes()
        for i, (label, data) in enumerate(zip(rows["label"].tolist(), encoded, strict=True)):
            self.add(content[16 * i : 16 * i + 16], label, data)
        for name in self.near:
            self.columns[name].write(np.ascontiguousarray(rows[name]).data)

    def drop(self, cause: str, name: Any, **details: Any) -> None:
        """A line of dropped.jsonl."""
        self.dropped.write(
            (json.dumps({"cause": cause, "name": name, **details}, sort_keys=True) + "\n").encode()
        )

    def _write_columns(self) -> None:
        for name, values in self._pending.items():
            dtype = COLUMNS[name][0]
            data = b"".join(values) if name == "content" else np.array(values, dtype).tobytes()
            self.columns[name].write(data)
            values.clear()

    def _close_shard(self) -> None:
        self._write(bytes(1024))
        _close_synced(self.file)
        self.shards.append(
            Shard(
                file=f"shards/{self.path.name}",
                blake2b=self.hash.hexdigest(),
                bytes=self.position,
                rows=self.rows - self.first_row,
                chained=self.chain.hexdigest(),
            )
        )

    def _column_header(self, name: str) -> None:
        dtype, row_shape = {**COLUMNS, **OPTIONAL_COLUMNS}[name]
        header = {"descr": dtype, "fortran_order": False, "shape": (self.rows, *row_shape)}
        np.lib.format.write_array_header_1_0(self.columns[name], header)  # numpy pads it, so that it may grow

    def close(self) -> list[str]:
        """Finish shards, columns and the list of dropped images; the files beside the shards."""
        self._close_shard()
        self._write_columns()
        for name, file in self.columns.items():
            file.seek(0)
            self._column_header(name)
            _close_synced(file)
        _close_synced(self.dropped)
        return [*(f"index/{name}.npy" for name in self.columns), "dropped.jsonl"]

    def abandon(self) -> None:
        for file in (self.file, self.dropped, *self.columns.values()):
            with contextlib.suppress(OSError):
                file.close()


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_MODE, _TIME, _REST = _HEADER[100:124], _HEADER[135:148], _HEADER[156:]  # around name, size and checksum
_SUM = sum(_MODE + _TIME + _REST) + 8 * ord(" ")


def tar_header(name: bytes, size: int) -> bytes:
    """As `tarfile` makes it of a name of up to 100 bytes and a size below 8 GiB, at a tenth of its cost."""
    octal = b"%011o" % size
    checksum = b"%06o\0 " % (_SUM + sum(name) + sum(octal))
    return b"".join((name.ljust(100, b"\0"), _MODE, octal, _TIME, checksum, _REST))


def _close_synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return files.content_digest(file)


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """A full disk or quota as the one-line UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if files.is_disk_full(error):
            raise files.disk_full(path) from error
        raise


@contextlib.contextmanager
def locked(directory: Path, runtime: Runtime) -> Iterator[None]:
    """One process at a time makes the pool `directory`; the lock dies with its holder, however it dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if runtime.stop():
                    raise Interrupted(f"stopped while another process prepares {directory.name}") from None
                time.sleep(_LOCK_POLL_S)
        yield


@contextlib.contextmanager
def building(
    directory: Path, codec: str, shard_bytes: int, *, near_duplicates: bool = False
) -> Iterator[ShardWriter]:
    """A writer into a hidden folder beside `directory`, which vanishes unless `publish` renames it."""
    build = directory.with_name(f".{directory.name}.build")
    shutil.rmtree(build, ignore_errors=True)
    writer = ShardWriter(build, codec, shard_bytes, near_duplicates=near_duplicates)
    try:
        yield writer
    finally:
        writer.abandon()
        shutil.rmtree(build, ignore_errors=True)


def publish(writer: ShardWriter, directory: Path, info: dict[str, Any]) -> Pool:
    """Finish a pool: shards, columns, dropped.jsonl, pool.json, then the rename that makes it exist."""
    if writer.rows == 0:
        raise UserError(f"pool {info['name']!r}: not one image is left to keep; counts: {info['counts']}")
    finish(writer, {**info, "first_size": writer.rows})
    shutil.rmtree(directory, ignore_errors=True)  # a folder without pool.json: nothing whole is lost
    writer.folder.rename(directory)
    return Pool.open(directory)


def finish(writer: ShardWriter, info: Mapping[str, Any]) -> None:
    """Everything of a pool in the writer's folder, pool.json (`info`, and what the writer knows) last."""
    checked = writer.close()
    finished = {
        **info,
        "size": writer.rows,
        "shards": writer.shards,
        "files": {name: file_digest(writer.folder / name) for name in checked},
    }
    files.write_json(writer.folder / "pool.json", PoolInfo.model_validate(finished).model_dump(mode="json"))


class PoolFields(Config):
    """What `write_pool` and `growing` are told about a pool that is not prepared from a source."""

    name: str
    source: str
    spec: dict[str, Any] = Field({})
    image_size: int
    filter: Filter = "bicubic"
    codec: Codec = "png"
    quality: int = 95
    seed: int = 0
    classes: list[str] = Field([])
    real_images: int | None
    origin: str = ""
    terms: str = ""
    provenance: dict[str, Any] = Field({})


Row = tuple[image.Pixels, int, Mapping[str, Any] | None]


def write_pool(
    path: Path,
    info_fields: Mapping[str, Any],
    rows: Iterable[Row] | Callable[[], Iterable[Row]],
    *,
    total: int = 0,
    shard_bytes: int = 1 << 28,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Pool:
    """Write an ordered stream of (uint8 (H, W, 3), class or -1, provenance) as the pool `path`, unshuffled.

    `info_fields` are those of `PoolFields`. Images are fitted to `image_size`; one whose pixels (as given, or
    as fitted) equal an earlier row's is dropped and listed. A pool that is finished already is returned and
    `rows` (an iterable, or a function that gives one) is not touched.
    """
    fields = validate(PoolFields, info_fields, f"pool {path.name}")
    with reporting_full_disk(path), locked(path, runtime):
        if (path / "pool.json").exists():
            return Pool.open(path)
        with building(path, fields.codec, shard_bytes) as writer:
            counts, source_digest = _add_rows(writer, fields, rows, total, runtime)
            info = {
                **fields.model_dump(),
                "spec_digest": files.digest(fields.spec),
                "source_digest": source_digest,
                "counts": counts,
            }
            return publish(writer, path, info)


def _add_rows(
    writer: ShardWriter, fields: PoolFields, rows: Any, total: int, runtime: Runtime
) -> tuple[dict[str, int], str]:
    counts = dict.fromkeys(
        ("read", "undecodable", "duplicate", "duplicate_after_resize", "excluded", "kept"), 0
    )
    seen = _Seen(writer.folder / "seen.db")
    source = hashlib.blake2b(digest_size=16)
    for pixels, label, provenance in rows() if callable(rows) else rows:
        if runtime.stop():
            raise Interrupted(f"stopped while writing pool {fields.name}")
        fitted = image.fit(pixels, fields.image_size, fields.filter)
        content = image.content_hash(pixels)
        source.update(content)
        hashes = {"duplicate": content, "duplicate_after_resize": image.content_hash(fitted)}
        found = ((cause, seen.get(cause, key)) for cause, key in hashes.items())
        cause, earlier = next(
            ((cause, number) for cause, number in found if number is not None), (None, None)
        )
        if cause:
            writer.drop(cause, counts["read"], kept=earlier, provenance=provenance)
        else:
            writer.add(content, label, image.encode(fitted, fields.codec, fields.quality), provenance)
            for kind, key in hashes.items():
                seen.add(kind, key, counts["read"])
        counts["read"] += 1
        counts[cause or "kept"] += 1
        runtime.progress(counts["read"], max(total, counts["read"]))
    seen.close()
    return counts, source.hexdigest()


class _Seen:
    """The first row that had a hash, in a file: a dict of 10^7 rows takes gigabytes of memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",  # the file is of no use after a kill
            "PRAGMA synchronous = OFF",
            "CREATE TABLE seen (kind TEXT, hash BLOB, row INTEGER, PRIMARY KEY (kind, hash)) WITHOUT ROWID",
            "BEGIN",
        ):
            self._run(statement)

    def _run(self, statement: str, *values: Any) -> list[tuple[int]]:
        try:
            return self.database.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, str(error)) from error
            raise

    def get(self, kind: str, key: bytes) -> int | None:
        rows = self._run("SELECT row FROM seen WHERE kind = ? AND hash = ?", kind, key)
        return rows[0][0] if rows else None

    def add(self, kind: str, key: bytes, row: int) -> None:
        self._run("INSERT INTO seen VALUES (?, ?, ?)", kind, key, row)

    def close(self) -> None:
        self.database.close()
        self.path.unlink()
