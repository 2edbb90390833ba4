"""A cell's pretraining: one method, one backbone, N images of one pool or several, exactly C samples."""

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import budget
from ssl_diversity.backbones import is_vit
from ssl_diversity.config import Config
from ssl_diversity.data.order import GlobalOrder, Order, Windowed
from ssl_diversity.data.subset import PartSpec, Subset
from ssl_diversity.data.windowed import WindowedOrder, layout_digest
from ssl_diversity.errors import UserError
from ssl_diversity.methods.recipe import Recipe
from ssl_diversity.runtime import Runtime

if TYPE_CHECKING:
    from ssl_diversity.data.reading import Reader
    from ssl_diversity.methods.base import Method

EFFECTIVE_RANK_IMAGES = 1024
HEAD_SPREAD = (
    0.1  # of a head's embeddings: SimCLR without its negatives fell to 0.03, healthy ones kept 0.28 and more
)


COMPILED_FROM = 4_000_000  # samples, in whose time a compilation does not matter


def pays_to_compile(backbone: str, samples: int) -> bool:
    """Whether a cell's networks are compiled, which changes results by rounding.

    Decided by its C, never by what is left of it: a resumed run computes as an undisturbed one. ViTs, which are mostly
    matrix products, are not.
    """
    return samples >= COMPILED_FROM and not is_vit(backbone)


class CellSpec(Config):
    """One point of the grid, resolved: everything that determines the weights that come out.

    `parts` say where the images are (rows of one pool, or of those of a mixture), `rows_digest` what they are.
    A windowed order depends on where shards end, too: `layout` is `data.windowed.layout_digest`.
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"parts", "checkpoint_samples"})

    method: str
    backbone: str
    recipe: Recipe
    image_size: int
    parts: tuple[PartSpec, ...]
    rows_digest: str
    unique_samples: int
    budget: int
    batch_size: int
    seed: int
    replicate: int = 0
    order: Literal["global"] | Windowed = "global"
    layout: str = ""
    precision: str = "bf16-mixed"
    decode: Literal["exact", "scaled"] = "exact"
    checkpoint_samples: int = 1_000_000

    @property
    def compiled(self) -> bool:
        return pays_to_compile(self.backbone, self.budget)

    def identity(self) -> dict[str, Any]:
        return super().identity() | ({"compiled": True} if self.compiled else {})


def make_order(spec: CellSpec, subset: Subset) -> Order:
    """The cell's order; UserError where the shards are no longer those that it was planned with."""
    if spec.order == "global":
        return GlobalOrder(spec.unique_samples, spec.batch_size, spec.seed, spec.budget)
    if layout_digest(subset.pieces) != spec.layout:
        raise UserError("the shards of a pool have changed since this cell was planned; plan again")
    return WindowedOrder(subset.pieces, spec.batch_size, spec.seed, spec.budget, **spec.order.model_dump())


