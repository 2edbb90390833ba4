"""The tasks of a plan's cells: what many of them have in common is worked out once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ssl_diversity import budget
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.reading import choose_tier
from ssl_diversity.data.subset import PartSpec, Subset
from ssl_diversity.data.windowed import layout_digest
from ssl_diversity.distance.config import DistanceSpec
from ssl_diversity.evaluation.config import ProbeSpec
from ssl_diversity.files import digest
from ssl_diversity.methods.recipe import Recipe
from ssl_diversity.sweep import rows
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.sets import Downstream, Source
from ssl_diversity.sweep.task import Series, Task
from ssl_diversity.train import CellSpec, pays_to_compile


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
    like: str = ""  # `Task.like` of its task
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

    @property
    def samples(self) -> int:
        """C_used, which is what determines the result; an N above it must still be within the budget. 0 while unknown."""
        if self.budget is None or self.unique_samples is None:
            return 0
        return max(budget.used(self.budget, self.batch_size), self.unique_samples)

    def vary(self, **values: Any) -> "Cell":
        """`dataclasses.replace` that looks at no field twice: a sweep has many thousands of cells."""
        new = object.__new__(Cell)
        new.__dict__.update(self.__dict__ | values)
        return new


@dataclass(frozen=True)
class Baseline:
    """What a network that was never trained gives on a downstream set: `random` or `pixels`."""

    name: str
    backbone: str  # "" for pixels
    seed: int | None  # None for pixels
    downstream: Downstream
    task: Task


@dataclass(frozen=True)
class Draw:
    """The rows of some cells and distances, as their specs are told of them."""

    subset: Subset

    @cached_property
    def specs(self) -> tuple[PartSpec, ...]:
        return self.subset.specs

    @cached_property
    def digest(self) -> str:
        return rows.digest(self.subset)

    @cached_property
    def layout(self) -> str:
        return layout_digest(self.subset.pieces)


class Maker:
    """The tasks of one plan: what many of them have in common is worked out once."""

    def __init__(
        self,
        sweep: SweepConfig,
        sources: tuple[Source, ...],
        downstream: tuple[Downstream, ...],
        extractor: str,
    ) -> None:
        self.sweep, self.downstream, self.extractor = sweep, downstream, extractor
        self._probes = {d.name: Series("probe", self._probe_spec(d), {"network"}) for d in downstream}
        self._series: dict[tuple[str, ...], Series] = {}
        self._sizes: dict[str, list[tuple[Downstream, dict[str, Any]]]] = {}  # of probes, by backbone
        self._draws: dict[tuple[str, int, int], Draw] = {}
        self._subset_distances: dict[tuple[str, int, int], dict[str, Task]] = {}
        self.distances = self._source_distances(sources)
        self._distances = {
            s.name: {d: t for (name, d), t in self.distances.items() if name == s.name} for s in sources
        }

    def cell(self, cell: Cell, seed: int, replicate: int) -> Cell:
        """`cell` with this seed and replicate, and with its tasks unless it waits."""
        source, n, c = cell.source, cell.unique_samples, cell.budget
        if cell.waiting or cell.recipe is None or c is None or n is None:
            return cell.vary(seed=seed, replicate=replicate)
        draw = self.draw(source, n, replicate)
        name = f"{cell.method}/{cell.backbone} {source.name} N={n} C={c} seed {seed}"
        samples = cell.samples
        values = {
            "parts": draw.specs,
            "rows_digest": draw.digest,
            "unique_samples": n,
            "budget": samples,
            "seed": seed,
            "replicate": replicate,
            "layout": draw.layout if self.sweep.windowed else "",
        }
        compiled = "compiled" if pays_to_compile(cell.backbone, samples) else ""
        group = ("pretrain", cell.method, cell.budget_asked, compiled)
        if group not in self._series:
            self._series[group] = Series("pretrain", self._cell_spec(cell, cell.recipe, values), values)
        task = self._series[group].task(
            values, source.needs, f"pretrain {name}", units=samples, like=cell.like
        )
        return cell.vary(
            seed=seed,
            replicate=replicate,
            subset=draw.subset,
            task=task,
            probes=self._probes_of(cell.backbone, {"network": f"cell:{task.key}"}, task, name),
            distances=self._distances[source.name],
            subset_distances=self._distances_of(source, n, replicate),
        )

    def _cell_spec(self, cell: Cell, recipe: Recipe, values: Mapping[str, Any]) -> CellSpec:
        return CellSpec(
            method=cell.method,
            backbone=cell.backbone,
            recipe=recipe,
            image_size=self.sweep.image_size,
            batch_size=cell.batch_size,
            order=self.sweep.windowed or "global",
            decode=self.sweep.decode,
            precision=self.sweep.precision,
            checkpoint_samples=self.sweep.checkpoint_samples,
            **values,
        )

    def draw(self, source: Source, n: int, replicate: int) -> Draw:
        key = (source.name, n, replicate)
        if key not in self._draws:
            self._draws[key] = Draw(source.subset(n, replicate))
        return self._draws[key]

    def _probes_of(self, backbone: str, network: dict[str, str], task: Task, of: str) -> dict[str, Task]:
        if backbone not in self._sizes:
            self._sizes[backbone] = [(d, probe_size(self.sweep, backbone, d)) for d in self.downstream]
        return {
            d.name: self._probes[d.name].task(network, (task, *d.tasks), f"probe {d.name} {of}", **size)
            for d, size in self._sizes[backbone]
        }

    def _probe_spec(self, d: Downstream) -> ProbeSpec:
        assert d.train is not None
        assert d.test is not None
        return ProbeSpec(
            network="pixels",
            image_size=self.sweep.image_size,
            train_pool=d.train.path.name,
            test_pool=d.test.path.name,
            train_digest=d.train.digest,
            test_digest=d.test.digest,
            probes=self.sweep.probes,
            seed=self.sweep.evaluation_seed,
        )

    def subset_distances(self) -> Iterator[Task]:
        """Of all cells so far."""
        for found in self._subset_distances.values():
            yield from found.values()

    def _distances_of(self, source: Source, n: int, replicate: int) -> dict[str, Task]:
        key = (source.name, n, replicate)
        if key not in self._subset_distances:
            self._subset_distances[key] = {
                d.name: task for d in self.downstream if (task := self.distance(source, n, d, replicate))
            }
        return self._subset_distances[key]

    def distance(self, source: Source, n: int, d: Downstream, replicate: int = 0) -> Task | None:
        """A draw of n images against as many training images of `d`: at most distance.n, and what both have.

        None for a single image: it has no distribution.
        """
        assert d.train is not None
        n = min(self.sweep.distance.n, n, d.train.size)
        if n < 2:
            return None
        draw = self.draw(source, n, replicate)
        values = {"parts": draw.specs, "rows_digest": draw.digest}
        if ("distance", d.name) not in self._series:
            spec = DistanceSpec(
                reference_pool=d.train.path.name,
                reference_digest=d.train.digest,
                extractor=self.sweep.distance.extractor,
                extractor_digest=self.extractor,
                seed=self.sweep.evaluation_seed,
                **values,
            )
            self._series["distance", d.name] = Series("distance", spec, values)
        label = f"distance {source.name} to {d.name}, {n} images from row {draw.specs[0].rows_start}"
        return self._series["distance", d.name].task(
            values, source.needs + d.tasks, label, units=n, like=distance_like(self.sweep)
        )

    def _source_distances(self, sources: tuple[Source, ...]) -> dict[tuple[str, str], Task]:
        """Each source against each downstream set at one n, once every source is there to tell what it can be."""
        if any(not source.pools for source in sources):
            return {}
        n = min(self.sweep.distance.n, *(source.size for source in sources))
        return {
            (source.name, d.name): task
            for d in self.downstream
            for source in sources
            if (task := self.distance(source, n, d))
        }

    def baselines(self) -> Iterator[Baseline]:
        sweep = self.sweep
        backbones = list(dict.fromkeys(sweep.backbone_of(method) for method in sweep.methods))
        for d in self.downstream:
            if "pixels" in sweep.baselines:
                yield Baseline("pixels", "", None, d, self._baseline(d, "pixels", "pixels"))
            for backbone in backbones if "random" in sweep.baselines else []:
                for seed in sweep.seeds:
                    network = f"random:{backbone}:{seed}"
                    yield Baseline("random", backbone, seed, d, self._baseline(d, network, backbone))

    def _baseline(self, d: Downstream, network: str, backbone: str) -> Task:
        size = probe_size(self.sweep, backbone, d)
        return self._probes[d.name].task({"network": network}, d.tasks, f"probe {d.name} {network}", **size)


def cell_like(sweep: SweepConfig, cell: Cell) -> str:
    """What the rate of a cell's pretraining depends on; "" where its recipe or N is not known yet."""
    recipe, n, size = cell.recipe, cell.unique_samples, sweep.image_size
    if recipe is None or n is None:
        return ""
    work = digest([[view.model_dump() for view in recipe.views], recipe.params, recipe.optimizer])[:8]
    tier = choose_tier(n, size, remote=any(pool.remote for pool in cell.source.pools))
    decode = "" if tier == "resident" else f"/{sweep.decode}"
    order = "windowed" if sweep.windowed else "global"
    how = f"{order}/{tier}{decode}{'/compiled' if pays_to_compile(cell.backbone, cell.samples) else ''}"
    return f"{cell.method}/{cell.backbone}/{work}/{size}px/{sweep.precision}/batch{cell.batch_size}/{how}"


def probe_size(sweep: SweepConfig, backbone: str, d: Downstream) -> dict[str, Any]:
    """`units` and `like` of a probe: it embeds and then learns on all images of the set."""
    assert d.train is not None
    assert d.test is not None
    like = f"{backbone}/{sweep.image_size}px/{'+'.join(sweep.probes)}"
    return {"units": d.train.size + d.test.size, "like": like}


def distance_like(sweep: SweepConfig) -> str:
    return f"{sweep.distance.extractor}/{sweep.encoding.size or sweep.image_size}px"
