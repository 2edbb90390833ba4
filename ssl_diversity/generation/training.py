"""Training a diffusion model on a pool: what a generator is, and the task. No torch before it runs."""

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ssl_diversity import budget
from ssl_diversity.config import Config
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.reading import open_reader
from ssl_diversity.data.subset import PartSpec, Subset
from ssl_diversity.errors import UserError
from ssl_diversity.generation.sampling import folder_digest
from ssl_diversity.runtime import Runtime

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Generator(Config):
    """A DDPM (arXiv 2006.11239) on a U-Net, and how it is trained. Schedules count samples."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"checkpoint_samples", "picture_samples"})

    image_size: Positive  # pixels; the pool's images are area-averaged to it
    channels: Literal[1, 3] = 3  # 1: the mean of the three
    class_conditional: bool = False  # on the pool's labels
    flip: bool = False  # every image is mirrored, left to right, half of the times it is seen
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)]  # channels at each level, each half the size
    layers: Positive = 1  # residual blocks per level
    groups: Positive = 8  # of group normalisation
    attention: bool = False  # self-attention at the coarsest level
    dropout: Fraction = 0.0  # in the residual blocks
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
    picture_samples: Positive | None = None  # a picture of samples after so many each; None: up to 8 in a run

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

    `pool` is a directory name (where the rows are); `rows_digest` says what they are, and, where the model is
    class-conditional, `labels_digest` which of the `classes` each belongs to. `of` makes one.
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = Generator.NOT_IDENTITY | {"pool"}

    pool: str
    rows_digest: str
    rows_count: Positive
    classes: int = Field(0, ge=0)  # how many; 0: unconditional
    labels_digest: str | None = None

    @classmethod
    def of(cls, generator: Generator, pool: Pool, where: str = "generator") -> Self:
        """The task on all rows of `pool` (the first C, where C is less).

        UserError, beginning with `where`, where the pool's size, image size or labels do not allow it.
        """
        g = generator
        if g.image_size > pool.image_size and pool.info.resize != "none":
            raise UserError(
                f"{where}: image_size={g.image_size} is more than pool {pool.name!r} has ({pool.image_size})"
            )
        samples = budget.used(g.samples, g.batch_size)
        n = min(pool.size, samples)
        try:
            budget.check_unique(n, samples, g.batch_size, pool.size, pool.name)
            labels = labels_digest(pool, pool.rows(n)) if g.class_conditional else None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return cls(
            **g.model_dump(),
            pool=pool.path.name,
            rows_digest=pool.rows_digest(pool.rows(n)),
            rows_count=n,
            classes=len(pool.info.classes) if g.class_conditional else 0,
            labels_digest=labels,
        )

    @model_validator(mode="after")
    def _labels(self) -> Self:
        if self.class_conditional and not (self.classes and self.labels_digest):
            raise ValueError(
                "class_conditional: the pool's labels are missing; make it with GeneratorSpec.of"
            )
        return self


def train_generator(spec: GeneratorSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Train the model, going on from `out/last.ckpt` if there is one, and save its average as `out/pipeline/`.

    Anybody can load that with `DiffusionPipeline.from_pretrained`: a DDPMPipeline, or where it is
    class-conditional a ConsistencyModelPipeline (the class of diffusers that samples a U-Net of pixels by class
    number) with a DDIM scheduler. Exactly B * floor(C / B) samples are seen, in the order that cells see theirs.
    Pictures of samples along the way are in `out/samples/`. Raises Interrupted after saving when asked to stop,
    UserError where the pool is not what was planned.
    """
    from ssl_diversity import loop
    from ssl_diversity.generation.diffusion import Diffusion, training_flops
    from ssl_diversity.generation.pipeline import save

    runtime.set_threads()
    part = PartSpec(pool=spec.pool, rows_start=0, rows_count=spec.rows_count)
    subset = Subset.open([part], spec.rows_digest, "generator")
    pool, rows = subset.parts[0]
    if spec.class_conditional and labels_digest(pool, rows) != spec.labels_digest:
        raise UserError(
            f"the labels of pool {pool.path} have changed since this generator was planned; plan again"
        )
    squares = pool.info.resize == "square"  # else cropped as it is read
    order = GlobalOrder(spec.rows_count, spec.batch_size, spec.seed, spec.samples)
    labels: Callable[[NDArray[np.int64]], NDArray[np.int32]] = lambda t: pool.label[rows[order.at(t)]]  # noqa: E731
    module = Diffusion(spec, spec.classes, labels, out / "samples")
    result = loop.fit(
        module,
        order=order,
        reader=open_reader(
            subset,
            image_size=None if squares else spec.image_size,
            threads=runtime.threads,
            order=order,
            runtime=runtime,
        ),
        out=out,
        runtime=runtime,
        precision=spec.precision,
        checkpoint_samples=spec.checkpoint_samples,
    )
    save(module.pipeline(), out / "pipeline")
    return {
        "real_images": spec.rows_count,
        "classes": list(pool.info.classes) if spec.class_conditional else [],
        "samples_seen": result.samples_seen,
        "final_loss": result.history[-1][1],
        "history": result.history,
        "train_flops": training_flops(spec, spec.classes) * result.samples_seen,
        "train_seconds": result.seconds,
        "samples_per_second": result.samples_seen / result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parameters": sum(parameter.numel() for parameter in module.unet.parameters()),
        "pipeline_digest": folder_digest(out / "pipeline"),
    }


def labels_digest(pool: Pool, rows: Rows) -> str:
    """Hex digest of the classes that `rows` belong to.

    UserError where one has no label, or where a class has none of them: a model could not learn it.
    """
    state, counts = blake2b(digest_size=16), np.zeros(len(pool.info.classes), np.int64)
    for chunk in rows.chunks():
        labels = np.ascontiguousarray(pool.label[chunk])
        if not 0 <= labels.min() <= labels.max() < len(counts):
            raise UserError(
                f"class_conditional: pool {pool.name!r} has images without a label; leave class_conditional out,"
                " or prepare it from folders of classes"
            )
        counts += np.bincount(labels, minlength=len(counts))
        state.update(labels.data)
    if missing := [name for name, count in zip(pool.info.classes, counts, strict=True) if not count]:
        raise UserError(
            f"class_conditional: none of the first {len(rows)} images of pool {pool.name!r} is of class"
            f" {missing[0]!r} ({len(missing)} of {len(counts)} classes are missing); raise samples"
        )
    return state.hexdigest()
