"""A class-conditional generator: every image with its own label, saved as anybody's pipeline."""

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DiffusionPipeline

from ssl_diversity import files
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import write_pool
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.generation.diffusion import Diffusion
from ssl_diversity.generation.training import Generator, GeneratorSpec, train_generator
from ssl_diversity.runtime import Runtime

CLASSES = ["dark", "middle", "bright"]


def labelled(name: str, labels: list[int], classes: list[str] = CLASSES) -> Pool:
    """24 images of 8 px, image i of brightness 10 + 100 i mod 3 and a little noise, labelled as told."""
    rng = np.random.default_rng(0)
    pixels = [10 + 100 * (i % 3) + rng.integers(0, 20, (8, 8, 3), dtype=np.uint8) for i in range(24)]
    rows = [(image.astype(np.uint8), label, None) for image, label in zip(pixels, labels, strict=True)]
    info = {"name": name, "source": "test", "image_size": 8, "real_images": 24, "classes": classes}
    return write_pool(files.pools_dir() / f"{name}-00000000", info, rows)


TRUE = [i % 3 for i in range(24)]


@pytest.fixture
def pool() -> Pool:
    return labelled("shades", TRUE)


@pytest.fixture
def generator() -> Generator:
    return Generator(
        image_size=4, class_conditional=True, widths=(8, 8), groups=4, timesteps=40, samples=40, batch_size=8, lr=1e-2
    )  # fmt: skip


@pytest.fixture
def spec(generator, pool) -> GeneratorSpec:
    return GeneratorSpec.of(generator, pool)


def test_every_image_comes_with_its_label(spec, tmp_path, monkeypatch):
    """Brightness tells the label, over all epochs and after a stop."""
    seen = []
    step = Diffusion.training_step

    def recorded(self, batch, batch_idx=0):
        seen.append((batch["images"].float().mean((1, 2, 3)) // 100, batch["labels"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", recorded)
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train_generator(spec, tmp_path, Runtime(stop=lambda: next(asked) >= 2))
    train_generator(spec, tmp_path, Runtime())
    assert len(seen) == 5
    for shades, labels in seen:
        assert labels.dtype == torch.int64
        assert shades.tolist() == labels.tolist()
    assert len(torch.cat([labels for _, labels in seen]).unique()) == 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumed_is_undisturbed(spec, tmp_path, precision):
    spec = spec.model_copy(
        update={"precision": precision, "flip": True, "dropout": 0.2, "picture_samples": 16}
    )
    whole = train_generator(spec, tmp_path / "whole", Runtime())
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train_generator(spec, tmp_path / "parts", Runtime(stop=lambda: next(asked) >= 3))
    torch.manual_seed(9)
    resumed = train_generator(spec, tmp_path / "parts", Runtime())
    for key in ("pipeline_digest", "history"):
        assert resumed[key] == whole[key]


def test_trained_pipeline_is_anybodys(spec, tmp_path):
    """It makes what it is asked for: a class of its own brightness for each label."""
    spec = spec.model_copy(update={"widths": (16,), "timesteps": 100, "samples": 4800, "batch_size": 24})
    result = train_generator(spec, tmp_path, Runtime())
    assert result["classes"] == CLASSES
    assert result["train_flops"] > 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert isinstance(pipeline, ConsistencyModelPipeline)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config.beta_schedule == spec.noise_schedule
    assert pipeline.unet.config.num_class_embeds == 3
    pipeline.set_progress_bar_config(disable=True)
    labels = [0, 1, 2] * 8
    generators = [torch.Generator().manual_seed(i) for i in range(24)]
    images = pipeline(
        batch_size=24, class_labels=labels, generator=generators, num_inference_steps=20, output_type="np"
    ).images
    shades = [float(images[label::3].mean()) * 255 for label in range(3)]
    assert shades[0] + 40 < shades[1] < shades[2] - 40
    again = pipeline(
        batch_size=3,
        class_labels=labels[3:6],
        generator=[torch.Generator().manual_seed(i) for i in (3, 4, 5)],
        num_inference_steps=20,
        output_type="np",
    ).images
    np.testing.assert_allclose(again, images[3:6], atol=2 / 255)


def test_labels_are_part_of_what_it_is(spec, generator, pool, tmp_path):
    """Other labels of the same images are another generator; those that changed meanwhile are refused."""
    assert (spec.classes, spec.rows_count) == (3, 24)
    same = GeneratorSpec.of(generator, labelled("renamed", TRUE))
    other = GeneratorSpec.of(generator, labelled("swapped", TRUE[::-1]))
    assert same.identity() == spec.identity()
    assert other.rows_digest == spec.rows_digest
    assert other.identity() != spec.identity()
    with pytest.raises(UserError, match=r"labels of pool .* have changed"):
        train_generator(spec.model_copy(update={"pool": other.pool}), tmp_path, Runtime())


def test_unconditional_ones_ignore_labels(generator):
    plain = generator.model_copy(update={"class_conditional": False})
    one, other = (GeneratorSpec.of(plain, labelled(*x)) for x in (("a", TRUE), ("b", TRUE[::-1])))
    assert (one.classes, one.labels_digest) == (0, None)
    assert one.identity() == other.identity()


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([-1] * 24, [], "pool 'p' has images without a label"),
        ([-1, *TRUE[1:]], CLASSES, "pool 'p' has images without a label"),
        ([i % 2 for i in range(24)], CLASSES, r"is of class 'bright' \(1 of 3 classes are missing\)"),
    ],
)
def test_pools_that_cannot_teach_classes(generator, labels, classes, message):
    with pytest.raises(UserError, match=f"generator: class_conditional: .*{message}") as error:
        GeneratorSpec.of(generator, labelled("p", labels, classes))
    assert "\n" not in str(error.value)
