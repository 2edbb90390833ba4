"""A small pool, a small generator, and a saved pipeline of random weights."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines

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
        sampling = {"scheduler": "ddim", "steps": 3, "block": 4}
        return from_recipe({**values, "sampling": sampling}, changes)

    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a pipeline of random weights, as anybody's, and gives its folder."""

    def save(kind: str = "ddpm", *args: Any, **options: Any) -> Path:
        folder = tmp_path / f"pipeline-{kind}-{len(list(tmp_path.glob('pipeline-*')))}"
        tiny_pipelines.KINDS[kind](folder, *args, **options)
        return folder

    return save


@pytest.fixture
def subprocess_environment(home: Path) -> dict[str, str]:
    return {**os.environ, "SSL_DIVERSITY_HOME": str(home), "PYTHONPATH": str(files.REPOSITORY)}