def open_cell(spec: CellSpec, runtime: Runtime) -> "tuple[Subset, Order, Method, Reader]":
    """What the cell trains on and with; UserError where its images are not there as planned."""
    from ssl_diversity import methods
    from ssl_diversity.data.reading import open_reader

    subset = Subset.open(spec.parts, spec.rows_digest, "cell")
    order = make_order(spec, subset)
    module = methods.build(
        spec.method,
        backbone=spec.backbone,
        image_size=spec.image_size,
        recipe=spec.recipe,
        budget=budget.used(spec.budget, spec.batch_size),
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
    if spec.compiled:
        _compile(module, runtime)
    reader = open_reader(
        subset,
        image_size=spec.image_size,
        decode=spec.decode,
        threads=runtime.threads,
        order=order,
        runtime=runtime,
    )
    return subset, order, module, reader


def pretrain(spec: CellSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Train the cell, going on from `out/last.ckpt` if there is one, and write `out/weights.pt`.

    `weights.pt` holds {"backbone", "image_size", "pooling", "state_dict"} of the network to evaluate.
    Returns the measures of the run. Raises Interrupted after saving when asked to stop. All ranks of `runtime.group`
    do this together, each with its share of every batch; rank 0 writes and returns measures, the others return {}.
    """
    import torch

    from ssl_diversity import loop
    from ssl_diversity.distance.diversity import collapsed, effective_rank
    from ssl_diversity.features import embed_images, load_weights
    from ssl_diversity.files import replacing
    from ssl_diversity.methods.flops import flops_per_sample

    runtime.set_threads()
    with runtime.group.together():
        subset, order, module, reader = open_cell(spec, runtime)
    result = loop.fit(
        module,
        order=order,
        reader=reader,
        out=out,
        runtime=runtime,
        precision=spec.precision,
        checkpoint_samples=spec.checkpoint_samples,
    )
    if not runtime.group.first:
        return {}
    pooling, state = module.evaluation_state()
    weights = {
        "backbone": spec.backbone,
        "image_size": spec.image_size,
        "pooling": pooling,
        "state_dict": {name: value.cpu() for name, value in state.items()},
    }
    with replacing(out / "weights.pt") as temporary, temporary.open("wb") as file:
        torch.save(weights, file)  # to a handle: a path would put its random name into the bytes
    shown = first_images(subset, EFFECTIVE_RANK_IMAGES, spec.image_size)
    features = embed_images(shown, load_weights(out / "weights.pt"), device=runtime.device)
    with torch.compiler.set_stance("force_eager") if module.compiled else contextlib.nullcontext():
        share = module.batch_size // runtime.group.ranks.world
        embeddings = _embeddings(module, shown, runtime.device, share)
    per_sample = flops_per_sample(spec.method, spec.backbone, spec.image_size, spec.recipe)
    return {
        "samples_seen": result.samples_seen,
        "flops_per_sample": per_sample,
        "flops": per_sample * result.samples_seen,
        "train_seconds": result.seconds,
        "samples_per_second": result.samples_seen / result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "effective_rank": effective_rank(features),
        "collapsed": collapsed(features) or any(collapsed(x, HEAD_SPREAD) for x in embeddings),
        "compiled": module.compiled,
        "final_loss": result.history[-1][1],
        "history": result.history,
    }


def _compile(module: "Method", runtime: Runtime) -> None:
    """If possible; if not, a line says why, and training goes on without. What ranks do within a network is not."""
    from ssl_diversity.methods.compiling import compile_networks

    if runtime.group.ranks.world > 1:
        return
    if why := compile_networks(module, runtime.device, runtime.threads):
        print(f"trains without torch.compile, which does not work here: {why}", file=sys.stderr, flush=True)


def first_images(subset: Subset, count: int, image_size: int) -> NDArray[np.uint8]:
    """uint8 (about `count`, S, S, 3): the first rows of every part, each by its share."""
    share = min(1.0, count / len(subset))
    return np.concatenate(
        [
            pool.images(rows[np.arange(math.ceil(share * len(rows)))], image_size)
            for pool, rows in subset.parts
        ]
    )


def _embeddings(
    module: "Method", images: NDArray[np.uint8], device: str, batch_size: int
) -> list[NDArray[np.float32]]:
    """What a joint-embedding method's head makes of views of uint8 (n, H, W, 3): [(n of all views, d)], or [] for MAE.

    In batches of the size that a rank trains with, for which there is memory. A head can map every image to one point while the backbone's features still look healthy.
    """
    import torch

    from ssl_diversity.views.augment import make_views

    if not module.joint_embedding:
        return []
    module.eval().to(device)
    found = []
    for first in range(0, len(images), batch_size):
        part = torch.from_numpy(images[first : first + batch_size])
        batch = part.permute(0, 3, 1, 2).contiguous().to(device)
        positions = torch.arange(first, first + len(part), device=device)
        with torch.no_grad():
            outputs = module(make_views(batch, module.recipe.views, module.seed, positions), positions)
        found.append(outputs[0].flatten(0, -2).float().cpu().numpy())
    return [np.concatenate(found)]
