"""The recipe of a generated pool: which generator to train or to load, and how to sample it. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ssl_diversity.config import Config, hint, merge, validate
from ssl_diversity.data.config import NAME, Filter
from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import UserError
from ssl_diversity.generation.sampling import (
    CLASS,
    HUB,
    SOURCE,
    TASK,
    Conditions,
    FilterName,
    GenerateSpec,
    Positive,
    Sampling,
    folder_digest,
    pipeline_class,
)
from ssl_diversity.generation.training import Generator, GeneratorSpec

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class GeneratedRecipe(Config):
    """A recipe with `source: generated`: train `generator` on the pool of recipe `base`, sample n images.

    `pipeline` names a saved diffusers pipeline instead, a folder or OWNER/NAME on the Hugging Face hub at commit
    `revision`; then nothing is trained. `classes` is a list, or a text file with one a line; `weights` a list in
    their order, or a mapping (a class that it leaves out is not drawn).
    """

    source: Literal["generated"]
    name: str = Field(pattern=NAME)
    base: str | None = None
    base_options: dict[str, Any] = Field({})
    generator: Generator | None = None
    pipeline: str | None = None
    revision: str | None = None
    real_images: int | None = Field(None, ge=0)  # behind `pipeline`, where that is known
    n: Positive
    seed: int = Field(0, ge=0, lt=1 << 63)
    classes: tuple[str, ...] | str = ()
    weights: tuple[float, ...] | dict[str, float] | None = None
    templates: tuple[str, ...] = (f"A photo of a {CLASS}",)
    model_labels: tuple[int, ...] | None = (
        None  # the number that a class-conditional model has for each class
    )
    sampling: Sampling
    filters: tuple[FilterName, ...] = ("blank", "saturated", "safety")
    blank_spread: float = 2.0
    saturated_share: float = 0.98
    near_duplicates: bool = False
    description: str = ""
    origin: str = ""
    terms: str = ""

    @model_validator(mode="after")
    def _one_pipeline(self) -> Self:
        if self.pipeline is None and (self.base is None or self.generator is None):
            raise ValueError("give base (a recipe) and generator to train one, or pipeline (a saved folder)")
        return self

    @property
    def trains(self) -> bool:
        """Whether the generator must be trained on the pool of `base` first."""
        return self.pipeline is None

    def generator_spec(self, base: Pool) -> GeneratorSpec:
        """The train-generator task on all rows of `base` (the first C, where C is less).

        Raises UserError where the pool's size or image size does not allow it.
        """
        assert self.generator is not None
        return GeneratorSpec.of(self.generator, base, f"generator of {self.name!r}")

    def generate_spec(
        self,
        *,
        size: int,
        filter: Filter,
        codec: Literal["png", "jpeg"],
        quality: int,
        trained: tuple[str, int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> GenerateSpec:
        """The generate task, its pool encoded like the sweep's others.

        `trained` is (key of the train-generator task, its `rows_count`) where the recipe `trains`; else the
        folder `pipeline` is looked at: a UserError where it is none that diffusers loads. `classes` are those that
        the recipe's `classes` stands for, where that is neither a list nor a file.
        """
        source: dict[str, Any]
        if self.trains:
            assert trained is not None
            source = {"pipeline": TASK + trained[0], "real_images": trained[1]}
        else:
            pipeline, digest = _located(str(self.pipeline), self.revision)
            source = {"pipeline": pipeline, "pipeline_digest": digest, "real_images": self.real_images}
        values = self.model_dump(include=set(GenerateSpec.model_fields) - source.keys()) | source
        values |= {"conditions": self.conditions(classes)}
        values |= {"size": size, "filter": filter, "codec": codec, "quality": quality}
        return validate(GenerateSpec, values, f"set {self.name!r}")

    def conditions(self, classes: Sequence[str] | None = None) -> Conditions:
        """What images are made of; `classes` in place of the recipe's. UserError where they do not fit together."""
        where = f"set {self.name!r}"
        if classes is None:
            classes = _read_classes(self.classes, where) if isinstance(self.classes, str) else self.classes
        weights: Any = self.weights
        if isinstance(self.weights, dict):
            for name in self.weights:
                if name not in classes:
                    raise UserError(f"{where}: weights: no class {name!r}; {hint(name, classes, 'classes')}")
            weights = [self.weights.get(name, 0.0) for name in classes]
        values = {"classes": tuple(classes), "weights": weights}
        return validate(
            Conditions, {**values, **self.model_dump(include={"templates", "model_labels"})}, where
        )


def from_recipe(recipe: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> GeneratedRecipe:
    """The recipe as read from YAML (`ssl_diversity.data.recipes.load`), the user's `options` over it."""
    return validate(GeneratedRecipe, merge(recipe, options or {}), f"set {recipe.get('name', SOURCE)!r}")


def _located(pipeline: str, revision: str | None) -> tuple[str, str]:
    """`pipeline` and `pipeline_digest` of the spec: an existing folder, else a name on the hub."""
    folder = Path(pipeline).expanduser().absolute()
    if folder.exists() or not _HUB_NAME.fullmatch(pipeline):
        pipeline_class(folder)
        return str(folder), folder_digest(folder)
    if revision is None or not _COMMIT.fullmatch(revision):
        said = "no revision is given" if revision is None else f"revision={revision} may come to mean another"
        raise UserError(
            f"pipeline={pipeline}: no such folder; of a pipeline on the Hugging Face hub say which commit (revision="
            f"40 hex digits, from https://huggingface.co/{pipeline}/commits): {said}"
        )
    return f"{HUB}{pipeline}@{revision}", f"{pipeline}@{revision}"


def _read_classes(path: str, where: str) -> tuple[str, ...]:
    """The lines of a text file that hold anything."""
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{where}: classes={path}: no such text file; give a list, or a file with one class a line"
        ) from None
    return tuple(line.strip() for line in lines if line.strip())
