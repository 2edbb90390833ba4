"""Looking at a pool: counts, and a contact sheet."""

import math
from typing import Any

import numpy as np

from ssl_diversity.data import image
from ssl_diversity.data.pool import Pool

_GAP = 2  # pixels between images
UNSIZED = 96  # pixels of an image whose pool resizes none


def contact_sheet(pool: Pool, n: int = 64) -> bytes:
    """PNG of the first `n` images (a pool's order is random) in a near-square grid on white."""
    size = pool.image_size or UNSIZED
    images = pool.images(np.arange(min(n, pool.size)), size)
    return image.encode(grid(images, math.ceil(math.sqrt(len(images))), _GAP), "png", 0)


def grid(images: image.Pixels, columns: int, gap: int = 0) -> image.Pixels:
    """Images uint8 (n, s, s, channels) as one, row by row; around each a white `gap`, pixels."""
    size, channels = images.shape[2:]
    step = size + gap
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * step + gap, columns * step + gap, channels), 255, np.uint8)
    for i, pixels in enumerate(images):
        y, x = i // columns * step + gap, i % columns * step + gap
        sheet[y : y + size, x : x + size] = pixels
    return sheet


def inspect(pool: Pool) -> dict[str, Any]:
    """What `data inspect` shows: where it comes from, how many of what, and rows per class."""
    info = pool.info
    per_class = np.bincount(pool.label[pool.label >= 0], minlength=len(info.classes))
    return {
        "name": info.name,
        "folder": str(pool.path),
        "source": info.source,
        "origin": info.origin,
        "terms": info.terms,
        "size": info.size,
        "encoding": info.encoding,
        "seed": info.seed,
        "digest": info.digest,
        "real_images": info.real_images,
        "counts": dict(info.counts),
        "shards": len(info.shards),
        "bytes": sum(shard.bytes for shard in info.shards),
        "classes": dict(zip(info.classes, per_class.tolist(), strict=False)),
    }
