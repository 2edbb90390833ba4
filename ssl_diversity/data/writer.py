"""Writing a pool: WebDataset tar shards, index columns, pool.json last, all in a folder renamed at the end."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import Field

from ssl_diversity import files
from ssl_diversity.config import Config, validate
from ssl_diversity.data import image
from ssl_diversity.data.config import Codec, Filter, PoolInfo, Shard
from ssl_diversity.data.pool import COLUMNS, Pool, padded
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

_LOCK_POLL_S = 0.2


class ShardWriter:
    """Appends rows to the shards and index columns of a pool's folder, in order and in bounded memory."""

    def __init__(self, folder: Path, codec: str, shard_bytes: int) -> None:
        self.folder = folder
        self.suffix = image.SUFFIX[codec]
        self.shard_bytes = shard_bytes
        self.rows = 0
        self.shards: list[Shard] = []
        self.chain = hashlib.blake2b(digest_size=16)
        (folder / "shards").mkdir(parents=True)
        (folder / "index").mkdir()
        self.columns = {name: (folder / "index" / f"{name}.npy").open("wb+") for name in COLUMNS}
        for name in COLUMNS:
            self._column_header(name)
        self._open_shard()

    def _open_shard(self) -> None:
        self.path = self.folder / "shards" / f"{len(self.shards):06d}.tar"
        self.file = self.path.open("wb")
        self.hash = hashlib.blake2b(digest_size=16)
        self.position = 0
        self.first_row = self.rows

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.position += len(data)

    def _member(self, suffix: str, data: bytes) -> None:
        member = tarfile.TarInfo(f"{self.rows:09d}.{suffix}")
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(data + bytes(padded(len(data)) - len(data)))

    def add(
        self, content: bytes, label: int, encoded: bytes, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """The next row: hash of the source pixels, class number or -1, encoded image."""
        if self.position >= self.shard_bytes:
            self._close_shard()
            self._open_shard()
        row = {
            "label": label,
            "content": np.frombuffer(content, np.uint8),
            "shard": len(self.shards),
            "offset": self.position + 512,
            "length": len(encoded),
        }
        for name, value in row.items():
            self.columns[name].write(np.asarray(value, COLUMNS[name][0]).tobytes())
        self.chain.update(content + label.to_bytes(4, "little", signed=True))
        self._member(self.suffix, encoded)
        if label >= 0:
            self._member("cls", str(label).encode())
        if provenance is not None:
            self._member("json", json.dumps(provenance, sort_keys=True).encode())
        self.rows += 1

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
        dtype, row_shape = COLUMNS[name]
        header = {"descr": dtype, "fortran_order": False, "shape": (self.rows, *row_shape)}
        np.lib.format.write_array_header_1_0(self.columns[name], header)  # numpy pads it, so that it may grow

    def close(self) -> None:
        self._close_shard()
        for name, file in self.columns.items():
            file.seek(0)
            self._column_header(name)
            _close_synced(file)

    def abandon(self) -> None:
        for file in (self.file, *self.columns.values()):
            with contextlib.suppress(OSError):
                file.close()


def _close_synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
def building(directory: Path, codec: str, shard_bytes: int) -> Iterator[ShardWriter]:
    """A writer into a hidden folder beside `directory`, which vanishes unless `publish` renames it."""
    build = directory.with_name(f".{directory.name}.build")
    shutil.rmtree(build, ignore_errors=True)
    writer = ShardWriter(build, codec, shard_bytes)
    try:
        yield writer
    finally:
        writer.abandon()
        shutil.rmtree(build, ignore_errors=True)


def publish(
    writer: ShardWriter, directory: Path, dropped: Iterable[Mapping[str, Any]], info: dict[str, Any]
) -> Pool:
    """Finish a pool: columns, dropped.jsonl, pool.json, then the rename that makes it exist."""
    if writer.rows == 0:
        raise UserError(f"pool {info['name']!r}: not one image is left to keep; counts: {info['counts']}")
    writer.close()
    with (writer.folder / "dropped.jsonl").open("wb") as file:
        file.writelines((json.dumps(line, sort_keys=True) + "\n").encode() for line in dropped)
        _close_synced(file)
    checked = [*(f"index/{name}.npy" for name in COLUMNS), "dropped.jsonl"]
    finished = {
        **info,
        "size": writer.rows,
        "first_size": writer.rows,
        "shards": writer.shards,
        "files": {name: file_digest(writer.folder / name) for name in checked},
    }
    files.write_json(writer.folder / "pool.json", PoolInfo.model_validate(finished).model_dump(mode="json"))
    shutil.rmtree(directory, ignore_errors=True)  # a folder without pool.json: nothing whole is lost
    writer.folder.rename(directory)
    return Pool.open(directory)


class PoolFields(Config):
    """What `write_pool` is told about a pool that is not prepared from a source."""

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
            counts, dropped, source_digest = _add_rows(writer, fields, rows, total, runtime)
            info = {
                **fields.model_dump(),
                "spec_digest": files.digest(fields.spec),
                "source_digest": source_digest,
                "counts": counts,
            }
            return publish(writer, path, dropped, info)


def _add_rows(
    writer: ShardWriter, fields: PoolFields, rows: Any, total: int, runtime: Runtime
) -> tuple[dict[str, int], Sequence[Mapping[str, Any]], str]:
    counts = dict.fromkeys(
        ("read", "undecodable", "duplicate", "duplicate_after_resize", "excluded", "kept"), 0
    )
    dropped: list[dict[str, Any]] = []
    seen: dict[str, dict[bytes, int]] = {"duplicate": {}, "duplicate_after_resize": {}}
    source = hashlib.blake2b(digest_size=16)
    for pixels, label, provenance in rows() if callable(rows) else rows:
        if runtime.stop():
            raise Interrupted(f"stopped while writing pool {fields.name}")
        fitted = image.fit(pixels, fields.image_size, fields.filter)
        content = image.content_hash(pixels)
        source.update(content)
        hashes = {"duplicate": content, "duplicate_after_resize": image.content_hash(fitted)}
        cause = next((cause for cause, key in hashes.items() if key in seen[cause]), None)
        if cause:
            earlier = seen[cause][hashes[cause]]
            dropped.append(
                {"cause": cause, "name": counts["read"], "kept": earlier, "provenance": provenance}
            )
        else:
            writer.add(content, label, image.encode(fitted, fields.codec, fields.quality), provenance)
            for kind, key in hashes.items():
                seen[kind][key] = counts["read"]
        counts["read"] += 1
        counts[cause or "kept"] += 1
        runtime.progress(counts["read"], max(total, counts["read"]))
    return counts, dropped, source.hexdigest()
