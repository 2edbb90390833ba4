"""One image: bytes to pixels, to the pool's square, to bytes again; and its hashes.

Pixels are uint8 (H, W, 3), RGB. `decode` is what every reader of a pool goes through.
"""

import hashlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
SUFFIX = {"png": "png", "jpeg": "jpg"}


def decode(data: bytes) -> Pixels:
    """The pixels of one image as a pool stores it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def decode_source(data: bytes) -> Pixels:
    """The pixels of an image as users have it: any mode, turned as its EXIF says, 16-bit grey scaled to 8.

    Raises whatever PIL raises for bytes that are no image.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def fit(pixels: Pixels, size: int, filter: str) -> Pixels:
    """Short side to `size` by an antialiased PIL filter, centre square: uint8 (size, size, 3)."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    resized = Image.fromarray(pixels).resize(
        (size, size), Image.Resampling[filter.upper()], box=(left, top, left + side, top + side)
    )
    return np.asarray(resized)


def encode(pixels: Pixels, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec, **({"quality": quality} if codec == "jpeg" else {}))
    return buffer.getvalue()


def content_hash(pixels: Pixels) -> bytes:
    """128 bits over shape and pixels: equal if and only if the images are (up to hash collisions)."""
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    state.update(np.ascontiguousarray(pixels).data)
    return state.digest()


def keyed_hash(seed: int, content: bytes) -> bytes:
    """128 bits that order a pool: a uniform shuffle for each seed, the same from any form of the source."""
    return hashlib.blake2b(content, digest_size=16, key=seed.to_bytes(8, "little")).digest()
