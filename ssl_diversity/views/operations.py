"""Augmentations of a batch with one parameter per image; each equals torchvision's operation of that name.

Images are float32 (B, 3, H, W) in [0, 1], parameters (B,) on the same device. Nothing is changed in place,
nothing is random, nothing waits for a GPU, and no image's result depends on its neighbours in the batch.
Reference: torchvision.transforms.v2.functional on float images.
"""

import torch
from torch import Tensor
from torch.nn import functional

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2


def resized_crop(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """(B, 3, size, size): each image's box, resized bilinearly with antialiasing, mirrored where `flip`.

    `boxes` is integer (B, 4): top, left, height and width, in pixels; `flip` is bool.
    """
    top, left, height, width = boxes.float().unbind(1)
    vertical = _triangle(top, height, size, images.shape[2], torch.zeros_like(flip))
    horizontal = _triangle(left, width, size, images.shape[3], flip)
    return _separable(images, vertical, horizontal)


def _triangle(start: Tensor, length: Tensor, size: int, side: int, flip: Tensor) -> Tensor:
    """(B, size, side) weights that resample pixels [start, start + length) of a line of `side` to `size`."""
    start, length = start[:, None], length[:, None]
    scale = length / size
    step = torch.arange(size, device=start.device) + 0.5
    centre = start + scale * torch.where(flip[:, None], size - step, step)
    pixel = torch.arange(side, device=start.device) + 0.5
    weights = (pixel - centre[:, :, None]).abs_().div_(-scale.clamp(min=1)[:, :, None]).add_(1).clamp_(min=0)
    weights *= ((pixel > start) & (pixel < start + length)).float()[:, None, :]
    return weights.div_(weights.sum(2, keepdim=True))


def _separable(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """`vertical` (B, h, H) and `horizontal` (B, w, W) applied to every channel: (B, 3, h, w)."""
    batch, channels, height, width = images.shape
    rows = torch.bmm(images.reshape(batch, channels * height, width), horizontal.transpose(1, 2))
    return torch.matmul(vertical[:, None], rows.view(batch, channels, height, -1))


def luma(images: Tensor) -> Tensor:
    """(B, 1, H, W): ITU-R 601 grey values."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(images: Tensor) -> Tensor:
    return luma(images).expand_as(images)


def blend(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """adjust_brightness, adjust_contrast or adjust_saturation, as `kind` (int64) says for each image.

    All three are `factor * image + (1 - factor) * other`, clamped: other is black, the image's mean grey, or
    each pixel's grey.
    """
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    other = luma(images)
    flat = other.mean((2, 3), keepdim=True) * (kind == CONTRAST)
    other.mul_((1 - factor) * (kind == SATURATION)).add_((1 - factor) * flat)
    return (images * factor).add_(other).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of each image by `shift` of a full circle, in HSV, in [-0.5, 0.5]."""
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # Of a pure colour (highest channel 1, lowest 0), 1 - red + green + blue is the distance from red around a
    # circle of 6; the sign of green - blue says which way.
    distance = (green - red).add_(blue).sub_(low).add_(chroma).div_(chroma.clamp(min=1e-12))
    hue = distance.copysign_(green - blue).add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_().mul_(6))
    away_from_red, green_share, blue_share = ((2 - (hue - c).abs_()).clamp_(0, 1) for c in (3, 2, 4))
    return torch.stack(
        (
            torch.addcmul(high, chroma, away_from_red, value=-1),
            torch.addcmul(low, chroma, green_share),
            torch.addcmul(low, chroma, blue_share),
        ),
        dim=1,
    )


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian of standard deviation `sigma` pixels, cut at `radius` (below H, W), edges reflected."""
    vertical = _gaussian(sigma, radius, images.shape[2])
    horizontal = vertical if images.shape[2] == images.shape[3] else _gaussian(sigma, radius, images.shape[3])
    return _separable(images, vertical, horizontal)


def _gaussian(sigma: Tensor, radius: int, side: int) -> Tensor:
    """(B, side, side) weights of the blur of a line, with what reaches over its ends folded back."""
    reach = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.softmax(-0.5 * (reach / sigma[:, None]) ** 2, dim=1)
    centre = 2 * (side - 1)
    # windows[:, p, j] is the kernel at distance p + j - centre.
    windows = functional.pad(kernel, (centre - radius, centre - radius)).unfold(1, side, 1)
    weights = windows[:, centre + 1 - side : centre + 1].flip(1)
    weights[:, :, 1:] += windows[:, centre : centre + side, 1:]
    weights[:, :, :-1] += windows[:, :side, :-1]
    return weights


def solarize(images: Tensor, threshold: float) -> Tensor:
    return torch.where(images >= threshold, 1 - images, images)
