"""Opening, subsets, verification and looking at pools."""

import atexit
import functools
import io
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from handmade_pool import handmade
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_diversity import files
from ssl_diversity.data import image, near, recipes
from ssl_diversity.data.pool import COLUMNS, OPTIONAL_COLUMNS, Pool, Rows, find, list_pools, overlap
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.shards import LocalShard
from ssl_diversity.data.sheet import contact_sheet, inspect
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


@pytest.fixture
def pool(tree: Tree, as_tar: Callable[..., Path]) -> Pool:
    return prepare(recipes.resolve(str(as_tar(tree)), {"size": 6, "name": "flowers", "shard_bytes": 30_000}))


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 60), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_rows_are_nested_and_wrap_within_the_ring(small: int, large: int, ring: int, replicate: int) -> None:
    small, large = sorted((small, large))
    start = int(replicate * 1.618033988749895 % 1.0 * ring)
    a, b = Rows(start, small, ring), Rows(start, large, ring)
    numbers = b.numbers().tolist()
    assert numbers == [(start + i) % ring if i < ring else i for i in range(large)]
    assert numbers[:small] == a.numbers().tolist()
    assert np.concatenate([np.arange(100)[chunk] for chunk in b.chunks()]).tolist() == numbers
    assert len(b.spans) == 1 + sum(y != x + 1 for x, y in pairwise(numbers))
    assert np.flatnonzero(b.holds(np.arange(100))).tolist() == sorted(numbers)


def test_rows_of_a_pool(pool: Pool) -> None:
    assert pool.rows(10).start == 0
    assert pool.rows(10, 1).start == int(0.618033988749895 * 60) == 37
    assert len(pool.rows(30, 1)) == 30
    for n in (0, 61):
        with pytest.raises(UserError, match="has 60 images"):
            pool.rows(n)
    with pytest.raises(IndexError):
        pool.rows(10)[[10]]


def test_overlap_is_the_mean_share_of_common_rows(pool: Pool) -> None:
    for n in (1, 7, 30, 45, 60):
        for replicates in ([0, 1], [0, 1, 2, 3, 4], [2, 2]):
            sets = [set(pool.rows(n, r).numbers().tolist()) for r in replicates]
            pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
            assert overlap(pool, n, replicates) == pytest.approx(np.mean([len(a & b) / n for a, b in pairs]))
    assert overlap(pool, 60, [0]) == 0.0
    for n in (7, 20, 45):  # of a sweep that asks for 20 of a pool that was made with more
        a, b = (set(pool.rows(n, r, first=20).numbers().tolist()) for r in (0, 1))
        assert overlap(pool, n, [0, 1], first=20) == pytest.approx(len(a & b) / n)


def test_rows_digest_is_of_the_rows_not_of_the_place(pool: Pool, home: Path) -> None:
    moved = shutil.copytree(pool.path, home / "elsewhere")
    other = Pool.open(moved)
    assert other.rows_digest(other.rows(20, 3)) == pool.rows_digest(pool.rows(20, 3))
    digests = {pool.rows_digest(pool.rows(n, r)) for n in (10, 60) for r in (0, 1, 2)}
    assert len(digests) == 6


def test_open_names_what_is_wrong(pool: Pool) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Pool.open("absent")
    values = files.read_json(pool.path / "pool.json")
    files.write_json(pool.path / "pool.json", {**values, "format": 99, "new": 1})
    with pytest.raises(UserError, match="newer ssl-diversity"):
        Pool.open(pool.path)
    (pool.path / "pool.json").write_text("{")
    with pytest.raises(UserError, match=r"pool.json: damaged"):
        Pool.open(pool.path)
    (pool.path / "pool.json").unlink()
    with pytest.raises(UserError, match="half-written"):
        Pool.open(pool.path.name)
    with pytest.raises(UserError, match="half-written"):
        find(pool.path.name)
    assert list_pools() == []
    assert (
        verify(prepare(recipes.resolve(pool.info.spec["options"]["path"], {"size": 6, "name": "flowers"})))
        == []
    )


def test_a_missing_or_short_file_is_named_when_it_is_needed(pool: Pool) -> None:
    shard = pool.path / pool.info.shards[1].file
    data = shard.read_bytes()
    shard.write_bytes(data[:-600])
    with pytest.raises(UserError, match=r"000001.tar has \d+ bytes instead of"):
        pool.check_shards()
    shard.unlink()
    for use in (pool.check_shards, lambda: pool.read_bytes(np.arange(60))):
        with pytest.raises(UserError, match=r"missing shard .*000001.tar"):
            use()
    (pool.path / "index" / "label.npy").unlink()
    with pytest.raises(UserError, match=r"missing index .*label.npy"):
        Pool.open(pool.path).label  # noqa: B018


