"""Training the diffusion model: its loss and average by slow formulas, its resume bit for bit."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.generation.diffusion import Diffusion, shrink, training_flops
from ssl_diversity.generation.training import Generator, GeneratorSpec, train_generator
from ssl_diversity.runtime import Runtime


@pytest.fixture
def spec(real, recipe) -> GeneratorSpec:
    return recipe().generator_spec(real)


@pytest.mark.parametrize("channels", [1, 3])
def test_shrink_is_the_mean_of_areas(spec, channels):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    got = shrink(images, spec.model_copy(update={"channels": channels}))
    for b in range(2):
        for y in range(4):
            for x in range(4):
                area = images[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double().mean((1, 2))
                want = area.mean(0, keepdim=True) if channels == 1 else area
                torch.testing.assert_close(got[b, :, y, x].double(), want / 127.5 - 1, atol=1e-6, rtol=0)


def test_loss_is_the_error_of_the_noise(spec):
    """Cosine schedule of Nichol and Dhariwal (arXiv 2102.09672), eq. 17, and eq. 14 of arXiv 2006.11239."""
    module = Diffusion(spec)
    module.unet = _Echo()
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    loss = module.training_step({"images": images, "positions": torch.arange(64)})
    x, t = module.unet.x, module.unet.t
    steps = spec.timesteps

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = [1.0]
    for i in range(steps):
        kept.append(kept[-1] * (1 - min(1 - f((i + 1) / steps) / f(i / steps), 0.999)))
    alpha_bar = torch.tensor(kept[1:])[t][:, None, None, None]
    noise = (x - alpha_bar.sqrt() * shrink(images, spec)) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(loss, noise.square().mean(), atol=1e-3, rtol=1e-3)
    assert abs(float(noise.mean())) < 0.15
    assert 0.85 < float(noise.std()) < 1.15
    assert len(t.unique()) > 20
    assert 0 <= int(t.min()) <= int(t.max()) < steps


def test_average_is_the_power_function_average(spec):
    """The weight of step i in the average after n steps is what the recursion's products say, and they sum to 1."""
    module = Diffusion(spec.model_copy(update={"ema_gamma": 3.0}))
    n, values = 6, [2.0**i for i in range(6)]
    for i, value in enumerate(values):
        with torch.no_grad():
            for parameter in module.unet.parameters():
                parameter.fill_(value)
        module.update_average(i + 1)
    beta = [(1 - 1 / i) ** 4 for i in range(1, n + 1)]
    weights = [(1 - beta[i]) * math.prod(beta[i + 1 :]) for i in range(n)]
    assert sum(weights) == pytest.approx(1)
    want = sum(w * v for w, v in zip(weights, values, strict=True))
    assert all(torch.allclose(p, torch.tensor(want)) for p in module.average.parameters())


