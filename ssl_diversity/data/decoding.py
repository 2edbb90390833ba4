"""Parts of a source to sorted runs of decoded images, in worker processes; finished parts outlive a kill."""

import hashlib
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.data import image, near
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.runs import RunWriter
from ssl_diversity.data.sources.base import Item, Part
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

INTERPRETER_BYTES = 96 << 20  # of a process before its first image: 50 measured, 95 with pyarrow
_LEAST_RUN_BYTES = 16 << 20
_AHEAD = 2  # parts handed out to each process
_TICK_ITEMS = 64  # images from one look at `stop` to the next
_POLL_S = 0.5
_TOLD_S = 2.0  # from one process of a job being told to end to the next
_RUNS_FORMAT = 1  # raised where older finished parts must not be reused
_DECIDING = {"resize", "size", "filter", "codec", "quality", "seed", "near_duplicates"}


def near_bytes(spec: PrepareSpec) -> tuple[int, ...]:
    """Bytes of signature and thumbnail, where rows carry them."""
    return (near.SIGNATURE_BYTES, near.THUMBNAIL_BYTES) if spec.near_duplicates else ()


def share(processes: int, memory_bytes: int, held_bytes: int = 0) -> tuple[int, int]:
    """(processes, bytes of images that each may hold), all interpreters included, and what the source's listing
    holds; UserError for less than one process.
    """
    left = memory_bytes - held_bytes
    while processes > 1 and _run_bytes(processes, left) < _LEAST_RUN_BYTES:
        processes -= 1
    if _run_bytes(processes, left) < _LEAST_RUN_BYTES:
        least = (INTERPRETER_BYTES + 2 * _LEAST_RUN_BYTES + held_bytes) / 2**30
        raise UserError(
            f"{memory_bytes / 2**30:.2f} GiB of memory is too little to prepare a pool;"
            f" allow {least + 0.005:.2f} or more"
        )
    return processes, _run_bytes(processes, left)


def _run_bytes(processes: int, memory_bytes: int) -> int:
    """Half of what is left: the other half is for the image being decoded, and for sorting."""
    interpreters = 1 if processes == 1 else processes + 1
    return (memory_bytes - interpreters * INTERPRETER_BYTES) // (2 * processes)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


Tick = Callable[[int], None]  # told that so many images more were read; raises Interrupted to stop


@dataclass(frozen=True)
class Decoder:
    """Decodes a part into runs in `work`, and writes what it found in a summary last; reuses a finished one."""

    work: Path
    spec: PrepareSpec
    run_bytes: int

    def __call__(self, part: Part, tick: Tick) -> dict[str, Any]:
        spec = self.spec
        name = files.digest([_RUNS_FORMAT, part.key(), spec.model_dump(include=_DECIDING)])
        summary = self.work / f"{name}.json"
        if summary.exists():
            found = files.read_json(summary)
            tick(found["read"])
            return {**found, "reused": True}
        writer = RunWriter(self.work, name, near_bytes(spec), self.run_bytes)
        read = undecodable = digest_sum = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about odd metadata
            for item in part:
                read += 1
                if read % _TICK_ITEMS == 0:
                    tick(_TICK_ITEMS)
                source_name = item.name.encode("utf-8", "surrogateescape")
                try:
                    pixels = pixels_of(item)
                except MemoryError:
                    raise
                except Exception as error:  # PIL raises nearly anything for bytes that are no image
                    undecodable += 1
                    key = image.keyed_hash(spec.seed, b"undecodable" + source_name)
                    writer.add(key, item.label, source_name, _reason(error).encode(), decoded=False)
                    continue
                digest_sum += self._add(writer, item, source_name, pixels)
        writer.flush()
        found = {
            "runs": writer.runs,
            "read": read,
            "undecodable": undecodable,
            "digest_sum": f"{digest_sum:x}",
        }
        files.write_json(summary, found)
        tick(read % _TICK_ITEMS)
        return found

    def _add(self, writer: RunWriter, item: Item, name: bytes, pixels: image.Pixels) -> int:
        spec = self.spec
        content = image.content_hash(pixels)
        stored, encoded = as_stored(item, pixels, spec)
        writer.add(
            image.keyed_hash(spec.seed, content),
            item.label,
            name,
            encoded,
            content=content,
            resized=content if stored is pixels else image.content_hash(stored),
            near=near.describe(pixels) if spec.near_duplicates else (),
        )
        digest = hashlib.blake2b(name + f"\0{item.label}\0".encode() + content, digest_size=16).digest()
        return int.from_bytes(digest)


def pixels_of(item: Item) -> image.Pixels:
    """Decoded as a source's. Raises whatever PIL raises for bytes that are no image."""
    return image.decode_source(item.image) if isinstance(item.image, bytes) else item.image


