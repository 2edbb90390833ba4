"""From a sweep's config and what exists on disk to its tasks: a pure function of the two.

What depends on a pool that is not prepared yet cannot be keyed (its rows are not known): such cells are
listed as waiting, and a plan made after the pool appeared has their tasks.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ssl_diversity import budget
from ssl_diversity.data.windowed import check_lanes
from ssl_diversity.distance.config import extractor_digest
from ssl_diversity.methods.flops import known_flops
from ssl_diversity.methods.recipe import Recipe, load_recipe
from ssl_diversity.sweep import sets
from ssl_diversity.sweep.cells import Baseline, Cell, Maker, cell_like
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.sets import Downstream, Source
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task


@dataclass(frozen=True)
class Plan:
    """`tasks` in an order in which they can be done; `waiting`: what cannot be planned yet, and why."""

    sweep: SweepConfig
    sources: tuple[Source, ...]
    downstream: tuple[Downstream, ...]
    cells: tuple[Cell, ...]
    baselines: tuple[Baseline, ...]
    distances: Mapping[tuple[str, str], Task]  # by (source, downstream)
    tasks: tuple[Task, ...]
    waiting: tuple[str, ...]

    def without(self, kinds: frozenset[str], done: Done) -> "Plan":
        """The plan without what is left to do of some kinds, and without what would need it."""
        tasks: list[Task] = []
        dropped: set[tuple[str, str]] = set()
        for task in self.tasks:
            if task not in done and (task.kind in kinds or any(need.id in dropped for need in task.needs)):
                dropped.add(task.id)
            else:
                tasks.append(task)
        return replace(self, tasks=tuple(tasks))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """A plan is a million objects and no cycle: the collector would go through them time and again for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@_uncollected()
def expand(sweep: SweepConfig) -> Plan:
    """The plan of a sweep, as far as what exists on disk allows.

    Raises UserError for what can never work: N above the pool, above C, not allowed by the batch size,
    a path that is not there, pools of different encodings.
    """
    extractor = extractor_digest(sweep.distance.extractor)  # refuses one that is not there
    sources = tuple(sets.source(sweep, name) for name in sweep.sources)
    downstream = tuple(sets.downstream(sweep, name) for name in sweep.downstream)
    sets.check_encoding(sweep, sources, downstream)
    made = Maker(sweep, sources, tuple(d for d in downstream if d.ready), extractor)
    cells = tuple(_cells(sweep, sources, made))
    baselines = tuple(made.baselines())
    tasks: dict[Any, Task] = {}
    sets_made: tuple[Source | Downstream, ...] = (*sources, *downstream)
    for each in sets_made:
        _add(tasks, each.tasks)
    for cell in cells:
        if cell.task is not None:
            _add(tasks, (cell.task, *cell.probes.values()))
    _add(
        tasks,
        (*(baseline.task for baseline in baselines), *made.distances.values(), *made.subset_distances()),
    )
    waiting = dict.fromkeys(each.waiting for each in sets_made if each.waiting)
    waiting |= dict.fromkeys(cell.waiting for cell in cells if cell.waiting)
    return Plan(
        sweep, sources, downstream, cells, baselines, made.distances, tuple(tasks.values()), tuple(waiting)
    )


def _add(tasks: dict[Any, Task], new: Iterable[Task]) -> None:
    for task in new:
        tasks.setdefault(task.key if task.output is None else (task.key, task.output), task)


def _cells(sweep: SweepConfig, sources: tuple[Source, ...], made: Maker) -> Iterator[Cell]:
    flops = _Flops(sweep)
    resolved = {
        (method, asked): _resolve_budget(sweep, method, asked, flops)
        for method in sweep.methods
        for asked in sweep.budget
    }
    for source in sources:
        for (method, asked), (recipe, per_sample, samples) in resolved.items():
            counted = "" if samples else f"the FLOPs of {method} are not counted yet"
            seen = set()
            for unique in sweep.unique_samples:
                n = _unique(sweep, unique, samples, source)
                if n in seen and n is not None:
                    continue  # `all` and `C/8` may name an N that a number names too
                seen.add(n)
                if n is not None and samples is not None and not _check_unique(sweep, n, samples, source):
                    continue
                cell = Cell(
                    method=method,
                    backbone=sweep.backbone_of(method),
                    recipe=recipe,
                    source=source,
                    unique_asked=str(unique),
                    unique_samples=n,
                    budget_asked=str(asked),
                    budget=samples,
                    batch_size=sweep.batch_size,
                    seed=0,
                    replicate=0,
                    flops_per_sample=per_sample,
                    waiting=source.waiting or counted,
                )
                cell = cell.vary(like=cell_like(sweep, cell))
                for seed in sweep.seeds:
                    yield made.cell(cell, seed, seed if sweep.replicates == "per-seed" else 0)


def _resolve_budget(
    sweep: SweepConfig, method: str, asked: int | float | str, flops: "_Flops"
) -> tuple[Recipe | None, int | None, int | None]:
    """(recipe, FLOPs per sample, C); None for what must be counted first.

    The recipe may depend on C (`auto`) and, for a budget in FLOPs, C on the recipe: the small recipe's
    count decides which recipe it is, that recipe's count decides C.
    """
    parsed = budget.parse_budget(asked)
    samples: int | None = int(parsed.amount) if parsed.unit == "samples" else None
    if samples is None:
        per_sample = flops.known(_recipe(sweep, method, 1))
        if per_sample is None:
            return None, None, None
        samples = parsed.samples(per_sample)
    recipe = _recipe(sweep, method, samples)
    per_sample = flops.known(recipe)
    if parsed.unit != "samples":
        samples = None if per_sample is None else parsed.samples(per_sample)
    if samples is not None:
        budget.used(samples, sweep.batch_size)  # refuses less than one batch
    return recipe, per_sample, samples


class _Flops:
    """FLOPs per sample of a sweep's recipes, each looked up once."""

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep = sweep
        self._known: dict[tuple[str, str], int | None] = {}

    def known(self, recipe: Recipe) -> int | None:
        method, name = recipe.method, (recipe.method, recipe.name)
        if name not in self._known:
            backbone, size = self.sweep.backbone_of(method), self.sweep.image_size
            self._known[name] = known_flops(method, backbone, size, recipe)
        return self._known[name]


def _recipe(sweep: SweepConfig, method: str, samples: int) -> Recipe:
    return load_recipe(
        method,
        sweep.recipe,
        budget_samples=samples,
        image_size=sweep.image_size,
        overrides=sweep.hyperparameters.get(method, {}),
    )


def _unique(sweep: SweepConfig, asked: int | float | str, samples: int | None, source: Source) -> int | None:
    if samples is None or (str(asked).lower() == "all" and not source.pools):
        return None
    return budget.parse_unique(asked, samples, source.size)


def _check_unique(sweep: SweepConfig, n: int, samples: int, source: Source) -> bool:
    """Whether N belongs to the grid at this C; raises UserError where N can never work.

    With several budgets, an N above the smaller ones belongs to the larger ones alone.
    """
    budgets = [budget.parse_budget(value) for value in sweep.budget]
    if n > samples and any(b.unit == "samples" and b.amount >= n for b in budgets):
        return False
    if source.pools:
        source.check(n)
    budget.check_unique(n, samples, sweep.batch_size, source.size or n, source.name)
    if sweep.windowed:
        check_lanes(n, sweep.batch_size, sweep.windowed.lanes)
    return True
