"""Training the diffusion model: its loss and average by slow formulas, its resume bit for bit."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.generation.config import Generator, GeneratorSpec
from ssl_diversity.generation.diffusion import Diffusion, shrink
from ssl_diversity.generation.task import train_generator
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
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, t):
            seen.append((x, t))
            return type("Out", (), {"sample": torch.zeros_like(x)})

    module.unet = Net()
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    loss = module.training_step({"images": images, "positions": torch.arange(64)})
    x, t = seen[0]
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
    assert math.isfinite(result["final_loss"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert isinstance(pipeline, DDPMPipeline)
    assert pipeline.scheduler.config.beta_schedule == spec.noise_schedule
    assert not list(tmp_path.glob(".pipeline*"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumed_is_undisturbed(spec, tmp_path, monkeypatch, precision):
    """Stopped after steps 1 and 3 of 5, under whatever global random state: the same pipeline, file for file."""
    spec = spec.model_copy(update={"precision": precision})
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


def test_seed_changes_everything(spec, tmp_path):
    one, two = (
        train_generator(spec.model_copy(update={"seed": seed}), tmp_path / str(seed), Runtime())
        for seed in (0, 1)
    )
    assert one["pipeline_digest"] != two["pipeline_digest"]


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
