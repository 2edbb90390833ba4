"""The two tasks of a generated source: train a diffusion model on a pool; sample a pool from one."""

import io
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data import image
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import write_pool
from ssl_diversity.data.reading import open_reader
from ssl_diversity.data.subset import PartSpec, Subset
from ssl_diversity.errors import UserError
from ssl_diversity.generation.config import SOURCE, GenerateSpec, GeneratorSpec, folder_digest, pipeline_class
from ssl_diversity.runtime import Runtime


def train_generator(spec: GeneratorSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Train the model, going on from `out/last.ckpt` if there is one, and save its average as `out/pipeline/`.

    Anybody can load that with `DiffusionPipeline.from_pretrained`. Exactly B * floor(C / B) samples are seen,
    in the order that cells see theirs. Raises Interrupted after saving when asked to stop, UserError where
    the pool is not what was planned.
    """
    from diffusers import DDPMPipeline

    from ssl_diversity import loop
    from ssl_diversity.generation.diffusion import Diffusion
    from ssl_diversity.generation.pipeline import save

    runtime.set_threads()
    part = PartSpec(pool=spec.pool, rows_start=0, rows_count=spec.rows_count)
    subset = Subset.open([part], spec.rows_digest, "generator")
    squares = subset.parts[0][0].info.resize == "square"  # else cropped as it is read
    order = GlobalOrder(spec.rows_count, spec.batch_size, spec.seed, spec.samples)
    module = Diffusion(spec)
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
    save(DDPMPipeline(module.average.cpu().eval(), module.noise), out / "pipeline")
    return {
        "real_images": spec.rows_count,
        "samples_seen": result.samples_seen,
        "final_loss": result.history[-1][1],
        "history": result.history,
        "train_seconds": result.seconds,
        "samples_per_second": result.samples_seen / result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parameters": sum(parameter.numel() for parameter in module.unet.parameters()),
        "pipeline_digest": folder_digest(out / "pipeline"),
    }


def generate(spec: GenerateSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Sample n distinct images into the pool `spec.directory`, unshuffled: they are independent as they come.

    Image i's noise comes from a hash of (pool seed, i), and blocks are whole, so any worker makes the same
    ones. Finished blocks lie in `out/blocks/` until the pool is written: a kill costs one block. A duplicate
    yields to the earlier image, and sampling goes on. A pool that is finished already is returned.

    Raises UserError where the pipeline cannot be sampled, is not what was planned, or repeats itself.
    """
    if (spec.directory / "pool.json").exists():
        return _result(Pool.open(spec.directory))
    runtime.set_threads()
    folder = spec.pipeline_folder
    kind, digest = pipeline_class(folder), folder_digest(folder)
    if spec.pipeline_digest not in (None, digest):
        raise UserError(f"pipeline={folder}: changed since this pool was planned; plan again")
    made = {
        "pipeline_digest": digest,
        "scheduler": spec.sampling.scheduler,
        "steps": spec.sampling.steps,
        "diffusers": version("diffusers"),
    }
    info = {
        **spec.model_dump(
            include={"name", "filter", "codec", "quality", "seed", "real_images", "origin", "terms"}
        ),
        "source": SOURCE,
        "image_size": spec.size,
        "spec": spec.identity(),
        "provenance": {
            **made,
            "pipeline": spec.pipeline,
            "pipeline_class": kind,
            "block": spec.sampling.block,
            "torch": version("torch"),
            "device": runtime.device.split(":")[0],
        },
    }
    blocks = Blocks(spec, out / "blocks" / digest, runtime.device)
    pool = write_pool(spec.directory, info, lambda: _rows(spec, blocks, made), total=spec.n, runtime=runtime)
    shutil.rmtree(out / "blocks", ignore_errors=True)
    return _result(pool)


class Blocks:
    """The images of a spec, computed a block at a time and kept in `folder`."""

    def __init__(self, spec: GenerateSpec, folder: Path, device: str) -> None:
        from ssl_diversity.generation.pipeline import Sampler, image_seeds

        self.spec, self.folder = spec, folder
        self._seeds = image_seeds
        self._sampler = cache(lambda: Sampler(spec.pipeline_folder, spec.sampling, device))

    def seeds(self, number: int) -> list[int]:
        size = self.spec.sampling.block
        return self._seeds(self.spec.seed, range(number * size, (number + 1) * size))

    def images(self, number: int) -> NDArray[np.uint8]:
        """uint8 (block, H, W, 3): images number * block and on, at the model's own size."""
        path = self.folder / f"{number:08d}.npy"
        if not path.exists():
            buffer = io.BytesIO()
            np.save(buffer, self._sampler().block(self.seeds(number)))
            files.write_atomic(path, buffer.getvalue())
        images: NDArray[np.uint8] = np.load(path)
        return images


def _rows(
    spec: GenerateSpec, blocks: Blocks, made: dict[str, Any]
) -> Iterator[tuple[NDArray[np.uint8], int, dict[str, Any]]]:
    """Images with their provenance until n of them, as the pool will hold them, are distinct."""
    size = spec.sampling.block
    distinct: set[bytes] = set()
    for number in range(-(-int(spec.n * spec.sampling.oversample) // size)):
        for i, (pixels, seed) in enumerate(zip(blocks.images(number), blocks.seeds(number), strict=True)):
            distinct.add(image.content_hash(image.fit(pixels, spec.size, spec.filter)))
            yield pixels, -1, {**made, "index": number * size + i, "seed": seed}
            if len(distinct) == spec.n:
                return
    raise UserError(
        f"pool {spec.name!r}: only {len(distinct)} of {(number + 1) * size} sampled images are distinct, "
        f"n={spec.n} are wanted; lower n, or raise sampling.oversample"
    )


def _result(pool: Pool) -> dict[str, Any]:
    return {
        "pool": pool.path.name,
        "digest": pool.digest,
        "size": pool.size,
        "counts": pool.info.counts,
        "real_images": pool.info.real_images,
        "pipeline_digest": pool.info.provenance["pipeline_digest"],
    }
