"""What a generated pool is made from: the recipe, and the specs of its two tasks. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ssl_diversity import budget, files
from ssl_diversity.config import Config, merge, validate
from ssl_diversity.data.config import NAME, Filter
from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import UserError

SOURCE = "generated"  # the `source` of a recipe that this room reads
TASK = "task:"  # a pipeline that a train-generator task of that key makes
PIPELINES = ("DDPMPipeline", "DDIMPipeline")  # the diffusers classes that can be sampled

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Generator(Config):
    """An unconditional DDPM (arXiv 2006.11239) on a U-Net, and how it is trained. Schedules count samples."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"checkpoint_samples"})

    image_size: Positive  # pixels; the pool's images are area-averaged to it
    channels: Literal[1, 3] = 3  # 1: the mean of the three
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)]  # channels at each level, each half the size
    layers: Positive = 1  # residual blocks per level
    groups: Positive = 8  # of group normalisation
    attention: bool = False  # self-attention at the coarsest level
    noise_schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"  # cosine: arXiv 2102.09672
    timesteps: Positive = 1000
    samples: Positive  # C: images processed, repeats counted
    batch_size: Positive
    lr: float = Field(gt=0, allow_inf_nan=False)
    warmup_fraction: Fraction = 0.05  # of C; then a cosine to 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    ema_gamma: float = Field(16.97, ge=0, allow_inf_nan=False)  # power-function average, arXiv 2312.02696
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: int = Field(0, ge=0, lt=1 << 63)
    checkpoint_samples: Positive = 1_000_000

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.image_size % (1 << (len(self.widths) - 1)):
            raise ValueError(
                f"image_size={self.image_size} cannot be halved {len(self.widths) - 1} times; give fewer widths"
            )
        if wrong := [width for width in self.widths if width % self.groups]:
            raise ValueError(f"widths: {wrong[0]} is not a multiple of groups={self.groups}")
        return self


