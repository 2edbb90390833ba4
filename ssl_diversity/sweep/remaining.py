"""What a plan still asks for: what can be done now, what waits, what failed."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssl_diversity.sweep import store
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task

Retried = frozenset[tuple[str, str]]
Name = str | tuple[str, Path]


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
    max_losses: int = 1,
    retried: Retried = frozenset(),
) -> Left:
    """Sort the tasks that are not done. A failed one has used up its attempts since `since` and is not `retried`."""
    return Remaining(since=since, max_attempts=max_attempts, max_losses=max_losses).look(plan, done, retried)


class Remaining:
    """`left`, asked time and again of a plan that is worked on: each look costs little more than what is new.

    A task that gave up is looked at again when it is done or its mark in the index of failures is gone.
    """

    def __init__(self, *, since: float, max_attempts: int, max_losses: int = 1) -> None:
        self._limits = since, max_attempts, max_losses
        self._plan: Plan | None = None
        self._failures = store.Index("failed")
        self._given_up: set[str] = set()

    def look(self, plan: Plan, done: Done, retried: Retried = frozenset()) -> Left:
        """As `left` of what `done` says now."""
        self._failures.refresh()
        if plan is not self._plan or not self._go_on(done):
            self._begin(plan, done)
        failed, blocked = self._failed(plan, retried)
        gone = failed | blocked

        def tasks(numbers: Iterable[int]) -> tuple[Task, ...]:
            return tuple([plan.tasks[i] for i in numbers])

        return Left(
            ready=tasks(i for i in self._ready if i not in gone),
            later=tasks(i for i in self._missing if i not in gone),
            failed=tasks(sorted(failed)),
            blocked=tasks(sorted(blocked)),
        )

    def is_open(self, key: str) -> bool:
        """Whether a task of the plan was not done at the last look."""
        return key in self._number or any(
            key == task.key for task in self._outputs if _name(task) in self._number
        )

    def _begin(self, plan: Plan, done: Done) -> None:
        """Tasks go by their number in the plan; needs that are not in it have none."""
        self._plan = plan
        self._keys: dict[str, set[str]] = defaultdict(set)  # kind -> of all tasks that have no output
        self._outputs: dict[Task, bool] = {}  # whether it is there, of the others
        self._number: dict[Name, int] = {}  # of what is not done
        self._ready: list[int] = []  # ascending, failed ones among them
        self._missing: dict[int, int] = {}  # how many needs are not done, where any are; ascending
        self._behind: dict[Name, list[int]] = defaultdict(list)  # what waits for a task
        needs = dict.fromkeys(need for task in plan.tasks for need in task.needs)
        for task in (*plan.tasks, *needs):
            if task.output is None:
                self._keys[task.kind].add(task.key)
            else:
                self._outputs[task] = task in done
        self._found = {kind: keys & done.keys(kind) for kind, keys in self._keys.items()}
        found = set[str]().union(*self._found.values())
        waited = {need: None if need in done else _name(need) for need in needs}
        for number, task in enumerate(plan.tasks):
            if task.key in found if task.output is None else self._outputs[task]:
                continue
            self._number[_name(task)] = number
            missing = 0
            for need in task.needs:
                if name := waited[need]:
                    missing += 1
                    self._behind[name].append(number)
            if missing:
                self._missing[number] = missing
            else:
                self._ready.append(number)

    def _go_on(self, done: Done) -> bool:
        """Whether it could: not where something is no longer done."""
        for task, there in self._outputs.items():
            if there != (task in done):
                if there:
                    return False
                self._outputs[task] = True
                self._close(_name(task))
        for kind, keys in self._keys.items():
            found = keys & done.keys(kind)
            if self._found[kind] - found:
                return False
            for key in found - self._found[kind]:
                self._close(key)
            self._found[kind] = found
        return True

    def _close(self, name: Name) -> None:
        number = self._number.pop(name, None)
        if number is not None and self._missing.pop(number, None) is None:
            del self._ready[bisect_left(self._ready, number)]
        for waiting in self._behind.pop(name, ()):
            if waiting not in self._missing:
                continue  # done without it
            self._missing[waiting] -= 1
            if not self._missing[waiting]:
                del self._missing[waiting]
                insort(self._ready, waiting)

    def _failed(self, plan: Plan, retried: Retried) -> tuple[set[int], set[int]]:
        """The numbers of what failed and of what cannot be done without it."""
        names: list[Name] = [
            _name(task) for task in self._outputs if task.key in self._failures.keys(task.kind)
        ]
        for kind in self._keys:
            names += self._failures.keys(kind)
        marked = sorted(self._number[name] for name in names if name in self._number)
        self._given_up &= {plan.tasks[i].key for i in marked}
        failed, blocked = set[int](), set[int]()
        for number in marked:
            task = plan.tasks[number]
            if number in blocked or task.id in retried or not self._gave_up(task):
                continue
            failed.add(number)
            front = [number]
            while front:
                behind = self._behind.get(_name(plan.tasks[front.pop()]), ())
                new = [i for i in behind if i in self._missing and i not in blocked]
                blocked.update(new)
                front += new
        return failed, blocked

    def _gave_up(self, task: Task) -> bool:
        if task.key not in self._given_up and gave_up(task, *self._limits):
            self._given_up.add(task.key)
        return task.key in self._given_up


def _name(task: Task) -> Name:
    """What tells tasks of a plan apart: the same pool may be made in two places."""
    return task.key if task.output is None else (task.key, task.output)


def gave_up(task: Task, since: float, max_attempts: int, max_losses: int) -> bool:
    """Whether a task has failed too often since `since`, or its workers died too often, or the user must act."""
    found = store.failures(task, since)
    died = sum(failure.worker_died for failure in found)
    return (
        len(found) - died >= max_attempts or died >= max_losses or any(failure.by_user for failure in found)
    )
