"""A small pool, a small generator, and a saved pipeline of random weights."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_diversity import files
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import write_pool
from ssl_diversity.generation.config import GeneratedRecipe, from_recipe

GENERATOR = {
    "image_size": 4,
    "channels": 1,
    "widths": [4, 8],
    "groups": 4,
    "timesteps": 40,
    "samples": 40,
    "batch_size": 8,
    "lr": 1e-2,
}
ENCODING: dict[str, Any] = {"size": 8, "filter": "bicubic", "codec": "png", "quality": 95}


@pytest.fixture
def real() -> Pool:
    """24 random images of 8 px."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), -1, None) for _ in range(24)]
    info = {"name": "real", "source": "test", "image_size": 8, "real_images": 24}
    return write_pool(files.pools_dir() / "real-00000000", info, rows)


@pytest.fixture
def recipe() -> Callable[..., GeneratedRecipe]:
    def make(**changes: Any) -> GeneratedRecipe:
        values = {"source": "generated", "name": "made", "base": "real", "generator": GENERATOR, "n": 10}
        return from_recipe({**values, "sampling": {"steps": 3, "block": 4}}, changes)

    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a pipeline of random weights, as anybody's, and gives its folder."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

    def save(kind: str = "ddpm", channels: int = 3, size: Any = 8) -> Path:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            add_attention=False,
        )
        folder = tmp_path / f"pipeline-{kind}-{channels}"
        if kind == "ddpm":
            DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
        else:
            DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=20)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def subprocess_environment(home: Path) -> dict[str, str]:
    return {**os.environ, "SSL_DIVERSITY_HOME": str(home), "PYTHONPATH": str(files.REPOSITORY)}
