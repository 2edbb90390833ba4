"""`prepare`: an external sort that shuffles, deduplicates and encodes any source into a pool.

Parts of the source are decoded by worker processes into sorted runs, kept when finished (decoding.py, runs.py); their
merge, a range of keys at a time, decides what stays (selection.py) and is the pool (writer.py). Rows come in
ascending (keyed hash of content, label, name), so the result does not depend on the source's form, the number of
processes, or kills (DESIGN 4.1).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ssl_diversity.data import image, near, recipes
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.decoding import (
    INTERPRETER_BYTES,
    Decoded,
    Decoder,
    decode_all,
    near_bytes,
    resident_bytes,
    share,
)
from ssl_diversity.data.holdout import TestSplit
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.runs import Runs
from ssl_diversity.data.selection import Selection
from ssl_diversity.data.sources import open_source
from ssl_diversity.data.sources.base import Source
from ssl_diversity.data.table import Keys
from ssl_diversity.data.writer import building, locked, publish, reporting_full_disk, write_pool
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime

__all__ = ["prepare", "write_pool"]

_PART_ITEMS = 8192  # at most, of a form that can be cut anywhere: what a kill can cost each process
_LEAST_PART_ITEMS, _PARTS = 1000, 256  # smaller sets are cut so that many processes have work
_EXCLUDING = {"resize", "size", "filter", "codec", "quality", "seed", "near_duplicates"}  # as the pool's own


def prepare(
    spec: PrepareSpec,
    *,
    processes: int = 1,
    memory_bytes: int = 1 << 30,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Pool:
    """The pool of `spec`: made now, or at once if it is there already.

    Killed and called again, it reuses the parts that were finished. Two callers at once: one works, the
    other waits. `memory_bytes` bounds the memory of all processes together, interpreters included but not what
    the caller holds besides (fewer than `processes` run where it does not carry them). Raises UserError for what
    is wrong with the source, too little memory, a full disk or an empty result; Interrupted when `runtime.stop()`.
    """
    directory = spec.directory
    work = directory.with_name(f".{directory.name}.work")
    if (directory / "pool.json").exists():
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed while it removed it
        return Pool.open(directory)
    share(processes, memory_bytes)
    excluded = _excluded(spec, processes, memory_bytes, runtime)
    with reporting_full_disk(directory), locked(directory, runtime):
        if (directory / "pool.json").exists():
            return Pool.open(directory)
        work.mkdir(exist_ok=True)
        for leftover in work.glob(".*.tmp"):  # of a kill
            leftover.unlink()
        before_bytes = resident_bytes()
        source = _open(spec, work)
        source.runtime = runtime
        holdout = _holdout(spec, source)
        total = sum(len(part) for part in source.parts(spec.split, _PART_ITEMS))
        parts = source.parts(spec.split, min(_PART_ITEMS, max(_LEAST_PART_ITEMS, total // _PARTS)))
        held_bytes = max(0, resident_bytes() - before_bytes)
        processes, run_bytes = share(processes, memory_bytes, held_bytes)
        decoded = decode_all(parts, total, Decoder(work, spec, run_bytes), processes, runtime)
        runs = Runs(work, decoded.runs, near_bytes(spec))
        selection = Selection(spec, runs, work, memory_bytes - held_bytes - INTERPRETER_BYTES, runtime)
        if excluded:
            selection.excluded = Keys.of(
                [
                    image.keyed_hash(spec.seed, content.tobytes())
                    for pool in excluded
                    for content in pool.content
                ]
            )
        if holdout and spec.split != "all":
            selection.test = TestSplit(holdout, len(source.classes), selection.distinct)
        selection.compare(_described(excluded) if excluded and spec.near_duplicates else None)
        options = {"near_duplicates": spec.near_duplicates}
        with building(directory, spec.codec, spec.shard_bytes, **options) as writer:
            selection.write(writer, max(total, decoded.read))
            counts = {**source.counts, **selection.counts, "kept": writer.rows}
            pool = publish(writer, directory, _info(spec, source, decoded, counts))
        shutil.rmtree(work, ignore_errors=True)
        return pool


def _open(spec: PrepareSpec, work: Path) -> Source:
    source = open_source(spec, work)
    if spec.labels_required and not source.classes:
        raise UserError(
            f"set {spec.name!r} has no labels: sort its images into one folder per class to probe on it"
        )
    return source


def _holdout(spec: PrepareSpec, source: Source) -> float:
    """The share of the images that become the test split: 0 where the source has splits of its own."""
    if source.splits:
        return 0.0
    holdout = source.holdout if spec.holdout is None else spec.holdout
    if spec.split == "test" and not holdout:
        raise UserError(
            f"set {spec.name!r} has no test split; say holdout=0.2 to hold out a fifth of each class"
        )
    return holdout


def _excluded(spec: PrepareSpec, processes: int, memory_bytes: int, runtime: Runtime) -> list[Pool]:
    """The test sets of `spec.exclude`, prepared as the pool is."""
    tests = [
        recipes.downstream(name, {}, defaults=spec.model_dump(include=_EXCLUDING))[1] for name in spec.exclude
    ]
    return [prepare(t, processes=processes, memory_bytes=memory_bytes, runtime=runtime) for t in tests]


def _described(pools: list[Pool]) -> near.Described:
    return near.Described(
        np.concatenate([pool.signature for pool in pools]), np.concatenate([pool.thumbnail for pool in pools])
    )


def _info(spec: PrepareSpec, source: Source, decoded: Decoded, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "name": spec.name,
        "source": spec.source,
        "spec": json.loads(spec.model_dump_json()),
        "spec_digest": spec.digest,
        "counts": counts,
        "classes": source.classes,
        "resize": spec.resize,
        "image_size": 0 if spec.resize == "none" else spec.size,
        "filter": spec.filter,
        "codec": spec.codec,
        "quality": spec.quality,
        "seed": spec.seed,
        "origin": spec.origin,
        "terms": spec.terms,
        "source_digest": f"{decoded.digest_sum:032x}",
        "near_duplicates": spec.near_duplicates,
        "real_images": counts["kept"],
    }
