"""Writing a pool row by row: what generators do, and the shards' headers."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ssl_diversity import files
from ssl_diversity.data import image, writer
from ssl_diversity.data.prepare import write_pool
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


def generated(n: int, copies: dict[int, int]) -> Iterator[tuple[np.ndarray, int, dict[str, Any]]]:
    for i in range(n):
        seed = copies.get(i, i)
        yield np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), -1, {"seed": i}


FIELDS = {"name": "made", "source": "generated", "spec": {"n": 9}, "image_size": 6, "real_images": 5}


def test_write_pool_keeps_the_order_and_yields_to_the_earlier_row() -> None:
    path = files.pools_dir() / "made-0"
    pool = write_pool(path, FIELDS, generated(9, {4: 2, 7: 0}), shard_bytes=2000)
    assert verify(pool) == []
    assert [pool.provenance(row)["seed"] for row in range(pool.size)] == [0, 1, 2, 3, 5, 6, 8]
    assert (pool.size, pool.info.counts["duplicate"], pool.info.real_images) == (7, 2, 5)
    first = next(generated(1, {}))[0]
    np.testing.assert_array_equal(pool.images([0])[0], image.fit(first, 6, "bicubic"))
    assert bytes(pool.content[0]) == image.content_hash(first)
    again = write_pool(path, FIELDS, lambda: pytest.fail("a finished pool is not written again"))
    assert again.digest == pool.digest
    dropped = [json.loads(line) for line in (path / "dropped.jsonl").read_text().splitlines()]
    assert [(d["name"], d["kept"]) for d in dropped] == [(4, 2), (7, 0)]


def test_write_pool_that_fails_midway_leaves_nothing() -> None:
    def failing() -> Iterator[tuple[np.ndarray, int, None]]:
        yield np.zeros((6, 6, 3), np.uint8), -1, None
        raise RuntimeError("the generator broke")

    path = files.pools_dir() / "made-1"
    with pytest.raises(RuntimeError):
        write_pool(path, FIELDS, failing())
    assert not path.exists()
    with pytest.raises(UserError, match="unknown key"):
        write_pool(path, {**FIELDS, "colour": 1}, generated(3, {}))


def test_tar_headers_are_those_of_tarfile() -> None:
    import tarfile

    for name, size in (("000000001.png", 0), ("123456789.jpg", 123_456_789), ("0.cls", 1)):
        member = tarfile.TarInfo(name)
        member.size = size
        assert writer.tar_header(name.encode(), size) == member.tobuf(tarfile.USTAR_FORMAT)
