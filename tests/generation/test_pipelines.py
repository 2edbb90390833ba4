"""Any diffusers pipeline that makes images of text, of a class or of nothing, block by block; others are refused."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_diversity.errors import UserError
from ssl_diversity.files import write_atomic
from ssl_diversity.generation import pipeline as pipelines
from ssl_diversity.generation.conditions import drawn
from ssl_diversity.generation.cost import Meter, flops_per_image
from ssl_diversity.generation.pipeline import Sampler, pipeline_folder
from ssl_diversity.generation.sampling import Conditions, Sampling

BIRDS = Conditions(classes=("wren", "owl", "rook"))
KINDS = {"ddpm": Conditions(), "ddim": Conditions(), "classes": BIRDS, "dit": Conditions(), "text": BIRDS}


def sampler(folder, conditions=Conditions(), **sampling) -> Sampler:  # noqa: B008
    return Sampler(folder, Sampling(**{"steps": 3, "block": 4, **sampling}), conditions, "cpu")


def made(sampler: Sampler, *indices: int) -> np.ndarray:
    return sampler.block(drawn(0, sampler.conditions, range(*indices)))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", [None, "ddpm", "EulerAncestralDiscreteScheduler"])
def test_blocks_do_not_know_of_each_other(saved, kind, scheduler):
    """In any order, after any use of the global generator, by another sampler: the same bits."""
    folder = saved(kind)
    one, two = (sampler(folder, KINDS[kind], scheduler=scheduler) for _ in range(2))
    first = [made(one, low, low + 4) for low in (0, 4, 8)]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    for number in (2, 0, 1):
        np.testing.assert_array_equal(made(two, 4 * number, 4 * number + 4), first[number])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(np.unique(np.concatenate(first), axis=0)) == 12
    assert first[0].dtype == np.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_block_sizes_differ_by_rounding_at_most(saved, kind, capsys):
    """Noise belongs to the image; 1, 3 and 8 at a time give the same but for the order of sums."""
    whole = sampler(saved(kind), KINDS[kind], steps=10)
    reference = made(whole, 0, 24)
    shares = []
    for size in (1, 3, 8):
        parts = [made(whole, low, low + size) for low in range(0, 24, size)]
        difference = np.abs(np.concatenate(parts).astype(int) - reference)
        assert difference.max() <= 2
        shares.append(f"{size}: {(difference == 0).mean():.2%}")
    with capsys.disabled():
        print(f"\n{kind}: pixels equal to those of one block of 24, by block size: {', '.join(shares)}")


def test_a_class_is_a_class(saved):
    """With the noise held fixed, what is asked for makes the difference."""
    for kind in ("classes", "text"):
        model = sampler(saved(kind), BIRDS, steps=5)
        images = []
        for name in BIRDS.classes:
            only = Conditions(classes=BIRDS.classes, weights=[float(name == n) for n in BIRDS.classes])
            only = only.model_copy(update={"model_labels": model.conditions.model_labels})
            images.append(model.block(drawn(0, only, range(4)))[0])
        assert len(np.unique(np.stack(images).reshape(3, -1), axis=0)) == 3


def test_options_reach_the_pipeline(saved):
    folder = saved("text")
    plain = made(sampler(folder, BIRDS), 0, 2)
    for options in ({"guidance": 3.0}, {"negative_prompt": "owl"}, {"steps": 4}, {"dtype": "bfloat16"}):
        assert not np.array_equal(made(sampler(folder, BIRDS, **options), 0, 2), plain)
    assert made(sampler(folder, BIRDS, resolution=32), 0, 2).shape == (2, 32, 32, 3)


def test_with_diffusers_alone(saved):
    """What a block says of itself is enough to make it again with nothing of ours."""
    folder = saved("ddpm")
    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    again = DDIMPipeline(loaded.unet, DDIMScheduler.from_config(loaded.scheduler.config))
    asked = drawn(0, Conditions(), range(4, 8))
    generators = [torch.Generator().manual_seed(seed) for seed in asked.seeds]
    images = again(batch_size=4, generator=generators, num_inference_steps=3).images
    mine = sampler(folder, scheduler="ddim").block(asked)[0]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), mine)


def test_safety_filter_of_the_pipeline(saved):
    images, unsafe = (model := sampler(saved("text", safety=True), BIRDS)).block(
        drawn(0, model.conditions, range(24))
    )
    assert 0 < unsafe.sum() < 24
    assert not images[unsafe].any()  # it blackens them
    assert images[~unsafe].any((1, 2, 3)).all()


@pytest.mark.parametrize(
    ("kind", "conditions", "sampling", "message"),
    [
        ("ddpm", BIRDS, {}, "knows no classes; leave classes out"),
        ("ddpm", Conditions(), {"guidance": 2}, r"sampling.guidance=2.0: .* takes none; leave it out"),
        ("ddpm", Conditions(), {"resolution": 16}, "sampling.resolution=16"),
        ("ddpm", Conditions(), {"steps": 21}, "has 20 time steps; lower it"),
        ("ddpm", Conditions(), {"dtype": "float16"}, "needs a GPU"),
        ("ddpm", Conditions(), {"scheduler": "UniPCMultistepScheduler"}, "takes no generator"),
        ("dit", Conditions(), {"negative_prompt": "x"}, "sampling.negative_prompt=x"),
        ("dit", BIRDS, {}, "the model has no class 'wren'"),
        ("text", Conditions(), {}, r"say classes=\[...\]"),
        ("text", Conditions(classes=("a",), model_labels=(1,)), {}, "for class-conditional models"),
    ],
)
def test_what_a_pipeline_cannot_do(saved, kind, conditions, sampling, message):
    with pytest.raises(UserError, match=message) as error:
        sampler(saved(kind), conditions, **sampling)
    assert "\n" not in str(error.value)


def test_pipelines_that_cannot_be_sampled(saved, tmp_path):
    def refused(folder, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            sampler(folder, BIRDS if "text" in folder.name else Conditions())
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "no such folder")
    refused(saved("ddpm", 4), "makes 4-channel images")
    folder = saved("text")
    index = json.loads((folder / "model_index.json").read_text())
    write_atomic(
        folder / "model_index.json", json.dumps({**index, "_class_name": "StableDiffusionImg2ImgPipeline"})
    )
    refused(folder, "a StableDiffusionImg2ImgPipeline takes image; pipelines that make images of text")
    folder = saved("ddpm")
    weights = next((folder / "unet").glob("*.safetensors"))
    write_atomic(weights, weights.read_bytes()[:100])
    refused(folder, "cannot be loaded")


def test_a_pipeline_of_the_hub(saved, tmp_path, monkeypatch):
    """Fetched before, it is found in the usual cache without network; else one line says what to do."""
    name, commit = "owner/tiny-ddpm", "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"pipeline=owner/tiny-ddpm: cannot be had .* give the folder"
    ) as error:
        pipeline_folder(f"hub:{name}@{commit}")
    assert "\n" not in str(error.value)
    snapshots = tmp_path / "hub" / "models--owner--tiny-ddpm" / "snapshots"
    shutil.copytree(saved("ddpm"), snapshots / commit)
    folder = pipeline_folder(f"hub:{name}@{commit}")
    assert folder == snapshots / commit
    assert made(sampler(folder), 0, 2).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("scheduler", ["ddim", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_flops_are_those_of_all_steps(saved, scheduler):
    """Extrapolated from few steps, equal to what the counter says of as many as are asked for."""
    model = sampler(saved("text"), BIRDS, scheduler=scheduler)
    one = drawn(0, model.conditions, range(1))

    def make(steps: int) -> None:
        model.block(one, num_inference_steps=steps)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make(9)
    assert counter.get_total_flops() == flops_per_image(make, 9, "cpu")


def test_meter():
    with Meter("cpu") as meter:
        pass
    assert meter.seconds >= 0
    assert meter.energy_joules is None or meter.energy_joules >= 0


def test_saving_is_all_or_nothing(tmp_path):
    class Failing:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="No space"):
        pipelines.save(Failing(), out / "pipeline")
    assert not list(out.iterdir())
