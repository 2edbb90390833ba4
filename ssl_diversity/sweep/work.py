"""A worker: claims the next task whose inputs are done, runs it, publishes its result, until none is left."""

import contextlib
import os
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.ranks import Group, PeerLost, Ranks, joined
from ssl_diversity.runtime import Runtime, device
from ssl_diversity.sweep import claims, estimate, fleet, losses, orders, slurm, store
from ssl_diversity.sweep.attempt import Attempts
from ssl_diversity.sweep.orders import Current, Order
from ssl_diversity.sweep.outlook import Clock, Libraries, Neighbours
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.remaining import Left, Remaining
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import REPORT, function

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STAYS = 10  # times `linger_s` that the last worker stays where others cannot be sent
HICCUPS = 20  # turns that a file server may fail in a row


class Worker:
    """One worker as submitit runs it: picklable, called once per job and rank, and again after a requeue.

    On a cluster, where much may happen before it starts, it takes the order of a later run there, if there is one.
    """

    def __init__(self, order: Order, index: int = 0) -> None:
        self.order, self.index = order, index

    def __call__(self) -> None:
        again = signal.getsignal(signal.SIGUSR2)  # submitit's: saves the job and asks for a requeue
        signals: list[int] = []  # also before it can stop; submitit lets this one pass
        signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
        order = self.order
        if isinstance(order.profile, SlurmProfile):
            order = orders.newer(order)
            if order is self.order and order.superseded:
                print(f"the latest run of {order.sweep.name} wants no such worker: leaving", flush=True)
                return
        ranks, place = Ranks.current(), estimate.place(order.profile)
        self._take_gpus(ranks)
        with joined(ranks, ranks.place(device(order.profile.device)), _meeting()) as group:
            run = Run(order, group, place, signals)
            if not group.first:
                return run.follow()
            run.lead()
        if isinstance(run.profile, SlurmProfile):
            # neither what it asks SLURM now nor Python as it ends is to fail by a signal
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            comes_back = run.comes_back
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if comes_back:
                self._come_back(run, run.profile, again)
            elif run.share_done:
                run.successor(run.profile)

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

    def _come_back(self, run: "Run", profile: SlurmProfile, again: Any) -> None:
        """Ask for this worker's place in the queue again, or for another worker; else the launcher has to."""
        until, wait_s = time.monotonic() + run.patience_s(profile), 1.0
        while True:
            if profile.requeue and callable(again):
                try:
                    again(signal.SIGUSR2, None)  # ends the process
                except Exception as error:
                    print(f"not requeued: {error}", flush=True)
                    if slurm.meant_to_run(claims.this_job()) is False:
                        return  # it was after all, or somebody cancelled it
            if run.successor(profile) or time.monotonic() + wait_s > until:
                return
            time.sleep(wait_s)
            wait_s *= 2


