"""A quick recipe of any method on a small net, a few batches, and the shortest training loop."""

from typing import Any

import torch
from torch import Tensor

from ssl_diversity import methods
from ssl_diversity.methods.base import Method
from ssl_diversity.methods.recipe import METHODS, load_recipe

BATCH = 16


def tiny(
    method: str,
    *,
    backbone: str | None = None,
    overrides: dict[str, Any] | None = None,
    budget: int = 64,
    batch_size: int = BATCH,
    seed: int = 0,
) -> Method:
    """`method` by its quick recipe on 16 px images, in training mode."""
    recipe = load_recipe(method, "quick", budget_samples=budget, image_size=16, overrides=overrides)
    return methods.build(
        method,
        backbone=backbone or ("vit-micro" if METHODS[method] else "conv-tiny"),
        image_size=16,
        recipe=recipe,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
    ).train()


def batches(count: int, batch_size: int = BATCH) -> list[dict[str, Tensor]]:
    """The first batches of a run over fixed random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, batch_size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    positions = torch.arange(count * batch_size).view(count, batch_size)
    return [{"images": i, "positions": p} for i, p in zip(images, positions, strict=True)]


def step(module: Method, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """What Lightning does with a batch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.training_step(batch)
        loss.backward()
        return loss

    module.optimizer_step(0, 0, optimizer, closure)


def train(module: Method, steps: int) -> list[Tensor]:
    """The losses of the first `steps` steps."""
    optimizer, losses = module.configure_optimizers(), []
    for batch in batches(steps, module.batch_size):
        step(module, optimizer, batch)
        losses.append(module.last_loss)
    return losses
