"""Random views of a batch of images, the same code on CPU and GPU.

An image's view depends on the image, the seed, the view's index and the image's position alone: not on the
rest of the batch, on another generator, or on what ran before.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ssl_diversity.views import operations
from ssl_diversity.views.sampling import Parameters, sample
from ssl_diversity.views.spec import MEAN, STD, ViewSpec

_CHUNK_VALUES = 2**19
"""On a CPU, views are made of at most this many pixel values at a time, so that they stay in its cache."""


@torch.no_grad()
def make_views(images: Tensor, specs: Sequence[ViewSpec], seed: int, positions: Tensor) -> list[Tensor]:
    """Normalised float32 (B, 3, s, s) for each view of `specs`, each repeated `count` times, in order.

    `images` is uint8 (B, 3, H, W); `positions`, int64 (B,), is each sample's place in the run's order.
    """
    height, width = images.shape[2:]
    views: list[Tensor] = []
    device = images.device.type
    with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
        for spec in specs:
            numbers = range(len(views), len(views) + spec.count)
            parameters = sample(spec, seed, numbers, positions, (height, width))
            views += _augment(images.repeat(spec.count, 1, 1, 1), spec, parameters).chunk(spec.count)
    return views


def normalise(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32, as `make_views` leaves its views: in [0, 1], less MEAN, over STD."""
    return _normalise(images.float().div_(255))


def _normalise(images: Tensor) -> Tensor:
    mean, std = _mean_and_std(images.device)
    return torch.addcmul(-mean / std, images, 1 / std)


@lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each, copied to a GPU once: each copy would wait for it."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return mean, std


def _augment(images: Tensor, spec: ViewSpec, parameters: Parameters) -> Tensor:
    parts = math.ceil(images.numel() / _CHUNK_VALUES) if _on_cpu(images) else 1
    chunks = zip(images.chunk(parts), *(p.chunk(parts) for p in parameters), strict=True)
    return torch.cat([_augment_chunk(chunk, spec, Parameters(*p)) for chunk, *p in chunks])


def _augment_chunk(images: Tensor, spec: ViewSpec, p: Parameters) -> Tensor:
    """The view of each image of uint8 (B, 3, H, W) that `p` describes."""
    pixels = images.float().div_(255)
    size = spec.pixels(images.shape[2])
    view = operations.resized_crop(pixels, p.boxes, size, p.flip)
    if spec.jitter > 0:
        for slot in range(4):
            view = _where(p.hue_slot == slot, view, operations.adjust_hue, p.hue)
            if slot < 3:
                view = operations.blend(view, p.kinds[:, slot], p.factors[:, slot])
    if spec.grayscale > 0:
        view = _where(p.grayscale, view, operations.grayscale)
    if spec.blur > 0:
        radius = spec.blur_radius(size)
        view = _where(p.blur, view, lambda x, sigma: operations.gaussian_blur(x, sigma, radius), p.sigma)
    if spec.solarize > 0:
        view = _where(p.solarize, view, lambda x: operations.solarize(x, spec.solarize_threshold))
    return _normalise(view)


def _on_cpu(images: Tensor) -> bool:
    return images.device.type == "cpu"


def _where(chosen: Tensor, images: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`operation(images, *parameters)` for the images where `chosen` (bool, (B,)), the others as they are.

    On a GPU it is computed for all, which is cheaper than waiting for their number; on a CPU for the chosen
    alone, and `images` is overwritten.
    """
    if not _on_cpu(images):
        return torch.where(chosen[:, None, None, None], operation(images, *parameters), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        images.index_copy_(0, rows, operation(*(x.index_select(0, rows) for x in (images, *parameters))))
    return images
