"""The task that makes a chunk of a pool's images, and what makes a block."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data import image, near
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.generation import filters
from ssl_diversity.generation.conditions import Drawn, drawn
from ssl_diversity.generation.cost import Meter, flops_per_image
from ssl_diversity.generation.pipeline import Sampler, pipeline_folder
from ssl_diversity.generation.sampling import (
    HUB,
    TASK,
    Conditions,
    GenerateSpec,
    SampleSpec,
    folder_digest,
    pipeline_class,
)
from ssl_diversity.generation.stream import ROW, Block, Gone, Stream
from ssl_diversity.runtime import Runtime

_MODEL = "model.json"


def sample(spec: SampleSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Make the images of `spec.blocks` blocks, but for those that are there, and keep them for the pool's assembly.

    A kill costs the block that was being made. Nothing is written to `out`: the images lie in the store by what
    they are (stream.py). Raises Interrupted when asked to stop, UserError where the pipeline cannot be sampled
    or is not what was planned.
    """
    runtime.set_threads()
    maker = Maker(spec, runtime)
    numbers = range(spec.first_block, spec.first_block + spec.blocks)
    missing = [number for number in numbers if number not in maker.stream]
    maker.make(missing, spec.blocks - len(missing), spec.blocks)
    with contextlib.suppress(Gone):  # a pool has taken some of them
        maker.stream.gather(numbers)
    maker.stream.look()
    abouts = [block.about for block in maker.stream.blocks(numbers)]
    return {
        "images": spec.images,
        "made": len(missing) * spec.sampling.block,  # now: the rest was there
        "pipeline_digest": maker.digest,
        **cost(abouts, maker.model["flops_per_image"]),
        "device": devices(abouts),
    }


def cost(abouts: Iterable[dict[str, Any]], flops: float | None) -> dict[str, Any]:
    """What blocks took in all: seconds, joules (None where a block's are not known); and FLOPs of one image."""
    entries = list(abouts)
    joules = [about["energy_joules"] for about in entries]
    return {
        "seconds": sum(about["seconds"] for about in entries),
        "energy_joules": None if None in joules else sum(joules),
        "flops_per_image": flops,
    }


def devices(abouts: Iterable[dict[str, Any]]) -> str:
    """The types of device that made blocks."""
    return "+".join(sorted({about["device"] for about in abouts}))


class Maker:
    """Makes blocks of the images that a spec asks for into the stream where all who want them look.

    The pipeline is loaded when the first block is to be made. Raises UserError where it is not what was planned.
    """

    def __init__(self, spec: SampleSpec | GenerateSpec, runtime: Runtime) -> None:
        self.spec, self.runtime = spec, runtime
        if spec.pipeline_digest is None:
            folder = pipeline_folder(spec.pipeline)
            pipeline_class(folder)
            self.digest = folder_digest(folder)
        else:
            self.digest = spec.pipeline_digest
        self.stream = Stream(files.task_dir("images", spec.images_digest(self.digest)))

    @cached_property
    def sampler(self) -> Sampler:
        folder = pipeline_folder(self.spec.pipeline)
        pipeline_class(folder)
        if not self.spec.pipeline.startswith((HUB, TASK)) and folder_digest(folder) != self.digest:
            raise UserError(f"pipeline={folder}: changed since this pool was planned; plan again")
        return Sampler(folder, self.spec.sampling, self.spec.conditions, self.runtime.device)

    def drawn(self, number: int) -> Drawn:
        size = self.spec.sampling.block
        return drawn(self.spec.seed, self.conditions, range(number * size, (number + 1) * size))

    def pixels(self, number: int) -> tuple[Drawn, NDArray[np.uint8], NDArray[np.bool_]]:
        """What a block is made of, its images at the model's own size, and what its safety filter objects to."""
        asked = self.drawn(number)
        return asked, *self.sampler.block(asked)

    def make(self, missing: Sequence[int], done: int, total: int) -> None:
        """Make the blocks `missing`; `done` of `total` were there (for the display).

        While one is encoded, the next is made.
        """
        if missing:
            _ = self.conditions, self.sampler  # loading is no part of what a block costs
        started = time.monotonic()
        kept: Future[None] | None = None
        with ThreadPoolExecutor(1) as background:
            for i, number in enumerate(missing, 1):
                if self.runtime.stop():
                    raise Interrupted("stopped while sampling; finished blocks are kept")
                if self.stream.appeared(number):  # another task has it, too
                    continue
                with Meter(self.runtime.device) as meter:
                    made = self.pixels(number)
                if kept is not None:
                    kept.result()
                kept = background.submit(self._keep, number, *made, meter)
                rate = i * self.spec.sampling.block / (time.monotonic() - started)
                self.runtime.note(f"{rate:.3g} images/s")
                self.runtime.progress(done + i, total)
            if kept is not None:
                kept.result()

    def _keep(
        self, number: int, asked: Drawn, images: NDArray[np.uint8], unsafe: NDArray[np.bool_], meter: Meter
    ) -> None:
        spec = self.spec
        rows = np.zeros(len(asked), ROW)
        rows["index"], rows["label"], rows["seed"] = asked.indices, asked.label, asked.seeds
        rows["unsafe"] = unsafe
        encoded, signatures, thumbnails = [], [], []
        for row, pixels in zip(rows, images, strict=True):
            fitted = image.fit(pixels, spec.size, spec.filter)
            row["content"] = np.frombuffer(image.content_hash(pixels), np.uint8)
            row["fitted"] = np.frombuffer(image.content_hash(fitted), np.uint8)
            row["spread"], row["saturated"] = filters.spread(pixels), filters.saturated(pixels)
            encoded.append(image.encode(fitted, spec.codec, spec.quality))
            signature, thumbnail = near.describe(pixels)
            signatures.append(np.frombuffer(signature, np.uint8))
            thumbnails.append(np.frombuffer(thumbnail, np.uint8))
        about = {
            **self.sampler.about,
            "device": self.runtime.device.split(":")[0],
            "seconds": meter.seconds,
            "energy_joules": meter.energy_joules,
        }
        described = {"signature": np.stack(signatures), "thumbnail": np.stack(thumbnails)}
        self.stream.add(Block(number, rows, described, about, tuple(encoded)))

    @cached_property
    def model(self) -> dict[str, Any]:
        """What is known of the model without loading it: `conditions` with its class numbers, the name of its
        `input`, `flops_per_image`. Whoever needs it first loads it and writes that down.
        """
        path = self.stream.folder / _MODEL
        if not path.exists():
            found = {
                "conditions": self.sampler.conditions.model_dump(mode="json"),
                "input": self.sampler.input,
            }
            first = drawn(self.spec.seed, self.sampler.conditions, range(1))
            flops = flops_per_image(
                lambda steps: self.sampler.block(first, num_inference_steps=steps),
                self.spec.sampling.steps,
                self.runtime.device,
            )
            files.write_json(path, {**found, "flops_per_image": flops})
        known: dict[str, Any] = files.read_json(path)
        return known

    @cached_property
    def conditions(self) -> Conditions:
        return Conditions(**self.model["conditions"])
