"""`prepare`: an external sort that shuffles, deduplicates and encodes any source into a pool.

Parts of the source are decoded by worker processes into sorted runs, kept when finished; one streaming
merge of the runs writes the pool. Rows come in ascending (keyed hash of content, source name), so the
result does not depend on the source's form, the number of processes, or kills (DESIGN 4.1).
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.config import validate
from ssl_diversity.data import image, recipes
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.runs import Record, merge, write_run
from ssl_diversity.data.selection import ENTRY, Selection
from ssl_diversity.data.sources import source_class
from ssl_diversity.data.sources.base import Part, Source
from ssl_diversity.data.writer import building, locked, publish, reporting_full_disk, write_pool
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

__all__ = ["prepare", "write_pool"]

_PART_ITEMS = 2000  # at most: what a kill can cost each process


def prepare(
    spec: PrepareSpec,
    *,
    processes: int = 1,
    memory_bytes: int = 1 << 30,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Pool:
    """The pool of `spec`: made now, or at once if it is there already.

    Killed and called again, it reuses the parts that were finished. Two callers at once: one works, the
    other waits. `memory_bytes` bounds what the processes hold of the images together. Raises UserError for
    what is wrong with the source, a full disk or an empty result; Interrupted when `runtime.stop()`.
    """
    directory = spec.directory
    if (directory / "pool.json").exists():
        return Pool.open(directory)
    excluded = _excluded(spec, processes, memory_bytes, runtime)
    with reporting_full_disk(directory), locked(directory, runtime):
        if (directory / "pool.json").exists():
            return Pool.open(directory)
        work = directory.with_name(f".{directory.name}.work")
        work.mkdir(exist_ok=True)
        source = _open(spec, work)
        holdout = _holdout(spec, source)
        parts = list(source.parts(spec.split, _part_items(spec.size, processes, memory_bytes)))
        sorting = partial(_sort_part, work, spec)
        summaries = [files.read_json(path) for path in _sort_all(parts, sorting, processes, runtime)]
        runs = [work / f"{summary['run']}.run" for summary in summaries]
        selection = Selection(spec, excluded)
        if holdout and spec.split != "all":
            selection.hold_out(holdout, merge(runs, work, memory_bytes))
        if spec.deduplicate:
            resized = [work / f"{summary['run']}.resized" for summary in summaries]
            selection.find_equal_after_resize(merge(resized, work, memory_bytes))
        selection.undecodable(summaries)
        with building(directory, spec.codec, spec.shard_bytes) as writer:
            selection.write(merge(runs, work, memory_bytes), writer, runtime)
            pool = publish(writer, directory, selection.dropped, _info(spec, source, selection, summaries))
        shutil.rmtree(work)
        return pool


def _open(spec: PrepareSpec, work: Path) -> Source:
    kind = source_class(spec.source)
    source = kind(validate(kind.Options, spec.options, f"set {spec.name!r}"), work)
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


def _part_items(size: int, processes: int, memory_bytes: int) -> int:
    item_bytes = 3 * size * size + 4096
    return max(1, min(_PART_ITEMS, memory_bytes // (2 * processes * item_bytes)))


def _excluded(spec: PrepareSpec, processes: int, memory_bytes: int, runtime: Runtime) -> set[bytes]:
    """Keyed hashes of the test images of the sets in `spec.exclude`."""
    encoding = spec.model_dump(include={"size", "filter", "codec", "quality", "seed"})
    found: set[bytes] = set()
    for name in spec.exclude:
        test = recipes.downstream(name, {}, defaults=encoding)[1]
        pool = prepare(test, processes=processes, memory_bytes=memory_bytes, runtime=runtime)
        found.update(image.keyed_hash(spec.seed, bytes(content)) for content in pool.content)
    return found


# Sorting: parts to runs, in worker processes


def _sort_part(work: Path, spec: PrepareSpec, part: Part) -> Path:
    """Decode a part into its run, the run of its images as resized, and last a summary; reuse finished ones."""
    name = files.digest([part.key(), spec.model_dump(include={"size", "filter", "codec", "quality", "seed"})])
    summary = work / f"{name}.json"
    if summary.exists():
        return summary
    records, resized_records, undecodable = [], [], []
    digest_sum = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about odd metadata
        for item in part:
            try:
                pixels = image.decode_source(item.image) if isinstance(item.image, bytes) else item.image
            except MemoryError:
                raise
            except Exception as error:  # PIL raises nearly anything for bytes that are no image
                undecodable.append([item.name, _reason(error)])
                continue
            content = image.content_hash(pixels)
            fitted = image.fit(pixels, spec.size, spec.filter)
            resized = image.content_hash(fitted)
            key = image.keyed_hash(spec.seed, content)
            source_name = item.name.encode("utf-8", "surrogateescape")
            encoded = image.encode(fitted, spec.codec, spec.quality)
            records.append(Record(key, source_name, ENTRY.pack(content, resized, item.label) + encoded))
            resized_records.append(Record(resized, key, b""))
            digest_sum += _digest_of(source_name, item.label, content)
    write_run(work / f"{name}.run", sorted(records))
    write_run(work / f"{name}.resized", sorted(resized_records))
    files.write_json(
        summary,
        {"run": name, "read": len(part), "undecodable": undecodable, "digest_sum": f"{digest_sum:x}"},
    )
    return summary


def _reason(error: Exception) -> str:
    """One line, the same in every run: without the addresses of objects."""
    text = re.sub(r" <[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _digest_of(name: bytes, label: int, content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name + f"\0{label}\0".encode() + content, digest_size=16).digest())


def _sort_all(parts: list[Part], sort_part: Any, processes: int, runtime: Runtime) -> list[Path]:
    total = sum(map(len, parts))
    done = 0
    summaries: dict[int, Path] = {}
    for i, path in _mapped(sort_part, parts, processes, runtime):
        summaries[i] = path
        done += len(parts[i])
        runtime.progress(done, total)
    return [summaries[i] for i in range(len(parts))]


def _mapped(function: Any, parts: list[Part], processes: int, runtime: Runtime) -> Iterator[tuple[int, Path]]:
    """(index, function(part)) as they finish, in this process or in `processes` others."""

    def check() -> None:
        if runtime.stop():
            raise Interrupted("stopped while preparing; finished parts are kept")

    if processes <= 1 or len(parts) <= 1:
        for i, part in enumerate(parts):
            check()
            yield i, function(part)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, context, initializer=_end_with_parent)
    try:
        pending = {executor.submit(function, part): i for i, part in enumerate(parts)}
        while pending:
            check()
            for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed (out of memory?) while preparing; use fewer than processes={processes}"
            " or a smaller memory_bytes, and run it again: finished parts are kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too, instead of waiting for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_COUNTS = (
    "read",
    "undecodable",
    "duplicate",
    "conflict",
    "duplicate_after_resize",
    "excluded",
    "held_out",
    "over_max",
)


def _info(
    spec: PrepareSpec, source: Source, selection: Selection, summaries: list[dict[str, Any]]
) -> dict[str, Any]:
    digest_sum = sum(int(summary["digest_sum"], 16) for summary in summaries) % (1 << 128)
    return {
        "name": spec.name,
        "source": spec.source,
        "spec": json.loads(spec.model_dump_json()),
        "spec_digest": spec.digest,
        "counts": {name: selection.counts[name] for name in (*_COUNTS, "kept")},
        "classes": source.classes,
        "image_size": spec.size,
        "filter": spec.filter,
        "codec": spec.codec,
        "quality": spec.quality,
        "seed": spec.seed,
        "origin": spec.origin,
        "terms": spec.terms,
        "source_digest": f"{digest_sum:032x}",
        "real_images": selection.counts["kept"],
    }
