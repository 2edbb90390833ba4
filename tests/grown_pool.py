"""A generated pool in small, made as generation makes one: walked from its first image at each growth."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssl_diversity.data import image
from ssl_diversity.data.growing import growing
from ssl_diversity.data.likeness import describe
from ssl_diversity.data.pool import Pool

FIELDS: dict[str, Any] = {
    "name": "made",
    "source": "generated",
    "spec": {"seed": 3},
    "image_size": 12,
    "classes": list("abc"),
    "real_images": 5,
}


def kept(index: int) -> bool:
    return index % 10 != 7


def pixels(row: int) -> np.ndarray:
    """uint8 (12, 12, 3): the image that is in that row, however the pool was made."""
    index = [i for i in range(2 * row + 9) if kept(i)][row]
    return np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8)


def grow(
    path: Path, size: int, *, near_duplicates: bool = False, shard_bytes: int = 6000, **fields: Any
) -> Pool:
    """The pool with `size` rows; every tenth image was dropped on the way."""
    with growing(path, FIELDS | fields, near_duplicates=near_duplicates, shard_bytes=shard_bytes) as pool:
        row = 0
        for index in _until(size):
            if not kept(index):
                pool.drop("blank", index, level=0)
                continue
            made = pixels(row)
            content = image.content_hash(made)
            if row < pool.rows:
                assert bytes(pool.content[row]) == content
            else:
                near = describe(made) if near_duplicates else (None, None)
                encoded = image.encode(made, "png", 95)
                pool.add(content, row % 4 - 1, encoded, {"index": index}, *near)
            row += 1
        counts = {"read": index + 1, "blank": index + 1 - size, "kept": size}
        return pool.finish(counts, source_digest=f"of {index + 1}", provenance={"images": index + 1})


def _until(size: int) -> Iterator[int]:
    """Indices until `size` of them are kept."""
    index = 0
    while size:
        yield index
        size -= kept(index)
        index += 1
