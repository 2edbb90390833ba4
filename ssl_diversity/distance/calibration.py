"""Fixed images that every installation has, by which extractors are calibrated: ranges and batch norm.

Half are crops of scikit-learn's two sample photographs, half its handwritten digits, so that the ranges
hold natural colours and textures as well as strokes on black. Measured once per extractor and cached.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

PHOTO_ROWS, PHOTO_COLUMNS = 8, 16  # crops per photograph, evenly spread; they overlap when they are large
DIGITS = 256
SMALLEST_CROP = 48  # a smaller crop of a photograph is hardly more than one colour


@cache
def images(size: int) -> Tensor:
    """uint8 (512, 3, size, size), the same for every caller and on every machine (up to the resize)."""
    from sklearn.datasets import load_digits, load_sample_images

    crops = [crop for photo in load_sample_images().images for crop in _crops(photo, size)]
    digits = load_digits().images[:DIGITS] * (255 / 16)
    grey = np.repeat(digits.round().astype(np.uint8)[..., None], 3, axis=3)
    resized = [Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in [*crops, *grey]]
    return torch.from_numpy(np.stack([np.asarray(x) for x in resized])).permute(0, 3, 1, 2).contiguous()


def _crops(photo: NDArray[np.uint8], size: int) -> list[NDArray[np.uint8]]:
    height, width = photo.shape[:2]
    side = min(max(size, SMALLEST_CROP), height, width)
    tops = np.linspace(0, height - side, PHOTO_ROWS).astype(int)
    lefts = np.linspace(0, width - side, PHOTO_COLUMNS).astype(int)
    return [photo[top : top + side, left : left + side] for top in tops for left in lefts]
