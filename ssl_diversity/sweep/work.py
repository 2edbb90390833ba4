"""A worker: claims the next task whose inputs are done, runs it, publishes its result, until none is left."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import claims, estimate, store
from ssl_diversity.sweep.claims import Claim, Process
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.profile import Profile, SlurmProfile
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import FUNCTIONS, REPORT, Task, function

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SQUEUE_S = 20.0  # how long SLURM may take to answer
PRODUCERS = frozenset({"prepare", "train-generator", "generate"})  # what a plan may wait for
PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "lightly",
    "diffusers",
    "timm",
    "numpy",
    "ssl-diversity",
)


@dataclass(frozen=True)
class Order:
    """What a worker is told. `since` is when the run began: older failures are forgiven.

    `skip` are kinds of tasks to leave alone. A worker whose `submitter` has died stops, where one is given.
    `with_report`: whoever finds nothing left to do writes the report, there being no submitter to do it.
    """

    sweep: SweepConfig
    profile: Profile
    threads: int
    since: float
    skip: frozenset[str] = frozenset()
    submitter: Process | None = None
    with_report: bool = False
    functions: dict[str, str] = field(default_factory=lambda: dict(FUNCTIONS))


class Current:
    """The plan of a sweep, made again when something that it waits for may have appeared."""

    def __init__(self, sweep: SweepConfig, skip: frozenset[str] = frozenset()) -> None:
        self.sweep, self.skip = sweep, skip
        self.plan = self._expand(Done())

    def refresh(self, done: Done) -> Plan:
        if self.plan.waiting and _made(self.plan, done) != self._seen:
            self.plan = self._expand(done)
        return self.plan

    def _expand(self, done: Done) -> Plan:
        plan = expand(self.sweep).without(self.skip, done)
        self._seen = _made(plan, done)
        return plan


def _made(plan: Plan, done: Done) -> int:
    return sum(task in done for task in plan.tasks if task.kind in PRODUCERS)


@dataclass(frozen=True)
class Left:
    """What a plan still asks for: tasks `ready` to be claimed, others that wait for them, and what failed."""

    ready: tuple[Task, ...]
    later: tuple[Task, ...]
    failed: tuple[Task, ...]
    blocked: tuple[Task, ...]  # behind a failed one

    @property
    def over(self) -> bool:
        return not self.ready and not self.later


def left(
    plan: Plan,
    done: Done,
    *,
    since: float,
    max_attempts: int,
    retried: frozenset[tuple[str, str]] = frozenset(),
) -> Left:
    """Sort the tasks that are not done. A failed one has used up its attempts since `since` and is not `retried`."""
    marked = store.Index("failed")
    out: dict[str, list[Task]] = {"ready": [], "later": [], "failed": [], "blocked": []}
    dead: set[tuple[str, str]] = set()
    for task in plan.tasks:  # needs come before what needs them
        if task in done:
            continue
        if any(need.id in dead for need in task.needs):
            out["blocked"].append(task)
            dead.add(task.id)
        elif (
            task.id not in retried
            and task.key in marked.keys(task.kind)
            and gave_up(task, since, max_attempts)
        ):
            out["failed"].append(task)
            dead.add(task.id)
        else:
            out["ready" if done.all(task.needs) else "later"].append(task)
    return Left(**{name: tuple(tasks) for name, tasks in out.items()})


def gave_up(task: Task, since: float, max_attempts: int) -> bool:
    found = store.failures(task, since)
    return len(found) >= max_attempts or any(failure.by_user for failure in found)


class Worker:
    """One worker as submitit runs it: picklable, called once per job, and again after a requeue."""

    def __init__(self, order: Order, index: int = 0) -> None:
        self.order, self.index = order, index

    def __call__(self) -> None:
        before = signal.getsignal(signal.SIGUSR2)  # submitit's: saves the job and asks for a requeue
        gpus = os.environ.get("SSL_DIVERSITY_GPUS", "")
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[self.index % len(gpus.split(","))]
        stopped_by = run_worker(self.order)
        slurm = isinstance(self.order.profile, SlurmProfile)
        again = stopped_by == signal.SIGUSR2 or (stopped_by == signal.SIGTERM and slurm and preempted())
        if again and callable(before):
            before(signal.SIGUSR2, None)

    def checkpoint(self) -> Any:
        """What submitit submits again: the same worker (what is done is in the store)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def preempted() -> bool:
    """Whether a SIGTERM is SLURM's wish for the node: of a job that was cancelled, it ends the running first."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return False
    ask = ["squeue", "--noheader", "--jobs", job, "--format=%T"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=SQUEUE_S)
        return told.stdout.strip() == "RUNNING"
    return False


def run_worker(order: Order) -> int:
    """Work until nothing is left to claim; returns the signal that ended it early, or 0.

    Returns early, too, when every task left has been held by other live workers for `linger_s`.
    """
    return _Run(order).run()


class _Run:
    def __init__(self, order: Order) -> None:
        self.order, self.profile = order, order.profile
        self.signal = 0
        self.stop = threading.Event()

    def run(self) -> int:
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            store.open_store()
            self._loop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.signal

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number
        self.stop.set()

    def _loop(self) -> None:
        current = Current(self.order.sweep, self.order.skip)
        idle_since = time.monotonic()
        while not self.stop.is_set():
            done = Done()
            plan = current.refresh(done)
            rest = left(plan, done, since=self.order.since, max_attempts=self.profile.max_attempts)
            if rest.over:
                if self.order.with_report:
                    self._report()
                return
            if any(self._try(task) for task in rest.ready):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self.profile.linger_s:
                return
            else:
                self._watch_submitter()
                self.stop.wait(self.profile.poll_s)

    def _report(self) -> None:
        """The report, by one worker at a time: what another would add now, it has read already."""
        claim = claims.claim(self.order.sweep.folder, stale_s=self.profile.stale_s)
        if claim is None:
            return
        try:
            with claim.heartbeat(self.profile.heartbeat_s):
                function(REPORT)(remember(self.order.sweep, ended=True, tell=print))
        finally:
            claim.release()

    def _watch_submitter(self) -> None:
        if self.order.submitter is not None and self.order.submitter.alive() is False:
            self.stop.set()

    def _try(self, task: Task) -> bool:
        """Claim and run a task; False if another has it."""
        claim = claims.claim(task.folder, stale_s=self.profile.stale_s)
        if claim is None:
            return False
        if self._settled(task, claim):
            claim.release()
            return True
        self._execute(task, claim)
        return True

    def _settled(self, task: Task, claim: Claim) -> bool:
        """Whether a claimed task needs no running: done a moment ago, or fatal to too many workers."""
        if (task.folder / "result.json").exists() and (task.output is None or task.output.exists()):
            store.settle(task)
            return True
        gone = claim.previous
        if gone is not None and gone.since >= self.order.since:
            where = f"process {gone.process.pid} on {gone.process.machine.split()[0]}"
            store.fail(task, f"WorkerDied: {where} ended while running this task (killed, or out of memory?)")
            return gave_up(task, self.order.since, self.profile.max_attempts)
        return False

    def _execute(self, task: Task, claim: Claim) -> None:
        started = time.time()
        state = {"label": task.label, "kind": task.kind, "key": task.key, "done": 0, "total": 0, "note": ""}
        state |= {"started": started, "heartbeat_s": self.profile.heartbeat_s}
        path = store.store_dir() / "workers" / f"{claim.nonce}.json"

        def beat() -> None:
            self._watch_submitter()
            files.write_json(path, {**state, "process": vars(claims.this_process())})

        def progress(finished: int, total: int) -> None:
            state.update(done=finished, total=total)

        def note(text: str) -> None:
            state.update(note=text)

        runtime = Runtime(
            device=device(self.profile.device),
            threads=self.order.threads,
            progress=progress,
            note=note,
            cache_bytes=self.profile.cache_bytes,
            cache_dir=self.profile.cache_folder,
            stop=lambda: self.stop.is_set() or claim.lost.is_set(),
        )
        try:
            store.describe(task)
            beat()
            with claim.heartbeat(self.profile.heartbeat_s, beat):
                value = function(self.order.functions[task.kind])(task.spec, task.folder, runtime)
                seconds = time.time() - started
                provenance = _provenance(runtime, started, seconds)
                if store.publish(task, claim, {**value, "run": provenance}):
                    estimate.record(task, value, seconds, runtime.device, runtime.threads)
        except Interrupted:
            claim.release()
        except Exception as error:
            try:
                if claim.held():
                    store.fail(task, _as_user_error(error, task))
            finally:
                claim.release()
            if files.is_disk_full(error):
                raise
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def prepare_pool(spec: PrepareSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """The task function of `prepare`."""
    from ssl_diversity.data.prepare import prepare

    pool = prepare(spec, processes=runtime.threads, runtime=runtime)
    return {"pool": pool.path.name, "digest": pool.digest, "size": pool.size, "counts": pool.info.counts}


@cache
def device(asked: str) -> str:
    """`auto` is the GPU where torch finds one."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _as_user_error(error: Exception, task: Task) -> Exception:
    """A full disk is the user's to mend, however it showed."""
    if files.is_disk_full(error) and not isinstance(error, UserError):
        return files.disk_full(task.folder / "result.json")
    return error


def _provenance(runtime: Runtime, started: float, seconds: float) -> dict[str, Any]:
    return {
        "device": runtime.device,
        "threads": runtime.threads,
        "machine": claims.this_machine().split()[0],
        "job": claims.this_process().job,
        "started": started,
        "seconds": seconds,
        "python": sys.version.split()[0],
        "versions": _versions(),
        "commit": _commit(),
    }


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def _commit() -> str:
    """The code's git commit, `+` if files differ from it; "" where git cannot tell."""
    git = ["git", "-C", str(files.REPOSITORY)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")
