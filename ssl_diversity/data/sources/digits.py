"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes (UCI, Alpaydin and Kaynak 1998)."""

from pathlib import Path
from typing import Any

import numpy as np

from ssl_diversity.data.sources.base import ArrayPart, Item, Source, array_parts

TRAIN_SHARE = 0.8


class Digits(Source):
    """Has no official splits; ours are the first four fifths and the last fifth of a fixed permutation.

    The quick recipes were chosen on that train split alone (docs/adding-a-method.md).
    """

    splits = frozenset({"train", "test"})

    def __init__(self, options: Any, scratch: Path) -> None:
        self.classes = [str(digit) for digit in range(10)]

    def parts(self, split: str, part_items: int) -> list[ArrayPart]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        rgb = np.repeat(grey[..., None], 3, axis=3)
        order = np.random.default_rng(0).permutation(len(rgb))
        first = int(TRAIN_SHARE * len(rgb))
        chosen = {"train": order[:first], "test": order[first:], "all": order}[split]
        items = [Item(f"{i:04d}", int(digits.target[i]), rgb[i]) for i in sorted(chosen.tolist())]
        return array_parts(items, part_items)
