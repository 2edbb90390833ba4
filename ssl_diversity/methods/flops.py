"""FLOPs of one training sample: what a budget in FLOPs buys. Nothing is computed: tensors have shapes only."""

import contextlib
from pathlib import Path
from typing import Any

from ssl_diversity.files import digest, home, read_json, write_json
from ssl_diversity.methods import build
from ssl_diversity.methods.recipe import Recipe

_VERSION = 1
"""Raised when a count changes, so that cached ones are not used again."""


def known_flops(method: str, backbone: str, image_size: int, recipe: Recipe) -> int | None:
    """`flops_per_sample` where it was counted before, else None; imports no torch."""
    return _counted().get(_key(method, backbone, image_size, recipe))


def flops_per_sample(method: str, backbone: str, image_size: int, recipe: Recipe) -> int:
    """FLOPs (two per multiply-add) that one image costs in one training step: all its views through all networks.

    Counted: matrix products and convolutions, attention's included, of every forward and backward. Left out: views,
    loss, optimiser. Independent of the batch size. Kept in store/cache/flops.json. UserError for a backbone that
    does not suit the method.
    """
    flops = known_flops(method, backbone, image_size, recipe)
    if flops is None:
        flops = count(method, backbone, image_size, recipe)
        write_json(_cache(), {**_counted(), _key(method, backbone, image_size, recipe): flops})
    return flops


def _key(method: str, backbone: str, image_size: int, recipe: Recipe) -> str:
    views = [(view.pixels(image_size), view.count) for view in recipe.views]
    return digest([_VERSION, method, backbone, image_size, views, recipe.params])


def _cache() -> Path:
    return home() / "store" / "cache" / "flops.json"


def _counted() -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, int] = read_json(_cache())
        return found
    return {}


def count(method: str, backbone: str, image_size: int, recipe: Recipe, batch_size: int = 4) -> int:
    """`flops_per_sample` without the cache, by torch's FlopCounterMode over a step on the meta device."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    arguments: dict[str, Any] = {"backbone": backbone, "image_size": image_size, "recipe": recipe}
    with torch.device("meta"):
        module = build(method, **arguments, budget=batch_size, batch_size=batch_size, seed=0).train()
    sides = [view.pixels(image_size) for view in recipe.views for _ in range(view.count)]
    views = [torch.empty(batch_size, 3, side, side, device="meta") for side in sides]
    positions = torch.empty(batch_size, dtype=torch.int64, device="meta")
    # The counter knows attention's kernels by name and not all of them; its plain form is matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = module(views, positions)
        torch.stack([output.sum() for output in outputs if output.requires_grad]).sum().backward()
    total = counter.get_total_flops()
    assert total % batch_size == 0, "a network's work does not depend on the batch"
    return total // batch_size
