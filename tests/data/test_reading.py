"""Readers: a tier decides speed and memory, never a byte."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssl_diversity.data import recipes
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.reading import open_reader
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


@pytest.fixture(params=["png", "jpeg"])
def pool(request: pytest.FixtureRequest, tree: Tree, as_tar: Callable[..., Path]) -> Pool:
    return prepare(
        recipes.resolve(str(as_tar(tree)), {"size": 6, "codec": request.param, "shard_bytes": 20_000})
    )


@pytest.mark.parametrize("replicate", [0, 1])
def test_tiers_and_threads_read_the_same_bytes(pool: Pool, replicate: int) -> None:
    rows = pool.rows(40, replicate)
    readers = [
        open_reader(pool, rows, tier=tier, threads=threads)  # type: ignore[arg-type]
        for tier in ("resident", "random")
        for threads in (1, 3)
    ]
    order = GlobalOrder(40, 16, 1, 400)
    for step in range(6):
        indices = order.batch(step)
        batches = [reader.read(indices) for reader in readers]
        expected = pool.images(rows[indices]).transpose(0, 3, 1, 2)
        for batch in batches:
            np.testing.assert_array_equal(batch, expected)
            assert batch.flags.c_contiguous
            assert batch.flags.writeable
            assert batch.dtype == np.uint8
            assert batch.shape == (16, 3, 6, 6)
    batches[0][:] = 0  # a reader's batch is the caller's
    np.testing.assert_array_equal(readers[0].read(indices), expected)


def test_auto_goes_by_memory_and_missing_shards_are_told_first(pool: Pool) -> None:
    rows = pool.rows(40)
    assert open_reader(pool, rows).tier == "resident"
    assert open_reader(pool, rows, resident_bytes=40 * 108 - 1).tier == "random"
    with pytest.raises(IndexError):
        open_reader(pool, rows, tier="random").read(np.array([40]))
    (pool.path / pool.info.shards[-1].file).unlink()
    with pytest.raises(UserError, match="missing shard"):
        open_reader(pool, rows, tier="random")
