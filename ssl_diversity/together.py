"""Samples per second of several cells at once on one device, each in a process of its own, as workers are."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.profiling import WARM_UP_STEPS, check_steps, wait
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, open_cell

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LEAST_STEPS = 3
MEASURED_S = 5.0  # about; longer where steps are
LEAVE_S = 30.0  # in which a process that is not needed any more must end its step


class ProcessFailed(Exception):
    """One of the processes did not get through, most likely for want of memory."""


def samples_per_second(spec: CellSpec, runtime: Runtime, count: int) -> float:
    """Of `count` equal cells together, from the moment when each has warmed up; trains nothing that is kept.

    Each has `runtime`'s device and threads. Raises UserError where the cell cannot be measured, ProcessFailed where not
    all of them find room.
    """
    context = multiprocessing.get_context("spawn")
    here = runtime.device, runtime.threads, runtime.cache_bytes, runtime.cache_dir
    pipes = [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(target=_train, args=(theirs, spec, here), daemon=True) for _, theirs in pipes
    ]
    try:
        with _as_workers_start():
            for process in processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()
        for ours, _ in pipes:
            _hear(ours)
        for ours, _ in pipes:
            ours.send("go")
        return sum(_hear(ours) for ours, _ in pipes)
    finally:
        for ours, _ in pipes:
            ours.close()  # which a process that still trains sees after its step
        until = time.monotonic() + LEAVE_S
        for process in processes:
            if process.pid is not None:
                process.join(max(0.0, until - time.monotonic()))
                process.kill()
                process.join()


@contextlib.contextmanager
def _as_workers_start() -> Iterator[None]:
    """Threads that wait sleep; a Ctrl-C is for the command, whose end the processes notice."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _hear(process: "Connection") -> float:
    """0 from one that is warm, its rate from one that is through."""
    try:
        told = process.recv()
    except (EOFError, ConnectionResetError):
        raise ProcessFailed("a process was killed (out of memory?)") from None
    if isinstance(told, Exception):
        raise told
    return float(told)


def _train(parent: "Connection", spec: CellSpec, here: tuple[Any, ...]) -> None:
    """What a process does: warm up, say so, wait for the others, train for a while and tell its samples per second."""
    try:
        told: Any = _rate(parent, spec, here)
    except UserError as error:
        told = error
    except EOFError:
        return  # nobody waits for it any more
    except Exception as error:
        told = ProcessFailed(f"{type(error).__name__}: {error}".strip().splitlines()[0])
    with contextlib.suppress(OSError):
        parent.send(told)


def _rate(parent: "Connection", spec: CellSpec, here: tuple[Any, ...]) -> float:
    import torch

    from ssl_diversity import loop

    name, threads, cache_bytes, cache_dir = here
    device = torch.device(name)
    runtime = Runtime(name, threads, cache_bytes=cache_bytes, cache_dir=cache_dir)
    runtime.set_threads()
    ends: list[float] = []

    def stop() -> bool:
        step = len(ends) + 1
        if step == WARM_UP_STEPS:
            wait(device)
            parent.send(0.0)
            parent.recv()
        ends.append(time.monotonic())
        alone = parent.poll()  # nothing more is sent: it has gone
        if step < WARM_UP_STEPS + LEAST_STEPS:
            return alone
        enough = ends[-1] - ends[WARM_UP_STEPS - 1] >= MEASURED_S
        over = enough or step == order.steps - 1 or alone
        if over:
            wait(device)
            ends[-1] = time.monotonic()
        return over

    _, order, module, reader = open_cell(spec, runtime)
    check_steps(spec, order.steps, WARM_UP_STEPS + LEAST_STEPS + 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Interrupted):
        loop.fit(
            module,
            order=order,
            reader=reader,
            out=Path(folder),
            runtime=replace(runtime, stop=stop),
            precision=spec.precision,
            checkpoint_samples=10**15,
        )
    steps = len(ends) - WARM_UP_STEPS
    return steps * spec.batch_size / (ends[-1] - ends[WARM_UP_STEPS - 1])
