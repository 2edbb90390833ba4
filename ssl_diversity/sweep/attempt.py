"""One try at a task: claim it, run it, publish its result, or write down why not."""

import contextlib
import gc
import os
import signal
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from threading import Event
from typing import Any, Protocol

from ssl_diversity import files
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.ranks import Group, PeerLost
from ssl_diversity.runtime import Runtime, device
from ssl_diversity.sweep import claims, estimate, losses, provenance, slurm, store
from ssl_diversity.sweep.claims import Claim
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.outlook import RESUMED, Clock, Libraries, Neighbours
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.remaining import gave_up
from ssl_diversity.sweep.task import Task, function

SHARED = frozenset({"pretrain"})  # kinds of tasks that all ranks of a worker do together
NAMED = frozenset({"pretrain", "train-generator"})  # long enough for squeue to show which


class Surroundings(Protocol):
    """What an attempt needs to know of the worker that makes it."""

    group: Group
    stop: Event
    signals: list[int]
    log: str
    place: str
    clock: Clock
    libraries: Libraries
    neighbours: Neighbours

    def look_around(self) -> None: ...


class BrokenDevice(Exception):
    """The GPU of this worker fails at anything: every task would fail here."""


class Attempts:
    """Attempts at the tasks of an order, by one worker; `executed` counts those that were run."""

    def __init__(self, order: Order, worker: Surroundings) -> None:
        self.order, self.profile, self.worker, self.executed = order, order.profile, worker, 0

    def at(self, task: Task) -> bool:
        """Claim and run a task; False if another has it. Raises BrokenDevice, and OSError where the disk is full."""
        self.worker.libraries.ready_for(task.kind)
        claim = claims.claim(
            task.folder,
            stale_s=self.profile.stale_s,
            ended=self.worker.neighbours.ended,
            log=self.worker.log,
            mem_gb=self.order.mem_gb,
        )
        if claim is None:
            return False
        if self._settled(task, claim):
            claim.release()
            return True
        self.executed += 1
        self._execute(task, claim)
        return True

    def runtime(self, stop: Any, **wires: Any) -> Runtime:
        """What a task's function is told here."""
        return Runtime(
            device=self.worker.group.ranks.place(device(self.profile.device)),
            threads=self.order.threads,
            cache_bytes=self.profile.cache_bytes,
            cache_dir=self.profile.cache_folder,
            stop=stop,
            **wires,
        )

    def _settled(self, task: Task, claim: Claim) -> bool:
        """Whether a claimed task needs no running: done a moment ago, or not for this worker after all."""
        if (task.folder / "result.json").exists() and (task.output is None or task.output.exists()):
            store.settle(task)
            return True
        gone = claim.previous
        if gone is None or gone.since < self.order.since:
            return False
        losses.record(task, gone, self.profile, losses.cause(gone))
        return (
            gave_up(task, self.order.since, self.profile.max_attempts, self.profile.max_losses)
            or losses.memory_needed(task, self.profile, store.Index("lost")) is not None
        )

    def _execute(self, task: Task, claim: Claim) -> None:
        started = time.time()
        state = {"label": task.label, "kind": task.kind, "key": task.key, "done": 0, "total": 0, "note": ""}
        state |= {"started": started, "heartbeat_s": self.profile.heartbeat_s}
        path = store.store_dir() / "workers" / f"{claim.nonce}.json"

        def beat() -> None:
            self.worker.look_around()
            files.write_json(path, {**state, "process": vars(claims.this_process())})

        pace = estimate.Pace(lambda finished, total: state.update(done=finished, total=total))
        runtime = self.runtime(
            lambda: self.worker.stop.is_set() or claim.lost.is_set(),
            progress=pace,
            note=lambda text: state.update(note=text),
            group=self.worker.group if task.kind in SHARED else Group(),
        )
        self._say("begin", task)
        try:
            store.describe(task)
            beat()
            with claim.heartbeat(self.profile.heartbeat_s, beat):
                value = self._call(task, runtime)
                seconds = time.time() - started
                told = provenance.of(runtime, started, seconds, self.worker.log)
                if store.publish(task, claim, {**value, "run": told}):
                    each = pace.each(task.units) if task.kind in NAMED else 0.0
                    estimate.record(task, value, seconds, self.worker.place, each)
                    self._say("done", task)
                else:
                    self._say("taken over", task)
        except Interrupted:
            self._say("interrupted", task)
            self._heard_by_a_rank(task, claim)
            self._interrupted(task, claim)
        except PeerLost as error:
            self._say(f"lost a rank ({error})", task)
            self._give_back(task, claim, "rank lost")
        except Exception as error:
            self._say("failed", task)
            traceback.print_exc()
            self._failed(task, claim, error, runtime)
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            gc.collect()  # a Trainer is a cycle, which holds the cell's images and networks
            gc.freeze()  # what is there now stays: the next collection need not go through it

    def _call(self, task: Task, runtime: Runtime) -> dict[str, Any]:
        """Run the task's function, on all ranks where they share the work."""
        if task.kind in NAMED and isinstance(self.profile, SlurmProfile):
            slurm.rename(claims.this_job(), task.label)
        if task.kind in SHARED:
            self.worker.group.tell((task.kind, task.spec, task.folder))
        value: dict[str, Any] = function(self.order.functions[task.kind])(task.spec, task.folder, runtime)
        return value

    def _heard_by_a_rank(self, task: Task, claim: Claim) -> None:
        """All ranks stop when one is told to; this one need not be, and would begin the task again."""
        shared = task.kind in SHARED and self.worker.group.ranks.world > 1
        if shared and not (claim.lost.is_set() or self.worker.stop.is_set()):
            self.worker.signals += [signal.SIGTERM, signal.SIGUSR2]  # whichever it was
            self.worker.stop.set()

    def _interrupted(self, task: Task, claim: Claim) -> None:
        """A task that reached the time limit without a state to go on from would do so for ever: that counts."""
        late = bool(self.worker.signals) and self.worker.clock.over()
        if late and task.kind not in RESUMED:
            self._give_back(task, claim, "time limit")
        else:
            claim.release()

    def _failed(self, task: Task, claim: Claim, error: Exception, runtime: Runtime) -> None:
        if not _works(runtime.device):
            self._give_back(task, claim, losses.BROKEN_DEVICE)
            raise BrokenDevice(f"{runtime.device} of this node fails: {error}") from error
        try:
            if claim.held() and not self._needs_memory(task, error):
                store.fail(task, _as_user_error(error, task))
        finally:
            claim.release()
        if files.is_disk_full(error):
            raise error

    def _give_back(self, task: Task, claim: Claim, why: str) -> None:
        held = claims.holder(task.folder)
        try:
            if held is not None and claim.held():
                losses.record(task, held, self.profile, why)
        finally:
            claim.release()

    def _needs_memory(self, task: Task, error: BaseException | None) -> bool:
        """Whether an error, or one that it came from, is a want of memory that a larger worker may meet."""
        while error is not None and not isinstance(error, MemoryError | BrokenProcessPool):
            error = error.__cause__ or error.__context__
        if error is None or not losses.ask_for_more(task, self.profile, self.order.mem_gb):
            return False
        losses.note(task, losses.OUT_OF_MEMORY, f"process {os.getpid()}", self.worker.log)
        return True

    def _say(self, what: str, task: Task) -> None:
        """A line for the worker's log, by which `logs` finds what belongs to a task."""
        print(f"{time.strftime('%F %T')} {what}: {task.label} [{task.kind} {task.key}]", flush=True)


def _works(device: str) -> bool:
    """Whether a device can add; after some errors a GPU, or this process's hold on it, can nothing any more."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        return int(torch.ones(2, device=device).sum()) == 2
    except Exception:
        return False


def _as_user_error(error: Exception, task: Task) -> Exception:
    """A full disk is the user's to mend, however it showed."""
    if files.is_disk_full(error) and not isinstance(error, UserError):
        return files.disk_full(task.folder / "result.json")
    return error
