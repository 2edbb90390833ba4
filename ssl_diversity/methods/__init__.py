"""The self-supervised methods: one file and one configs/methods/<name>.yaml each (no torch until one is built)."""

import importlib
from typing import TYPE_CHECKING

from ssl_diversity.methods.recipe import Recipe, check_backbone

if TYPE_CHECKING:
    from ssl_diversity.methods.base import Method


def build(
    method: str, *, backbone: str, image_size: int, recipe: Recipe, budget: int, batch_size: int, seed: int
) -> "Method":
    """The LightningModule of `method`: `METHOD` in ssl_diversity/methods/<method>.py.

    `budget` is C_used, the samples that whole batches process; `batch_size` the global batch; `seed` fixes the
    initial weights and, with each sample's position, all of its randomness. UserError for an unknown method or a
    backbone that does not suit it.
    """
    check_backbone(method, backbone)
    cls: type[Method] = importlib.import_module(f"ssl_diversity.methods.{method}").METHOD
    return cls(
        backbone=backbone,
        image_size=image_size,
        recipe=recipe,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
    )
