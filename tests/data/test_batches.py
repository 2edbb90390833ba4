"""What ranks and workers deliver together is the order, from any step, under any split."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssl_diversity.data import recipes
from ssl_diversity.data.batches import Batch, Batches
from ssl_diversity.data.order import GlobalOrder, Order
from ssl_diversity.data.pool import Rows
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.windowed import WindowedOrder
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


class Indices:
    """A reader whose images hold their own index."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        return (indices[:, None] >> np.arange(0, 24, 8) & 255).astype(np.uint8).reshape(-1, 3, 1, 1)


def indices(batch: Batch) -> np.ndarray:
    return (batch["images"].reshape(-1, 3).astype(np.int64) << np.arange(0, 24, 8)).sum(axis=1)


@pytest.fixture
def subset(tree: Tree, as_tar: Callable[..., Path]) -> Subset:
    """Two pools of several shards; of the first, rows that wrap at its end."""
    pools = [
        prepare(recipes.resolve(str(as_tar(tree)), {"size": 6, "shard_bytes": size, "seed": size}))
        for size in (10_000, 30_000)
    ]
    first, second = pools
    assert len(first.info.shards) > 3
    return Subset(((first, Rows(first.size - 10, 40, first.size)), (second, second.rows(37, 1))))


ORDERS = ["global", "windowed"]


def make(kind: str, subset: Subset, batch: int = 24, budget: int = 400) -> Order:
    if kind == "global":
        return GlobalOrder(len(subset), batch, 5, budget)
    return WindowedOrder(subset.pieces, batch, 5, budget, shards=2, lanes=4)


def delivered(order: Order, start: int, stop: int, world: int, workers: int) -> np.ndarray:
    """(stop - start, B): steps as `world` ranks of `workers` workers each deliver them, workers taken in turn."""
    rows = []
    for rank in range(world):
        turns = [
            iter(Batches(order, Indices(), start, rank, world, worker, workers)) for worker in range(workers)
        ]
        batches = [next(turns[k % workers]) for k in range(stop - start)]
        for k, batch in enumerate(batches):
            share = order.batch_size // world
            first = (start + k) * order.batch_size + rank * share
            assert batch["positions"].tolist() == list(range(first, first + share))
        if stop == order.steps:
            assert all(next(turn, None) is None for turn in turns)
        rows.append(np.stack([indices(batch) for batch in batches]))
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_ranks_and_workers_deliver_the_order_exactly(
    subset: Subset, kind: str, world: int, workers: int
) -> None:
    order = make(kind, subset)
    rows = delivered(order, 0, order.steps, world, workers)
    for step in range(order.steps):
        np.testing.assert_array_equal(rows[step], order.batch(step))
        assert len(set(rows[step].tolist())) == order.batch_size
    counts = np.bincount(rows.ravel(), minlength=len(subset))
    assert set(counts) <= {order.total // len(subset), -(-order.total // len(subset))}


@pytest.mark.parametrize("kind", ORDERS)
def test_resumed_anywhere_with_other_workers_and_ranks_it_goes_on(subset: Subset, kind: str) -> None:
    order = make(kind, subset)
    whole = delivered(order, 0, order.steps, 1, 1)
    splits = [(1, 3), (2, 1), (4, 8), (2, 2)]
    for stopped in range(1, order.steps):
        before, after = splits[stopped % 4], splits[(stopped + 1) % 4]
        begun = delivered(make(kind, subset), 0, stopped, *before)
        rest = delivered(make(kind, subset), stopped, order.steps, *after)
        np.testing.assert_array_equal(np.concatenate([begun, rest]), whole)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


class Counting(Indices):
    """Counts its reads, and fails at one of them."""

    def __init__(self, order: Order, fails_at: int = -1) -> None:
        self.reads = 0
        self.bad = order.batch(fails_at) if fails_at >= 0 else np.array([])

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.reads += 1
        if np.array_equal(indices, self.bad):
            raise UserError("broken image")
        return super().read(indices)


def test_reading_ahead_is_bounded_and_its_threads_end_with_it(subset: Subset) -> None:
    order = make("global", subset)
    reader = Counting(order)
    running = iter(Batches(order, reader, threads=3, ahead=4))
    for k in range(3):
        next(running)
        assert reader.reads <= k + 5
    assert reading_threads()
    running.close()  # type: ignore[attr-defined]
    assert not reading_threads()
    assert list(Batches(order, reader, start=order.steps)) == []
    assert sum(1 for _ in Batches(order, reader, threads=3)) == order.steps
    assert not reading_threads()


def test_an_error_comes_where_its_batch_would_have_come(subset: Subset) -> None:
    order = make("windowed", subset)
    running = iter(Batches(order, Counting(order, fails_at=5), threads=2, ahead=4))
    for step in range(5):
        np.testing.assert_array_equal(indices(next(running)), order.batch(step))
    with pytest.raises(UserError, match="broken image"):
        next(running)
    assert not reading_threads()


def test_a_reader_that_fetches_ahead_is_told_what_comes(subset: Subset) -> None:
    told = []

    class Far(Indices):
        def begin(self, *what: int) -> None:
            told.append(what)

    next(iter(Batches(make("windowed", subset), Far(), start=3, rank=1, world=2, worker=2, workers=3)))
    assert told == [(3, 1, 2, 3)]


def test_ranks_that_cannot_share_a_batch_are_told_which_can(subset: Subset) -> None:
    with pytest.raises(UserError, match=r"must be one of 1, 2, 4$"):
        next(iter(Batches(make("windowed", subset), Indices(), world=3)))
    with pytest.raises(UserError, match=r"one of 1, 2, 3, 4, 6, 8, 12, 24$"):
        next(iter(Batches(make("global", subset), Indices(), world=5)))
