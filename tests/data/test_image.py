"""One image: what its bytes stand for is PIL's word, by whatever way they are decoded."""

import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ssl_diversity.data import image

Pixels = image.Pixels


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    """Smooth colours: what DCT scaling and JPEG keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def saved(source: Pixels | Image.Image, kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    opened = source if isinstance(source, Image.Image) else Image.fromarray(source)
    opened.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(24, 16), "jpeg", exif=exif)


def reference(data: bytes) -> Pixels:
    """PIL alone."""
    with Image.open(io.BytesIO(data)) as opened:
        upright: Image.Image = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(upright.convert("RGB"))


def outcome(function: Callable[[bytes], Pixels], data: bytes) -> object:
    try:
        return function(data).tolist()
    except Exception as error:
        return type(error)


PHOTO = picture(37, 29)
GREY16 = Image.fromarray(np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 100)
PLAIN = {
    **{f"jpeg {s}": saved(PHOTO, "jpeg", subsampling=s) for s in ("4:4:4", "4:2:2", "4:2:0")},
    "quality 30": saved(PHOTO, "jpeg", quality=30),
    "grey": saved(PHOTO, "jpeg", "L"),
    "progressive": saved(PHOTO, "jpeg", progressive=True),
    "restarts": saved(PHOTO, "jpeg", restart_marker_blocks=2),
    "comment": saved(PHOTO, "jpeg", comment=b"\xff\xe1Exif"),
    "profile": saved(PHOTO, "jpeg", icc_profile=b"\xff\xda" * 50),
    "rgb jpeg": saved(PHOTO, "jpeg", keep_rgb=True),
    "png": saved(PHOTO, "png"),
}
ODD = {
    "cmyk": saved(PHOTO, "jpeg", "CMYK"),
    **{f"turned {n}": turned(n) for n in range(2, 9)},
    "xmp": saved(PHOTO, "jpeg", xmp=b'<x:xmpmeta><r tiff:Orientation="6"/></x:xmpmeta>'),
    "16 bits": saved(GREY16, "png", "I;16"),
    "large png": saved(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8), "png"),
    "palette": saved(PHOTO, "png", "P"),
    "alpha": saved(PHOTO, "png", "RGBA"),
    "one bit": saved(PHOTO, "png", "1"),
    "transparent": saved(PHOTO, "png", transparency=(0, 0, 0)),
    **{kind: saved(PHOTO, kind) for kind in ("gif", "bmp", "webp", "tiff", "ppm")},
}


@pytest.mark.parametrize("name", [*PLAIN, *ODD])
def test_pixels_are_pils(name: str) -> None:
    data = {**PLAIN, **ODD}[name]
    np.testing.assert_array_equal(image.decode_source(data), reference(data))
    if name in PLAIN:
        np.testing.assert_array_equal(image.decode(data), reference(data))
    for size, scaled in ((8, False), (20, True), *([(8, True)] if name in ODD else [])):
        square = image.decoder("original", size, "bicubic", scaled=scaled)(data)
        np.testing.assert_array_equal(square, image.square(reference(data), size, "bicubic"))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_images_do_not_pass_through_pils_parser(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("PIL was asked"))
    for read in (image.decode, image.decode_source, image.decoder("original", 8, "bicubic", scaled=True)):
        assert read(PLAIN[name]).dtype == np.uint8


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_exif_that_turns_nothing_costs_no_slow_decoding(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = turned(orientation)
    expected = reference(data)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("PIL decoded"))
    np.testing.assert_array_equal(image.decode_source(data), expected)


@pytest.mark.parametrize(
    "name", ["jpeg 4:2:0", "progressive", "grey", "turned 2", "turned 6", "cmyk", "png", "large png"]
)
def test_damage_has_the_outcome_that_pil_has(name: str) -> None:
    whole = {**PLAIN, **ODD}[name]
    rng = np.random.default_rng(1)
    cuts = [whole[:n] for n in (0, 2, 20, *rng.integers(20, len(whole), 25).tolist(), len(whole) - 1)]
    flips = []
    for position, bit in zip(
        rng.integers(0, len(whole), 60).tolist(), rng.integers(0, 8, 60).tolist(), strict=True
    ):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        flips.append(bytes(flipped))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in (*cuts, *flips, whole + b"more", b"no image"):
            assert outcome(image.decode_source, data) == outcome(reference, data)


def test_an_endless_size_is_refused_as_pil_does() -> None:
    data = bytearray(PLAIN["jpeg 4:2:0"])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(Image.DecompressionBombError):
        image.decode_source(bytes(data))


def test_fit_is_the_centre_square() -> None:
    wide = picture(40, 20)
    np.testing.assert_array_equal(image.fit(wide, 20, "bicubic"), wide[:, 10:30])
    assert image.fit(wide, 20, "box") is not wide
    assert image.resized(wide, "square", 7, "box").tolist() == image.fit(wide, 7, "box").tolist()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_short_keeps_the_aspect_and_never_enlarges(width: int, height: int, size: int) -> None:
    pixels = picture(width, height)
    short = image.resized(pixels, "short", size, "bicubic")
    if min(width, height) <= size:
        assert short is pixels
    else:
        assert min(short.shape[:2]) == size
        assert abs(short.shape[1] * height - short.shape[0] * width) <= max(width, height) / 2
    assert image.resized(pixels, "none", size, "bicubic") is pixels


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.sampled_from(["bicubic", "bilinear"]))
@settings(max_examples=150, deadline=None)
def test_a_readers_square_is_pils_within_two_levels(width: int, height: int, size: int, filter: str) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    cut = Image.fromarray(pixels[top : top + side, left : left + side])
    expected = np.asarray(cut.resize((size, size), Image.Resampling[filter.upper()])).astype(int)
    found = image.square(pixels, size, filter)
    assert found.shape == (size, size, 3)
    assert np.abs(found - expected).max() <= 2


@given(
    st.integers(64, 330), st.integers(64, 330), st.integers(10, 90), st.sampled_from(["bicubic", "lanczos"])
)
@settings(max_examples=150, deadline=None)
def test_scaled_decoding_keeps_every_pixel_in_its_place(
    width: int, height: int, size: int, filter: str
) -> None:
    """On a slope from left to right, a shift or another scale is a difference in level."""
    slope = np.linspace(0, 255, width)[None, :, None]
    data = saved(np.broadcast_to(slope, (height, width, 3)).astype(np.uint8), "jpeg", quality=98)
    exact = image.decoder("jpeg", size, filter)(data).astype(int)
    scaled = image.decoder("jpeg", size, filter, scaled=True)(data)
    assert scaled.shape == (size, size, 3)
    off = (scaled - exact)[2:-2, 2:-2].mean((0, 2))  # by column
    pixel = 255 / width * min(width, height) / size  # levels from one column to the next
    assert np.abs(off).max() < 0.7 * pixel + 2  # a corner falls on a whole pixel of the smaller image
    assert abs(off[0] - off[-1]) < 0.1 * pixel + 2.5


def test_scaled_decoding_takes_the_least_scale_that_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []

    def spy(data: bytes, **options: int) -> Pixels:
        pixels: Pixels = decode(data, **options)
        shapes.append(pixels.shape[:2])
        return pixels

    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    data = saved(picture(500, 375), "jpeg")
    for size in (300, 224, 188, 94, 47, 20):
        image.decoder("jpeg", size, "bicubic", scaled=True)(data)
    assert shapes == [(375, 500), (188, 250), (188, 250), (94, 125), (47, 63), (47, 63)]


def test_suffix_is_that_of_the_bytes() -> None:
    names = {
        "jpeg 4:2:0": "jpg",
        "cmyk": "jpg",
        "png": "png",
        "16 bits": "png",
        "tiff": "tiff",
        "webp": "webp",
    }
    assert {name: image.suffix({**PLAIN, **ODD}[name]) for name in names} == names
    with pytest.raises(OSError, match="cannot identify"):
        image.suffix(b"no image")


def real_images(folder: Path) -> Iterator[bytes]:
    for name in ("cifar10.tar", "tiny-imagenet-20k.tar", "photos.tar"):
        with tarfile.open(folder / name) as tar:
            members = (member for member in tar if member.name.lower().endswith((".jpg", ".jpeg")))
            for member, _ in zip(members, range(150), strict=False):
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()


@pytest.mark.skipif("SSL_DIVERSITY_TEST_DATA" not in os.environ, reason="no real images here")
def test_real_photographs_decode_to_pils_pixels() -> None:
    count = 0
    for data in real_images(Path(os.environ["SSL_DIVERSITY_TEST_DATA"])):
        np.testing.assert_array_equal(image.decode_source(data), reference(data))
        count += 1
    assert count == 450
