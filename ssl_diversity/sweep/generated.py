"""A generated source: tasks that prepare and train, sample chunk by chunk, and gather a pool of what was made."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import UserError
from ssl_diversity.generation import config as generation
from ssl_diversity.generation.sampling import GenerateSpec
from ssl_diversity.sweep import estimate, mixture
from ssl_diversity.sweep.config import SweepConfig, given_pool, named_entry
from ssl_diversity.sweep.supply import Supply, encoding_of, pool_of, prepare_task
from ssl_diversity.sweep.task import Task


def supply(sweep: SweepConfig, name: str, recipe: generation.GeneratedRecipe) -> Supply:
    """What makes the pool of `recipe`: as far as it can be known before what it is made from is there."""
    defaults = sweep.defaults
    codec: Any = "png" if defaults["codec"] == "original" else defaults["codec"]
    stored = {"size": defaults["size"], "filter": defaults["filter"], "quality": defaults["quality"]}
    encoding = encoding_of(SimpleNamespace(resize="square", codec=codec, **stored))
    trained, classes = None, None
    before: tuple[Task, ...] = ()
    if recipe.trains:
        assert recipe.base is not None
        shared = next((n for n, entry in sweep.sources.items() if entry == {"recipe": recipe.base}), None)
        options = {**({"name": shared} if shared else {}), **recipe.base_options}
        base = prepare_task(recipes.resolve(recipe.base, options, defaults=defaults))
        real = pool_of(base)
        if real is None:
            return Supply(name, (base,), None, encoding)
        generator = recipe.generator_spec(real)
        train = Task(
            "train-generator",
            generator,
            (base,),
            label=f"train-generator {name}",
            units=generator.samples,
            like=estimate.likeness(generator),
        )
        before, trained = (base, train), (train.key, generator.rows_count)
        classes = real.info.classes if generator.class_conditional and not recipe.classes else None
    if isinstance(recipe.classes, str) and not Path(recipe.classes).expanduser().is_file():
        labelled = _labelled(sweep, recipe.classes)
        if isinstance(labelled, Task):
            return Supply(name, (*before, labelled), None, encoding)
        classes = labelled.info.classes
    spec = recipe.generate_spec(**stored, codec=codec, trained=trained, classes=classes)
    return _sampled(name, spec, before, encoding)


def _labelled(sweep: SweepConfig, name: str) -> Pool | Task:
    """The pool that a recipe's `classes` names: a set of the sweep or a pool there is; the task that makes it, if none."""
    if name in sweep.downstream:
        task = prepare_task(sweep.downstream_specs(name)[0])
        return pool_of(task) or task
    if name in sweep.sources and mixture.MIX not in sweep.sources[name]:
        recipe, options = named_entry(sweep.sources[name], name)
        with contextlib.suppress(UserError):  # a pool that is there already
            task = prepare_task(recipes.resolve(recipe, options, defaults=sweep.defaults))
            return pool_of(task) or task
        name = recipe
    if (pool := given_pool(name)) is None:
        raise UserError(
            f"classes={name}: no such text file, set of this sweep or pool; give a list, a file with one class a line,"
            " or a name that `ssl-diversity data list` shows"
        )
    return pool


def _sampled(name: str, spec: GenerateSpec, before: tuple[Task, ...], encoding: dict[str, Any]) -> Supply:
    """The chunks of n images as tasks, and the one that gathers them; a pool of fewer images grows."""
    parts = spec.samples()
    like = estimate.likeness(parts[0])
    of = f"of {len(parts)}"
    chunks = tuple(
        Task("sample", part, before[-1:], None, f"sample {name}, part {i} {of}", units=part.images, like=like)
        for i, part in enumerate(parts, 1)
    )
    pool = Pool.open(spec.directory) if spec.written else None
    # that a pool is there does not say that it has grown: then the mark of its size does
    path = spec.directory / "pool.json"
    output = spec.mark if pool is None and path.exists() else path
    told, stored = f"generate {name}, {spec.n:,} images", f"{spec.size}px/{spec.codec}"
    gather = Task("generate", spec, chunks, output, told, units=spec.n, like=stored)
    made = [*before, *chunks]
    if pool is not None:  # nothing is made again for a pool that is there
        made = [task for task in made if task.output or (task.folder / "result.json").exists()]
    return Supply(name, (*made, gather), pool, encoding, spec.n)
