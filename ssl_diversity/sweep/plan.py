"""From a sweep's config and what exists on disk to its tasks: a pure function of the two.

What depends on a pool that is not prepared yet cannot be keyed (its rows are not known): such cells are
listed as waiting, and a plan made after the pool appeared has their tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ssl_diversity import budget
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.windowed import check_lanes, layout_digest
from ssl_diversity.distance.config import DistanceSpec, extractor_digest
from ssl_diversity.evaluation.config import ProbeSpec
from ssl_diversity.methods.flops import known_flops
from ssl_diversity.methods.recipe import Recipe, load_recipe
from ssl_diversity.sweep import rows, sets
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.sets import Downstream, Source
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task
from ssl_diversity.train import CellSpec


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `task` and what follows it are empty while the cell is waiting.

    `probes`, `distances` (source against downstream set, at one n common to all sources) and
    `subset_distances` (the cell's own rows) are by downstream set.
    """

    method: str
    backbone: str
    recipe: Recipe | None
    source: Source
    unique_asked: str
    unique_samples: int | None
    budget_asked: str
    budget: int | None
    batch_size: int
    seed: int
    replicate: int
    flops_per_sample: int | None
    waiting: str = ""
    subset: Subset | None = None
    task: Task | None = None
    probes: Mapping[str, Task] = field(default_factory=dict)
    distances: Mapping[str, Task] = field(default_factory=dict)
    subset_distances: Mapping[str, Task] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[tuple[Pool, Rows], ...]:
        """The rows that the cell sees: of one pool, or of each pool of a mixture. () while it waits."""
        return self.subset.parts if self.subset is not None else ()


@dataclass(frozen=True)
class Baseline:
    """What a network that was never trained gives on a downstream set: `random` or `pixels`."""

    name: str
    backbone: str  # "" for pixels
    seed: int | None  # None for pixels
    downstream: Downstream
    task: Task


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


def expand(sweep: SweepConfig) -> Plan:
    """The plan of a sweep, as far as what exists on disk allows.

    Raises UserError for what can never work: N above the pool, above C, not allowed by the batch size,
    a path that is not there, pools of different encodings.
    """
    extractor_digest(sweep.distance.extractor)  # refuses one that is not there
    sources = tuple(sets.source(sweep, name) for name in sweep.sources)
    downstream = tuple(sets.downstream(sweep, name) for name in sweep.downstream)
    sets.check_encoding(sweep, sources, downstream)
    distances = _source_distances(sweep, sources, downstream)
    cells = tuple(_with_tasks(sweep, cell, downstream, distances) for cell in _grid(sweep, sources))
    baselines = tuple(_baselines(sweep, downstream))
    tasks: dict[tuple[Any, ...], Task] = {}
    made: tuple[Source | Downstream, ...] = (*sources, *downstream)
    for each in made:
        _add(tasks, *each.tasks)
    for cell in cells:
        if cell.task is not None:
            _add(tasks, cell.task, *cell.probes.values())
    _add(tasks, *(baseline.task for baseline in baselines), *distances.values())
    for cell in cells:
        _add(tasks, *cell.subset_distances.values())
    waiting = dict.fromkeys(each.waiting for each in made if each.waiting)
    waiting |= dict.fromkeys(cell.waiting for cell in cells if cell.waiting)
    return Plan(
        sweep, sources, downstream, cells, baselines, distances, tuple(tasks.values()), tuple(waiting)
    )


def _add(tasks: dict[tuple[Any, ...], Task], *new: Task) -> None:
    for task in new:
        tasks.setdefault((*task.id, task.output), task)


def _grid(sweep: SweepConfig, sources: tuple[Source, ...]) -> list[Cell]:
    cells: list[Cell] = []
    for source in sources:
        for method in sweep.methods:
            for asked in sweep.budget:
                recipe, per_sample, samples = _resolve_budget(sweep, method, asked)
                seen = set()
                for unique in sweep.unique_samples:
                    n = _unique(sweep, unique, samples, source)
                    if n in seen and n is not None:
                        continue  # `all` and `C/8` may name an N that a number names too
                    seen.add(n)
                    if n is not None and samples is not None and not _check_unique(sweep, n, samples, source):
                        continue
                    for seed in sweep.seeds:
                        cells.append(
                            Cell(
                                method=method,
                                backbone=sweep.backbone_of(method),
                                recipe=recipe,
                                source=source,
                                unique_asked=str(unique),
                                unique_samples=n,
                                budget_asked=str(asked),
                                budget=samples,
                                batch_size=sweep.batch_size,
                                seed=seed,
                                replicate=seed if sweep.replicates == "per-seed" else 0,
                                flops_per_sample=per_sample,
                                waiting=source.waiting
                                or ("" if samples else f"the FLOPs of {method} are not counted yet"),
                            )
                        )
    return cells


