"""A worker: claims the next task whose inputs are done, runs it, publishes its result, until none is left."""

import contextlib
import os
import signal
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.ranks import Group, PeerLost, Ranks, joined
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import claims, estimate, fleet, losses, provenance, slurm, store
from ssl_diversity.sweep.claims import Claim
from ssl_diversity.sweep.orders import Current, Order
from ssl_diversity.sweep.outlook import RESUMED, Clock, Neighbours
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.remaining import Left, Remaining, gave_up
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import REPORT, Task, function

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SHARED = frozenset({"pretrain"})  # kinds of tasks that all ranks of a worker do together
NAMED = frozenset({"pretrain", "train-generator"})  # long enough for squeue to show which


class Worker:
    """One worker as submitit runs it: picklable, called once per job and rank, and again after a requeue."""

    def __init__(self, order: Order, index: int = 0) -> None:
        self.order, self.index = order, index

    def __call__(self) -> None:
        again = signal.getsignal(signal.SIGUSR2)  # submitit's: saves the job and asks for a requeue
        ranks = Ranks.current()
        self._take_gpus(ranks)
        with joined(ranks, ranks.place(device(self.order.profile.device)), _meeting()) as group:
            run = Run(self.order, group)
            if not group.first:
                return run.follow()
            run.lead()
        if run.comes_back:
            self._come_back(run, again)

    def checkpoint(self) -> Any:
        """What submitit submits again: the same worker (what is done is in the store)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _take_gpus(self, ranks: Ranks) -> None:
        """Of a local worker: its share of those that SSL_DIVERSITY_GPUS names."""
        gpus = [name for name in os.environ.get("SSL_DIVERSITY_GPUS", "").split(",") if name]
        if gpus:
            mine = range(self.index * ranks.local_world, (self.index + 1) * ranks.local_world)
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(gpus[i % len(gpus)] for i in mine))

    def _come_back(self, run: "Run", again: Any) -> None:
        """Ask for this worker's place in the queue again, or for another worker; else the launcher has to."""
        profile = self.order.profile
        if not isinstance(profile, SlurmProfile):
            return
        if profile.requeue and callable(again):
            try:
                again(signal.SIGUSR2, None)  # ends the process
            except Exception as error:
                print(f"not requeued: {error}", flush=True)
        run.successor()


