"""What is left of a plan, as time: of every cell, of all workers together, and by the clock."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ssl_diversity.sweep import estimate
from ssl_diversity.sweep.cells import Cell, distance_like, probe_size
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.profile import Profile
from ssl_diversity.sweep.status import duration
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task


@dataclass(frozen=True)
class Cost:
    """Seconds of one worker; `rough` where they come from FLOPs and not from a measurement."""

    seconds: float = 0.0
    rough: bool = False
    unknown: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.rough or other.rough, self.unknown or other.unknown)

    @property
    def words(self) -> str:
        if self.unknown:
            return "unknown" if not self.seconds else f"over {duration(self.seconds)}"
        return ("~" if self.rough else "") + duration(self.seconds)


@dataclass(frozen=True)
class _Class:
    """Workers of one class."""

    profile: Profile
    place: str


class Forecast:
    """Of a plan on the workers of a profile, from what was measured on such workers before.

    `worker_s` are the seconds of work left, by class of workers; `chain_s` the longest run of tasks that wait for one
    another; `unmeasured` counts the tasks that no estimate was found for.
    """

    def __init__(self, plan: Plan, profile: Profile, done: Done | None = None) -> None:
        self.plan, self.profile, self.done = plan, profile, done or Done()
        self.times = estimate.times()
        self._known: dict[tuple[str, int, int | None], Cost] = {}
        self._classes = {
            name: _Class(own := profile.of(name), estimate.place(own)) for name in profile.classes_of_workers
        }
        self._class_of = {kind: name for name, kinds in profile.classes_of_workers.items() for kind in kinds}
        self._flops = {cell.task.id: cell.flops_per_sample for cell in plan.cells if cell.task is not None}

    def cell(self, cell: Cell) -> Cost:
        """A cell's pretraining, also of one that has no task yet."""
        return self._cost(f"pretrain/{cell.like}", cell.budget or 0, cell.flops_per_sample)

    def task(self, task: Task) -> Cost:
        return self._cost(task.like, task.units, self._flops.get(task.id))

    @cached_property
    def words(self) -> str:
        """`time left: 2 min 5 s with 2 worker(s) of 1 thread(s) on cpu, 0.06 core-hours`, and how sure that is."""
        classes = [self._classes[name] for name in self.worker_s] or [next(iter(self._classes.values()))]
        crews = []
        for own in classes:
            workers, threads = own.profile.layout()
            crews.append(f"{workers} worker(s) of {threads} thread(s) on {own.profile.likely_device}")
        told = f"time left: {self.left.words} with {' and '.join(crews)}, {self.core_hours:.3g} core-hours"
        told += f", {self.gpu_hours:.3g} GPU-hours" if self.gpu_hours else ""
        told += "; ~ unmeasured: rough, from FLOPs" if self.left.rough else ""
        return told + (
            f"; not counted: {self.unmeasured} tasks unlike any measured here" if self.unmeasured else ""
        )

    @property
    def left(self) -> Cost:
        """By the clock: what is left, shared among the workers, but not less than its longest chain."""
        cells = [cost for cost, kind in self._costs if kind == "pretrain"]
        return Cost(self.wall_s, any(c.rough for c in cells), any(c.unknown for c in cells))

    @cached_property
    def wall_s(self) -> float:
        """Seconds by the clock, workers' start and the report included where they were measured."""
        if not self._costs:
            return 0.0
        shared = (s / self._classes[name].profile.layout()[0] for name, s in self.worker_s.items())
        return max(*shared, self.chain_s) + self._around_s

    @property
    def core_hours(self) -> float:
        return sum(s * self._cores(name) for name, s in self.worker_s.items()) / 3600

    @property
    def gpu_hours(self) -> float:
        on_gpus = {n: own for n, own in self._classes.items() if own.profile.likely_device == "cuda"}
        return (
            sum(self.worker_s.get(n, 0.0) * own.profile.gpus_of_worker for n, own in on_gpus.items()) / 3600
        )

    @cached_property
    def worker_s(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for cost, kind in self._costs:
            name = self._class_of[kind]
            found[name] = found.get(name, 0.0) + cost.seconds
        return found

    @cached_property
    def unmeasured(self) -> int:
        return sum(cost.unknown for cost, _ in self._costs)

    @cached_property
    def chain_s(self) -> float:
        ends: dict[tuple[str, str], float] = {}
        for task in self._left:  # needs come first
            ends[task.id] = self.task(task).seconds + max(
                (ends.get(n.id, 0.0) for n in task.needs), default=0.0
            )
        longest = max(ends.values(), default=0.0)
        for cell in self._waiting:
            begins = max((ends.get(need.id, 0.0) for need in cell.source.needs), default=0.0)
            probes = max((cost.seconds for cost in self._probes(cell)), default=0.0)
            longest = max(longest, begins + self.cell(cell).seconds + probes)
        return longest

    @cached_property
    def _left(self) -> list[Task]:
        return [task for task in self.plan.tasks if task not in self.done]

    @cached_property
    def _waiting(self) -> list[Cell]:
        return [cell for cell in self.plan.cells if cell.task is None]

    @cached_property
    def _costs(self) -> list[tuple[Cost, str]]:
        """Of every task that is left, and of those that cells which still wait for their pool will have."""
        found = [(self.task(task), task.kind) for task in self._left]
        draws = set()
        for cell in self._waiting:
            found.append((self.cell(cell), "pretrain"))
            found += [(cost, "probe") for cost in self._probes(cell)]
            draws.add((cell.source.name, cell.unique_samples or 0, cell.replicate))
        ready = [d for d in self.plan.downstream if d.train is not None]
        for _, n, _ in draws:
            for d in ready:
                images = min(n, self.plan.sweep.distance.n, d.train.size)  # type: ignore[union-attr]
                found.append((self._cost(f"distance/{distance_like(self.plan.sweep)}", images), "distance"))
        return found

    def _probes(self, cell: Cell) -> Iterator[Cost]:
        for d in self.plan.downstream:
            if d.ready:
                size = probe_size(self.plan.sweep, cell.backbone, d)
                yield self._cost(f"probe/{size['like']}", size["units"])

    @property
    def _around_s(self) -> float:
        """A worker's start, what it imports, and the report."""
        kinds = {kind for _, kind in self._costs}
        place = self._classes[self._class_of["pretrain"]].place
        parts = [("start", 1), ("report", len(self.plan.cells)), *((f"imports {kind}", 1) for kind in kinds)]
        return sum(self.times.seconds(what, n, place) or 0.0 for what, n in parts)

    def _cost(self, like: str, units: int, flops_per_sample: int | None = None) -> Cost:
        asked = like, units, flops_per_sample
        if asked not in self._known:
            self._known[asked] = self._estimate(*asked)
        return self._known[asked]

    def _estimate(self, like: str, units: int, flops_per_sample: int | None) -> Cost:
        own = self._classes[self._class_of[like.partition("/")[0]]]
        measured = self.times.seconds(like, units, own.place)
        if measured is not None:
            return Cost(measured)
        if not units or not flops_per_sample:
            return Cost(unknown=True)
        return Cost(flops_per_sample * units / own.profile.rough_flops_per_second, rough=True)

    def _cores(self, name: str) -> int:
        own = self._classes[name].profile
        return own.layout()[1] * own.world
