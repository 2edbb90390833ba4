"""Pools that grow in place: rows are added behind those that are there, under their readers.

Everything new is written into `<pool>/.growth`, last a pool.json of old and new. Then shards, columns and the list of
drops move to their places one by one, and at the end pool.json, which makes the pool the longer one. After a kill
before the moves the next growth begins afresh; after one among them it moves the rest. Till then the pool is the
shorter one, whose columns may be longer than its pool.json says, which readers cut.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.config import validate
from ssl_diversity.data.config import PoolInfo
from ssl_diversity.data.pool import OPTIONAL_COLUMNS, Pool
from ssl_diversity.data.shards import AGAIN
from ssl_diversity.data.writer import (
    PoolFields,
    ShardWriter,
    building,
    file_digest,
    finish,
    locked,
    publish,
    reporting_full_disk,
)
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime

_GROWTH = ".growth"
_LASTING = ("image_size", "filter", "codec", "quality", "seed", "classes", "near_duplicates")


class Growing:
    """A pool to which rows are being added; `finish` makes them part of it, without it nothing has happened.

    `rows` and `content`, uint8 (rows, 16), are what the pool had before: 0 rows where it is new.
    """

    def __init__(self, path: Path, fields: PoolFields, writer: ShardWriter, pool: Pool | None) -> None:
        self.path = path
        self.rows = 0 if pool is None else pool.size
        self.content: NDArray[np.uint8] = np.zeros((0, 16), np.uint8) if pool is None else pool.content
        self._fields, self._writer, self._pool = fields, writer, pool

    def add(  # noqa: PLR0917
        self,
        content: bytes,
        label: int,
        encoded: bytes,
        provenance: Mapping[str, Any] | None = None,
        signature: bytes | None = None,
        thumbnail: bytes | None = None,
    ) -> None:
        """The next row: hash of the source pixels, class number or -1, encoded image, and what was noted about it.

        Signature and thumbnail (near.py) if and only if the pool has them: ValueError otherwise.
        """
        near = {"signature": signature, "thumbnail": thumbnail}
        for name, value in near.items():
            wanted = OPTIONAL_COLUMNS[name][1][0] if name in self._writer.near else None
            if wanted != (None if value is None else len(value)):
                raise ValueError(f"{name}: the pool wants {wanted or 'no'} bytes of it")
        self._writer.add(content, label, encoded, provenance)
        for name in self._writer.near:
            self._writer.columns[name].write(near[name] or b"")

    def drop(self, cause: str, name: Any, **details: Any) -> None:
        """A line of dropped.jsonl, which is written anew: at each growth the drops of the whole pool are given."""
        self._writer.drop(cause, name, **details)

    def finish(self, counts: Mapping[str, int], *, source_digest: str, provenance: Mapping[str, Any]) -> Pool:
        """The pool with the rows added; as it was if there are none. All three are of the whole pool."""
        info = {
            **self._fields.model_dump(),
            "spec_digest": files.digest(self._fields.spec),
            "source_digest": source_digest,
            "counts": dict(counts),
            "provenance": dict(provenance),
            "near_duplicates": bool(self._writer.near),
        }
        if self._pool is None:
            return publish(self._writer, self.path, info)
        if self._writer.rows > self.rows:
            finish(self._writer, {**info, "first_size": self._pool.info.first_size})
            _settle(self.path)
        return Pool.open(self.path)


@contextlib.contextmanager
def growing(
    path: Path,
    fields: PoolFields | Mapping[str, Any],
    *,
    near_duplicates: bool = False,
    shard_bytes: int = 1 << 28,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Iterator[Growing]:
    """Add rows to the pool `path`, which is made if there is none; one process at a time, others wait.

    The rows that are there stay what they are, and so do draws of them (`Rows`); the pool's digest is that of one made
    with all rows at once. New rows come in shards of their own. First, an interrupted growth is finished or undone.

    Raises UserError where the pool is of another spec, encoding or classes, lies elsewhere (`data attach`), or
    is damaged; or where the disk is full.
    """
    if not isinstance(fields, PoolFields):
        fields = validate(PoolFields, fields, f"pool {path.name}")
    with reporting_full_disk(path), locked(path, runtime):
        if not (path / "pool.json").exists():
            with building(path, fields.codec, shard_bytes, near_duplicates=near_duplicates) as writer:
                yield Growing(path, fields, writer, None)
            return
        _settle(path)
        pool = Pool.open(path)
        _check(pool, fields, near_duplicates)
        growth = path / _GROWTH
        try:
            writer = ShardWriter(
                growth, fields.codec, shard_bytes, near_duplicates=near_duplicates, after=pool
            )
            try:
                yield Growing(path, fields, writer, pool)
            finally:
                writer.abandon()
        finally:
            if not (growth / "pool.json").exists():  # else the moves have begun, and are not undone
                shutil.rmtree(growth, ignore_errors=True)


def unfinished(path: Path) -> PoolInfo | None:
    """What the pool `path` becomes once a growth, which is under way or was interrupted, has moved all its files."""
    try:
        return validate(PoolInfo, files.read_json(path / _GROWTH / "pool.json"), str(path / _GROWTH))
    except FileNotFoundError:
        return None


def _settle(path: Path) -> None:
    """Move what an all but finished growth has written, else remove what there is of it."""
    growth = path / _GROWTH
    if (growth / "pool.json").exists():
        for folder in ("shards", "index"):
            for file in sorted((growth / folder).iterdir()):
                file.replace(path / folder / file.name)
            files.sync(path / folder)
        if (growth / "dropped.jsonl").exists():
            (growth / "dropped.jsonl").replace(path / "dropped.jsonl")
        files.sync(path)
        (growth / "pool.json").replace(path / "pool.json")
        files.sync(path)
    shutil.rmtree(growth, ignore_errors=True)


def _check(pool: Pool, fields: PoolFields, near_duplicates: bool) -> None:
    """UserError where a pool cannot take rows that are made as `fields` say."""
    if pool.remote is not None:
        raise UserError(f"pool {pool.path.name} lies at {pool.remote}: it grows there, not here")
    wanted = {**fields.model_dump(mode="json"), "near_duplicates": near_duplicates}
    found = pool.info.model_dump(mode="json")
    differ = [name for name in _LASTING if wanted[name] != found[name]]
    specs = wanted["spec"], found["spec"]
    differ += sorted(
        f"spec.{name}" for name in specs[0].keys() | specs[1] if specs[0].get(name) != specs[1].get(name)
    )
    if differ:
        raise UserError(
            f"pool {pool.path} was made otherwise ({', '.join(differ)} differ) and cannot grow so;"
            " give the new one another name"
        )
    pool.check_shards()
    for name, checksum in pool.info.files.items():
        if name.startswith("index/") and file_digest(pool.path / name) != checksum:
            raise UserError(f"damaged index {pool.path / name}: {AGAIN}")
