"""How far a sweep is: read from the files that workers leave, shown as text for people."""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ssl_diversity.files import task_dir
from ssl_diversity.sweep import estimate, losses, store
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.remaining import Left, Remaining
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task


@dataclass(frozen=True)
class Running:
    """What one worker is doing, as it last said."""

    label: str
    kind: str
    key: str
    done: int
    total: int
    started: float
    note: str


@dataclass(frozen=True)
class Snapshot:
    """A sweep at one moment. `samples` counts those of finished and running cells, of `samples_asked`."""

    total: int
    done: int
    running: tuple[Running, ...]
    left: Left
    waiting: tuple[str, ...]
    samples: int
    samples_asked: int
    done_by_kind: Mapping[str, tuple[int, int]]  # kind -> (done, planned)

    @property
    def over(self) -> bool:
        return self.left.over

    @property
    def complete(self) -> bool:
        return self.done == self.total and not self.waiting

    @property
    def words(self) -> str:
        """`31 of 67 tasks done, 2 running, 1 failed, 3 behind it`."""
        parts = [f"{self.done} of {self.total}{' or more' if self.waiting else ''} tasks done"]
        parts += [f"{len(self.running)} running"] if self.running else []
        parts += [f"{len(self.left.failed)} failed"] if self.left.failed else []
        parts += [f"{len(self.left.blocked)} not possible without them"] if self.left.blocked else []
        return ", ".join(parts)


def snapshot(plan: Plan, *, since: float = 0.0, max_attempts: int = 1, max_losses: int = 1) -> Snapshot:
    """Look at the store once. With the default `since`, every task that failed and was not done later counts as
    failed, unless somebody is trying it again."""
    return Watch(since=since, max_attempts=max_attempts, max_losses=max_losses).look(plan)


class Watch:
    """`snapshot`, asked time and again: each look costs little more than what is new."""

    def __init__(self, *, since: float = 0.0, max_attempts: int = 1, max_losses: int = 1) -> None:
        self._forgiving = bool(since)
        self._done = Done()
        self._remaining = Remaining(since=since, max_attempts=max_attempts, max_losses=max_losses)
        self._plan: Plan | None = None

    def look(self, plan: Plan) -> Snapshot:
        if plan is not self._plan:
            self._plan, self._planned = plan, Counter([task.kind for task in plan.tasks])
            self._asked = sum(task.units for task in plan.tasks if task.kind == "pretrain")
        self._done.refresh()
        live = _live()
        retried = frozenset() if self._forgiving else frozenset((r.kind, r.key) for r in live)
        left = self._remaining.look(plan, self._done, retried)
        gone = {task.id for task in (*left.failed, *left.blocked)}
        running = tuple(r for r in live if self._remaining.is_open(r.key) and (r.kind, r.key) not in gone)
        unfinished = [*left.ready, *left.later, *left.failed, *left.blocked]
        missing = Counter([task.kind for task in unfinished])
        samples = self._asked - sum(task.units for task in unfinished if task.kind == "pretrain")
        return Snapshot(
            total=len(plan.tasks),
            done=len(plan.tasks) - len(unfinished),
            running=running,
            left=left,
            waiting=plan.waiting,
            samples=samples + sum(r.done for r in running if r.kind == "pretrain"),
            samples_asked=self._asked,
            done_by_kind={kind: (count - missing[kind], count) for kind, count in self._planned.items()},
        )


def _live() -> list[Running]:
    """What live workers are doing."""
    found = []
    for record in store.live_workers():
        with contextlib.suppress(KeyError):
            found.append(Running(**{name: record[name] for name in Running.__annotations__}))
    return found