class GeneratorSpec(Generator):
    """The train-generator task: a `Generator` and the first `rows_count` rows of a pool.

    `pool` is a directory name (where the rows are); `rows_digest` says what they are.
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = Generator.NOT_IDENTITY | {"pool"}

    pool: str
    rows_digest: str
    rows_count: Positive


class Sampling(Config):
    """How a pipeline is sampled, `block` images at a time."""

    scheduler: Literal["ddim", "ddpm"] = "ddim"  # ddim: eta = 0, arXiv 2010.02502
    steps: Positive
    block: Positive  # part of the images' identity: other block sizes give pixels that differ here and there
    oversample: float = Field(2.0, ge=1)  # give up after this many times n images, if too many are duplicates


class GenerateSpec(Config):
    """The generate task: a pipeline, how it is sampled, and the encoding of the pool that is written.

    `pipeline` is `task:KEY` (what that train-generator task made; the key says what it is) or a folder that
    `DiffusionPipeline.save_pretrained` wrote; of a folder, `pipeline_digest` says what it is.
    """

    name: str = Field(pattern=NAME)
    pipeline: str
    pipeline_digest: str | None = None
    real_images: int | None = Field(None, ge=0)  # that the generator was trained on; None: not known
    n: Positive
    seed: int = Field(0, ge=0, lt=1 << 63)
    sampling: Sampling
    size: Positive
    filter: Filter = "bicubic"
    codec: Literal["png", "jpeg"] = "png"
    quality: int = Field(95, ge=1, le=100)
    origin: str = ""
    terms: str = ""

    def identity(self) -> dict[str, Any]:
        exclude: dict[str, Any] = {"origin": True, "terms": True, "sampling": {"oversample"}}
        if self.pipeline_digest is not None:
            exclude["pipeline"] = True
        return self.model_dump(mode="json", exclude=exclude)

    @property
    def directory(self) -> Path:
        """Where the pool lies."""
        return files.pools_dir() / f"{self.name}-{files.digest(self.identity())[:8]}"

    @property
    def pipeline_folder(self) -> Path:
        if self.pipeline.startswith(TASK):
            return files.task_dir("train-generator", self.pipeline.removeprefix(TASK)) / "pipeline"
        return Path(self.pipeline).expanduser()


class GeneratedRecipe(Config):
    """A recipe with `source: generated`: train `generator` on the pool of recipe `base`, sample n images.

    `pipeline` names a saved diffusers pipeline folder instead; then nothing is trained.
    """

    source: Literal["generated"]
    name: str = Field(pattern=NAME)
    base: str | None = None
    base_options: dict[str, Any] = Field({})
    generator: Generator | None = None
    pipeline: str | None = None
    real_images: int | None = Field(None, ge=0)  # behind `pipeline`, where that is known
    n: Positive
    seed: int = Field(0, ge=0, lt=1 << 63)
    sampling: Sampling
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
        g = self.generator
        where = f"generator of {self.name!r}"
        if g.image_size > base.image_size and base.info.resize != "none":
            raise UserError(
                f"{where}: image_size={g.image_size} is more than pool {base.name!r} has ({base.image_size})"
            )
        samples = budget.used(g.samples, g.batch_size)
        n = min(base.size, samples)
        try:
            budget.check_unique(n, samples, g.batch_size, base.size, base.name)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return GeneratorSpec(
            **g.model_dump(), pool=base.path.name, rows_digest=base.rows_digest(base.rows(n)), rows_count=n
        )

    def generate_spec(
        self,
        *,
        size: int,
        filter: Filter,
        codec: Literal["png", "jpeg"],
        quality: int,
        trained: tuple[str, int] | None = None,
    ) -> GenerateSpec:
        """The generate task, its pool encoded like the sweep's others.

        `trained` is (key of the train-generator task, its `rows_count`) where the recipe `trains`; else the
        folder `pipeline` is looked at: a UserError where it is none that can be sampled.
        """
        source: dict[str, Any]
        if self.trains:
            assert trained is not None
            source = {"pipeline": TASK + trained[0], "real_images": trained[1]}
        else:
            folder = Path(str(self.pipeline)).expanduser().absolute()
            pipeline_class(folder)
            digest = folder_digest(folder)
            source = {"pipeline": str(folder), "pipeline_digest": digest, "real_images": self.real_images}
        return GenerateSpec(
            **self.model_dump(include={"name", "n", "seed", "sampling", "origin", "terms"}),
            **source,
            size=size,
            filter=filter,
            codec=codec,
            quality=quality,
        )


def from_recipe(recipe: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> GeneratedRecipe:
    """The recipe as read from YAML (`ssl_diversity.data.recipes.load`), the user's `options` over it."""
    return validate(GeneratedRecipe, merge(recipe, options or {}), f"set {recipe.get('name', SOURCE)!r}")


def pipeline_class(folder: Path) -> str:
    """The diffusers class of a saved pipeline; UserError where it is none that can be sampled."""
    index = folder / "model_index.json"
    try:
        name = json.loads(index.read_text())["_class_name"]
    except OSError:
        raise UserError(
            f"pipeline={folder}: no such folder, or no model_index.json in it; "
            "give a folder that a diffusers pipeline's save_pretrained wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a diffusers model index; save the pipeline again") from None
    if name not in PIPELINES:
        raise UserError(
            f"pipeline={folder}: a {name} cannot be sampled; unconditional ones can ({', '.join(PIPELINES)})"
        )
    return str(name)


def folder_digest(folder: Path) -> str:
    """128-bit hex digest of the names and contents of a folder's files, hidden ones left out."""
    state = hashlib.blake2b(digest_size=16)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted(paths.items()):
        if not any(part.startswith(".") for part in name.split("/")):
            with path.open("rb") as file:
                state.update(f"{name}\0{hashlib.file_digest(file, 'blake2b').hexdigest()}\n".encode())
    return state.hexdigest()
