"""The diffusion model that is trained: a U-Net that predicts the noise in an image, and its average."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_diversity import files, randomness
from ssl_diversity.data import image
from ssl_diversity.data.sheet import grid
from ssl_diversity.generation.training import Generator
from ssl_diversity.methods.schedules import warmup_cosine

_TIMESTEPS, _NOISE, _FLIPS, _DROPOUT, _PICTURE = range(5)  # streams of the generator's seed
_PICTURES = 8  # in a run that does not say how often
_GRID = (4, 8)  # rows and columns of a picture
_PICTURE_STEPS = 25  # of DDIM
_TILE = 32  # least pixels of an image in a picture


class Diffusion(pl.LightningModule):
    """A DDPM (Ho, Jain and Abbeel, arXiv 2006.11239): mean squared error of the predicted noise.

    A batch is {"images": uint8 (B, 3, H, W), "positions": int64 (B,)}; of a model of `classes` > 0 with "labels",
    int64 (B,), which Lightning's transfer of the batch adds as `labels(positions)`. Timestep, noise and mirroring
    of a sample are functions of (seed, position), dropout of (seed, step), learning rate and average of the
    samples seen. So the state dict and the optimiser's state are all that a resumed run needs.

    Every so often a grid of samples from the average is written to `pictures/<samples seen>.png`.
    """

    def __init__(
        self,
        spec: Generator,
        classes: int = 0,
        labels: Callable[[NDArray[np.int64]], NDArray[np.int32]] | None = None,
        pictures: Path | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.classes, self.labels, self.pictures = spec, classes, labels, pictures
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.seed)
            self.unet = build_unet(spec, classes)
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.noise = DDPMScheduler(num_train_timesteps=spec.timesteps, beta_schedule=spec.noise_schedule)
        self.steps = spec.samples // spec.batch_size
        every = None if spec.picture_samples is None else max(1, spec.picture_samples // spec.batch_size)
        self.picture_every = every or math.ceil(self.steps / _PICTURES)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if not self.classes:
            return batch
        assert self.labels is not None
        return {**batch, "labels": torch.from_numpy(self.labels(batch["positions"].numpy()).astype(np.int64))}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        seed, images, positions = self.spec.seed, shrink(batch["images"], self.spec), batch["positions"]
        if self.spec.flip:
            mirrored = randomness.uniform(seed, _FLIPS, positions, 1)[:, :, None, None] < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        chance = randomness.uniform(seed, _TIMESTEPS, positions, 1)[:, 0]
        timesteps = (chance * self.spec.timesteps).long()
        noise = randomness.normal(seed, _NOISE, positions, images[0].numel()).view_as(images)
        noisy = self.noise.add_noise(images, noise, timesteps)
        # Fused attention's backward is slow on a CPU: without it, a step of the 16 px recipe took 0.88 times as long.
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with self._keyed_dropout(), plain:
            predicted = self.unet(noisy, timesteps, batch.get("labels")).sample
        loss = F.mse_loss(predicted.float(), noise)
        self.last_loss = loss.detach()
        return loss

    @contextlib.contextmanager
    def _keyed_dropout(self) -> Iterator[None]:
        """torch's random state, which dropout draws from, is that of (seed, step) here, and as before afterwards."""
        if not self.spec.dropout:
            yield
            return
        key = randomness.bits(self.spec.seed, _DROPOUT, torch.tensor([self.global_step]), 1)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(key))
            yield

    def configure_optimizers(self) -> Any:
        s = self.spec
        optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=s.lr, betas=s.betas, weight_decay=s.weight_decay, fused=True
        )

        def scale(step: int) -> float:
            return warmup_cosine(1.0, 0.0, (step + 0.5) * s.batch_size / s.samples, s.warmup_fraction)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        self.update_average(step)
        if self.pictures is not None and (step % self.picture_every == 0 or step == self.steps):
            path = self.pictures / f"{step * self.spec.batch_size:012d}.png"
            files.write_atomic(path, picture(self.samples(_GRID[0] * _GRID[1])))

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """The power-function average after optimiser step `step` (1, 2, ...): its reach is a fixed share of the
        steps so far, so it needs no warm-up and no change with the budget (Karras et al., arXiv 2312.02696).
        """
        weight = 1 - (1 - 1 / step) ** (self.spec.ema_gamma + 1)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), weight)

    @torch.no_grad()
    def samples(self, count: int) -> NDArray[np.uint8]:
        """uint8 (count, s, s, channels): what the average makes of always the same noise by DDIM, classes in turn.

        Draws nothing from torch's generators.
        """
        s = self.spec
        scheduler = DDIMScheduler.from_config(self.noise.config)
        scheduler.set_timesteps(min(_PICTURE_STEPS, s.timesteps))
        numbers = torch.arange(count, device=self.device)
        x = randomness.normal(s.seed, _PICTURE, numbers, s.channels * s.image_size**2)
        x = x.view(count, s.channels, s.image_size, s.image_size)
        labels = numbers % self.classes if self.classes else None
        self.average.eval()
        for t in scheduler.timesteps:
            x = scheduler.step(self.average(x, t, labels).sample, t, x).prev_sample
        pixels: NDArray[np.uint8] = (
            ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        )
        return pixels

    def pipeline(self) -> DDPMPipeline | ConsistencyModelPipeline:
        """The average as a pipeline of diffusers, on the CPU."""
        average = self.average.cpu().eval()
        if not self.classes:
            return DDPMPipeline(average, self.noise)
        return ConsistencyModelPipeline(average, DDIMScheduler.from_config(self.noise.config))


def build_unet(spec: Generator, classes: int = 0) -> UNet2DModel:
    """The network: float32 (B, channels, s, s), timesteps and, of `classes` > 0, labels to the noise, same shape."""
    plain = len(spec.widths) - 1
    return UNet2DModel(
        sample_size=spec.image_size,
        in_channels=spec.channels,
        out_channels=spec.channels,
        block_out_channels=spec.widths,
        layers_per_block=spec.layers,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D" if spec.attention else "DownBlock2D",),
        up_block_types=("AttnUpBlock2D" if spec.attention else "UpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=spec.groups,
        add_attention=spec.attention,
        dropout=spec.dropout,
        num_class_embeds=classes or None,
    )


def shrink(images: Tensor, spec: Generator) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, channels, s, s) in [-1, 1] by area averaging."""
    x = F.adaptive_avg_pool2d(images.float(), spec.image_size)
    return (x.mean(dim=1, keepdim=True) if spec.channels == 1 else x) / 127.5 - 1


def picture(images: NDArray[np.uint8]) -> bytes:
    """PNG of uint8 (rows * columns of `_GRID`, s, s, channels), small ones magnified, row by row."""
    times = max(1, _TILE // images.shape[1])
    magnified = images.repeat(times, 1).repeat(times, 2)
    return image.encode(grid(magnified, _GRID[1]).squeeze(), "png", 0)


def training_flops(spec: Generator, classes: int = 0) -> int:
    """FLOPs (two per multiply-add) of one image in one training step: matrix products and convolutions, forward
    and backward, by torch's FlopCounterMode. Nothing is computed: tensors have shapes only.
    """
    with torch.device("meta"):
        unet = build_unet(spec, classes)
        x = torch.empty(1, spec.channels, spec.image_size, spec.image_size)
        t = torch.zeros(1, dtype=torch.int64)
    # The counter knows attention's kernels by name and not all of them; its plain form is matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(x, t, t if classes else None).sample.sum().backward()
    return int(counter.get_total_flops())
