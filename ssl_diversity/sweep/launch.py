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

from ssl_diversity import files, runtime
from ssl_diversity.budget import parse_budget
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, estimate, fleet, flops, orders, sharing, slurm, status, store
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Current, Order
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.profile import Profile, SlurmProfile
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import REPORT, function
from ssl_diversity.sweep.work import Worker
from ssl_diversity.train import CellSpec, make_order

PLAIN_LINE_EVERY_S = 15.0  # where the output is not a terminal
TRAINING = frozenset({"pretrain", "train-generator", "sample", "generate"})
EVALUATION = frozenset({"probe", "distance"})
SHOWN_FAILURES = 5


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
    reach(profile)
    if any(parse_budget(value).unit == "flop" for value in sweep.budget):
        flops.count_missing(sweep, lambda text: console.print(f"{sweep.name}: {text}"))
    current = Current(sweep, skip)
    check_cache(current.plan, profile)
    if not status.snapshot(current.plan).complete:
        check_gpus(profile)
    profile = sharing.settled(profile, current.plan)

    def tell(text: str) -> None:
        console.print(text, style="yellow")

    remember(sweep, tell=tell)  # only what can be planned at all
    on_slurm = isinstance(profile, SlurmProfile)
    submitter = None if detach or on_slurm else claims.this_process()
    reporting = with_report and (detach or on_slurm)  # on a cluster the launcher may be gone by then
    threads = profile.layout()[1]
    order = Order(sweep, profile, threads, claims.file_time(), skip, submitter, with_report=reporting)
    rest = order.left(current.plan, Done())
    if not rest.over:
        orders.keep(order)
        crew = fleet.of(order, Worker)
        if detach:
            count = _supplied(crew, current, order)
            told = f"{count} workers submitted; `ssl-diversity status {sweep.name} --watch` shows them"
            console.print(
                f"{sweep.name}: {told}" if count else f"{sweep.name}: no worker submitted: {crew.told}"
            )
            return 0 if count else 1
        with _stopping() as stopped:
            try:
                _watch(current, order, crew, stopped, console)
            except BaseException:
                if not on_slurm:
                    crew.stop()
                raise
        now = status.snapshot(current.plan, **order.limits)
        if stopped or (order.cancelled and not now.complete):
            how = "stopped" if stopped else "cancelled"
            console.print(f"{sweep.name}: {how}; {now.words}. Run the same command again to go on.")
            return 128 + stopped[0] if stopped else 1
        if crew.hopeless and crew.told:
            console.print(f"{sweep.name}: {crew.told}")
    return _finish(remember(sweep, ended=True, tell=tell), current, order, console, with_report)


def join(sweep: SweepConfig, console: Console) -> None:
    """Watch a sweep that runs until it is over, sending workers where they may not do so themselves.

    Ctrl-C ends the watching alone.
    """
    order = orders.latest(sweep.folder)
    current = Current(order.sweep, order.skip)
    crew = None  # of another user's run, or of this machine's processes: whoever began it looks after them
    if isinstance(order.profile, SlurmProfile) and orders.by_this_user(sweep.folder):
        reach(order.profile)
        crew = fleet.of(order, Worker)
    with contextlib.suppress(KeyboardInterrupt):
        _watch(current, order, crew, [], console)


def reach(profile: Profile) -> None:
    """Make the commands of the profile's cluster answer; UserError where there are none."""
    if not isinstance(profile, SlurmProfile):
        return
    if profile.conf:
        conf = os.path.expanduser(os.path.expandvars(profile.conf))
        if not Path(conf).exists():
            raise UserError(
                f"conf={profile.conf}: no such file; is that cluster up? (`make slurm-up` starts slurm-dev)"
            )
        os.environ["SLURM_CONF"] = conf
    if shutil.which("sbatch") is None:
        raise UserError(
            "executor=slurm: no sbatch on this machine; run on a login node or use --profile local"
        )


def check_gpus(profile: Profile) -> None:
    """Raise UserError where torch has no use for the GPUs that workers are to have."""
    if isinstance(profile, SlurmProfile):
        for name in profile.classes_of_workers:
            profile.of(name).require_torch()
    else:
        runtime.require_gpu(profile.device)


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


