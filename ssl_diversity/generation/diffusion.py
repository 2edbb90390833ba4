"""The diffusion model that is trained: a U-Net that predicts the noise in an image, and its average."""

import copy
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from ssl_diversity import randomness
from ssl_diversity.generation.config import Generator
from ssl_diversity.methods.schedules import warmup_cosine

_TIMESTEPS, _NOISE = 0, 1  # streams of the generator's seed


class Diffusion(pl.LightningModule):
    """A DDPM (Ho, Jain and Abbeel, arXiv 2006.11239): mean squared error of the predicted noise.

    A batch is {"images": uint8 (B, 3, H, W), "positions": int64 (B,)}. Timestep and noise of a sample are
    functions of (seed, position); learning rate and average of the samples seen. So the state dict and the
    optimiser's state are all that a resumed run needs.
    """

    def __init__(self, spec: Generator) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.seed)
            self.unet = build_unet(spec)
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.noise = DDPMScheduler(num_train_timesteps=spec.timesteps, beta_schedule=spec.noise_schedule)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        images, positions = shrink(batch["images"], self.spec), batch["positions"]
        chance = randomness.uniform(self.spec.seed, _TIMESTEPS, positions, 1)[:, 0]
        timesteps = (chance * self.spec.timesteps).long()
        noise = randomness.normal(self.spec.seed, _NOISE, positions, images[0].numel()).view_as(images)
        predicted = self.unet(self.noise.add_noise(images, noise, timesteps), timesteps).sample
        loss = F.mse_loss(predicted.float(), noise)
        self.last_loss = loss.detach()
        return loss

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

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """The power-function average after optimiser step `step` (1, 2, ...): its reach is a fixed share of the
        steps so far, so it needs no warm-up and no change with the budget (Karras et al., arXiv 2312.02696).
        """
        weight = 1 - (1 - 1 / step) ** (self.spec.ema_gamma + 1)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), weight)


def build_unet(spec: Generator) -> UNet2DModel:
    """The network: float32 (B, channels, s, s) and timesteps to the noise in them, same shape."""
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
    )


def shrink(images: Tensor, spec: Generator) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, channels, s, s) in [-1, 1] by area averaging."""
    x = F.adaptive_avg_pool2d(images.float(), spec.image_size)
    return (x.mean(dim=1, keepdim=True) if spec.channels == 1 else x) / 127.5 - 1
