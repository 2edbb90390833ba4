"""What a generated pool is: a pipeline, how it is sampled, what of, how its images are stored. No torch here."""

import hashlib
import json
import math
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ssl_diversity import files
from ssl_diversity.config import Config, hint
from ssl_diversity.data.config import NAME, Filter
from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import UserError

SOURCE = "generated"  # the `source` of a recipe that this room reads
TASK = "task:"  # a pipeline that a train-generator task of that key makes
HUB = "hub:"  # a pipeline of the Hugging Face hub: hub:OWNER/NAME@COMMIT
CLASS = "{class}"  # in a template: the name of the class
SHORT = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}  # arXiv 2010.02502 (eta = 0) and 2006.11239
NUMERICS = 1  # raised when the images of a spec change
_CHUNK_IMAGES = 1024

Positive = Annotated[int, Field(gt=0)]
FilterName = Literal["blank", "saturated", "safety"]


class Sampling(Config):
    """How a pipeline is sampled, `block` images at a time; `chunk` images are a task of their own."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"chunk", "oversample", "offload"})

    scheduler: str | None = None  # ddim, ddpm or a diffusers class; None: the one saved with the pipeline
    steps: Positive
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)  # None: the pipeline's default
    negative_prompt: str = ""
    resolution: Positive | None = None  # pixels, of a pipeline that makes any; None: its own
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of weights and activations
    block: Positive  # part of the images' identity: other block sizes give pixels that differ here and there
    chunk: Positive | None = None  # images, a multiple of block; None: 1024, rounded up to one
    oversample: float = Field(2.0, ge=1)  # give up after this many times n images, if too many are dropped
    offload: Literal["none", "model", "sequential"] = (
        "none"  # of weights to the CPU's memory: less GPU memory
    )

    @field_validator("scheduler")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in known_schedulers():
            close = hint(value, known_schedulers(), "known")
            raise ValueError(f"not ddim, ddpm or a scheduler class of diffusers; {close}")
        return value

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.chunk is not None and self.chunk % self.block:
            near = max(1, round(self.chunk / self.block)) * self.block
            raise ValueError(f"chunk={self.chunk} is not a multiple of block={self.block}; say chunk={near}")
        return self

    @property
    def chunk_blocks(self) -> int:
        return (self.chunk or _CHUNK_IMAGES + self.block - 1) // self.block


class Conditions(Config):
    """What images are made of. Image i's class and template are drawn for it alone: every prefix is an i.i.d. sample.

    A text model is given a template with the class's name in it, a class-conditional one the class's number
    (`model_labels`; by default the class of that name, else of that place). Without `classes`: all that a
    class-conditional model knows, or the templates as they are. An unconditional model heeds nothing of this.
    """

    classes: tuple[str, ...] = ()  # names in the order of the pool's labels
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None  # None: equal
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = (f"A photo of a {CLASS}",)
    model_labels: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"classes: {twice!r} is there twice; name each class once")
        for name in ("weights", "model_labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.classes):
                raise ValueError(f"{name}: {len(values)} for {len(self.classes)} classes; give one for each")
        if self.weights is not None and not sum(self.weights) > 0:
            raise ValueError("weights: all are 0; give a class that is wanted more than 0")
        lacking = [template for template in self.templates if CLASS not in template]
        if self.classes and lacking:
            raise ValueError(f"templates: {lacking[0]!r} does not name the class; put {CLASS} into it")
        return self


class _Sampled(Config):
    """What determines image i of a pool, and how it is stored.

    `pipeline` is `task:KEY` (what that train-generator task made; the key says what it is), `hub:NAME@COMMIT`, or
    a folder that `DiffusionPipeline.save_pretrained` wrote. `pipeline_digest` says what a folder is, or repeats
    name and commit.
    """

    pipeline: str
    pipeline_digest: str | None = None
    seed: int = Field(0, ge=0, lt=1 << 63)
    sampling: Sampling
    conditions: Conditions = Conditions()
    size: Positive  # pixels, of the pool's squares
    filter: Filter = "bicubic"
    codec: Literal["png", "jpeg"] = "png"
    quality: int = Field(95, ge=1, le=100)

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        if self.pipeline_digest is not None:
            del found["pipeline"]
        return found

    def images_digest(self, pipeline_digest: str) -> str:
        """Of what determines image i, where the pipeline is what that digest says."""
        found = {name: value for name, value in self.identity().items() if name in _Sampled.model_fields}
        return files.digest({**found, "pipeline": pipeline_digest, "numerics": NUMERICS})


class SampleSpec(_Sampled):
    """The sample task: `blocks` blocks of a pool's images from block `first_block` on."""

    first_block: int = Field(ge=0)
    blocks: Positive

    @property
    def images(self) -> int:
        return self.blocks * self.sampling.block


