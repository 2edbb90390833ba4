"""Samples per second of several cells at once on one device, each in a process of its own, as workers are."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, open_cell

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier, Event

WARM_UP_STEPS = 3
LEAST_STEPS = 3
MEASURED_S = 5.0  # about; longer where steps are
READY_S = 600.0  # in which all must have done their first steps


def samples_per_second(spec: CellSpec, runtime: Runtime, count: int) -> float:
    """Of `count` equal cells together, from the moment when each has warmed up; trains nothing that is kept.

    Each has `runtime`'s device and threads. Raises UserError where the cell has too few steps; whatever a process
    raises, such as torch's OutOfMemoryError, where not all of them find room.
    """
    context = multiprocessing.get_context("spawn")
    barrier, asked = context.Barrier(count), context.Event()
    here = runtime.device, runtime.threads, runtime.cache_bytes, runtime.cache_dir
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # what workers inherit
    with ProcessPoolExecutor(count, context, initializer=_join, initargs=(barrier, asked)) as processes:
        try:
            running = [processes.submit(_rate, spec, here) for _ in range(count)]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception()) is not None]
            if errors:
                raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        except BaseException:
            asked.set()
            barrier.abort()
            raise
    return sum(future.result() for future in running)


_barrier: "Barrier"
_asked_to_stop: "Event"


def _join(barrier: "Barrier", asked: "Event") -> None:
    global _barrier, _asked_to_stop
    _barrier, _asked_to_stop = barrier, asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command, which asks us to stop


def _rate(spec: CellSpec, here: tuple[Any, ...]) -> float:
    """Samples per second of this process's cell while the others run."""
    import torch

    from ssl_diversity import loop

    device, threads, cache_bytes, cache_dir = here
    runtime = Runtime(device, threads, cache_bytes=cache_bytes, cache_dir=cache_dir)
    runtime.set_threads()
    ends: list[float] = []

    def stop() -> bool:
        step = len(ends) + 1
        if step == WARM_UP_STEPS:
            _synchronize()
            _barrier.wait(READY_S)
        ends.append(time.monotonic())
        if step < WARM_UP_STEPS + LEAST_STEPS:
            return _asked_to_stop.is_set()
        enough = ends[-1] - ends[WARM_UP_STEPS - 1] >= MEASURED_S
        over = enough or step == order.steps - 1 or _asked_to_stop.is_set()
        if over:
            _synchronize()
            ends[-1] = time.monotonic()
        return over

    def _synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    _, order, module, reader = open_cell(spec, runtime)
    least = WARM_UP_STEPS + LEAST_STEPS + 1
    if order.steps < least:
        raise UserError(
            f"budget={spec.budget}: {order.steps} steps of {spec.batch_size} images are too few to measure; "
            f"give it at least {least * spec.batch_size}"
        )
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
