"""One image: bytes to pixels, to a pool's shape or a reader's square, to bytes again; and its hashes.

Pixels are uint8 (H, W, 3), RGB. What pixels bytes stand for is PIL's word: libjpeg-turbo is called directly
(`simplejpeg`), and PIL's inflater without its parser, only where they give the same, and faster.
"""

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ssl_diversity.data.config import Resize

Pixels = NDArray[np.uint8]
SUFFIX = {"png": "png", "jpeg": "jpg"}  # of a shard's members; `suffix` where the codec is original
_JPEG = b"\xff\xd8\xff"
_SEGMENT = struct.Struct(">BBH")  # of a JPEG: 0xFF, marker, length
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_RGB = b"\x08\x02\0\0\0"  # 8 bits, RGB, not interlaced
_SMALL_PIXELS = 1 << 22
_LEAST_SCALED = 0.8  # of the asked size: what `scaled` decoding may leave to be enlarged


def decode(data: bytes) -> Pixels:
    """The pixels of one image as a pool of codec png or jpeg stores it."""
    pixels = _decoded(data)
    if pixels is not None:
        return pixels
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def decode_source(data: bytes) -> Pixels:
    """The pixels of an image as users have it: any mode, turned as its EXIF says, 16-bit grey scaled to 8.

    Raises whatever PIL raises for bytes that are no image.
    """
    pixels = _decoded(data) if _plain(data) else None
    if pixels is not None:
        return pixels
    with Image.open(io.BytesIO(data)) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def decoder(codec: str, size: int | None, filter: str, *, scaled: bool = False) -> Callable[[bytes], Pixels]:
    """How the images of a pool of `codec` are read: as they are (`size` None), or as a square of `size`.

    `scaled`: a JPEG with pixels to spare is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg-turbo's inverse DCT
    of fewer coefficients), the least that has 0.8 `size` on its short side. Other fractions cost more than
    they save: they lack vector code.
    """
    whole = decode_source if codec == "original" else decode
    if size is None:
        return whole

    def at_size(data: bytes) -> Pixels:
        pixels = _scaled(data, size, filter) if scaled else None
        return square(whole(data), size, filter) if pixels is None else pixels

    return at_size


def _decoded(data: bytes) -> Pixels | None:
    """The pixels without PIL's overhead; None where PIL must look."""
    try:
        if data.startswith(_JPEG):
            pixels: Pixels = simplejpeg.decode_jpeg(data)
            return pixels
        if data.startswith(_PNG_START) and data[24:29] == _PNG_RGB:
            return _small_png(data)
    except ValueError:  # damaged or unusual
        pass
    return None


def _small_png(data: bytes) -> Pixels | None:
    """The pixels of an RGB PNG that has one IDAT chunk and nothing else, as PIL writes small ones."""
    end = 41 + int.from_bytes(data[33:37])
    lean = data[37:41] == b"IDAT" and len(data) == end + 16 and data[end + 8 : end + 12] == b"IEND"
    if not lean or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        return None
    shape = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    if shape[0] * shape[1] > _SMALL_PIXELS:
        return None
    return np.asarray(Image.frombytes("RGB", shape, data[41:end], "zip", "RGB", 0))


def _plain(data: bytes) -> bool:
    """Whether the bytes stand for the coded picture as it is: not turned by EXIF or XMP, no CMYK, no endless size."""
    if not data.startswith(_JPEG):
        return data.startswith(_PNG_START)
    try:
        position, marker = 2, 0
        while marker != 0xDA:  # from segment to segment, to the start of the scan
            lead, marker, length = _SEGMENT.unpack_from(data, position)
            if lead != 0xFF:
                return False
            if marker == 0xE1:
                return _upright(data)
            position += 1 if marker == 0xFF else 2 + length
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, struct.error):
        return False
    return colors in ("YCbCr", "RGB", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or height * width)


