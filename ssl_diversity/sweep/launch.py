"""Sending workers off through submitit, locally and on SLURM by the same code, and watching them."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.live import Live

from ssl_diversity import files
from ssl_diversity.budget import parse_budget
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, flops, status, store
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.profile import Profile, SlurmProfile, visible_gpus
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import REPORT, function
from ssl_diversity.sweep.work import Current, Order, Worker, left
from ssl_diversity.train import CellSpec, make_order

PLAIN_LINE_EVERY_S = 15.0  # where the output is not a terminal
TRAINING = frozenset({"pretrain", "train-generator", "sample", "generate"})
EVALUATION = frozenset({"probe", "distance"})
SHOWN_FAILURES = 5
KEPT_LOGS = 5  # runs whose logs are kept, and those that may not have ended
ENDLESS = 10**6  # how often SLURM may requeue a worker that reached its time limit


def run(
    sweep: SweepConfig,
    profile: Profile,
    *,
    skip: frozenset[str] = frozenset(),
    detach: bool = False,
    with_report: bool = True,
    console: Console | None = None,
) -> int:
    """Run a sweep to its end and write its report; returns the exit status.

    0: everything planned is done. 1: a task failed (its neighbours went on). 2: all that failed is for the
    user to mend. 128 + n: signal n stopped it. `skip` are kinds of tasks to leave alone. `detach` returns
    as soon as the workers are submitted.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    store.open_store()
    if any(parse_budget(value).unit == "flop" for value in sweep.budget):
        flops.count_missing(sweep, lambda text: console.print(f"{sweep.name}: {text}"))
    current = Current(sweep, skip)
    check_cache(current.plan, profile)

    def tell(text: str) -> None:
        console.print(text, style="yellow")

    remember(sweep, tell=tell)  # only what can be planned at all
    since = time.time()
    workers, threads = profile.layout()
    submitter = None if detach or isinstance(profile, SlurmProfile) else claims.this_process()
    order = Order(sweep, profile, threads, since, skip, submitter, with_report=detach)
    rest = left(current.plan, Done(), since=since, max_attempts=profile.max_attempts)
    if not rest.over:
        jobs = _Jobs(order, workers)
        count = workers if current.plan.waiting else min(workers, len(rest.ready) + len(rest.later))
        if detach:
            jobs.submit(count)
            told = f"{count} workers submitted; `ssl-diversity status {sweep.name} --watch` shows them"
            console.print(f"{sweep.name}: {told}")
            return 0
        with _stopping() as stopped:
            try:
                jobs.submit(count)
                _watch(sweep.name, current, jobs, stopped, console)
            except BaseException:
                jobs.stop()
                raise
        if stopped:
            now = status.snapshot(current.plan, since=since, max_attempts=profile.max_attempts)
            console.print(f"{sweep.name}: stopped; {now.words}. Run the same command again to go on.")
            return 128 + stopped[0]
    return _finish(remember(sweep, ended=True, tell=tell), current, order, console, with_report)


def check_cache(plan: Plan, profile: Profile) -> None:
    """Refuse cells that would read remote shards in the global order through a cache that does not hold them."""
    if plan.sweep.windowed:
        return
    far = [cell for cell in plan.cells if any(pool.remote for pool, _ in cell.parts)]
    if not far:
        return
    from ssl_diversity.data.streaming import needed_bytes

    for cell in far:
        assert cell.subset is not None
        assert cell.task is not None
        order = make_order(cast(CellSpec, cell.task.spec), cell.subset)
        if (needed := needed_bytes(cell.subset, order)) > profile.cache_bytes:
            raise UserError(
                f"source {cell.source.name}: order=global reads {needed / 2**30:.3g} GiB of remote shards again and again,"
                f" the profile's cache holds {profile.cache_gb:.3g}; raise cache_gb, or read them in sequence:"
                " order={windowed: {shards: 4}}"
            )


class _Jobs:
    """The submitit jobs of one run."""

    def __init__(self, order: Order, workers: int) -> None:
        import submitit

        self.order, self.workers, self.jobs = order, workers, list[Any]()
        self.submitted = 0
        profile, name = order.profile, order.sweep.name
        if isinstance(profile, SlurmProfile) and shutil.which("sbatch") is None:
            raise UserError(
                "executor=slurm: no sbatch on this machine; run on a login node or use --profile local"
            )
        logs = order.sweep.folder / "logs"
        for old in sorted(logs.glob("*"))[: -KEPT_LOGS + 1]:
            if _ended(old):
                shutil.rmtree(old, ignore_errors=True)
        folder = logs / time.strftime("%Y%m%d-%H%M%S")
        self.executor = submitit.AutoExecutor(
            folder=folder, cluster=profile.executor, slurm_max_num_timeout=ENDLESS
        )
        self.executor.update_parameters(**profile.parameters(name))

    def submit(self, count: int) -> None:
        """Send `count` more workers, as one array where the executor knows arrays."""
        indices = range(self.submitted, self.submitted + count)
        with _environment(self.order), self.executor.batch():
            self.jobs += [self.executor.submit(Worker(self.order, index)) for index in indices]
        self.submitted += count

    def ended(self) -> int:
        """How many jobs ended since the last call."""
        over = [job for job in self.jobs if job.done()]
        self.jobs = [job for job in self.jobs if job not in over]
        return len(over)

    def stop(self) -> None:
        """Ask every worker to save and end. Local controllers pass SIGTERM on; SLURM takes the jobs down."""
        for job in self.jobs:
            if isinstance(self.order.profile, SlurmProfile):
                job.cancel(check=False)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGTERM)