class Reads:
    """A place to read shards from that keeps account."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.spans: list[tuple[int, int, int]] = []

    def __call__(self, number: int) -> "Reads":
        self.number = number
        return self

    def read(self, offset: int, length: int) -> bytes:
        self.spans.append((self.number, offset, length))
        return LocalShard(self.pool.path / self.pool.info.shards[self.number].file).read(offset, length)


@given(st.lists(st.integers(0, 19), max_size=30))
@settings(max_examples=100, deadline=None)
def test_read_bytes_answers_in_the_order_asked(numbers: list[int]) -> None:
    pool = spread_pool()
    reads = Reads(pool)
    assert pool.read_bytes(numbers, reads) == [bytes([row]) * SPREAD[row % 5] for row in numbers]
    assert pool.read_bytes(numbers) == pool.read_bytes(numbers, reads)
    rows = np.unique(np.array(numbers, int))
    needed = int(pool.length[rows].sum()) if len(rows) else 0
    assert sum(length for *_, length in reads.spans) <= 2 * (needed + 4096 * len(rows))


def test_neighbours_come_in_one_read_and_nothing_else_is_read() -> None:
    pool = spread_pool()
    lone = Reads(pool)
    for row in range(20):
        pool.read_bytes([row], lone)
    places = list(zip(pool.shard.tolist(), pool.offset.tolist(), pool.length.tolist(), strict=True))
    assert lone.spans == places
    together = Reads(pool)
    pool.read_bytes(range(20), together)  # rows 0 to 6, 7 to 13, 14 to 19 share shards
    assert len(together.spans) == 3
    apart = Reads(pool)
    pool.read_bytes([0, 3, 14], apart)  # between rows 0 and 3 lie two of 9,000 bytes
    assert apart.spans == [places[0], places[3], places[14]]


SPREAD = (10, 9000, 9000, 700, 1)  # bytes of a row, by its number modulo 5


@functools.cache
def spread_pool() -> Pool:
    """20 rows of which `image` can make nothing: BMP in name, all of one byte."""
    folder = Path(tempfile.mkdtemp(prefix="ssl-diversity-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = [bytes([row]) * SPREAD[row % 5] for row in range(20)]
    return handmade(folder / "pool", rows, codec="original", resize="none", suffix="bin")


def test_a_remote_pool_is_read_from_where_its_shards_are(pool: Pool, home: Path) -> None:
    expected = pool.images(np.arange(60))
    far = home / "far away"
    far.mkdir()
    (pool.path / "shards").rename(far / "shards")
    files.write_json(pool.path / "remote.json", {"url": str(far)})
    other = Pool.open(pool.path)
    assert other.remote == str(far)
    other.check_shards()  # nothing is here, nothing is missing
    np.testing.assert_array_equal(other.images(np.arange(60)), expected)
    shard = far / pool.info.shards[1].file
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        UserError, match=r"row \d+ of .*far away/shards/000001.tar is not what the index says"
    ):
        other.read_bytes(np.arange(60))


def test_optional_columns_are_there_where_near_copies_were_dropped(pool: Pool) -> None:
    assert OPTIONAL_COLUMNS["signature"][1] == (near.SIGNATURE_BYTES,)
    assert OPTIONAL_COLUMNS["thumbnail"][1] == (near.THUMBNAIL_BYTES,)
    with pytest.raises(UserError, match="prepare it with near_duplicates=true"):
        pool.signature  # noqa: B018
    values = files.read_json(pool.path / "pool.json")
    files.write_json(pool.path / "pool.json", {**values, "near_duplicates": True})
    for name, (dtype, shape) in OPTIONAL_COLUMNS.items():
        with pytest.raises(UserError, match=f"missing index .*{name}.npy"):
            getattr(Pool.open(pool.path), name)
        np.save(pool.path / "index" / f"{name}.npy", np.full((60, *shape), 7, dtype))
    other = Pool.open(pool.path)
    assert other.signature.shape == (60, 32)
    assert other.thumbnail.max() == 7


def test_images_of_another_size_are_resized(pool: Pool) -> None:
    squares = pool.images(np.arange(5))
    assert squares.shape == (5, 6, 6, 3)
    assert pool.images([], 4).shape == (0, 4, 4, 3)
    resized = pool.images(np.arange(5), 3)
    np.testing.assert_array_equal(resized, [image.square(pixels, 3, "bicubic") for pixels in squares])


def test_a_row_that_the_index_puts_nowhere_is_an_error(pool: Pool) -> None:
    for name, value in (("shard", 99), ("shard", -3), ("offset", -5), ("offset", 1 << 40), ("length", -1)):
        path = pool.path / "index" / f"{name}.npy"
        data = path.read_bytes()
        column = np.load(path)
        column[7] = value
        np.save(path, column)
        with pytest.raises(UserError):
            Pool.open(pool.path).read_bytes([6, 7, 8])
        path.write_bytes(data)


def test_verify_names_every_file_that_differs(pool: Pool) -> None:
    assert verify(pool) == []
    listed = [path for path in sorted(pool.path.rglob("*")) if path.is_file() and path.name != "pool.json"]
    assert len(listed) == len(pool.info.shards) + len(COLUMNS) + 1
    for path in listed:
        data = path.read_bytes()
        for position in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            assert any(str(path) in problem for problem in verify(pool.path)), (path, position)
        path.unlink()
        assert any(str(path) in problem for problem in verify(pool.path.name))
        path.write_bytes(data)
    assert verify(pool) == []
    seen: list[tuple[int, int]] = []
    verify(pool, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)


def test_verify_sees_an_index_that_does_not_fit_its_shards(pool: Pool) -> None:
    """Even where the checksums in pool.json were made to agree."""
    from ssl_diversity.data.writer import file_digest

    for name, value in (("offset", 512), ("label", 1), ("content", 1)):
        path = pool.path / "index" / f"{name}.npy"
        data = path.read_bytes()
        column = np.load(path)
        column[7] += value
        np.save(path, column)
        info = pool.info.model_copy(
            update={"files": {**pool.info.files, f"index/{name}.npy": file_digest(path)}}
        )
        assert verify(Pool(pool.path, info)) != []
        path.write_bytes(data)


def test_find_by_folder_by_name_and_by_prefix(pool: Pool) -> None:
    for name in (pool.path.name, "flowers", "flo"):
        assert find(name).path == pool.path
    other = prepare(recipes.resolve("digits", {"name": "flow-digits"}))
    assert find("flowers").path == pool.path
    assert find("flow-digits").path == other.path
    assert [p.name for p in list_pools()] == ["flow-digits", "flowers"]
    with pytest.raises(UserError, match="ambiguous"):
        find("flow")
    with pytest.raises(UserError, match="there are: flow-digits"):
        find("roses")


def test_shards_are_webdataset_shards(pool: Pool) -> None:
    import webdataset

    urls = [str(pool.path / shard.file) for shard in pool.info.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [int(sample["__key__"]) for sample in samples] == list(range(60))
    assert [int(sample["cls"]) for sample in samples] == pool.label.tolist()
    assert [sample["png"] for sample in samples] == pool.read_bytes(np.arange(60))
    assert len(urls) > 2


def test_a_pool_travels_to_other_processes(pool: Pool) -> None:
    pool.read_bytes([0])
    other = pickle.loads(pickle.dumps(pool))
    assert len(pickle.dumps(pool)) < 20_000
    np.testing.assert_array_equal(other.images([5, 3]), pool.images([5, 3]))


def test_a_contact_sheet_shows_images_of_any_shape(tmp_path: Path) -> None:
    shapes = [(40, 30), (300, 200), (96, 96)]
    encoded = [image.encode(np.full((h, w, 3), 10 * w % 251, np.uint8), "png", 0) for h, w in shapes]
    for name, size, step in (("none", 0, 98), ("short", 20, 22)):
        pool = handmade(tmp_path / name, encoded, resize=name, image_size=size)
        sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(pool))))
        assert sheet.shape == (2 * step + 2, 2 * step + 2, 3)
        assert sheet[step // 2, step // 2].tolist() == [300 % 251] * 3


def test_contact_sheet_and_counts(pool: Pool) -> None:
    sheet = Image.open(io.BytesIO(contact_sheet(pool, 10)))
    assert sheet.size == (4 * 8 + 2, 3 * 8 + 2)
    np.testing.assert_array_equal(np.asarray(sheet)[2:8, 10:16], pool.images([1])[0])
    seen = inspect(pool)
    assert sum(seen["classes"].values()) == seen["size"] == 60
    assert json.loads(json.dumps(seen)) == seen
    assert set(seen["classes"]) == {"a", "b", "c"}