class Run:
    """What one rank of a worker does between its start and its end."""

    def __init__(
        self, order: Order, group: Group | None = None, place: str = "", signals: list[int] | None = None
    ) -> None:
        """`signals` are those that came before it works; later ones are added."""
        self.group, self.place = group or Group(), place or estimate.place(order.profile)
        self.libraries = Libraries(order, self.place)
        self.signals = [] if signals is None else signals
        self.unfinished = False  # whether it ends with work left that it has no time for
        self.share_done = False  # whether it ends because it has done as many tasks as it may
        self.stayed = 0  # how often it was idle for `linger_s` and nobody else could be sent
        self.stop = threading.Event()
        self.log = _log()
        self.clock = Clock(order, self.place)
        self.neighbours = Neighbours(order)
        self._take(order)

    def _take(self, order: Order) -> None:
        self.order, self.profile = order, order.profile
        self.stamp = orders.stamp(order.sweep.folder)
        self.attempts = Attempts(order, self)

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
        return self.signals[-1] if self.signals else 0

    @property
    def comes_back(self) -> bool:
        """Whether its work is to be gone on with in its place: not that of a job that was cancelled."""
        if orders.newer(self.order).cancelled:
            return False
        if signal.SIGTERM in self.signals and isinstance(self.profile, SlurmProfile):
            meant = slurm.meant_to_run(claims.this_job())
            if meant is not None:
                return meant
        return self.unfinished or signal.SIGUSR2 in self.signals

    def follow(self) -> None:
        """Do what rank 0 says, until it has nothing more."""
        with self._signals():
            try:
                while (told := self.group.hear()) is not None:
                    kind, spec, folder = told
                    runtime = self.attempts.runtime(self.stop.is_set, group=self.group)
                    try:
                        function(self.order.functions[kind])(spec, folder, runtime)
                    except (Interrupted, PeerLost):
                        pass
                    except Exception:  # all ranks have it, and rank 0 records it; else the group is broken
                        traceback.print_exc()
            except PeerLost as error:
                print(f"lost a rank ({error}): leaving", flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Any:
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if self.signals:
            self.stop.set()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signals.append(number)
        self.stop.set()

    def _loop(self) -> None:
        current, done = Current(self.order.sweep, self.order.skip), Done()
        remaining = Remaining(**self.order.limits)
        if self.order.submitter is not None:
            estimate.note("start", estimate.Measured(1, claims.file_time() - self.order.since), self.place)
        idle_since, hiccups = time.monotonic(), 0
        while True:
            if self._adopt():
                current, remaining = (
                    Current(self.order.sweep, self.order.skip),
                    Remaining(**self.order.limits),
                )
            self.look_around()
            if self.stop.is_set():
                return
            try:
                done.refresh()
                before, plan = current.plan, current.refresh(done)
                rest = remaining.look(plan, done)
                if rest.over:
                    self._dismiss()
                    if self.order.with_report:
                        self._report(len(plan.cells))
                        done.refresh()
                        if not remaining.look(current.refresh(done), done).over:
                            idle_since = time.monotonic()
                            continue  # failures were forgiven meanwhile
                    return
                if plan is not before or self.neighbours.due():
                    self._keep_up(plan, rest, new=plan is not before)
                worked = self._work(rest)
                hiccups = 0
            except OSError as error:  # a file server's bad moment
                hiccups += 1
                if hiccups > HICCUPS or files.is_disk_full(error):
                    raise
                print(f"{error}: trying again", flush=True)
                worked = False
            if self.unfinished or self.share_done:
                return
            if worked:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self.profile.linger_s and self._may_leave(rest):
                return
            else:
                self.stop.wait(self.profile.poll_s)

    def _adopt(self) -> bool:
        """Go on with the latest run of the sweep, where a later one than ours has begun on this cluster."""
        if self.order.submitter is not None or not isinstance(self.profile, SlurmProfile):
            return False
        if orders.stamp(self.order.sweep.folder) == self.stamp:
            return False
        before = self.order
        self._take(orders.newer(before))
        return self.order is not before

    def _work(self, rest: Left) -> bool:
        """Claim and do one of the tasks that are ready; False if there is none for this worker now."""
        lost, short = store.Index("lost"), False
        self.clock.look()
        for task in rest.ready:
            if not self.order.takes(task) or losses.memory_needed(task, self.profile, lost) is not None:
                continue
            if self.attempts.executed and not self.clock.has_time_for(task):
                short = True
            elif self.attempts.at(task):
                self.unfinished = bool(self.group.broken)
                self.share_done = self.attempts.executed == self.profile.tasks_per_worker
                return True
        self.unfinished = short
        return False

    def _may_leave(self, rest: Left) -> bool:
        """Whether an idle worker is not needed: not the last one, where what is ready wants others, who must be sent."""
        if not rest.ready or not isinstance(self.profile, SlurmProfile) or not self.profile.successors:
            return True
        self.stayed += 1
        return self.stayed > STAYS or self.successor(self.profile)

    def patience_s(self, profile: SlurmProfile) -> float:
        """How long a worker that leaves may wait for the scheduler."""
        return min(profile.submit_patience_s, profile.signal_delay_s / 2)

    def successor(self, profile: SlurmProfile) -> bool:
        """Have another worker sent for this one, which ends; whether there are others now, or none is needed."""
        if not profile.successors:
            return False
        order = orders.newer(self.order)
        plan, done = Current(order.sweep, order.skip).plan, Done()
        rest, crew = order.left(plan, done), fleet.Slurm(order, Worker)
        if rest.over:
            return True
        more = {"leaving": claims.this_job(), "patience_s": self.patience_s(profile)}
        return self._send(crew, plan, rest, **more) > 0

    def _keep_up(self, plan: Plan, rest: Left, *, new: bool) -> None:
        """Send workers that are missing, where the plan is new or nobody has looked for a while."""
        if isinstance(self.profile, SlurmProfile) and self.profile.successors:
            crew = fleet.Slurm(self.order, Worker)
            if new or claims.file_time() - crew.looked_at() > self.profile.ask_s:
                self._send(crew, plan, rest)

    def _send(self, crew: fleet.Fleet, plan: Plan, rest: Left, **more: Any) -> int:
        """How many there are afterwards; 0 where nobody can tell."""
        try:
            return crew.supply(rest, waiting=bool(plan.waiting), **more)
        except (slurm.NoAnswer, UserError, OSError) as error:
            print(f"no workers sent: {error}", flush=True)
            return 0

    def _dismiss(self) -> None:
        """Nobody needs to wait for a node any more."""
        if isinstance(self.profile, SlurmProfile):
            with contextlib.suppress(slurm.NoAnswer):
                fleet.Slurm(self.order, Worker).dismiss()

    def _report(self, cells: int) -> None:
        """The report, by one worker at a time: what another would add now, it has read already."""
        claim = claims.claim(self.order.sweep.folder, stale_s=self.profile.stale_s)
        if claim is None:
            return
        try:
            with claim.heartbeat(self.profile.heartbeat_s), estimate.timed("report", cells, self.place):
                function(REPORT)(remember(self.order.sweep, ended=True, tell=print))
        finally:
            claim.release()

    def look_around(self) -> None:
        """Stop where the submitter has died or somebody said `cancel`."""
        submitter = self.order.submitter
        if (submitter is not None and submitter.alive() is False) or self.order.cancelled:
            self.stop.set()


def run_worker(order: Order) -> int:
    """One worker on its own, without submitit; returns the signal that ended it early, or 0."""
    return Run(order).lead()


def prepare_pool(spec: PrepareSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """The task function of `prepare`."""
    from ssl_diversity.data.prepare import prepare

    pool = prepare(spec, processes=runtime.threads, runtime=runtime)
    return {"pool": pool.path.name, "digest": pool.digest, "size": pool.size, "counts": pool.info.counts}


def _meeting() -> Path:
    """Where the ranks of this job meet: another file at every start."""
    told = os.environ
    local = told.get("SUBMITIT_EXECUTOR") == "local"
    job = f"local-{os.getppid()}" if local else told.get("SLURM_JOB_ID", "")
    name = f"{job}.{told.get('SLURM_RESTART_COUNT', 0)}.{told.get('SLURM_STEP_ID', 0)}"
    return store.store_dir() / "meetings" / f"{name}.json"


def _log() -> str:
    """Where the output of this process goes, as submitit laid it down; "" outside of it."""
    with contextlib.suppress(Exception):
        from submitit import JobEnvironment

        return str(JobEnvironment().paths.stdout)
    return ""