def _supplied(crew: fleet.Fleet, current: Current, order: Order) -> int:
    """How many workers there are, once those that were missing have been sent."""
    done = Done()
    plan = current.refresh(done)
    try:
        patience_s = getattr(order.profile, "submit_patience_s", 0.0)
        return crew.supply(order.left(plan, done), waiting=bool(plan.waiting), patience_s=patience_s)
    except slurm.NoAnswer as error:
        raise UserError(f"the scheduler does not answer ({error}); try again, nothing was lost") from None


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


def _watch(
    current: Current, order: Order, crew: fleet.Fleet | None, stopped: list[int], console: Console
) -> None:
    """Show the sweep until it is over or its workers are gone; have the crew replace those that died.

    Without a crew, whoever started the workers looks after them.
    """
    name, profile = order.sweep.name, order.profile
    where = estimate.place(profile)
    meter, count, hint = status.Meter(), 0, ""
    watching, done, on_slurm = status.Watch(**order.limits), Done(), isinstance(profile, SlurmProfile)
    told, told_at, signalled, asked_at = "", time.monotonic(), False, float("-inf")
    live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while True:
            done.refresh()
            plan = current.refresh(done)
            now = watching.look(plan)
            if now.over and plan.waiting:
                done.refresh()
                if current.refresh(done) is not plan:
                    continue  # what it waited for has appeared between the two looks
            if stopped and crew is not None and not (signalled and on_slurm):
                # here again and again: submitit drops what a worker is told while it starts
                if on_slurm:
                    orders.cancel(order.sweep, everybody=False)
                with contextlib.suppress(slurm.NoAnswer):  # then they find by themselves that they are to end
                    crew.stop()
                signalled = True
            if crew is not None and (now.over or time.monotonic() - asked_at >= crew.ask_s):
                asked_at = time.monotonic()
                try:
                    count, hint = _kept_up(crew, now, bool(plan.waiting), count, bool(stopped))
                except slurm.NoAnswer as error:
                    hint = f"the scheduler does not answer: {error}"
                    if stopped:
                        return
            rate = meter.rate(now.samples)
            workers = count if crew is not None else len(now.running)
            remaining = status.seconds_left(plan, now, workers, where)
            if live:
                live.update(status.render(name, now, rate, remaining, hint), refresh=True)
            elif (
                time.monotonic() - told_at > PLAIN_LINE_EVERY_S
                and (text := status.line(now, rate, remaining, hint)) != told
            ):
                console.print(f"{name}: {text}")
                told, told_at = text, time.monotonic()
            if now.over and (crew is None or crew.ends_itself or not count):
                return
            if crew is not None and not count and (stopped or crew.hopeless or _disk_is_full()):
                return
            if not count and order.cancelled:
                return
            time.sleep(profile.poll_s)


def _kept_up(
    crew: fleet.Fleet, now: status.Snapshot, waiting: bool, before: int, stopped: bool
) -> tuple[int, str]:
    """(how many workers there are, what keeps more from being sent)."""
    if now.over:
        crew.dismiss()
    count = crew.alive()
    if not (stopped or now.over or (count < before and _disk_is_full())):
        count = crew.supply(now.left, waiting=waiting)
    return count, crew.told


def _report(record: SweepConfig, order: Order, cells: int) -> Any:
    """Write the report, after a worker that is about it."""
    while (claim := claims.claim(record.folder, stale_s=order.profile.stale_s)) is None:
        time.sleep(order.profile.poll_s)
    try:
        with (
            claim.heartbeat(order.profile.heartbeat_s),
            estimate.timed("report", cells, estimate.place(order.profile)),
        ):
            return function(REPORT)(record)
    finally:
        claim.release()


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
    now = status.snapshot(current.plan, **order.limits)
    if not now.complete and _disk_is_full():
        raise files.disk_full(store.store_dir())
    page = f"; report: {_report(record, order, len(current.plan.cells))}" if with_report else ""
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