def as_stored(item: Item, pixels: image.Pixels, spec: PrepareSpec) -> tuple[image.Pixels, bytes]:
    """An image's pixels, and the bytes of it, that a pool of `spec` has; `pixels` are those of the item."""
    stored = image.resized(pixels, spec.resize, spec.size, spec.filter)
    if spec.codec != "original":
        return stored, image.encode(stored, spec.codec, spec.quality)
    return stored, item.image if isinstance(item.image, bytes) else image.encode(pixels, "png", 0)


def _reason(error: Exception) -> str:
    """One line, the same in every run: without the addresses of objects."""
    text = re.sub(r" <[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())}"


@dataclass
class Decoded:
    """What the parts of a source came to."""

    runs: list[str]
    read: int = 0
    undecodable: int = 0
    digest_sum: int = 0
    reused: int = 0  # parts that were finished before
    reused_images: int = 0


def decode_all(
    parts: Iterable[Part], total: int, decoder: Decoder, processes: int, runtime: Runtime
) -> Decoded:
    """Every part through `decoder`, in `processes` processes. Progress counts images, of about 2 `total`."""
    out = Decoded([])
    by_part: dict[int, list[str]] = {}
    started = time.monotonic()

    def report(done: int) -> None:
        rate = (done - out.reused_images) / max(time.monotonic() - started, 1e-9)
        before = f", {out.reused_images:,} images decoded before" if out.reused else ""
        runtime.note(f"decoding {rate:,.0f} images/s, {out.undecodable:,} undecodable{before}")
        runtime.progress(done, max(2 * total, done))

    for number, summary in _mapped(decoder, parts, processes, runtime, report):
        by_part[number] = summary["runs"]
        out.read += summary["read"]
        out.undecodable += summary["undecodable"]
        out.digest_sum = (out.digest_sum + int(summary["digest_sum"], 16)) % (1 << 128)
        if summary.get("reused"):
            out.reused += 1
            out.reused_images += summary["read"]
    out.runs = [run for number in sorted(by_part) for run in by_part[number]]
    return out


def _mapped(
    decoder: Decoder,
    parts: Iterable[Part],
    processes: int,
    runtime: Runtime,
    report: Callable[[int], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, summary) of the parts as they finish; `report` is told how many images were read so far."""
    try:
        if processes <= 1:
            yield from _mapped_here(decoder, parts, runtime, report)
        else:
            yield from _mapped_to_others(decoder, parts, processes, runtime, report)
    except BrokenProcessPool:
        if _is_told_to_stop(runtime):
            raise _stopped() from None
        raise UserError(
            f"a worker process was killed (out of memory?) while preparing; use fewer than processes={processes}"
            " or a smaller memory_bytes, and run it again: finished parts are kept"
        ) from None
    except MemoryError:
        raise UserError(
            "out of memory while preparing; use fewer processes or a smaller memory_bytes, and run it again:"
            " finished parts are kept"
        ) from None


def _mapped_here(
    decoder: Decoder, parts: Iterable[Part], runtime: Runtime, report: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        report(done)
        if runtime.stop():
            raise _stopped()

    for number, part in enumerate(parts):
        yield number, decoder(part, tick)


def _mapped_to_others(
    decoder: Decoder,
    parts: Iterable[Part],
    processes: int,
    runtime: Runtime,
    report: Callable[[int], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A few parts are handed out at a time. Whatever ends this ends the workers within a few images."""
    context = multiprocessing.get_context("spawn")
    stop, done = (
        context.RawValue("b", 0),
        context.Value("q", 0),
    )  # a worker killed at a lock must not block us
    executor = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(stop, done))
    numbered = enumerate(parts)
    pending: dict[Future[dict[str, Any]], int] = {}
    try:
        while True:
            if runtime.stop():
                raise _stopped()
            while len(pending) < _AHEAD * processes and (following := next(numbered, None)):
                pending[executor.submit(_work, decoder, following[1])] = following[0]
            if not pending:
                return
            for future in wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
            report(done.get_obj().value)
    finally:
        stop.value = 1
        executor.shutdown(cancel_futures=True)


def _is_told_to_stop(runtime: Runtime) -> bool:
    """Also when a scheduler's signal to all processes has ended a worker first."""
    until = time.monotonic() + _TOLD_S
    while not runtime.stop() and time.monotonic() < until:
        time.sleep(_POLL_S)
    return runtime.stop()


def _stopped() -> Interrupted:
    return Interrupted("stopped while preparing; finished parts are kept")


# In a worker process

_tick: Tick


def _begin(stop: Any, done: Any) -> None:
    """Ctrl-C and the warning of a scheduler are the parent's to answer; SIGTERM is how the pool ends its workers. A
    worker whose parent was killed ends too, instead of waiting for ever."""
    global _tick
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

    def tick(count: int) -> None:
        with done.get_lock():
            done.value += count
        if stop.value:
            raise _stopped()

    _tick = tick


def _work(decoder: Decoder, part: Part) -> dict[str, Any]:
    return decoder(part, _tick)
