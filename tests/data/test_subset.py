"""A subset of several pools: its indices, its pieces, its digest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from grown_pool import grow

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import Subset

Tree = dict[str, bytes]


@pytest.fixture
def pools(tree: Tree, as_tar: Callable[..., Path]) -> list[Pool]:
    return [
        prepare(recipes.resolve(str(as_tar(tree)), {"size": 6, "shard_bytes": size, "seed": size}))
        for size in (10_000, 30_000)
    ]


@pytest.fixture(params=["prefix", "wrapped", "mixed", "all of it, from the middle", "of a pool that grew"])
def subset(request: pytest.FixtureRequest, pools: list[Pool], tmp_path: Path) -> Subset:
    a, b = pools
    grow(tmp_path / "grown", 20)
    grown = grow(tmp_path / "grown", 45)
    wrapped = (a, Rows(a.size - 7, 30, a.size))
    return {
        "prefix": Subset(((a, a.rows(40)),)),
        "wrapped": Subset((wrapped,)),
        "mixed": Subset(((b, b.rows(33, 1)), wrapped, (b, b.rows(5)))),
        "all of it, from the middle": Subset(((a, a.rows(a.size, 1)),)),
        "of a pool that grew": Subset(((grown, grown.rows(41, 1)), (grown, grown.rows(40)))),
    }[request.param]


def test_pieces_are_the_subset_cut_at_shards(subset: Subset) -> None:
    indices = np.arange(len(subset))
    expected = [(0, 0)] * len(subset)
    for part, places, numbers in subset.locate(indices):
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            expected[place] = part, number
    found = []
    for piece in subset.pieces:
        assert piece.first_index == len(found)
        assert piece.count > 0
        numbers = np.arange(piece.first_row, piece.first_row + piece.count)
        assert set(subset.parts[piece.part][0].shard[numbers]) == {piece.shard}
        found += [(piece.part, number) for number in numbers.tolist()]
    assert found == expected
    whole = [(a.part, a.shard, a.first_row + a.count) for a in subset.pieces]
    follows = [(b.part, b.shard, b.first_row) for b in subset.pieces[1:]]
    assert not set(zip(whole, follows, strict=False)) & {(x, x) for x in whole}  # no cut within a shard


def test_locate_gives_every_index_once_in_any_order(subset: Subset) -> None:
    indices = np.random.default_rng(0).permutation(len(subset))
    places = np.concatenate([places for _, places, _ in subset.locate(indices)])
    assert sorted(places.tolist()) == list(range(len(subset)))
    with pytest.raises(IndexError):
        list(subset.locate([len(subset)]))


def test_the_digest_is_of_the_rows_and_their_order(pools: list[Pool]) -> None:
    a, b = ((pool, pool.rows(20)) for pool in pools)
    assert Subset((a,)).digest == pools[0].rows_digest(a[1])
    digests = [Subset(parts).digest for parts in ((a,), (b,), (a, b), (b, a))]
    assert len(set(digests)) == 4