def _resolve_budget(
    sweep: SweepConfig, method: str, asked: int | float | str
) -> tuple[Recipe | None, int | None, int | None]:
    """(recipe, FLOPs per sample, C); None for what must be counted first.

    The recipe may depend on C (`auto`) and, for a budget in FLOPs, C on the recipe: the small recipe's
    count decides which recipe it is, that recipe's count decides C.
    """
    parsed = budget.parse_budget(asked)
    samples: int | None = int(parsed.amount) if parsed.unit == "samples" else None
    if samples is None:
        first = _recipe(sweep, method, 1)
        per_sample = known_flops(method, sweep.backbone_of(method), sweep.image_size, first)
        if per_sample is None:
            return None, None, None
        samples = parsed.samples(per_sample)
    recipe = _recipe(sweep, method, samples)
    per_sample = known_flops(method, sweep.backbone_of(method), sweep.image_size, recipe)
    if parsed.unit != "samples":
        samples = None if per_sample is None else parsed.samples(per_sample)
    if samples is not None:
        budget.used(samples, sweep.batch_size)  # refuses less than one batch
    return recipe, per_sample, samples


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


def _with_tasks(
    sweep: SweepConfig,
    cell: Cell,
    downstream: tuple[Downstream, ...],
    distances: Mapping[tuple[str, str], Task],
) -> Cell:
    if cell.waiting or cell.recipe is None or cell.budget is None or cell.unique_samples is None:
        return cell
    subset = cell.source.subset(cell.unique_samples, cell.replicate)
    name = f"{cell.method}/{cell.backbone} {cell.source.name} N={cell.unique_samples} C={cell.budget} seed {cell.seed}"
    spec = CellSpec(
        method=cell.method,
        backbone=cell.backbone,
        recipe=cell.recipe,
        image_size=sweep.image_size,
        parts=subset.specs,
        rows_digest=rows.digest(subset),
        unique_samples=cell.unique_samples,
        # C_used, which is what determines the result; an N above it must still be within the budget
        budget=max(budget.used(cell.budget, cell.batch_size), cell.unique_samples),
        batch_size=cell.batch_size,
        seed=cell.seed,
        replicate=cell.replicate,
        order=sweep.windowed or "global",
        layout=layout_digest(subset.pieces) if sweep.windowed else "",
        decode=sweep.decode,
        precision=sweep.precision,
        checkpoint_samples=sweep.checkpoint_samples,
    )
    task = Task("pretrain", spec, cell.source.needs, label=f"pretrain {name}")
    ready = [d for d in downstream if d.ready]
    return replace(
        cell,
        subset=subset,
        task=task,
        probes={
            d.name: _probe(sweep, f"cell:{task.key}", d, (task, *d.tasks), f"{d.name} {name}") for d in ready
        },
        distances={d.name: t for d in ready if (t := distances.get((cell.source.name, d.name)))},
        subset_distances={
            d.name: t for d in ready if (t := _distance(sweep, cell.source, len(subset), d, cell.replicate))
        },
    )


def _probe(sweep: SweepConfig, network: str, d: Downstream, needs: tuple[Task, ...], label: str) -> Task:
    assert d.train is not None
    assert d.test is not None
    spec = ProbeSpec(
        network=network,
        image_size=sweep.image_size,
        train_pool=d.train.path.name,
        test_pool=d.test.path.name,
        train_digest=d.train.digest,
        test_digest=d.test.digest,
        probes=sweep.probes,
        seed=sweep.evaluation_seed,
    )
    return Task("probe", spec, needs, label=f"probe {label}")


def _baselines(sweep: SweepConfig, downstream: tuple[Downstream, ...]) -> list[Baseline]:
    backbones = list(dict.fromkeys(sweep.backbone_of(method) for method in sweep.methods))
    out = []
    for d in downstream:
        if not d.ready:
            continue
        if "pixels" in sweep.baselines:
            out.append(
                Baseline("pixels", "", None, d, _probe(sweep, "pixels", d, d.tasks, f"{d.name} pixels"))
            )
        for backbone in backbones if "random" in sweep.baselines else []:
            for seed in sweep.seeds:
                network = f"random:{backbone}:{seed}"
                task = _probe(sweep, network, d, d.tasks, f"{d.name} {network}")
                out.append(Baseline("random", backbone, seed, d, task))
    return out


def _source_distances(
    sweep: SweepConfig, sources: tuple[Source, ...], downstream: tuple[Downstream, ...]
) -> dict[tuple[str, str], Task]:
    """Each source against each downstream set at one n, once every source is there to tell what it can be."""
    if any(not source.pools for source in sources):
        return {}
    n = min(sweep.distance.n, *(source.size for source in sources))
    return {
        (source.name, d.name): task
        for d in downstream
        if d.ready
        for source in sources
        if (task := _distance(sweep, source, n, d))
    }


def _distance(sweep: SweepConfig, source: Source, n: int, d: Downstream, replicate: int = 0) -> Task | None:
    """A draw of n images against as many training images of `d`: at most distance.n, and what both have.

    None for a single image: it has no distribution.
    """
    assert d.train is not None
    n = min(sweep.distance.n, n, d.train.size)
    if n < 2:
        return None
    subset = source.subset(n, replicate)
    spec = DistanceSpec(
        parts=subset.specs,
        rows_digest=rows.digest(subset),
        reference_pool=d.train.path.name,
        reference_digest=d.train.digest,
        extractor=sweep.distance.extractor,
        extractor_digest=extractor_digest(sweep.distance.extractor),
        seed=sweep.evaluation_seed,
    )
    first = subset.parts[0][1].start
    return Task(
        "distance",
        spec,
        (*source.needs, *d.tasks),
        label=f"distance {source.name} to {d.name}, {n} images from row {first}",
    )
