"""What workers are told, and how it is remembered for whoever joins a sweep later."""

import contextlib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_diversity.config import validate
from ssl_diversity.errors import UserError
from ssl_diversity.files import read_json, write_atomic, write_json
from ssl_diversity.sweep.claims import Process, file_time
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.profile import MAIN, Profile, parse_profile
from ssl_diversity.sweep.remaining import Left, left
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import FUNCTIONS, Task

RUN = "run.json"
PRODUCERS = frozenset({"prepare", "train-generator", "generate"})  # what a plan may wait for


@dataclass(frozen=True)
class Order:
    """What a worker is told. `since` is when the run began: older failures are forgiven.

    `profile` is that of the worker's class, whose kinds of tasks it takes. `skip` are kinds of tasks to leave
    alone. A worker whose `submitter` has died stops, where one is given. `with_report`: whoever finds nothing
    left to do writes the report, there being no submitter to do it.
    """

    sweep: SweepConfig
    profile: Profile
    threads: int
    since: float
    skip: frozenset[str] = frozenset()
    submitter: Process | None = None
    with_report: bool = False
    functions: dict[str, str] = field(default_factory=lambda: dict(FUNCTIONS))
    worker_class: str = MAIN
    whole: Profile | None = None  # the profile with all its classes

    def of(self, name: str, mem_gb: float | None = None) -> "Order":
        """For workers of one class, with more memory than it asks for where so much is given."""
        own = self.given.of(name)
        if mem_gb is not None:
            own = own.model_copy(update={"mem_gb": mem_gb})
        return replace(self, profile=own, threads=own.layout()[1], worker_class=name, whole=self.given)

    @property
    def given(self) -> Profile:
        """The profile as the run was given it, with all its classes."""
        return self.whole or self.profile

    @property
    def limits(self) -> dict[str, Any]:
        """When a task is given up, as `remaining` and `status` take it."""
        tries = {"max_attempts": self.profile.max_attempts, "max_losses": self.profile.max_losses}
        return {"since": self.since, **tries}

    def left(self, plan: Plan, done: Done) -> Left:
        """What the sweep still asks for."""
        return left(plan, done, **self.limits)

    def takes(self, task: Task) -> bool:
        """Whether a task is for workers of this class."""
        return task.kind in self._kinds

    @cached_property
    def _kinds(self) -> frozenset[str]:
        return self.given.classes_of_workers[self.worker_class]

    @property
    def mem_gb(self) -> float | None:
        """GiB that these workers ask for, where they ask for a number."""
        return getattr(self.profile, "mem_gb", None)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was said after this run began, to all or to this user's workers."""
        for path in _marks(self.sweep):
            with contextlib.suppress(OSError, ValueError):
                if float(path.read_text()) >= self.since:
                    return True
        return False

    @property
    def superseded(self) -> bool:
        """Whether a later run with other tasks has taken over the workers of this one."""
        later = _later(self)
        return later is not None and _asked(later) != _asked(self)


def cancel(sweep: SweepConfig, *, everybody: bool = True) -> None:
    """Tell every worker of the runs that have begun, or this user's alone, to save and end."""
    path = _marks(sweep)[0 if everybody else 1]
    write_atomic(path, repr(file_time()))


def _marks(sweep: SweepConfig) -> tuple[Path, Path]:
    """The files that say when `cancel` was said: to everybody, and to this user's workers."""
    return sweep.folder / "cancelled", sweep.folder / f"cancelled.{os.getuid()}"


def _asked(order: Order) -> tuple[Any, frozenset[str]]:
    """What a run is to do."""
    return order.sweep.model_dump(mode="json"), order.skip


def keep(order: Order) -> None:
    """Remember the latest run, for those who join it: its workers, `status --watch`, `cancel`."""
    record = {
        "since": order.since,
        "skip": sorted(order.skip),
        "profile": order.given.model_dump(mode="json"),
    }
    record |= {"sweep": order.sweep.model_dump(mode="json"), "with_report": order.with_report}
    for path in _marks(order.sweep):
        if not path.exists():
            write_atomic(path, "0.0")  # a file server may go on saying for a while that there is none
    write_json(order.sweep.folder / RUN, {**record, "functions": order.functions, "uid": os.getuid()})


def latest(folder: Path) -> Order:
    """The latest run of the sweep of `runs/<sweep>/`. Raises UserError if there was none."""
    path = folder / RUN
    try:
        record = read_json(path)
        profile = parse_profile(record["profile"], str(path))
        sweep = validate(SweepConfig, record["sweep"], str(path))
        order = Order(sweep, profile, profile.layout()[1], record["since"], frozenset(record["skip"]))
        return replace(order, functions=record["functions"], with_report=record["with_report"])
    except FileNotFoundError:
        raise UserError(f"sweep {folder.name!r} was never run here: no {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}); run the sweep again") from None


def by_this_user(folder: Path) -> bool:
    """Whether it was this user who began the latest run."""
    return read_json(folder / RUN).get("uid") == os.getuid()


def stamp(folder: Path) -> int:
    """Another number for another run of the sweep of `runs/<sweep>/`."""
    with contextlib.suppress(OSError):
        return os.stat(folder / RUN).st_mtime_ns
    return 0


def newer(order: Order) -> Order:
    """The latest run of the order's sweep, for workers of the same class; `order` itself where that is it.

    So that a run with more cells finds workers, and those of an earlier run go on with it.
    """
    found = _later(order)
    if found is not None and order.worker_class in found.profile.classes_of_workers:
        return found.of(order.worker_class, order.mem_gb)
    return order


def _later(order: Order) -> Order | None:
    """The latest run of the order's sweep, where that began after it and runs where it does."""
    with contextlib.suppress(OSError, UserError):
        found = latest(order.sweep.folder)
        if found.profile.executor == order.profile.executor and found.since > order.since:
            return found
    return None


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
