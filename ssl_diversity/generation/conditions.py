"""Image i of a pool: its class, what the model is told, its seed. Each a hash of (pool seed, i), whatever was made before."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_diversity import randomness
from ssl_diversity.config import hint
from ssl_diversity.errors import UserError
from ssl_diversity.generation.sampling import CLASS, Conditions, model_index

_SEEDS, _CLASSES, _TEMPLATES, _BLOCKS = range(4)  # streams of a pool's seed


@dataclass(frozen=True)
class Drawn:
    """What images `indices` are made of. `inputs` are prompts, or class numbers of the model.

    `label` is int64 (n,), the class number in the pool, -1 for none. `block_seed` is that of the global generator
    while they are computed, for models and schedulers that draw from it.
    """

    indices: range
    label: NDArray[np.int64]
    inputs: tuple[str | int, ...]
    seeds: tuple[int, ...]
    block_seed: int

    def __len__(self) -> int:
        return len(self.indices)


def image_seeds(seed: int, indices: range) -> list[int]:
    """Noise seeds of a pool's images, in [0, 2^53)."""
    return _bits(seed, _SEEDS, indices).tolist()


def drawn(seed: int, conditions: Conditions, indices: range) -> Drawn:
    """What images `indices` (a block) of the pool of `seed` are made of; classes by their weights, templates evenly."""
    n = len(indices)
    label = np.full(n, -1, np.int64)
    if conditions.classes:
        weights = np.array(conditions.weights or [1.0] * len(conditions.classes))
        label = _choices(seed, _CLASSES, indices, weights)
    inputs: tuple[str | int, ...]
    if conditions.model_labels is not None:
        inputs = tuple(conditions.model_labels[i] for i in label)
    else:
        template = _choices(seed, _TEMPLATES, indices, np.ones(len(conditions.templates)))
        names = [conditions.classes[i] if i >= 0 else CLASS for i in label]
        inputs = tuple(
            conditions.templates[t].replace(CLASS, name) for t, name in zip(template, names, strict=True)
        )
    block_seed = int(_bits(seed, _BLOCKS, range(indices.start, indices.start + 1))[0])
    return Drawn(indices, label, inputs, tuple(image_seeds(seed, indices)), block_seed)


def _bits(seed: int, stream: int, indices: range) -> NDArray[np.int64]:
    """53 random bits for each index."""
    positions = torch.arange(indices.start, indices.stop)
    found: NDArray[np.int64] = randomness.bits(seed, stream, positions, 1)[:, 0].numpy()
    return found & ((1 << 53) - 1)


def _choices(seed: int, stream: int, indices: range, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """A number below len(weights) for each index, each with its share of the probability."""
    edges = np.cumsum(weights) / weights.sum()
    last = int(np.flatnonzero(weights)[-1])  # edges that rounding leaves below 1 give none beyond it
    return np.minimum(np.searchsorted(edges, _bits(seed, stream, indices) / (1 << 53), "right"), last)


def model_classes(folder: Path) -> tuple[str, ...] | None:
    """Names of the classes that a saved model is conditioned on (numbers, where it has no names); None: on none."""
    names = model_index(folder).get("id2label")
    for part, key in (("unet", "num_class_embeds"), ("transformer", "num_embeds_ada_norm")):
        path = folder / part / "config.json"
        count = json.loads(path.read_text()).get(key) if path.exists() else None
        if count:
            known: dict[str, Any] = names if isinstance(names, dict) else {}
            found = [str(known.get(str(i), i)) for i in range(count)]
            return tuple(f"{name} ({i})" if found.count(name) > 1 else name for i, name in enumerate(found))
    return None


def for_classes(conditions: Conditions, known: Sequence[str], where: str) -> Conditions:
    """The conditions of a model of the classes `known`: all of them by default; else the number of each class.

    Raises UserError where a class has none.
    """
    if not conditions.classes:
        return Conditions(classes=tuple(known), model_labels=tuple(range(len(known))))
    numbers = conditions.model_labels
    if numbers is None:
        places: dict[str, int] = {}
        for i, name in enumerate(known):
            for part in (name, *name.split(", ")):
                places.setdefault(part, i)
        if all(name in places for name in conditions.classes):
            numbers = tuple(places[name] for name in conditions.classes)
        elif len(conditions.classes) == len(known):
            numbers = tuple(range(len(known)))
        else:
            missing = next(name for name in conditions.classes if name not in places)
            close = hint(missing, places, "known") if len(known) <= 20 else f"it knows {len(known)}"
            raise UserError(
                f"{where}: the model has no class {missing!r} ({close}); name its classes, or say model_labels=[...], "
                "its number for each of yours"
            )
    if max(numbers) >= len(known):
        raise UserError(
            f"{where}: model_labels: the model has classes 0 to {len(known) - 1}, not {max(numbers)}"
        )
    return conditions.model_copy(update={"model_labels": numbers})


def for_text(conditions: Conditions, where: str) -> Conditions:
    """The conditions of a text model; UserError where there is nothing to put into the templates."""
    lacking = [template for template in conditions.templates if CLASS in template]
    if lacking and not conditions.classes:
        raise UserError(
            f"{where}: makes images of text, and template {lacking[0]!r} wants a class; say classes=[...] (a list, "
            "or a file with one a line), or templates without {class}"
        )
    if conditions.model_labels is not None:
        raise UserError(
            f"{where}: makes images of text; model_labels are for class-conditional models, leave them out"
        )
    return conditions