class Run:
    """What one rank of a worker does between its start and its end."""

    def __init__(self, order: Order, group: Group | None = None) -> None:
        self.order, self.profile, self.group = order, order.profile, group or Group()
        self.signal = 0
        self.goes_on = (
            False  # whether it ends before its work does: no time left, or as many tasks as it may do
        )
        self.stop = threading.Event()
        self.tasks_done = 0
        self.log = _log()
        self.clock = Clock(order, device(order.profile.device))
        self.neighbours = Neighbours(order)

    def lead(self) -> int:
        """Work until nothing is left to claim; returns the signal that ended it early, or 0.

        Returns early, too, when every task left has been held by other live workers for `linger_s`.
        """
        with self._signals():
            try:
                store.open_store()
                self._loop()
            finally:
                with contextlib.suppress(PeerLost):
                    self.group.tell(None)
        return self.signal

    @property
    def comes_back(self) -> bool:
        """Whether its work is to be gone on with in its place: not that of a job that was cancelled."""
        if self.order.cancelled:
            return False
        if self.signal == signal.SIGTERM and isinstance(self.profile, SlurmProfile):
            return slurm.running(claims.this_job())
        return self.goes_on or self.signal == signal.SIGUSR2

    def follow(self) -> None:
        """Do what rank 0 says, until it has nothing more."""
        with self._signals():
            try:
                while (told := self.group.hear()) is not None:
                    kind, spec, folder = told
                    runtime = self._runtime(self.stop.is_set, group=self.group)
                    with contextlib.suppress(Interrupted):
                        function(self.order.functions[kind])(spec, folder, runtime)
            except PeerLost as error:
                print(f"lost a rank ({error}): leaving", flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Any:
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number
        self.stop.set()

    def _loop(self) -> None:
        current, done = Current(self.order.sweep, self.order.skip), Done()
        remaining = Remaining(**self.order.limits)
        idle_since = time.monotonic()
        while not self.stop.is_set():
            done.refresh()
            before, plan = current.plan, current.refresh(done)
            rest = remaining.look(plan, done)
            if rest.over:
                self._dismiss()
                if self.order.with_report:
                    self._report()
                return
            if plan is not before or self.neighbours.due():
                self._keep_up(plan, rest, new=plan is not before)
            mine = self._mine(rest)
            timely = [task for task in mine if self.clock.has_time_for(task)]
            if any(self._try(task) for task in timely):
                idle_since = time.monotonic()
                self.tasks_done += 1
                if self.group.broken or self.tasks_done == self.profile.tasks_per_worker:
                    self.goes_on = True
                    return
            elif len(timely) < len(mine):
                self.goes_on = True
                return
            elif time.monotonic() - idle_since > self.profile.linger_s:
                return
            else:
                self._look_around()
                self.stop.wait(self.profile.poll_s)

    def _mine(self, rest: Left) -> list[Task]:
        """Of the tasks that are ready, those for a worker of this class and memory."""
        lost, has_gb = store.Index("lost"), self.order.mem_gb
        return [
            task
            for task in rest.ready
            if self.order.takes(task) and losses.memory_needed(task, has_gb, lost) is None
        ]

    def successor(self) -> None:
        """Have another worker sent for this one, which ends."""
        if isinstance(self.profile, SlurmProfile) and self.profile.successors:
            plan, done = Current(self.order.sweep, self.order.skip).plan, Done()
            patience_s = min(self.profile.submit_patience_s, self.profile.signal_delay_s / 2)
            more: dict[str, Any] = {"leaving": claims.this_job(), "patience_s": patience_s}
            self._send(fleet.Slurm(self.order, Worker), plan, self.order.left(plan, done), **more)

    def _keep_up(self, plan: Plan, rest: Left, *, new: bool) -> None:
        """Send workers that are missing, where the plan is new or nobody has looked for a while."""
        if isinstance(self.profile, SlurmProfile) and self.profile.successors:
            crew = fleet.Slurm(self.order, Worker)
            if new or claims.file_time() - crew.looked_at() > self.profile.ask_s:
                self._send(crew, plan, rest)

    def _send(self, crew: fleet.Fleet, plan: Plan, rest: Left, **more: Any) -> None:
        try:
            crew.supply(rest, waiting=bool(plan.waiting), **more)
        except (slurm.NoAnswer, UserError) as error:
            print(f"no workers sent: {error}", flush=True)

    def _dismiss(self) -> None:
        """Nobody needs to wait for a node any more."""
        if isinstance(self.profile, SlurmProfile):
            with contextlib.suppress(slurm.NoAnswer):
                fleet.Slurm(self.order, Worker).dismiss()

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

    def _look_around(self) -> None:
        """Stop where the submitter has died or somebody said `cancel`."""
        submitter = self.order.submitter
        if (submitter is not None and submitter.alive() is False) or self.order.cancelled:
            self.stop.set()

    def _try(self, task: Task) -> bool:
        """Claim and run a task; False if another has it."""
        claim = claims.claim(
            task.folder, stale_s=self.profile.stale_s, ended=self.neighbours.ended, log=self.log
        )
        if claim is None:
            return False
        if self._settled(task, claim):
            claim.release()
            return True
        self._execute(task, claim)
        return True

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
            or losses.memory_needed(task, self.order.mem_gb, store.Index("lost")) is not None
        )

    def _execute(self, task: Task, claim: Claim) -> None:
        started = time.time()
        state = {"label": task.label, "kind": task.kind, "key": task.key, "done": 0, "total": 0, "note": ""}
        state |= {"started": started, "heartbeat_s": self.profile.heartbeat_s}
        path = store.store_dir() / "workers" / f"{claim.nonce}.json"

        def beat() -> None:
            self._look_around()
            files.write_json(path, {**state, "process": vars(claims.this_process())})

        runtime = self._runtime(
            lambda: self.stop.is_set() or claim.lost.is_set(),
            progress=lambda finished, total: state.update(done=finished, total=total),
            note=lambda text: state.update(note=text),
            group=self.group if task.kind in SHARED else Group(),
        )
        self._say("begin", task)
        try:
            store.describe(task)
            beat()
            with claim.heartbeat(self.profile.heartbeat_s, beat):
                value = self._call(task, runtime)
                seconds = time.time() - started
                told = provenance.of(runtime, started, seconds, self.log)
                if store.publish(task, claim, {**value, "run": told}):
                    estimate.record(task, value, seconds, runtime.device, runtime.threads)
                    self._say("done", task)
                else:
                    self._say("taken over", task)
        except Interrupted:
            self._say("interrupted", task)
            self._interrupted(task, claim, started)
        except PeerLost as error:
            self._say(f"lost a rank ({error})", task)
            self._give_back(task, claim, str(error), started)
        except Exception as error:
            self._say("failed", task)
            traceback.print_exc()
            try:
                if claim.held() and not self._needs_memory(task, error):
                    store.fail(task, _as_user_error(error, task))
            finally:
                claim.release()
            if files.is_disk_full(error):
                raise
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _call(self, task: Task, runtime: Runtime) -> dict[str, Any]:
        """Run the task's function, on all ranks where they share the work."""
        if task.kind in NAMED and isinstance(self.profile, SlurmProfile):
            slurm.rename(claims.this_job(), task.label)
        if task.kind in SHARED:
            self.group.tell((task.kind, task.spec, task.folder))
        value: dict[str, Any] = function(self.order.functions[task.kind])(task.spec, task.folder, runtime)
        return value

    def _runtime(self, stop: Any, **wires: Any) -> Runtime:
        return Runtime(
            device=self.group.ranks.place(device(self.profile.device)),
            threads=self.order.threads,
            cache_bytes=self.profile.cache_bytes,
            cache_dir=self.profile.cache_folder,
            stop=stop,
            **wires,
        )

    def _interrupted(self, task: Task, claim: Claim, started: float) -> None:
        """A task that reached the time limit without a state to go on from would do so for ever: that counts."""
        if self.signal == signal.SIGUSR2 and task.kind not in RESUMED and self.clock.over():
            self._give_back(task, claim, "time limit", started)
        else:
            claim.release()

    def _give_back(self, task: Task, claim: Claim, why: str, started: float) -> None:
        held = claims.holder(task.folder)
        try:
            if held is not None and claim.held():
                losses.record(task, held, self.profile, why)
        finally:
            claim.release()

    def _needs_memory(self, task: Task, error: Exception) -> bool:
        if not isinstance(error, MemoryError) or not losses.ask_for_more(task, self.profile):
            return False
        losses.note(task, losses.OUT_OF_MEMORY, f"process {os.getpid()}", self.log)
        return True

    def _say(self, what: str, task: Task) -> None:
        """A line for the worker's log, by which `logs` finds what belongs to a task."""
        print(f"{time.strftime('%F %T')} {what}: {task.label} [{task.kind} {task.key}]", flush=True)


def run_worker(order: Order) -> int:
    """One worker on its own, without submitit; returns the signal that ended it early, or 0."""
    return Run(order).lead()


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


def _meeting() -> Path:
    """Where the ranks of this job meet: another file at every start."""
    told = os.environ
    job = told.get("SLURM_JOB_ID", "") or f"local-{os.getppid()}"
    name = f"{job}.{told.get('SLURM_RESTART_COUNT', 0)}.{told.get('SLURM_STEP_ID', 0)}"
    return store.store_dir() / "meetings" / f"{name}.json"


def _log() -> str:
    """Where the output of this process goes, as submitit laid it down; "" outside of it."""
    with contextlib.suppress(Exception):
        from submitit import JobEnvironment

        return str(JobEnvironment().paths.stdout)
    return ""


def _as_user_error(error: Exception, task: Task) -> Exception:
    """A full disk is the user's to mend, however it showed."""
    if files.is_disk_full(error) and not isinstance(error, UserError):
        return files.disk_full(task.folder / "result.json")
    return error
