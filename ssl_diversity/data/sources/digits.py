"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes (UCI, Alpaydin and Kaynak 1998)."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ssl_diversity.data.sources.base import ArrayPart, Item, Source, array_parts


class Digits(Source):
    """Has no splits of its own: a fifth of each class is its test split, by content hash."""

    holdout: ClassVar[float] = 0.2

    def __init__(self, options: Any, scratch: Path) -> None:
        self.classes = [str(digit) for digit in range(10)]

    def parts(self, split: str, part_items: int) -> list[ArrayPart]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        rgb = np.repeat(grey[..., None], 3, axis=3)
        items = [Item(f"{i:04d}", int(digits.target[i]), pixels) for i, pixels in enumerate(rgb)]
        return array_parts(items, part_items)
