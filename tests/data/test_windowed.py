"""The windowed order (DESIGN 4.2) as properties, over any cut of the subset into shards."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_diversity.data.order import GlobalOrder, slots, upcoming
from ssl_diversity.data.subset import Piece
from ssl_diversity.data.windowed import WindowedOrder, drift, layout_digest
from ssl_diversity.errors import UserError


def pieces(*counts: int, parts: int = 1) -> tuple[Piece, ...]:
    """Shards of these lengths, dealt to `parts` pools."""
    ends = list(itertools.accumulate(counts))
    return tuple(
        Piece(i % parts, i, 1000 * i, end - count, count)
        for i, (end, count) in enumerate(zip(ends, counts, strict=True))
    )


@st.composite
def orders(draw: st.DrawFn) -> WindowedOrder:
    """Any that is allowed: N from B, or just above 2B, to a few B, in shards of any lengths."""
    lanes = draw(st.integers(1, 9))
    batch = lanes * draw(st.integers(1, 6))
    more = st.integers(2 * batch + 4 * lanes, 2 * batch + 4 * lanes + 150)
    multiple = st.integers(2 * batch // lanes, 3 * batch // lanes).map(lambda n: n * lanes)
    unique = draw(st.one_of(st.just(batch), more, multiple))
    cuts = draw(st.lists(st.integers(1, unique - 1), max_size=12)) if unique > 1 else []
    shards = pieces(*np.diff(sorted({0, unique, *cuts})).tolist(), parts=draw(st.integers(1, 3)))
    budget = draw(st.integers(unique, 6 * unique + 40))
    seed, window = draw(st.integers(0, 2**63)), draw(st.integers(1, 4))
    return WindowedOrder(shards, batch, seed, budget, shards=window, lanes=lanes)


@given(orders())
@settings(max_examples=200, deadline=None)
def test_every_sample_floor_or_ceil_times_and_never_twice_in_a_batch(order: WindowedOrder) -> None:
    everything = order.at(np.arange(order.total))
    counts = np.bincount(everything, minlength=order.unique_samples)
    assert len(counts) == order.unique_samples
    assert set(counts) <= {order.total // order.unique_samples, -(-order.total // order.unique_samples)}
    assert all(len(set(row)) == order.batch_size for row in everything.reshape(-1, order.batch_size).tolist())


def test_exact_for_all_n_at_the_edge_of_what_is_allowed() -> None:
    for lanes, share in itertools.product((1, 2, 3, 5, 8), (1, 2, 5)):
        batch, worked = lanes * share, 0
        for unique in range(batch, 2 * batch + 4 * lanes + 2):
            try:
                order = WindowedOrder(pieces(*[1] * unique), batch, 0, 5 * unique + 3, shards=2, lanes=lanes)
            except UserError as error:
                nearest = int(str(error).rpartition(" ")[2])
                WindowedOrder(pieces(nearest), batch, 0, nearest, shards=2, lanes=lanes)
                continue
            worked += 1
            rows = order.at(np.arange(order.total))
            assert np.ptp(np.bincount(rows, minlength=unique)) <= 1
            assert all(len(set(row)) == batch for row in rows.reshape(-1, batch).tolist())
        assert worked >= 3


@given(orders())
@settings(max_examples=100, deadline=None)
def test_lanes_own_consecutive_stretches_that_hardly_move_and_keep_to_their_windows(
    order: WindowedOrder,
) -> None:
    """Word for word: an epoch's lanes are neighbouring stretches, each read window by window."""
    n, lanes = order.unique_samples, order.lanes
    shard = np.repeat(np.arange(len(order._pieces)), [piece.count for piece in order._pieces])
    share = order.batch_size // lanes
    before: list[int] | None = None
    for epoch in range(order.total // n):
        table = order._epoch(epoch)
        starts = table.starts.tolist()
        assert starts[0] == 0
        assert starts[-1] == n
        assert set(np.diff(starts)) <= {n // lanes, -(-n // lanes)}
        if before is not None:
            moved = np.array(starts) - before
            assert (np.maximum(0, -moved[:-1]) + np.maximum(0, moved[1:])).max() <= order.drift
        before = starts
        for lane in range(lanes):
            given = order._supplied(epoch)[lane] + np.arange(starts[lane + 1] - starts[lane])
            if given[-1] >= order.steps * share:
                continue
            step, nth = np.divmod(given, share)
            images = order.at(step * order.batch_size + lane * share + nth)
            assert sorted(images.tolist()) == list(range(starts[lane], starts[lane + 1]))
            mended = order._head_size if order._tail(epoch) else 0
            raw = table.images(np.full(len(images), lane), np.arange(len(images)))
            assert sorted(images[:mended]) == sorted(raw[:mended])
            np.testing.assert_array_equal(images[mended:], raw[mended:])
            visits = [key for key, _ in itertools.groupby(shard[raw].tolist())]
            open_at_once, seen, closed = order.shards, list[int](), set[int]()
            for number in visits:  # at most `shards` of them interleave; a closed one never comes again
                assert number not in closed
                if number not in seen:
                    if len(seen) == open_at_once:
                        closed |= set(seen)
                        seen = []
                    seen.append(number)


@given(orders(), st.integers(0, 500), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_budget_and_ranks_only_split_positions(order: WindowedOrder, more: int, random: object) -> None:
    everything = order.at(np.arange(order.total))
    longer = WindowedOrder(
        order._pieces, order.batch_size, order.seed, order.total + order.unique_samples + more,
        shards=order.shards, lanes=order.lanes,
    )  # fmt: skip
    np.testing.assert_array_equal(longer.at(np.arange(order.total)), everything)
    np.testing.assert_array_equal(np.concatenate([order.batch(s) for s in range(order.steps)]), everything)
    positions = np.array([random.randrange(order.total) for _ in range(20)])  # type: ignore[attr-defined]
    fresh = WindowedOrder(
        order._pieces, order.batch_size, order.seed, order.total + order.unique_samples,
        shards=order.shards, lanes=order.lanes,
    )  # fmt: skip
    np.testing.assert_array_equal(fresh.at(positions.reshape(4, 5)), everything[positions].reshape(4, 5))


@given(orders(), st.data())
@settings(max_examples=100, deadline=None)
def test_upcoming_has_what_a_rank_needs_in_time_and_nothing_of_another_rank(
    order: WindowedOrder, data: st.DataObject
) -> None:
    world = data.draw(st.sampled_from([n for n in range(1, order.lanes + 1) if order.lanes % n == 0]))
    rank, step = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, order.steps - 1))
    share = order.batch_size // order.lanes
    mine = slots(order, rank, world)
    ahead = iter(order.upcoming(step, rank, world))
    came: list[int] = []
    wanted = list[int]()
    for k in range(step, order.steps):
        batch = order.batch(k)[mine].tolist()
        wanted += batch
        while not set(batch) <= set(came):
            piece = next(ahead).piece  # no batch is left without what it needs
            whole = order._pieces[next(i for i, p in enumerate(order._pieces) if p[:2] == piece[:2])]
            assert piece.first_row - whole.first_row == piece.first_index - whole.first_index
            assert whole.first_index <= piece.first_index
            assert piece.first_index + piece.count <= whole.first_index + whole.count
            came += range(piece.first_index, piece.first_index + piece.count)
    came += [i for piece, _, _ in ahead for i in range(piece.first_index, piece.first_index + piece.count)]
    needs = list(order.upcoming(step, rank, world))
    for k in range(step, order.steps):
        at_hand = [need.piece for need in needs if need.soonest <= k <= need.until]
        images = [i for piece in at_hand for i in range(piece.first_index, piece.first_index + piece.count)]
        assert set(order.batch(k)[mine].tolist()) <= set(images)
    # whole windows: the first may be half used, the last not used up
    largest = max(np.diff(order._epoch(0).windows.begins).max() + order._head_size, share)
    epochs = 2 + (order.steps - step) * order.batch_size // order.unique_samples
    assert len(came) <= len(wanted) + 2 * largest * order.lanes + epochs * order.drift * order.lanes


def test_each_epoch_brings_every_image_of_the_rank_once_and_first_needs_come_first() -> None:
    order = WindowedOrder(pieces(*[50] * 40), 40, 3, 4000, shards=2, lanes=8)
    for world in (1, 2, 4, 8):
        got = [[need.piece for need in order.upcoming(0, rank, world)] for rank in range(world)]
        images = [i for part in got for p in part for i in range(p.first_index, p.first_index + p.count)]
        assert np.bincount(images).tolist() == [2] * 2000
        assert len({p.shard for p in got[0][: 2 * 8 // world]}) == 2 * 8 // world  # one window of each lane


def test_a_lane_holds_two_windows_at_a_time() -> None:
    order = WindowedOrder(pieces(*[25, 30, 20, 40] * 10), 40, 3, 6 * 1150, shards=2, lanes=4)
    for lane, start in itertools.product(range(4), (0, 3)):
        needs = list(order.upcoming(start, lane, 4))
        for step in range(start, order.steps):
            of_two_epochs = step * 40 // 1150 < (step * 40 + 39) // 1150
            held = sum(need.soonest <= step <= need.until for need in needs)
            assert held <= 2 * order.shards + of_two_epochs
        windows = sorted({(need.until, need.soonest) for need in needs})
        for (until, _), _, (_, soonest) in zip(windows, windows[1:], windows[2:], strict=False):
            assert soonest <= until + 1  # once a window is open, the next one is fetched


def test_a_window_is_read_through_before_the_next_and_the_orders_of_epochs_differ() -> None:
    order = WindowedOrder(pieces(*[25] * 40), 20, 1, 3000, shards=2, lanes=4)
    by_lane = order.at(np.arange(1000)).reshape(50, 4, 5).transpose(1, 0, 2).reshape(4, 5, 50)
    for lane in range(4):
        for window in by_lane[lane] // 25:  # shards of the next 50 images
            assert len(set(window.tolist())) == 2
            assert np.bincount(window).max() == 25
            assert (np.diff(window) != 0).sum() > 5  # mixed
        assert set((by_lane[lane] // 250).ravel().tolist()) == {lane}
    epochs = order.at(np.arange(3000)).reshape(3, 1000)
    assert (epochs[0] != epochs[1]).mean() > 0.9
    other = WindowedOrder(pieces(*[25] * 40), 20, 2, 3000, shards=2, lanes=4)
    assert (other.batch(0) != order.batch(0)).any()


def test_drift_is_what_the_docstring_says() -> None:
    assert max(drift(n, 256) for n in range(256)) <= 4
    assert drift(640, 64) == 0


def test_what_cannot_work_names_what_does() -> None:
    with pytest.raises(
        UserError,
        match=re.escape("lanes=64 does not divide batch_size=96; the nearest that do are 48 and 96"),
    ):
        WindowedOrder(pieces(1000), 96, 0, 1000, shards=1)
    with pytest.raises(UserError, match="N must not exceed C"):
        WindowedOrder(pieces(1001), 64, 0, 1000, shards=1)
    with pytest.raises(UserError, match="the nearest that works is 128"):
        WindowedOrder(pieces(129), 64, 0, 1000, shards=1, lanes=64)
    with pytest.raises(IndexError):
        WindowedOrder(pieces(128), 64, 0, 128, shards=1).at([128])
    order = WindowedOrder(pieces(1000), 64, 0, 1000, shards=1, lanes=8)
    with pytest.raises(UserError, match=r"3 ranks cannot share .* one of 1, 2, 4, 8"):
        slots(order, 0, 3)


def test_a_global_order_needs_every_piece_at_any_time() -> None:
    shards = pieces(100, 100)
    assert [need.piece for need in upcoming(GlobalOrder(200, 20, 0, 400), shards, 3)] == list(shards)
    windowed = WindowedOrder(shards, 20, 0, 400, shards=1, lanes=2)
    assert list(upcoming(windowed, shards, 3)) == list(windowed.upcoming(3))


def test_the_layout_is_where_shards_end_and_the_order_depends_on_it() -> None:
    a, b = pieces(100, 100), pieces(150, 50)
    assert layout_digest(a) == layout_digest(pieces(100, 100, parts=2)) != layout_digest(b)
    one, other = (WindowedOrder(cut, 20, 0, 400, shards=1, lanes=2) for cut in (a, b))
    assert (one.batch(0) != other.batch(0)).any()