def test_trained_pipeline_is_anybodys(spec, tmp_path):
    result = train_generator(spec, tmp_path, Runtime())
    assert result["samples_seen"] == 40
    assert result["real_images"] == 24
    assert result["classes"] == []
    assert result["train_flops"] == 40 * training_flops(spec)
    assert math.isfinite(result["final_loss"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert isinstance(pipeline, DDPMPipeline)
    assert pipeline.scheduler.config.beta_schedule == spec.noise_schedule
    assert not list(tmp_path.glob(".pipeline*"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_is_undisturbed(spec, tmp_path, monkeypatch, precision, dropout):
    """Stopped after steps 1 and 3 of 5, under whatever global random state: the same files, byte for byte."""
    changes = {"precision": precision, "dropout": dropout, "flip": dropout > 0, "picture_samples": 8}
    spec = spec.model_copy(update=changes)
    whole = train_generator(spec, tmp_path / "whole", Runtime())
    steps = []
    update = Diffusion.update_average
    monkeypatch.setattr(
        Diffusion, "update_average", lambda self, step: [steps.append(step), update(self, step)]
    )
    for stop_after in (1, 2):
        torch.manual_seed(stop_after)
        with pytest.raises(Interrupted):
            train_generator(spec, tmp_path / "parts", Runtime(stop=_after(stop_after)))
        assert not (tmp_path / "parts" / "pipeline").exists()
    resumed = train_generator(spec, tmp_path / "parts", Runtime())
    for key in ("pipeline_digest", "final_loss", "history", "samples_seen"):
        assert resumed[key] == whole[key]
    assert steps == [1, 2, 3, 4, 5]
    shown = [
        {path.name: path.read_bytes() for path in (tmp_path / run / "samples").iterdir()}
        for run in ("whole", "parts")
    ]
    assert sorted(shown[0]) == [f"{8 * step:012d}.png" for step in range(1, 6)]
    assert shown[0] == shown[1]


def test_seed_changes_everything(spec, tmp_path):
    one, two = (
        train_generator(spec.model_copy(update={"seed": seed}), tmp_path / str(seed), Runtime())
        for seed in (0, 1)
    )
    assert one["pipeline_digest"] != two["pipeline_digest"]


class _Echo(torch.nn.Module):
    """A network that keeps what it was given and predicts no noise."""

    def forward(self, x, t, labels):
        self.x, self.t = x, t
        return type("Out", (), {"sample": torch.zeros_like(x)})


def test_flip_mirrors_half_of_the_positions(spec):
    """The same ones however they are batched, the whole image, and nothing else changes."""
    images = torch.randint(0, 256, (512, 3, 8, 8), dtype=torch.uint8)
    seen = {}
    for flip, order in ((False, torch.arange(512)), (True, torch.arange(512)), (True, torch.randperm(512))):
        module = Diffusion(spec.model_copy(update={"flip": flip, "channels": 3}))
        module.unet = _Echo()
        module.training_step({"images": images[order], "positions": order})
        kept = module.noise.alphas_cumprod[module.unet.t].sqrt()[:, None, None, None]
        moved = torch.empty_like(module.unet.x)
        moved[order] = module.unet.x / kept
        seen.setdefault(flip, []).append(moved)
    (plain,), (one, two) = seen[False], seen[True]
    torch.testing.assert_close(one, two)
    x = shrink(images, spec.model_copy(update={"channels": 3}))
    mirrored = torch.isclose(one - plain, x.flip(-1) - x, rtol=1e-3, atol=1e-3).all(1).all(1).all(1)
    same = torch.isclose(one, plain).all(1).all(1).all(1)
    assert (mirrored ^ same).all()
    assert 200 < int(mirrored.sum()) < 312


def test_dropout_is_keyed_and_off_in_samples(spec):
    """It depends on the step alone, leaves torch's random state as it was, and is not in the pictures."""
    batch = {"images": torch.full((8, 3, 8, 8), 9, dtype=torch.uint8), "positions": torch.arange(8)}
    losses, dropped = [], Diffusion(spec.model_copy(update={"dropout": 0.5}))
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        losses.append(float(dropped.training_step(batch).detach()))
        first = dropped.samples(4)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert losses[0] != float(Diffusion(spec).training_step(batch).detach())
    assert (dropped.samples(4) == first).all()
    assert (Diffusion(spec).samples(4) == first).all()


def test_pictures_cost_the_model_nothing(spec, tmp_path):
    """At most eight of them unless told otherwise, the last at the end; whatever their number the model is the same."""
    spec = spec.model_copy(update={"samples": 72})
    found = {}
    for every in (None, 40, 10**6):
        out = tmp_path / str(every)
        changed = spec.model_copy(update={"picture_samples": every})
        assert changed.identity() == spec.identity()
        digest = train_generator(changed, out, Runtime())["pipeline_digest"]
        found[every] = sorted(int(path.stem) for path in (out / "samples").iterdir()), digest
    assert len({digest for _, digest in found.values()}) == 1
    assert found[None][0] == [16, 32, 48, 64, 72]
    assert found[40][0] == [40, 72]
    assert found[10**6][0] == [72]
    assert Image.open(out / "samples" / f"{72:012d}.png").size == (8 * 32, 4 * 32)  # 4 px, eight times


@pytest.mark.parametrize("attention", [False, True])
def test_flops_are_those_of_a_step(spec, attention):
    spec = spec.model_copy(update={"attention": attention, "channels": 3})
    batch = {"images": torch.zeros((3, 3, 8, 8), dtype=torch.uint8), "positions": torch.arange(3)}
    module = Diffusion(spec)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain:
        module.training_step(batch).backward()
    assert 3 * training_flops(spec) == counter.get_total_flops() > 0


def test_attention_and_three_channels(spec):
    values = spec.model_dump(include=set(Generator.model_fields)) | {"attention": True, "channels": 3}
    module = Diffusion(Generator(**values))
    images = torch.zeros((2, 3, 8, 8), dtype=torch.uint8)
    module.training_step({"images": images, "positions": torch.arange(2)}).backward()


def test_pool_that_changed(spec, tmp_path):
    with pytest.raises(UserError, match="changed since"):
        train_generator(spec.model_copy(update={"rows_digest": "0" * 32}), Path(tmp_path), Runtime())


def _after(calls: int):
    """A `stop` that turns true at its `calls`-th question (one a step)."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= calls
