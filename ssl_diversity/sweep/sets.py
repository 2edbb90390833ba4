"""The sets of a sweep: from a name and options to a pool, or to the tasks that will make it."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ssl_diversity.data import recipes
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import UserError
from ssl_diversity.generation import config as generation
from ssl_diversity.sweep.config import SweepConfig, given_pool, named_entry
from ssl_diversity.sweep.task import Task


@dataclass(frozen=True)
class Source:
    """A pool to pretrain on. `tasks` make it, the last of them the pool itself (none for a given pool)."""

    name: str
    tasks: tuple[Task, ...]
    pool: Pool | None
    encoding: dict[str, Any]

    @property
    def waiting(self) -> str:
        return "" if self.pool else f"source {self.name} is not prepared yet"


@dataclass(frozen=True)
class Downstream:
    """A labelled set to probe on, as two pools. `tasks` make them."""

    name: str
    tasks: tuple[Task, ...]
    train: Pool | None
    test: Pool | None
    encoding: dict[str, Any]

    @property
    def ready(self) -> bool:
        return self.train is not None and self.test is not None

    @property
    def waiting(self) -> str:
        return "" if self.ready else f"downstream set {self.name} is not prepared yet"


def source(sweep: SweepConfig, name: str) -> Source:
    """The source `name`: a recipe to prepare or generate, or a pool that lies there already."""
    recipe, options = named_entry(sweep.sources[name], name)
    try:
        loaded = recipes.load(recipe)
        if loaded["source"] == generation.SOURCE:
            return _generated(sweep, name, generation.from_recipe(loaded, options))
        spec = recipes.resolve(recipe, options, defaults=sweep.defaults)
    except UserError as error:
        pool = given_pool(recipe)
        if pool is None:
            raise UserError(f"sources.{name}: {error}") from None
        return Source(name, (), pool, pool.info.encoding)
    task = _prepare(spec)
    return Source(name, (task,), _pool(task), _encoding(spec))


def _generated(sweep: SweepConfig, name: str, recipe: generation.GeneratedRecipe) -> Source:
    """Prepare the generator's own pool, train it, sample from it; each is known once the one before is done."""
    defaults, trained = sweep.defaults, None
    tasks: tuple[Task, ...] = ()
    if recipe.trains:
        assert recipe.base is not None
        shared = next((n for n, entry in sweep.sources.items() if entry == {"recipe": recipe.base}), None)
        options = {**({"name": shared} if shared else {}), **recipe.base_options}
        base = _prepare(recipes.resolve(recipe.base, options, defaults=defaults))
        pool = _pool(base)
        if pool is None:
            return Source(name, (base,), None, _encoding(SimpleNamespace(**defaults)))
        spec = recipe.generator_spec(pool)
        train = Task("train-generator", spec, (base,), label=f"train-generator {name}")
        tasks, trained = (base, train), (train.key, spec.rows_count)
    generate_spec = recipe.generate_spec(**defaults, trained=trained)
    output = generate_spec.directory / "pool.json"
    generate = Task("generate", generate_spec, tasks[-1:], output, f"generate {name}")
    return Source(name, (*tasks, generate), _pool(generate), _encoding(generate_spec))


def downstream(sweep: SweepConfig, name: str) -> Downstream:
    """The labelled downstream set `name`: a recipe, or the path of a folder or tar."""
    try:
        specs = sweep.downstream_specs(name)
    except UserError as error:
        raise UserError(f"downstream.{name}: {error}") from None
    train, test = (_prepare(spec) for spec in specs)
    return Downstream(name, (train, test), _pool(train), _pool(test), _encoding(specs[0]))


def check_encoding(sweep: SweepConfig, made: Sequence[Source | Downstream]) -> None:
    """Refuse pools stored in different ways: codecs are easier to tell apart than contents."""
    first = made[0]
    for other in made:
        if isinstance(other, Source) and other.encoding["size"] != sweep.image_size:
            raise UserError(
                f"source {other.name!r} is stored at {other.encoding['size']} px, the sweep trains at "
                f"image_size={sweep.image_size}; prepare it at that size"
            )
        if other.encoding != first.encoding and not sweep.allow_mixed_encoding:
            raise UserError(
                f"sets {first.name!r} ({_words(first.encoding)}) and {other.name!r} ({_words(other.encoding)}) are "
                "stored differently, which a network could tell apart; store them alike or say allow_mixed_encoding=true"
            )


def _words(encoding: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in encoding.items() if value is not None)


def _encoding(spec: Any) -> dict[str, Any]:
    """As `PoolInfo.encoding`, of a pool still to be made."""
    quality = spec.quality if spec.codec == "jpeg" else None
    return {"size": spec.size, "filter": spec.filter, "codec": spec.codec, "quality": quality}


def _prepare(spec: PrepareSpec) -> Task:
    return Task(
        "prepare", spec, output=spec.directory / "pool.json", label=f"prepare {spec.name} {spec.split}"
    )


def _pool(task: Task) -> Pool | None:
    return Pool.open(task.output.parent) if task.output is not None and task.output.exists() else None
