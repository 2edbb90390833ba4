"""YFCC100M becomes a pool: from the bucket's layout on disk, and over HTTP with failures counted by cause."""

from pathlib import Path
from typing import Any

import pytest
import yfcc_replica as replica

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import UserError

PHOTOS, VIDEOS = 54, 6


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """54 photos and 6 videos in two files, and two malformed lines."""
    lines = [replica.line(i, video=i % 10 == 9) for i in range(60)]
    replica.write(tmp_path / "metadata/yfcc100m_dataset-0.bz2", [*lines[:31], ["not", "a", "line"]])
    replica.write(tmp_path / "metadata/yfcc100m_dataset-1.bz2", [*lines[31:], lines[2][:7]])
    return tmp_path / "metadata"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    for i in range(60):
        if i % 10 != 9:
            replica.put(tmp_path / "bucket", i)
    return tmp_path / "bucket"


def pool_of(place: Path, **options: Any) -> Pool:
    values = {"metadata": str(place), "size": 12, "resize": "square", "codec": "png", **options}
    return prepare(recipes.resolve("yfcc100m", values))


def test_the_replica_becomes_a_verified_pool(metadata: Path, bucket: Path) -> None:
    pool = pool_of(metadata, images=str(bucket))
    assert verify(pool) == []
    assert pool.size == PHOTOS
    assert pool.info.classes == []
    assert pool.info.counts["read"] == PHOTOS


def test_the_folder_may_begin_where_the_hashes_begin(metadata: Path, bucket: Path) -> None:
    whole = pool_of(metadata, images=str(bucket))
    assert pool_of(metadata, images=str(bucket / "data/images")).digest == whole.digest


def test_selections_are_nested(metadata: Path, bucket: Path) -> None:
    small, large = (pool_of(metadata, images=str(bucket), n=n) for n in (10, 30))
    assert (small.size, large.size) == (10, 30)
    contents = [{bytes(row) for row in pool.content} for pool in (small, large)]
    assert contents[0] < contents[1]
    other = pool_of(metadata, images=str(bucket), n=10, draw=1)
    assert {bytes(row) for row in other.content} != contents[0]


def test_missing_photos_are_counted_or_too_many(metadata: Path, bucket: Path) -> None:
    for i in (1, 2, 3):
        replica.put(bucket, i).unlink()
    with pytest.raises(UserError, match=r"51 of 54 photos, 3 no such file: 5.56% are missing") as caught:
        pool_of(metadata, images=str(bucket))
    assert "missing_ok=0.06" in str(caught.value)
    pool = pool_of(metadata, images=str(bucket), missing_ok=0.06)
    assert pool.size == pool.info.counts["read"] == PHOTOS - 3


def test_an_image_that_does_not_decode_is_listed(metadata: Path, bucket: Path) -> None:
    replica.put(bucket, 5, b"\xff\xd8 no jpeg")
    pool = pool_of(metadata, images=str(bucket))
    assert pool.info.counts["undecodable"] == 1
    assert replica.hash_at(5) in (pool.path / "dropped.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 55}, "n=55: the metadata lists 54 photos"),
        ({"images": "/nowhere"}, "images=/nowhere: no such folder"),
        ({"metadata": "/nowhere.bz2"}, "metadata=/nowhere.bz2: no such file"),
        ({"n": 0}, "n: Input should be greater than 0"),
        ({"metadata": None}, "yfcc100m_dataset.bz2"),
    ],
)
def test_a_mistake_says_what_to_do(metadata: Path, bucket: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        pool_of(metadata, **{"images": str(bucket), **options})
