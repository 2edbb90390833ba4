"""Diffusers pipelines: saved whole or not at all, loaded from a folder, sampled block by block."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers.utils import logging
from numpy.typing import NDArray

from ssl_diversity import randomness
from ssl_diversity.errors import UserError
from ssl_diversity.generation.config import Sampling, pipeline_class

SCHEDULERS = {"ddim": (DDIMPipeline, DDIMScheduler), "ddpm": (DDPMPipeline, DDPMScheduler)}
_SEEDS = 0  # stream of a pool's seed


def save(pipeline: Any, folder: Path) -> None:
    """Write `pipeline` so that `folder` holds all of it or does not exist."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def image_seeds(seed: int, indices: range) -> list[int]:
    """Noise seeds of a pool's images, in [0, 2^53): a hash of (pool seed, index), whatever was made before."""
    positions = torch.arange(indices.start, indices.stop)
    return [int(value) & ((1 << 53) - 1) for value in randomness.bits(seed, _SEEDS, positions, 1)[:, 0]]


class Sampler:
    """A saved unconditional pipeline under a scheduler; images depend on the seeds of their block alone.

    Raises UserError where the folder cannot be loaded, or the model does not give grey or RGB images.
    """

    def __init__(self, folder: Path, sampling: Sampling, device: str) -> None:
        pipeline_class(folder)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            saved = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"pipeline={folder}: cannot be loaded ({' '.join(str(error).split())})") from None
        trained = saved.scheduler.config.num_train_timesteps
        if sampling.steps > trained:
            raise UserError(f"sampling.steps={sampling.steps}: pipeline {folder} has {trained}; lower it")
        if saved.unet.config.out_channels not in (1, 3):
            raise UserError(
                f"pipeline={folder}: makes {saved.unet.config.out_channels}-channel images; 1 or 3 are wanted"
            )
        pipeline, scheduler = SCHEDULERS[sampling.scheduler]
        self.pipeline = pipeline(saved.unet, scheduler.from_config(saved.scheduler.config)).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = sampling.steps

    def block(self, seeds: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 (B, H, W, 3), one image per seed. Noise is drawn on the CPU, so it is the same on any device."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self.pipeline(
            batch_size=len(seeds), generator=generators, num_inference_steps=self.steps, output_type="np"
        ).images
        pixels = np.round(images * 255).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
