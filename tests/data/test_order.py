"""The global order (DESIGN 4.2) as properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(N, B, seed, C) that the budget allows."""
    batch = draw(st.integers(1, 24))
    unique = draw(st.one_of(st.just(batch), st.integers(2 * batch, 2 * batch + 150)))
    budget = draw(st.integers(unique, 6 * unique + 40))
    return unique, batch, draw(st.integers(0, 2**63)), budget


@given(orders())
@settings(max_examples=200, deadline=None)
def test_every_sample_floor_or_ceil_times_and_never_twice_in_a_batch(case: tuple[int, int, int, int]) -> None:
    unique, batch, seed, budget = case
    order = GlobalOrder(unique, batch, seed, budget)
    everything = order.at(np.arange(order.total))
    assert order.total == batch * (budget // batch) == batch * order.steps
    counts = np.bincount(everything, minlength=unique)
    assert len(counts) == unique
    assert set(counts) <= {order.total // unique, -(-order.total // unique)}
    assert all(len(set(row)) == batch for row in everything.reshape(-1, batch).tolist())


@given(orders())
@settings(max_examples=100, deadline=None)
def test_each_epoch_is_a_permutation(case: tuple[int, int, int, int]) -> None:
    unique, batch, seed, _ = case
    order = GlobalOrder(unique, batch, seed, 4 * unique)
    for epoch in range(order.total // unique):
        here = order.at(np.arange(epoch * unique, (epoch + 1) * unique))
        assert sorted(here.tolist()) == list(range(unique))


@given(orders(), st.integers(0, 500), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_budget_batches_ranks_and_workers_only_split_positions(
    case: tuple[int, int, int, int], more: int, random: "np.random.Generator"
) -> None:
    unique, batch, seed, budget = case
    order = GlobalOrder(unique, batch, seed, budget)
    everything = order.at(np.arange(order.total))
    longer = GlobalOrder(unique, batch, seed, budget + more)
    np.testing.assert_array_equal(longer.at(np.arange(order.total)), everything)
    np.testing.assert_array_equal(np.concatenate([order.batch(s) for s in range(order.steps)]), everything)
    for share in (2, 3):  # every rank or worker asks for its own positions
        for rank in range(share):
            positions = np.arange(rank, order.total, share)
            np.testing.assert_array_equal(order.at(positions), everything[positions])
    positions = np.array([random.randrange(order.total) for _ in range(20)])
    np.testing.assert_array_equal(order.at(positions.reshape(4, 5)), everything[positions].reshape(4, 5))


def slow_order(order: GlobalOrder) -> list[int]:
    """DESIGN 4.2 word for word: raw permutations, then the seam rule with Python lists."""
    unique, batch = order.unique_samples, order.batch_size
    out: list[int] = []
    epoch = 0
    while len(out) < order.total:
        images = order._permuted(np.full(unique, epoch), np.arange(unique)).tolist()
        seam = len(out) % batch
        if seam:
            tail = set(out[-seam:])
            head = images[:batch]
            head = [i for i in head if i not in tail] + [i for i in head if i in tail]
            images[:batch] = head
        out += images
        epoch += 1
    return out[: order.total]


@given(orders())
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_definition(case: tuple[int, int, int, int]) -> None:
    order = GlobalOrder(*case)
    assert order.at(np.arange(order.total)).tolist() == slow_order(order)


def test_seeds_and_epochs_differ_and_positions_are_uniform() -> None:
    unique, epochs = 64, 4000
    order = GlobalOrder(unique, 32, 7, unique * epochs)
    table = order.at(np.arange(order.total)).reshape(epochs, unique)
    assert len({tuple(row) for row in table.tolist()}) == epochs
    for place in (0, 1, 31, 63):
        counts = np.bincount(table[:, place], minlength=unique)
        chi2 = ((counts - epochs / unique) ** 2 / (epochs / unique)).sum()
        assert chi2 < 120  # 63 degrees of freedom: mean 63, standard deviation 11
    pairs = np.bincount(table[:, 0] * unique + table[:, 1], minlength=unique**2)
    assert pairs.max() < 12  # about one each
    other = GlobalOrder(unique, 32, 8, unique * epochs)
    assert (other.batch(0) != order.batch(0)).any()


def test_large_n_costs_no_memory_and_stays_a_bijection_where_sampled() -> None:
    order = GlobalOrder(10**8, 256, 0, 3 * 10**8)
    seen = order.at(np.arange(200_000))
    assert len(np.unique(seen)) == 200_000
    assert seen.min() >= 0
    assert seen.max() < 10**8
    assert order.at([order.total - 1]).shape == (1,)


@pytest.mark.parametrize(
    ("unique", "batch", "budget"), [(100, 64, 1000), (10, 64, 1000), (65, 64, 1000), (200, 10, 100)]
)
def test_refuses_what_cannot_be_exact(unique: int, batch: int, budget: int) -> None:
    with pytest.raises(UserError, match="unique_samples"):
        GlobalOrder(unique, batch, 0, budget)


def test_positions_outside_are_an_error() -> None:
    order = GlobalOrder(8, 4, 0, 18)
    assert order.total == 16
    with pytest.raises(IndexError):
        order.at([16])
    with pytest.raises(IndexError):
        order.batch(4)
