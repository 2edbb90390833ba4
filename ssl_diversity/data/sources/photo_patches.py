"""Non-overlapping square patches of the two photographs that scikit-learn ships; unlabelled."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ssl_diversity.config import Config
from ssl_diversity.data.sources.base import ArrayPart, Item, Source, array_parts


class PhotoPatches(Source):
    """At the default of 16 pixels, 2,080 patches of two 640x427 photographs."""

    class Options(Config):
        patch: int = Field(16, gt=0, le=427)  # pixels

    def __init__(self, options: Any, scratch: Path) -> None:
        self.patch = options.patch
        self.classes = []

    def parts(self, split: str, part_items: int) -> list[ArrayPart]:
        from sklearn.datasets import load_sample_images

        photos = load_sample_images()
        step = self.patch
        items = []
        for path, photo in zip(photos.filenames, photos.images, strict=True):
            height, width = photo.shape[:2]
            for y in range(0, height - step + 1, step):
                for x in range(0, width - step + 1, step):
                    patch = np.ascontiguousarray(photo[y : y + step, x : x + step])
                    items.append(Item(f"{Path(path).stem}/{y:04d}-{x:04d}", -1, patch))
        return array_parts(items, part_items)