def _upright(data: bytes) -> bool:
    """As `_plain`, of a JPEG with EXIF or XMP."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
            return opened.format == "JPEG" and opened.mode in ("RGB", "L") and not turned
    except Exception:  # PIL raises nearly anything; it will again where it decodes
        return False


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


def resized(pixels: Pixels, resize: Resize, size: int, filter: str) -> Pixels:
    """As a pool of that policy keeps it: `fit`; or short side to `size`, never enlarged; or as it is."""
    if resize == "square":
        return fit(pixels, size, filter)
    height, width = pixels.shape[:2]
    short = min(height, width)
    if resize == "none" or short <= size:
        return pixels
    shape = round(width * size / short), round(height * size / short)
    return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling[filter.upper()]))


def square(pixels: Pixels, size: int, filter: str) -> Pixels:
    """The centre square at `size`, as readers resize: uint8 (size, size, 3).

    Bicubic and bilinear by torch's antialiased integer kernel, as evaluation does it: four times as fast as PIL's,
    the same on any processor, and within 2 of what PIL makes of the cut-out square. Other filters by `fit`.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    return _squared(pixels, ((height - side) // 2, (width - side) // 2), side, size, filter)


def _scaled(data: bytes, size: int, filter: str) -> Pixels | None:
    """As `square` of the decoded image, from no more of its frequencies than `size` needs; None: not so."""
    if not data.startswith(_JPEG) or not _plain(data):
        return None
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    side = min(height, width)
    shrink = next((n for n in (8, 4, 2) if side >= n * _LEAST_SCALED * size), 1)
    if shrink == 1:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // shrink), min_width=-(-width // shrink))
    except ValueError:  # damaged: PIL says how
        return None
    corner = round((height - side) / 2 / shrink), round((width - side) / 2 / shrink)
    return _squared(pixels, corner, side / shrink, size, filter)


def _squared(pixels: Pixels, corner: tuple[int, int], side: float, size: int, filter: str) -> Pixels:
    """The square of `side` pixels, the last of which may be cut, from `corner` (top, left), at `size`."""
    if side == size and pixels.shape[:2] == (size, size):
        return pixels
    (top, left), whole = corner, math.ceil(side)
    cut = pixels[top : top + whole, left : left + whole]
    part = np.require(cut, requirements=["C", "W"])  # as torch wants it
    if side == size:
        return part
    if filter not in ("bilinear", "bicubic") or whole == size:  # of equal sizes torch makes a copy
        resample = Image.Resampling[filter.upper()]
        return np.asarray(Image.fromarray(part).resize((size, size), resample, box=(0, 0, side, side)))
    import torch
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    # by a factor where `side` is no integer: it is what the kernel then measures by
    target = {"size": (size, size)} if side == whole else {"scale_factor": (size / side, size / side)}
    out = interpolate(planes, **target, mode=filter, antialias=True)
    result: Pixels = out[0, :, :size, :size].permute(1, 2, 0).numpy()
    return result


def encode(pixels: Pixels, codec: str, quality: int) -> bytes:
    """PNG, or JPEG of that quality. (Of codec original the source's own bytes are kept.)"""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec, **({"quality": quality} if codec == "jpeg" else {}))
    return buffer.getvalue()


def suffix(data: bytes) -> str:
    """Of a file that holds these bytes: jpg, png, gif, tiff, webp, ... PIL's error where they are no image."""
    if data.startswith(_JPEG):
        return "jpg"
    if data.startswith(_PNG_START[:8]):
        return "png"
    with Image.open(io.BytesIO(data)) as image:
        return str(image.format).lower()


def content_hash(pixels: Pixels) -> bytes:
    """128 bits over shape and pixels: equal if and only if the images are (up to hash collisions)."""
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    state.update(np.ascontiguousarray(pixels).data)
    return state.digest()


def keyed_hash(seed: int, content: bytes) -> bytes:
    """128 bits that order a pool: a uniform shuffle for each seed, the same from any form of the source."""
    return hashlib.blake2b(content, digest_size=16, key=seed.to_bytes(8, "little")).digest()
