"""A small YFCC100M in the official form: metadata as bz2, photos in the layout of the public bucket."""

import bz2
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_diversity.data.yfcc.download import photo_path
from ssl_diversity.data.yfcc.metadata import hash_of


def line(number: int, *, video: bool = False) -> list[str]:
    """The 25 fields of one photo or video; free text is URL-encoded, as in the release, or not, to be safe."""
    identifier = str(6985418911 + number)
    url = f"http://farm8.staticflickr.com/7205/{identifier}_df7747990d.jpg"
    return [
        str(number),
        identifier,
        hash_of(url.encode()).decode(),
        "39089491@N00",
        "gnuckx",
        "2012-02-16 09:56:37.0",
        "1331840483",
        "Canon+PowerShot+ELPH+310+HS",
        "K%C3%B6ln+ö" if number % 3 else "",
        "a+description",
        "canon,%E6%97%A5%E6%9C%AC",
        "",
        "-81.804885" if number % 2 else "",
        "24.550558" if number % 2 else "",
        "12" if number % 2 else "",
        f"http://www.flickr.com/photos/39089491@N00/{identifier}/",
        url,
        "Attribution-NonCommercial-NoDerivs License",
        "http://creativecommons.org/licenses/by-nc-nd/2.0/",
        "7205",
        "8",
        "df7747990d",
        "692d7e0a7f",
        "jpg",
        str(int(video)),
    ]


def hash_at(number: int) -> str:
    return line(number)[2]


def write(path: Path, lines: list[list[str]]) -> Path:
    """Metadata, compressed as the release is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress("".join("\t".join(fields) + "\n" for fields in lines).encode()))
    return path


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def put(root: Path, number: int, data: bytes | None = None) -> Path:
    """A photo where the bucket has it."""
    path = root / photo_path(hash_at(number))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(number) if data is None else data)
    return path