class GenerateSpec(_Sampled):
    """The generate task: the first n images of a pipeline that no filter drops, as a pool, in the order of i.

    A pool grows in place: those of every n lie in the same folder, the shorter being the longer's beginning.
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"origin", "terms"})

    name: str = Field(pattern=NAME)
    n: Positive
    filters: tuple[FilterName, ...] = ()
    blank_spread: float = Field(2.0, ge=0)  # standard deviation, grey levels, up to which an image is blank
    saturated_share: float = Field(0.98, gt=0, le=1)  # of values at 0 or 255, from which it is saturated
    near_duplicates: bool = False  # drop near copies of earlier images too (data/near.py)
    real_images: int | None = Field(None, ge=0)  # that the generator was trained on; None: not known
    origin: str = ""
    terms: str = ""

    def pool_identity(self) -> dict[str, Any]:
        """Of the pool, whatever its size."""
        found = {**self.identity(), "numerics": NUMERICS}
        del found["n"]
        return found

    @property
    def directory(self) -> Path:
        """Where the pool lies."""
        return files.pools_dir() / f"{self.name}-{files.digest(self.pool_identity())[:8]}"

    @property
    def written(self) -> bool:
        """Whether the pool is there with n images or more."""
        there = (self.directory / "pool.json").exists()
        return there and Pool.open(self.directory).size >= self.n

    @property
    def mark(self) -> Path:
        """An empty file in the pool that says that it has n images or more; of a pool that grew."""
        return self.directory / f".has-{self.n}"

    def samples(self) -> tuple[SampleSpec, ...]:
        """The tasks whose images are enough if none is dropped, in order."""
        shared = self.model_dump(include=set(_Sampled.model_fields))
        blocks, step = math.ceil(self.n / self.sampling.block), self.sampling.chunk_blocks
        return tuple(
            SampleSpec(**shared, first_block=first, blocks=min(step, blocks - first))
            for first in range(0, blocks, step)
        )


def task_folder(pipeline: str) -> Path:
    """The folder of `task:KEY`."""
    return files.task_dir("train-generator", pipeline.removeprefix(TASK)) / "pipeline"


@cache
def known_schedulers() -> frozenset[str]:
    """The short names, and the scheduler classes that diffusers lists (read, not imported: that imports torch)."""
    found = find_spec("diffusers")
    text = "" if found is None or found.origin is None else Path(found.origin).read_text()
    return frozenset(SHORT) | frozenset(re.findall(r'"((?!Flax)[A-Z]\w*Scheduler)"', text))


def model_index(folder: Path) -> dict[str, Any]:
    """The parts of a saved pipeline by name; UserError where the folder is none that diffusers loads by itself."""
    path = folder / "model_index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        name = index["_class_name"]
    except OSError:
        raise UserError(
            f"pipeline={folder}: no such folder, or no model_index.json in it; "
            "give a folder that a diffusers pipeline's save_pretrained wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a diffusers model index; save the pipeline again") from None
    if not isinstance(name, str):
        raise UserError(
            f"pipeline={folder}: brings code of its own, which is not run; use a pipeline of diffusers"
        )
    return index


def pipeline_class(folder: Path) -> str:
    """The diffusers class of a saved pipeline; UserError as `model_index`."""
    return str(model_index(folder)["_class_name"])


def folder_digest(folder: Path) -> str:
    """128-bit hex digest of the names and contents of a folder's files, hidden ones left out.

    Kept under home()/cache by the files' names, sizes, inodes and times of change: weights of gigabytes are read
    once.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    shown = {name: path for name, path in sorted(paths.items()) if not re.search(r"(^|/)\.", name)}
    stats = [(name, path.stat()) for name, path in shown.items()]
    state = [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]
    known = files.home() / "cache" / "pipelines" / files.digest([str(folder.absolute()), state])
    if known.exists():
        return known.read_text()
    whole = hashlib.blake2b(digest_size=16)
    for name, path in shown.items():
        with path.open("rb") as file:
            whole.update(f"{name}\0{hashlib.file_digest(file, 'blake2b').hexdigest()}\n".encode())
    files.write_atomic(known, whole.hexdigest())
    return whole.hexdigest()
