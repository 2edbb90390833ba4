"""A generator trained on a CPU: how far its samples are from real images, beside noise and an untrained model.

    python tests/benchmarks/bench_generator.py --data FOLDER [--minutes 4] [--out FOLDER] [key=value of the generator]

FOLDER holds cifar10.tar with cifar10/{train,test}/<class>/*.jpg in it. Two classes of it become pools at 16 px. The
generator of the recipe datasets/generated-cifar10-16px.yaml is trained on their 10,000 training images for about so
many minutes (how many samples that is, a short run says) or on samples=... of them. 1,000 samples of the trained
model's average, 1,000 of the same model untrained and 1,000 images of noise are compared with 1,000 held-out test
images by the Fréchet distance on random-resnet features. The floor is that of the other 1,000 test images; 1,000 of
the training images stand beside it. OUT/generator.png shows samples (above) and held-out real images (below).
"""

import argparse
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging
from numpy.typing import NDArray
from PIL import Image

from ssl_diversity.config import merge, parse_overrides, validate
from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.distance.extractors import Extractor, load_extractor
from ssl_diversity.distance.frechet import frechet
from ssl_diversity.distance.statistics import Statistics
from ssl_diversity.generation.diffusion import Diffusion, training_flops
from ssl_diversity.generation.training import Generator, GeneratorSpec, train_generator
from ssl_diversity.runtime import Runtime

N = 1000
SIZE = 16
Images = NDArray[np.uint8]


def pools(data: Path, classes: list[str], scratch: Path) -> tuple[Pool, Pool]:
    """Training and test images of `classes` at SIZE px."""
    with tarfile.open(data / "cifar10.tar") as tar:
        wanted = [m for m in tar if m.isfile() and m.name.split("/")[-2] in classes]
        tar.extractall(scratch, wanted, filter="data")
    defaults = {"size": SIZE, "codec": "png"}
    options = {"path": str(scratch / "cifar10"), "name": "two-classes"}
    train, test = (
        prepare(recipes.resolve("folder", {**options, "split": split}, defaults=defaults), processes=1)
        for split in ("train", "test")
    )
    return train, test


def sampled(pipeline, steps: int, classes: int, seed: int = 0) -> Images:  # type: ignore[no-untyped-def]
    """uint8 (N, SIZE, SIZE, 3), classes in turn."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, N, 250):
        labels = {"class_labels": [i % classes for i in range(start, start + 250)]} if classes else {}
        generator = torch.Generator().manual_seed(seed + start)
        parts.append(
            pipeline(
                batch_size=250, num_inference_steps=steps, generator=generator, output_type="np", **labels
            ).images
        )
    return np.round(np.concatenate(parts) * 255).astype(np.uint8)


def statistics(images: Images, extractor: Extractor) -> Statistics:
    features = np.concatenate(
        [
            extractor(torch.from_numpy(part).permute(0, 3, 1, 2))[0].numpy()
            for part in np.array_split(images, 8)
        ]
    )
    return Statistics.of(features, np.zeros((0, 0), np.int64))


def affordable(generator: Generator, pool: Pool, minutes: float, out: Path) -> int:
    """Samples that so many minutes allow, from a short run."""
    few = generator.model_copy(update={"samples": 24 * generator.batch_size})
    result = train_generator(GeneratorSpec.of(few, pool), out, Runtime(threads=torch.get_num_threads()))
    return int(result["samples_per_second"] * 60 * minutes)


def grid(images: Images, columns: int = 16) -> Images:
    rows = images[: len(images) // columns * columns].reshape(-1, columns, SIZE, SIZE, 3)
    return rows.swapaxes(1, 2).reshape(-1, columns * SIZE, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--classes", default="automobile,horse")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("overrides", nargs="*", help="keys of the generator")
    args = parser.parse_args()
    recipe = recipes.load("generated-cifar10-16px")["generator"]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        os.environ["SSL_DIVERSITY_HOME"] = temporary
        train, test = pools(args.data, args.classes.split(","), scratch)
        overrides = parse_overrides(args.overrides)
        generator = validate(Generator, merge(recipe, overrides), "bench_generator")
        if "samples" not in overrides:
            samples = affordable(generator, train, args.minutes, scratch / "short")
            generator = generator.model_copy(update={"samples": samples})
        spec = GeneratorSpec.of(generator, train)
        clock = time.process_time()
        result = train_generator(spec, scratch / "out", Runtime(threads=torch.get_num_threads()))
        print(
            f"{spec.rows_count} training images of {args.classes} at {SIZE} px; {result['parameters'] / 1e6:.2f} M parameters,"
            f" {training_flops(spec, spec.classes) / 1e6:.0f} MFLOPs per sample; {result['samples_seen']} samples"
            f" ({result['samples_seen'] / spec.rows_count:.1f} epochs) in {result['train_seconds']:.0f} s"
            f" ({time.process_time() - clock:.0f} s of processor time) on {torch.get_num_threads()} thread(s),"
            f" {result['samples_per_second']:.0f}/s; loss {result['final_loss']:.4f}"
        )
        logging.disable_progress_bar()
        made = DiffusionPipeline.from_pretrained(scratch / "out" / "pipeline", local_files_only=True)
        made.scheduler = DDIMScheduler.from_config(made.scheduler.config)
        untrained = Diffusion(spec, spec.classes).pipeline()
        untrained.scheduler = made.scheduler
        extractor = load_extractor("random-resnet", image_size=SIZE)
        real, others = test.images(np.arange(N)), test.images(np.arange(N, 2 * N))
        clock = time.perf_counter()
        images = sampled(made, args.steps, spec.classes)
        seconds = time.perf_counter() - clock
        print(f"{N} images in {args.steps} steps of DDIM: {seconds:.0f} s, {N / seconds:.1f} images/s")
        noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
        reference = statistics(real, extractor)

        distance: Callable[[Images], float] = lambda x: frechet(statistics(x, extractor), reference)  # noqa: E731
        rows = {
            "noise": noise,
            "untrained model": sampled(untrained, args.steps, spec.classes),
            "trained model": images,
            "real, training images": train.images(np.arange(N)),
            "real, the other test images (floor)": others,
        }
        print(f"Fréchet distance to {N} held-out real images, n = {N} each, {extractor.label(SIZE)}:")
        for name, x in rows.items():
            print(f"{name:36} {distance(x):9.3f}")
        args.out.mkdir(parents=True, exist_ok=True)
        gap = np.full((SIZE // 4, 16 * SIZE, 3), 255, np.uint8)
        page = np.concatenate([grid(images[:96]), gap, grid(real[:96])]).repeat(3, 0).repeat(3, 1)
        Image.fromarray(page).save(args.out / "generator.png")


if __name__ == "__main__":
    main()
