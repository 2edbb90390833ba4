"""Readers: a tier decides speed and memory, never a byte."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_pool import handmade
from PIL import Image

from ssl_diversity.data import image, reading
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.reading import RandomReader, ResidentReader, open_reader
from ssl_diversity.data.shards import LocalShard
from ssl_diversity.data.subset import Subset
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

N = 40
KINDS = {  # codec, resize, image_size of the pool
    "png square": ("png", "square", 12),
    "jpeg square": ("jpeg", "square", 12),
    "jpeg short": ("jpeg", "short", 12),
    "png none": ("png", "none", 0),
    "original": ("original", "none", 0),
}


def photo(seed: int, width: int, height: int) -> image.Pixels:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def made(folder: Path, kind: str, n: int = N, **info: Any) -> Pool:
    """A pool of that kind; images that keep their shapes have many, the original ones many codecs."""
    codec, resize, size = KINDS[kind]
    encoded = []
    for i in range(n):
        pixels = image.resized(photo(i, 12 + i % 5 * 9, 12 + i % 3 * 11), resize, size, "bicubic")  # type: ignore[arg-type]
        kept = ("jpeg", "png", "bmp")[i % 3] if codec == "original" else codec
        encoded.append(image.encode(pixels, kept, 90))
    return handmade(folder, encoded, codec=codec, resize=resize, image_size=size, **info)


@pytest.fixture(params=KINDS)
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    return made(tmp_path / "pool", request.param)


def expected_images(pool: Pool, numbers: Any, size: int, *, scaled: bool = False) -> reading.Images:
    """Row by row, from the tar members."""
    read = image.decoder(pool.info.codec, size, pool.info.filter, scaled=scaled)
    images = [read(pool.read_bytes([number])[0]) for number in np.asarray(numbers).tolist()]
    return np.stack(images).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("size", "start", "decode"), [(12, 0, "exact"), (5, 31, "exact"), (5, 31, "scaled")])
def test_tiers_and_threads_read_the_same_bytes(pool: Pool, size: int, start: int, decode: str) -> None:
    rows = Rows(start, 30, N)
    subset = Subset(((pool, rows),))
    readers = [
        open_reader(subset, image_size=size, decode=decode, tier=tier, threads=threads)  # type: ignore[arg-type]
        for tier in ("resident", "random")
        for threads in (1, 3)
    ]
    order = GlobalOrder(30, 10, 1, 300)
    for step in range(4):
        indices = order.batch(step)
        expected = expected_images(pool, rows[indices], size, scaled=decode == "scaled")
        batches = [reader.read(indices) for reader in readers]
        for batch in batches:
            np.testing.assert_array_equal(batch, expected)
            assert batch.flags.c_contiguous
            assert batch.flags.writeable
            assert batch.dtype == np.uint8
    kept = batches[0].copy()
    batches[0][:] = 0  # a reader's batch is the caller's
    np.testing.assert_array_equal(readers[0].read(indices), kept)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("tier", ["resident", "random"])
def test_a_mixture_is_read_from_all_its_pools(tmp_path: Path, tier: reading.Tier, threads: int) -> None:
    pools = [made(tmp_path / kind, kind) for kind in ("png square", "original", "jpeg short")]
    parts = tuple(zip(pools, (Rows(35, 13, N), Rows(0, 1, N), Rows(3, 6, N)), strict=True))
    expected = np.concatenate([expected_images(pool, rows.numbers(), 12) for pool, rows in parts])
    reader = open_reader(Subset(parts), image_size=12, tier=tier, threads=threads)
    for indices in (
        np.arange(20),
        np.random.default_rng(0).integers(0, 20, 33),
        np.array([13]),
        np.array([], int),
    ):
        np.testing.assert_array_equal(reader.read(indices), expected[indices])
    with pytest.raises(IndexError):
        reader.read(np.array([20]))


def test_the_size_is_the_pools_own_where_all_store_one(tmp_path: Path) -> None:
    square, short = made(tmp_path / "square", "png square"), made(tmp_path / "short", "jpeg short")
    rows = Rows(0, 10, N)
    assert open_reader(Subset(((square, rows),))).read(np.arange(4)).shape == (4, 3, 12, 12)
    with pytest.raises(UserError, match="pool short keeps images of different sizes; say image_size"):
        open_reader(Subset(((square, rows), (short, rows))))
    other = handmade(
        tmp_path / "other", [image.encode(photo(0, 5, 5), "png", 0)], resize="square", image_size=5
    )
    with pytest.raises(UserError, match=r"images of \[5, 12\] pixels"):
        open_reader(Subset(((square, rows), (other, Rows(0, 1, 1)))))


def test_auto_goes_by_memory(pool: Pool) -> None:
    subset = Subset(((pool, Rows(0, 30, N)),))
    needed = 30 * 3 * 12 * 12
    assert open_reader(subset, image_size=12, resident_bytes=needed).tier == "resident"
    assert open_reader(subset, image_size=12, resident_bytes=needed - 1).tier == "random"


def test_shards_that_the_subset_needs_are_checked_first(pool: Pool) -> None:
    (pool.path / pool.info.shards[-1].file).unlink()
    needless = Subset(((pool, Rows(0, 30, N)),))
    open_reader(needless, image_size=5, tier="random").read(np.arange(30))
    with pytest.raises(UserError, match=r"missing shard .*000005.tar"):
        open_reader(Subset(((pool, Rows(30, 10, N)),)), image_size=5, tier="random")


def test_shards_can_be_read_from_elsewhere(tmp_path: Path) -> None:
    """As the streaming tier does."""
    pools = [made(tmp_path / kind, kind) for kind in ("png square", "jpeg square")]
    subset = Subset(tuple((pool, Rows(0, 20, N)) for pool in pools))
    expected = RandomReader(subset, image_size=12).read(np.arange(40))
    opened = []

    def elsewhere(part: int, number: int) -> LocalShard:
        opened.append((part, number))
        return LocalShard(tmp_path / f"moved{part}" / "shards" / f"{number:06d}.tar")

    for part, pool in enumerate(pools):
        pool.path.rename(tmp_path / f"moved{part}")
        (tmp_path / f"moved{part}" / "index").rename(pool.path.with_name(f"index{part}"))
        pool.path.mkdir()
        pool.path.with_name(f"index{part}").rename(pool.path / "index")
    reader = RandomReader(subset, image_size=12, threads=2, open_shard=elsewhere)
    np.testing.assert_array_equal(reader.read(np.arange(40)), expected)
    assert set(opened) == {(part, number) for part in (0, 1) for number in (0, 1, 2)}


def test_filling_memory_stops_when_asked(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 1000)
    source = RandomReader(Subset(((pool, Rows(0, 30, N)),)), image_size=12)
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        ResidentReader(source, Runtime(stop=stop))
    np.testing.assert_array_equal(ResidentReader(source).images, source.read(np.arange(30)))


def flipped(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "flipped byte": (flipped, r"row 9 of .*000001.tar is not what the index says"),
    "cut": (lambda path, position: os.truncate(path, position + 1), r"truncated shard .*000001.tar"),
    "missing": (lambda path, _: path.unlink(), r"missing shard .*000001.tar"),
    "replaced": (
        lambda path, _: path.write_bytes((path.parent / "000002.tar").read_bytes()),
        r"row \d+ of .*000001.tar is not what the index says|truncated shard .*000001.tar",
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_damaged_under_a_running_job_is_named(pool: Pool, damage: str, threads: int) -> None:
    reader = open_reader(Subset(((pool, Rows(0, 30, N)),)), image_size=12, tier="random", threads=threads)
    reader.read(np.arange(7))  # only the first shard is open
    change, message = DAMAGE[damage]
    change(pool.path / "shards/000001.tar", int(pool.offset[9]) + int(pool.length[9]) // 2)
    with pytest.raises(UserError, match=message) as caught:
        reader.read(np.arange(30))
    assert "put it back, or remove the pool's folder and prepare it again" in str(caught.value)
    reader.read(np.arange(7))  # the others can still be read


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    encoded = [image.encode(photo(i, 12, 12), "png", 0) for i in range(9)]
    pool = handmade(tmp_path / "pool", [*encoded[:8], encoded[8][:60]], resize="square", image_size=12)
    with pytest.raises(UserError, match=r"row 8 in .*000001.tar does not decode .*data verify pool"):
        open_reader(Subset(((pool, Rows(0, 9, 9)),)))
