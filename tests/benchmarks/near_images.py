"""Real images for bench_near_duplicates.py, copies of them, and which of them are twins."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_diversity.data import bands, near

Pixels = NDArray[np.uint8]
TARS = ("photos.tar", "tiny-imagenet-20k.tar", "cifar10.tar")
KINDS = ("photos", "web-crops", "tiny", "cifar")
# Pairs of different data sets or classes that are the same picture nevertheless: each was looked at.
TWINS_SEEN = """
n01855672_44 val_2157, n07747607_20 n07753592_63
n01644900_22 train/frog/1832, n02123045_47 train/cat/4630
n02123045_77 train/cat/1081, n02106662_7 train/dog/1135
n02814533_39 train/automobile/0429, n03796401_44 test/truck/0919
n01644900_26 train/frog/3928, n02123045_28 train/cat/3506
val_3516 test/frog/0841, n01641577_74 train/frog/4135
n03796401_59 train/truck/4809, n01644900_43 train/frog/1739
n01644900_68 train/frog/1676, n02124075_61 train/cat/4477
n03796401_67 train/truck/2237, n03100240_81 test/automobile/0111
val_76 train/cat/4767, val_3119 test/frog/0749
n02123045_2 test/cat/0842, n01641577_49 train/frog/2873
val_3102 train/cat/2677, n02123045_52 train/cat/3068
n01644900_10 train/frog/3545, n01644900_10 train/frog/0965
n02123394_93 train/cat/3666, n01644900_10 train/frog/2410
n01644900_79 train/frog/1041, n02123045_2 train/cat/2934
n02123045_2 train/cat/3522
"""
TWINS = frozenset(
    frozenset(pair.split()) for line in TWINS_SEEN.strip().splitlines() for pair in line.split(", ")
)


class Images:
    """Names, encoded bytes, kind (photos, web-crops, tiny, cifar) and a key that tells different images apart."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.names: list[str] = []
        self.data: list[bytes] = []
        for tar in TARS:
            with tarfile.open(folder / tar) as file:
                members = [m for m in file if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))]
                if limit:
                    members = sorted(members, key=lambda m: name_hash(m.name))[:limit]
                for member in members:
                    self.names.append(member.name)
                    self.data.append(file.extractfile(member).read())  # type: ignore[union-attr]
        self.kind = np.array([kind(name) for name in self.names])
        self.key = np.unique([key(name) for name in self.names], return_inverse=True)[1]
        self.odd = np.array([name_hash(name) % 2 == 1 for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, number: int) -> Pixels:
        return decoded(self.data[number])


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())


def kind(name: str) -> str:
    """One of KINDS."""
    return {"tiny-imagenet": "tiny", "cifar10": "cifar"}.get(
        name.split("/", maxsplit=1)[0], name.split("/", maxsplit=1)[0]
    )


def key(name: str) -> str:
    """What only images that may be alike have in common: a photograph, or a class of a set."""
    if kind(name) in ("photos", "web-crops"):
        return Path(name).stem.split("_")[0]
    return f"{kind(name)}/{name.split('/')[-2]}"


def short(name: str) -> str:
    """As TWINS_SEEN has it."""
    return Path(name).stem if kind(name) == "tiny" else name.partition("/")[2].removesuffix(".jpg")


def decoded(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def described(images: Iterable[Pixels], count: int) -> near.Described:
    out = near.Described(
        np.empty((count, near.SIGNATURE_BYTES), np.uint8), np.empty((count, near.THUMBNAIL_BYTES), np.uint8)
    )
    for i, pixels in enumerate(images):
        signature, thumbnail = near.describe(pixels)
        out.signatures[i] = np.frombuffer(signature, np.uint8)
        out.thumbnails[i] = np.frombuffer(thumbnail, np.uint8)
    return out


# --- copies -----------------------------------------------------------------------------------------------------


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return decoded(buffer.getvalue())


def resized(pixels: Pixels, scale: float) -> Pixels:
    height, width = pixels.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def cropped(pixels: Pixels, part: float, draw: np.random.Generator) -> Pixels:
    """Less `part` of the width and of the height, in whole pixels and at least one, anywhere off the sides."""
    height, width = pixels.shape[:2]
    down, across = max(1, round(part * height)), max(1, round(part * width))
    top, left = draw.integers(0, down + 1), draw.integers(0, across + 1)
    return pixels[top : height - down + top, left : width - across + left]


def made_small(pixels: Pixels, size: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def lighter(pixels: Pixels, levels: int) -> Pixels:
    return np.clip(pixels.astype(np.int64) + levels, 0, 255).astype(np.uint8)


Draw = np.random.Generator
CHANGES: dict[str, Callable[[Pixels, Draw], Pixels]] = {
    "JPEG 95": lambda p, d: jpeg(p, 95),
    "JPEG 75": lambda p, d: jpeg(p, 75),
    "JPEG 50": lambda p, d: jpeg(p, 50),
    "JPEG 30": lambda p, d: jpeg(p, 30),
    "resize x0.5": lambda p, d: resized(p, 0.5),
    "resize x0.75": lambda p, d: resized(p, 0.75),
    "resize x1.5": lambda p, d: resized(p, 1.5),
    "resize x2": lambda p, d: resized(p, 2.0),
    "crop 1 %": lambda p, d: cropped(p, 0.01, d),
    "crop 3 %": lambda p, d: cropped(p, 0.03, d),
    "crop 5 %": lambda p, d: cropped(p, 0.05, d),
    "10 levels lighter": lambda p, d: lighter(p, 10),
    "crop 3 %, x0.75, JPEG 75": lambda p, d: jpeg(resized(cropped(p, 0.03, d), 0.75), 75),
    "crop 5 %, JPEG 50": lambda p, d: jpeg(cropped(p, 0.05, d), 50),
    "crop 8 % (not slight)": lambda p, d: cropped(p, 0.08, d),
}


def meet(a: near.Described, b: near.Described, pairs: float) -> NDArray[np.bool_]:
    """Whether some band of that many pairs makes the images of each pair candidates."""
    codes_a, codes_b = bands.codes(a.signatures, a.thumbnails), bands.codes(b.signatures, b.thumbnails)
    shift, out = np.uint64(64 - bands.band_bits(pairs)), np.zeros(len(a), bool)
    for band in range(bands.BANDS):
        for x, y in ((codes_a, codes_b[:, :1]), (codes_b, codes_a[:, :1])):
            same = (bands.keys(x, band) ^ bands.keys(y, band)) >> shift == 0
            out |= (same & (np.bitwise_count(x ^ y) <= bands.MAX_DISTANCE)).any(1)
    return out
