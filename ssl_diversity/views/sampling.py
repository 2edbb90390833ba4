"""A view's random parameters, one set per image, from the counter-based generator.

Distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale,
GaussianBlur and RandomSolarize.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_diversity.randomness import uniform
from ssl_diversity.views.operations import BRIGHTNESS, CONTRAST, SATURATION
from ssl_diversity.views.spec import ViewSpec

STREAM = 1000
"""View i draws from stream STREAM + i of `randomness`; other uses of a seed stay below it."""

_TRIES = 10
_COLUMNS = (_TRIES, _TRIES, 2, 1, 1, 1, 3, 1, 1, 1, 1, 1)
"""Uniform numbers per operation of a view; this layout does not depend on its spec."""


class Parameters(NamedTuple):
    """What happens to each image of a batch: (B,) each, but for the first and the two of the jitter."""

    boxes: Tensor
    """int64 (B, 4), as `operations.resized_crop` takes them."""
    flip: Tensor
    kinds: Tensor
    """int64 (B, 3): the order of brightness, contrast and saturation, as `operations.blend` numbers them."""
    factors: Tensor
    """(B, 3), in the order of `kinds`; 1 where there is no jitter."""
    hue_slot: Tensor
    """How many of `kinds` come before the hue; -1 where there is no jitter."""
    hue: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor


def sample(
    spec: ViewSpec, seed: int, views: Sequence[int], positions: Tensor, side: tuple[int, int]
) -> Parameters:
    """Parameters of the views numbered `views`, one after the other (V B in all).

    For images of `side` (height, width) at `positions`, int64 (B,).
    """
    draws = torch.cat([uniform(seed, STREAM + view, positions, sum(_COLUMNS)) for view in views])
    area, ratio, corner, flip, jitter, order, factor, hue, grayscale, blur, sigma, solarize = (
        column.squeeze(1) for column in draws.split(_COLUMNS, dim=1)
    )
    jittered = jitter < spec.jitter
    # The 24 orders of four operations: where the hue comes, and the order of the other three.
    order_index = _below(24, order)
    first, swap = order_index // 8, order_index // 4 % 2
    kinds = torch.stack((first, (first + 1 + swap) % 3, (first + 2 - swap) % 3), dim=1)
    strengths = {BRIGHTNESS: spec.brightness, CONTRAST: spec.contrast, SATURATION: spec.saturation}
    factors = torch.stack(
        [_between(max(0.0, 1 - s), 1 + s, factor[:, kind]) for kind, s in strengths.items()], dim=1
    )
    return Parameters(
        crop_boxes(spec, area, ratio, corner, side),
        flip=flip < spec.flip,
        kinds=kinds,
        factors=torch.where(jittered[:, None], factors.gather(1, kinds), 1.0),
        hue_slot=torch.where(jittered, order_index % 4, -1),
        hue=_between(-spec.hue, spec.hue, hue),
        grayscale=grayscale < spec.grayscale,
        blur=blur < spec.blur,
        sigma=_between(*spec.blur_sigma, sigma),
        solarize=solarize < spec.solarize,
    )


def crop_boxes(spec: ViewSpec, area: Tensor, ratio: Tensor, corner: Tensor, side: tuple[int, int]) -> Tensor:
    """int64 (B, 4), as RandomResizedCrop samples them, from uniform numbers (B, 10), (B, 10) and (B, 2).

    Of ten tries (`area`, `ratio`) the first that fits counts; where none does, the largest central crop of an
    allowed ratio. In double precision, so that a box is the same on every device.
    """
    height, width = side
    narrow, wide = spec.crop_ratio
    scale = (height * width * _between(*spec.crop_scale, area.double())).sqrt_()
    root = _between(math.log(narrow), math.log(wide), ratio.double()).div_(2).exp_()
    heights, widths = (scale / root).round_().long(), (scale * root).round_().long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    earliest, chosen = (fits * torch.arange(_TRIES, 0, -1, device=area.device)).max(1, keepdim=True)
    length = torch.cat((heights.gather(1, chosen), widths.gather(1, chosen)), dim=1)
    room = torch.cat((height - length[:, :1], width - length[:, 1:]), dim=1)
    found = torch.cat((_below(room + 1, corner), length), dim=1)
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))
    fallback = [(height - h) // 2, (width - w) // 2, h, w]
    return torch.stack([torch.where(earliest[:, 0] > 0, found[:, i], fallback[i]) for i in range(4)], dim=1)


def _below(bound: Tensor | int, u: Tensor) -> Tensor:
    """A random integer in [0, bound) from u in [0, 1)."""
    return (u.double() * bound).long()


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u