def seconds_left(plan: Plan, now: Snapshot, workers: int, where: str) -> float | None:
    """Estimated seconds until the end; None before any cell has been measured on such workers (`estimate.place`).

    A running task by its progress, others by what their like took, a cell whose like was never measured by
    the mean of those that were; cells that wait for their pool are counted in.
    """
    known = estimate.times()
    started = {r.key: r for r in now.running}
    typical = known.typical(where)
    total = 0.0
    for task in (*now.left.ready, *now.left.later):
        running = started.get(task.key)
        if running is not None and running.done:
            total += (time.time() - running.started) * (running.total / running.done - 1)
            continue
        seconds = known.of(task, where)
        if seconds is None and task.kind == "pretrain":
            if typical is None:
                return None
            seconds = typical * task.units
        total += seconds or 0.0
    for cell in plan.cells:
        if cell.waiting and cell.budget is not None:
            seconds = known.seconds(f"pretrain/{cell.like}", cell.budget, where)
            if seconds is None and typical is None:
                return None
            total += typical * cell.budget if seconds is None else seconds  # type: ignore[operator]
    return total / max(1, workers)


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min 20 s`, `5 h 10 min`, `12 days 4 h`; `unknown` for None."""
    if seconds is None:
        return "unknown"
    for unit, name, small, small_name in (
        (86400, "days", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= unit:
            whole, rest = divmod(int(seconds), unit)
            return f"{whole} {name.rstrip('s') if whole == 1 else name} {rest // small} {small_name}"
    return f"{seconds:.0f} s"


def render(
    name: str, now: Snapshot, rate: float | None, remaining: float | None, hint: str = ""
) -> RenderableType:
    """The live display; `hint` is what holds it up, where something does."""
    bar = ProgressBar(total=max(1, now.total), completed=now.done, width=40)
    rate_text = f"{rate:,.0f} samples/s" if rate else ""
    left_text = f"about {duration(remaining)} left" if remaining else ""
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(name, style="bold"), bar, now.words, rate_text, left_text)
    body = Table.grid(padding=(0, 2))
    for running in now.running:
        share = f"{running.done / running.total:4.0%}" if running.total else ""
        took = duration(max(0.0, time.time() - running.started))
        body.add_row("  ", running.label, share, took, running.note)
    return Group(head, body, *([Text(hint, style="yellow")] if hint else []))


def line(now: Snapshot, rate: float | None, remaining: float | None, hint: str = "") -> str:
    """The display in one plain line."""
    parts = [now.words]
    parts += [f"{rate:,.0f} samples/s"] if rate else []
    parts += [f"about {duration(remaining)} left"] if remaining else []
    parts += [hint] if hint else []
    return ", ".join(parts)


def lost(plan: Plan) -> dict[str, int]:
    """How many workers went without a word while they had a task of the plan, by cause."""
    marked, causes = store.Index("lost"), Counter[str]()
    for kind in {task.kind for task in plan.tasks}:
        if keys := marked.keys(kind):
            keys = keys & {task.key for task in plan.tasks if task.kind == kind}
            causes.update(loss["cause"] for key in keys for loss in losses.in_folder(task_dir(kind, key)))
    return dict(causes.most_common())


def details(now: Snapshot, lost: Mapping[str, int]) -> RenderableType:
    """What `ssl-diversity status` shows below the display: by kind, what failed and why, what waits, what was lost."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("task", "done", "planned"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for kind, (done, planned) in now.done_by_kind.items():
        table.add_row(kind, str(done), str(planned))
    lines: list[RenderableType] = [table]
    lines += [Text(f"waiting: {reason}") for reason in now.waiting]
    if lost:
        told = ", ".join(f"{count} {cause}" for cause, count in lost.items())
        lines.append(Text(f"workers lost, their tasks taken up by others: {told}"))
    lines += [Text(text, style="red") for task in now.left.failed for text in failure_lines(task)]
    return Group(*lines)


def failure_lines(task: Task) -> list[str]:
    """What failed, why, and where the traceback is."""
    found = store.failures(task)
    if not found:
        return []
    last = found[-1]
    return [f"failed: {task.label}: {last.summary.removeprefix('UserError: ')}", f"  traceback: {last.path}"]


class Meter:
    """Samples per second over the last minute."""

    WINDOW_S = 60.0

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def rate(self, samples: int) -> float | None:
        now = time.monotonic()
        self.seen = [pair for pair in self.seen if now - pair[0] <= self.WINDOW_S] + [(now, samples)]
        elapsed, gained = now - self.seen[0][0], samples - self.seen[0][1]
        return gained / elapsed if elapsed > 1 and gained > 0 else None


def as_record(now: Snapshot, lost: Mapping[str, int]) -> dict[str, Any]:
    """For `status --json`."""
    return {
        "done": now.done,
        "total": now.total,
        "running": [vars(r) for r in now.running],
        "failed": [task.label for task in now.left.failed],
        "blocked": [task.label for task in now.left.blocked],
        "waiting": list(now.waiting),
        "samples": now.samples,
        "samples_asked": now.samples_asked,
        "workers_lost": dict(lost),
    }
