"""Near copies: what counts as one, and that banding finds what comparing everything with everything finds."""

import io
import os
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data import bands, likeness, near
from ssl_diversity.errors import Interrupted
from ssl_diversity.runtime import Runtime

Pixels = np.ndarray
ODD_SHAPES = [(1, 1), (1, 300), (8, 8), (32, 32), (33, 31), (375, 500), (500, 40)]


@lru_cache(maxsize=1000)
def picture(seed: int, size: int = 48) -> Pixels:
    """A made-up photograph: coloured waves, fainter the finer they are."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    out = np.full((size, size, 3), 128.0)
    for frequency in np.repeat(np.arange(1, 12), 3):
        down, across = draw.normal(0, frequency / 2, 2)
        wave = np.cos(2 * np.pi * (down * y + across * x + draw.random()))
        out += wave[..., None] * draw.normal(0, 25 / frequency, 3)
    return np.clip(out, 0, 255).astype(np.uint8)


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized(pixels: Pixels, scale: float) -> Pixels:
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def cropped(pixels: Pixels) -> Pixels:
    """About 3 % off two sides."""
    step = max(1, pixels.shape[0] // 32)
    return pixels[step:, :-step]


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "jpeg 90": lambda p: jpeg(p, 90),
    "jpeg 40": lambda p: jpeg(p, 40),
    "half": lambda p: resized(p, 0.5),
    "double": lambda p: resized(p, 2),
    "squeezed": lambda p: np.asarray(Image.fromarray(p).resize((60, 40))),
    "cropped": cropped,
    "lighter": lambda p: np.clip(p.astype(int) + 10, 0, 255).astype(np.uint8),
    "cropped, smaller, jpeg": lambda p: jpeg(resized(cropped(p), 0.75), 75),
}


def described(images: list[Pixels]) -> near.Described:
    pairs = [near.describe(image) for image in images]
    return near.Described(*(np.stack([np.frombuffer(pair[i], np.uint8) for pair in pairs]) for i in range(2)))


def copies(images: near.Described, scratch: Path, memory_bytes: int = 1 << 26, **more: Runtime) -> np.ndarray:
    return np.array(
        near.near_copies(
            images.signatures, images.thumbnails, scratch=scratch, memory_bytes=memory_bytes, **more
        )
    )


def distances(a: near.Described, b: near.Described) -> np.ndarray:
    """(len(a), len(b)), every pair compared."""
    i, j = np.divmod(np.arange(len(a) * len(b)), len(b))
    x, y = a.take(i), b.take(j)
    found = likeness.distance(x.signatures, x.thumbnails, y.signatures, y.thumbnails)
    return found.reshape(len(a), len(b))


@pytest.fixture(scope="module")
def mixed() -> near.Described:
    """120 pictures and a copy of some of them of every kind, in no order, flat ones among them."""
    images = [picture(seed) for seed in range(120)]
    images += [change(picture(3 * n + k)) for n, change in enumerate(CHANGES.values()) for k in range(12)]
    images += [np.full((20, 20, 3), shade, np.uint8) for shade in (0, 9, 9, 200, 255, 255)]
    order = np.random.default_rng(0).permutation(len(images))
    return described([images[i] for i in order])


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_any_image_is_described_in_as_many_bytes(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    signature, thumbnail = near.describe(pixels)
    assert (len(signature), len(thumbnail)) == (near.SIGNATURE_BYTES, near.THUMBNAIL_BYTES)
    assert near.describe(pixels.copy()) == (signature, thumbnail)
    assert near.describe(pixels[:, ::-1])[1] != thumbnail or pixels[:, ::-1].tobytes() == pixels.tobytes()


def test_a_thumbnail_is_the_image_made_small() -> None:
    pixels = picture(1, 32)
    thumbnail = np.frombuffer(near.describe(pixels)[1], np.uint8)
    grey = Image.fromarray(pixels).convert("L").resize((12, 12), Image.Resampling.BILINEAR)
    assert np.abs(thumbnail[:144].reshape(12, 12) - np.asarray(grey, np.int64)).max() <= 2


@pytest.mark.parametrize("size", [32, 64, 150])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_image_is_a_copy(change: Callable[[Pixels], Pixels], size: int) -> None:
    images = [picture(seed, size) for seed in range(12)]
    a, b = described(images), described([change(image) for image in images])
    assert (np.diag(distances(a, b)) <= 1).mean() >= 0.9


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[:, ::-1],
        lambda p: p[::-1],
        lambda p: p[..., ::-1],
        lambda p: 255 - p,
        lambda p: np.repeat(p.mean(2, keepdims=True).astype(np.uint8), 3, 2),
        lambda p: np.clip(p.astype(int) + 60, 0, 255).astype(np.uint8),
        lambda p: p[: len(p) // 2],
        lambda p: np.roll(p, 9, 1),
    ],
    ids=[
        "mirrored",
        "upside down",
        "red is blue",
        "negative",
        "grey",
        "much lighter",
        "half of it",
        "shifted",
    ],
)
def test_another_image_is_none(change: Callable[[Pixels], Pixels]) -> None:
    images = [picture(seed) for seed in range(30)]
    assert np.diag(distances(described(images), described([change(i) for i in images]))).min() > 1


def test_different_images_are_far_apart_and_distance_has_no_direction(mixed: near.Described) -> None:
    apart = distances(
        described([picture(s) for s in range(60)]), described([picture(s) for s in range(60, 120)])
    )
    assert apart.min() > 1.5
    some = mixed.take(np.arange(60))
    there = distances(some, some)
    np.testing.assert_allclose(np.minimum(there, 9), np.minimum(there.T, 9), rtol=1e-3)
    assert (np.diag(there) == 0).all()


def test_next_to_featureless_images_are_copies_only_of_equal_ones() -> None:
    flat = [np.full((40, 40, 3), shade, np.uint8) for shade in (0, 1, 128, 254, 255)]
    dotted = flat[-1].copy()
    dotted[20, 20] = 200
    sky = np.repeat(np.repeat(np.linspace(150, 158, 40)[:, None, None], 40, 1), 3, 2).astype(np.uint8)
    images = described([*flat, dotted, sky, sky + 1])
    apart = distances(images, images)
    assert (apart[~np.eye(len(apart), dtype=bool)] > 1).all()
    assert (np.diag(apart) == 0).all()


def test_a_row_goes_if_and_only_if_an_earlier_one_is_its_copy(mixed: near.Described, tmp_path: Path) -> None:
    apart = np.tril(distances(mixed, mixed) + 1, -1) - 1  # of earlier rows; else -1
    is_copy = (apart >= 0) & (apart <= 1)
    bits = np.bitwise_count(mixed.signatures[:, None] ^ mixed.signatures).sum(2, dtype=np.int64)
    found = copies(mixed, tmp_path / "s")
    assert (found >= 0).sum() > 90
    for row, earlier in enumerate(found):
        assert earlier < row
        assert earlier < 0 or is_copy[row, earlier]
        sure = np.flatnonzero(is_copy[row] & (bits[row] <= 40))
        if len(sure):
            assert 0 <= earlier <= sure[0]
    missed = is_copy.any(1) & (found < 0)
    assert missed.sum() <= 0.02 * is_copy.any(1).sum()


def test_memory_does_not_change_what_is_found(mixed: near.Described, tmp_path: Path) -> None:
    whole = copies(mixed, tmp_path / "a", 1 << 30)
    np.testing.assert_array_equal(copies(mixed, tmp_path / "b", 1 << 14), whole)
    few, many = mixed.take(np.arange(50)), mixed.take(np.arange(50, len(mixed)))
    pairs = near.pairs(few, many, memory_bytes=1 << 30)
    np.testing.assert_array_equal(near.pairs(few, many, memory_bytes=1 << 16), pairs)
    assert pairs.shape[1] > 10


def test_arrays_on_disk_are_as_good(mixed: near.Described, tmp_path: Path) -> None:
    for name, array in (("s", mixed.signatures), ("t", mixed.thumbnails)):
        np.save(tmp_path / name, array)
    mapped = near.Described(*(np.asarray(np.load(tmp_path / f"{n}.npy", mmap_mode="r")) for n in "st"))
    np.testing.assert_array_equal(copies(mapped, tmp_path / "a"), copies(mixed, tmp_path / "b"))


def test_interrupted_it_goes_on_where_it_stopped(
    mixed: near.Described, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copies(mixed, tmp_path / "whole")
    with pytest.raises(Interrupted):
        copies(mixed, tmp_path / "s", runtime=Runtime(stop=lambda: True))
    seen: list[tuple[int, int]] = []
    stopping = Runtime(progress=lambda done, total: seen.append((done, total)), stop=lambda: len(seen) >= 5)
    with pytest.raises(Interrupted):
        copies(mixed, tmp_path / "s", runtime=stopping)
    searched: list[int] = []
    original = bands.candidates
    monkeypatch.setattr(
        bands, "candidates", lambda file, band, *rest: searched.append(band) or original(file, band, *rest)
    )
    np.testing.assert_array_equal(copies(mixed, tmp_path / "s"), whole)
    assert searched == list(range(5, bands.BANDS))
    assert seen[4] == (5 * len(mixed), bands.BANDS * len(mixed))


def test_any_number_of_copies_of_one_image_is_found(tmp_path: Path) -> None:
    image = picture(5)
    draw = np.random.default_rng(0)
    noisy = [np.clip(image + draw.normal(0, 3, image.shape), 0, 255).astype(np.uint8) for _ in range(300)]
    images = described([image, *noisy, *(picture(s) for s in range(50, 80))])
    found = copies(images, tmp_path / "s")
    assert found[0] == -1
    assert (found[1:301] >= 0).all()
    assert (found[301:] == -1).all()


def test_equal_rows_go_to_the_first_whatever_their_number(tmp_path: Path) -> None:
    images = described([picture(1), np.full((9, 9, 3), 7, np.uint8), picture(2)])
    many = images.take(np.tile(np.arange(3), 1000))
    np.testing.assert_array_equal(copies(many, tmp_path / "s", 1 << 14), [-1] * 3 + list(range(3)) * 999)


def test_nothing_and_one_image(tmp_path: Path) -> None:
    one = described([picture(0)])
    assert copies(one, tmp_path / "a").tolist() == [-1]
    assert copies(one.take(np.arange(0)), tmp_path / "b").tolist() == []
    nothing = near.pairs(one.take(np.arange(0)), one, memory_bytes=1 << 20)
    assert nothing.shape == (2, 0)


def test_matched_is_what_comparing_everything_finds_in_both_directions(tmp_path: Path) -> None:
    pool = described([picture(s) for s in range(200)])
    changed = [change(picture(7 * n)) for n, change in enumerate(CHANGES.values())]
    test = described([*changed, *(picture(s) for s in range(300, 320)), np.full((8, 8, 3), 3, np.uint8)])

    def matched(a: near.Described, b: near.Described) -> np.ndarray:
        return near.matched(
            a.signatures, a.thumbnails, b.signatures, b.thumbnails, scratch=tmp_path, memory_bytes=1 << 24
        )

    expected = distances(test, pool) <= 1
    np.testing.assert_array_equal(matched(test, pool), expected.any(1))
    np.testing.assert_array_equal(matched(pool, test), expected.any(0))
    assert expected.any(1).sum() == len(CHANGES)


def test_codes_do_not_depend_on_what_they_are_computed_with(mixed: near.Described) -> None:
    """Sums of whole numbers: the same bits from any library, whatever the order of summation."""
    whole = bands.codes(mixed.signatures, mixed.thumbnails)
    alone = [bands.codes(mixed.signatures[i : i + 1], mixed.thumbnails[i : i + 1]) for i in range(len(mixed))]
    np.testing.assert_array_equal(whole, np.concatenate(alone))
    luma = mixed.thumbnails[:, : likeness.LUMA**2].astype(np.int64) - 128
    exact = luma @ bands._TO_VIEWS.astype(np.int64) > 0
    packed = (
        np.packbits(exact.reshape(-1, 64), axis=1, bitorder="little").view("<u8").reshape(-1, bands.VIEWS)
    )
    np.testing.assert_array_equal(whole[:, 1:], packed)


@pytest.mark.parametrize(("top", "left", "view"), [(0, 0, 0), (0, 9, 2), (9, 0, 6), (9, 9, 8)])
def test_a_view_is_about_the_code_of_the_image_cropped_so(top: int, left: int, view: int) -> None:
    images = [picture(seed, 200) for seed in range(20)]
    inner = [image[top : top + 191, left : left + 191] for image in images]  # 4.5 % off two sides
    views, own = (bands.codes(d.signatures, d.thumbnails) for d in (described(images), described(inner)))
    differing = np.bitwise_count(views ^ own[:, :1]).mean(0)  # the image's own code, then its views
    assert differing.argmin() == 1 + view
    assert differing[1 + view] < 0.5 * differing[0]


# --- real images ------------------------------------------------------------------------------------------------

DATA = os.environ.get("SSL_DIVERSITY_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="SSL_DIVERSITY_TEST_DATA is not set")


def from_tar(name: str, start: str, count: int) -> list[Pixels]:
    out = []
    with tarfile.open(Path(str(DATA)) / name) as tar:
        for member in tar:
            if (
                member.isfile()
                and member.name.startswith(start)
                and member.name.lower().endswith(("jpg", "jpeg"))
            ):
                out.append(np.asarray(Image.open(tar.extractfile(member)).convert("RGB")))
                if len(out) == count:
                    break
    return out


@real
def test_copies_of_photographs_are_found_among_others(tmp_path: Path) -> None:
    photos = from_tar("photos.tar", "photos/", 200)
    originals = described(photos)
    for name, change in CHANGES.items():
        changed = described([change(photo) for photo in photos])
        both = near.Described(
            np.concatenate([originals.signatures, changed.signatures]),
            np.concatenate([originals.thumbnails, changed.thumbnails]),
        )
        found = copies(both, tmp_path / name)
        assert (found[:200] == -1).all()
        assert (found[200:] == np.arange(200)).mean() >= 0.98, name


@real
def test_different_photographs_stay(tmp_path: Path) -> None:
    """10,000 of Tiny ImageNet and 5,000 crops of photographs, some of which overlap: all but a handful stay."""
    images = described(
        from_tar("tiny-imagenet-20k.tar", "tiny-imagenet/train", 10_000)
        + from_tar("photos.tar", "web-crops/", 5000)
    )
    found = copies(images, tmp_path / "s")
    assert (found[:10_000] >= 0).sum() <= 1
    assert (found >= 0).sum() <= 5
