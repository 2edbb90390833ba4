"""What a view is: the augmentations of one random crop of an image, as a record (no torch here)."""

from math import ceil
from typing import Annotated

from pydantic import Field, field_validator

from ssl_diversity.config import Config

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1], by channel: every network sees its images less MEAN, over STD."""

MIN_PIXELS = 4

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ViewSpec(Config):
    """A view's operations in the order in which they are applied; the defaults are a plain resize.

    Crop, flip, colour jitter, grayscale, blur, solarise: the order of SimCLR (arXiv 2002.05709) and BYOL
    (arXiv 2006.07733). Parameters mean what they mean in torchvision's transforms of the same names.
    """

    size: int | float = 1.0
    """Side of the square view: pixels (an integer) or a fraction of the image size (a float up to 1)."""
    count: Annotated[int, Field(ge=1)] = 1
    """How many views of this kind (DINO's local crops)."""
    crop_scale: tuple[Positive, Positive] = (1.0, 1.0)
    """Area of the crop, as a fraction of the image's."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Width by height of the crop."""
    flip: Probability = 0.0
    jitter: Probability = 0.0
    """Probability of the colour jitter as a whole; then its four parts, in random order, always apply."""
    brightness: Strength = 0.0
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grayscale: Probability = 0.0
    blur: Probability = 0.0
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Standard deviation of the Gaussian, in pixels of the view."""
    blur_kernel: Annotated[float, Field(gt=0, le=1)] | None = None
    """Kernel as a fraction of the view's side (SimCLR: 0.1); unset: three of the largest sigma each way."""
    solarize: Probability = 0.0
    solarize_threshold: Probability = 0.5
    """Values from here on are inverted; images lie in [0, 1] (PIL's 128 of 255 is 0.5)."""

    @field_validator("size")
    @classmethod
    def _size(cls, size: int | float) -> int | float:
        if size >= MIN_PIXELS if isinstance(size, int) else 0 < size <= 1:
            return size
        raise ValueError(
            f"pixels (an integer from {MIN_PIXELS}) or a fraction of the image size (a float up to 1)"
        )

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _range(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] <= pair[1]:
            return pair
        raise ValueError("expected [low, high] with low <= high")

    @field_validator("crop_scale")
    @classmethod
    def _scale(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[1] <= 1:
            return pair
        raise ValueError("must not exceed 1, the whole image")

    def pixels(self, image_size: int) -> int:
        """Side of the view, in pixels, of images of `image_size` pixels."""
        return self.size if isinstance(self.size, int) else max(1, round(self.size * image_size))

    def blur_radius(self, side: int) -> int:
        """Pixels that the blur's kernel reaches each way, in a view of `side` pixels."""
        if self.blur_kernel is None:
            radius = ceil(3 * self.blur_sigma[1])
        else:
            radius = int(self.blur_kernel * side) // 2
        return min(max(radius, 1), side - 1)