def _ended(logs: Path) -> bool:
    """Whether every job of a run has its result: one that waits in a queue still needs its folder."""
    jobs = [path.name.removesuffix("_submitted.pkl") for path in logs.glob("*_submitted.pkl")]
    return all(any(logs.glob(f"{job}_*_result.pkl")) for job in jobs)


@contextlib.contextmanager
def _environment(order: Order) -> Iterator[None]:
    """What workers inherit. SIGINT is for the submitting process: it tells its workers to save and end
    (submitit's local controller would kill them one second after a Ctrl-C)."""
    values = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve their neighbours
        "OMP_NUM_THREADS": str(order.threads),
        "MKL_NUM_THREADS": str(order.threads),
        "SSL_DIVERSITY_HOME": str(files.home()),
        "PYTHONSAFEPATH": "1",  # the folder datasets/ must not pass for the package of that name
        **order.profile.environment,
    }
    if not isinstance(order.profile, SlurmProfile) and order.profile.device != "cpu":
        values["SSL_DIVERSITY_GPUS"] = ",".join(visible_gpus())
    before = {name: os.environ.get(name) for name in values}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(values)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that receives the signal that asks us to stop; asked twice, we leave at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(name: str, current: Current, jobs: _Jobs, stopped: list[int], console: Console) -> None:
    """Show the sweep until its workers are gone; replace those that died, a bounded number of times."""
    order, profile = jobs.order, jobs.order.profile
    meter = status.Meter()
    spare = profile.max_attempts * jobs.workers
    told, told_at, signalled = "", time.monotonic(), False
    live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while True:
            ended = jobs.ended()
            plan = current.refresh(Done())
            now = status.snapshot(plan, since=order.since, max_attempts=profile.max_attempts)
            rate = meter.rate(now.samples)
            remaining = status.seconds_left(plan, now, len(jobs.jobs), device_of(profile), order.threads)
            if live:
                live.update(status.render(name, now, rate, remaining), refresh=True)
            elif (
                time.monotonic() - told_at > PLAIN_LINE_EVERY_S
                and (text := status.line(now, rate, remaining)) != told
            ):
                console.print(f"{name}: {text}")
                told, told_at = text, time.monotonic()
            if stopped and not signalled:
                jobs.stop()
                signalled = True
            if not jobs.jobs and (stopped or now.over or spare <= 0 or _disk_is_full()):
                return
            if ended and not stopped and not now.over and spare > 0 and not _disk_is_full():
                replaced = min(ended, spare, len(now.left.ready) + len(now.left.later))
                spare -= replaced
                jobs.submit(replaced)
            time.sleep(profile.poll_s)


def device_of(profile: Profile) -> str:
    """The device that measured rates are looked up for, without asking torch."""
    return ("cuda" if visible_gpus() else "cpu") if profile.device == "auto" else profile.device


def _disk_is_full() -> bool:
    """Whether so little space is left that this may be why tasks were not done."""
    probe = store.store_dir() / ".space"
    try:
        files.write_atomic(probe, bytes(1 << 20))
    except UserError:
        return True
    probe.unlink(missing_ok=True)  # of another launcher, perhaps
    return False


def _finish(record: SweepConfig, current: Current, order: Order, console: Console, with_report: bool) -> int:
    """The report, then one last line that tells the truth, and the exit status that goes with it."""
    name = record.name
    now = status.snapshot(current.plan, since=order.since, max_attempts=order.profile.max_attempts)
    if not now.complete and _disk_is_full():
        raise files.disk_full(store.store_dir())
    page = ""
    if with_report:
        page = f"; report: {function(REPORT)(record)}"
    for task in now.left.failed[:SHOWN_FAILURES]:
        for text in status.failure_lines(task):
            console.print(text, style="red")
    if len(now.left.failed) > SHOWN_FAILURES:
        console.print(f"and {len(now.left.failed) - SHOWN_FAILURES} more: `ssl-diversity status {name}`")
    if now.complete:
        console.print(f"{name}: all {now.total} tasks are done{page}")
        return 0
    ended = "" if now.over else f"; the workers ended before their work did, see {record.folder / 'logs'}"
    waiting = "".join(f"; waiting: {reason}" for reason in now.waiting)
    console.print(f"{name}: NOT COMPLETE: {now.words}{waiting}{ended}{page}")
    failed = [store.failures(task, order.since)[-1] for task in now.left.failed]
    return 2 if failed and all(failure.by_user for failure in failed) else 1
