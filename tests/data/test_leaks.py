"""Leaks: what comparing every test image with every row of a subset finds, at no cost the second time."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data import leaks, near, recipes
from ssl_diversity.data.leaks import find_leaks, leaked
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.prepare import prepare

EXACT, CHANGED, NEW = 3, 4, 5  # test images of each kind


def picture(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8))
    return np.asarray(small.resize((40, 40), Image.Resampling.BICUBIC))


def written(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def pool_of(folder: Path, images: list[np.ndarray], **changes: object) -> Pool:
    options = {"name": folder.name, "size": 16, "split": "all", "near_duplicates": True, **changes}
    return prepare(recipes.resolve(str(written(folder, images)), options))


@pytest.fixture
def pools(tmp_path: Path) -> tuple[Pool, Pool, Pool]:
    """(test, pool, another pool): copies of `pool` are in the test set, one of them in both pools."""
    test = [picture(s) for s in range(EXACT)]
    test += [np.asarray(Image.fromarray(picture(10 + s)[1:]).resize((30, 30))) for s in range(CHANGED)]
    test += [picture(100 + s) for s in range(NEW)]
    one = [picture(s) for s in (*range(EXACT), *range(10, 10 + CHANGED), *range(200, 230))]
    other = [picture(s) for s in (0, *range(300, 310))]
    folders = [tmp_path / name for name in ("test", "one", "other")]
    first, second, third = (pool_of(*each) for each in zip(folders, (test, one, other), strict=True))
    return first, second, third


def expected(test: Pool, pool: Pool, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(exact, near) test images, by comparing everything with everything."""
    exact = (test.content[:, None] == pool.content[numbers]).all(2).any(1)
    a = near.Described(test.signature, test.thumbnail)
    b = near.Described(pool.signature, pool.thumbnail)
    i, j = np.repeat(np.arange(test.size), len(numbers)), np.tile(numbers, test.size)
    return exact, (a.apart(i, b, j) <= 1).reshape(test.size, -1).any(1) | exact


def test_exact_and_near_copies_of_any_subset(pools: tuple[Pool, Pool, Pool]) -> None:
    test, pool, _ = pools
    assert test.size == EXACT + CHANGED + NEW
    for n in (1, 7, 20, pool.size):
        for replicate in range(4):  # some wrap around
            rows = pool.rows(n, replicate)
            found = find_leaks(test, [(pool, rows)])
            exact, alike = expected(test, pool, rows.numbers())
            np.testing.assert_array_equal(found.exact, exact)
            np.testing.assert_array_equal(found.near, alike)
            np.testing.assert_array_equal(found.known, alike)
            assert leaked(test, pool, rows) == exact.sum()
    whole = find_leaks(test, [(pool, pool.rows(pool.size))])
    assert whole.near is not None
    assert (int(whole.exact.sum()), int(whole.near.sum())) == (EXACT, EXACT + CHANGED)


def test_a_mixture_leaks_what_its_parts_leak(pools: tuple[Pool, Pool, Pool]) -> None:
    test, one, other = pools
    parts = [(one, one.rows(9, 1)), (other, other.rows(other.size))]
    both, single = find_leaks(test, parts), [find_leaks(test, [part]) for part in parts]
    np.testing.assert_array_equal(both.exact, single[0].exact | single[1].exact)
    assert both.near is not None
    assert single[0].near is not None
    assert single[1].near is not None
    np.testing.assert_array_equal(both.near, single[0].near | single[1].near)
    assert single[1].exact.sum() == 1


def test_without_an_index_of_near_copies_nothing_is_said_of_them(
    pools: tuple[Pool, Pool, Pool], tmp_path: Path
) -> None:
    test, one, _ = pools
    blind = pool_of(tmp_path / "blind", [picture(0), picture(10)], near_duplicates=False)
    for pool_set in ([(blind, blind.rows(2))], [(one, one.rows(one.size)), (blind, blind.rows(2))]):
        found = find_leaks(test, pool_set)
        assert found.near is None
        np.testing.assert_array_equal(found.known, found.exact)
    assert leaked(test, blind, blind.rows(2)) == 1
    assert find_leaks(blind, [(one, one.rows(one.size))]).near is None


def test_what_was_found_is_remembered_for_all_subsets(
    pools: tuple[Pool, Pool, Pool], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    test, pool, _ = pools
    first = find_leaks(test, [(pool, pool.rows(5))])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("searched again")

    with monkeypatch.context() as patch:
        patch.setattr(near, "pairs", refuse)
        for again in (test, Pool.open(test.path)):
            np.testing.assert_array_equal(find_leaks(again, [(pool, pool.rows(5))]).near, first.near)
            find_leaks(again, [(pool, pool.rows(20, 2))])
    for file in (home / "store" / "statistics").rglob("*.npz"):
        file.write_bytes(b"damaged")
    again = find_leaks(Pool.open(test.path), [(Pool.open(pool.path), pool.rows(5))])
    np.testing.assert_array_equal(again.near, first.near)


def test_a_large_pool_is_searched_only_where_the_subset_is(
    pools: tuple[Pool, Pool, Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    test, pool, _ = pools
    monkeypatch.setattr(leaks, "_CHUNK_ROWS", 8)
    searched: list[int] = []
    original = leaks._equal
    monkeypatch.setattr(leaks, "_equal", lambda few, many: searched.append(len(many)) or original(few, many))
    for start, count in ((9, 3), (30, 20), (0, pool.size)):
        rows = Rows(start, count, pool.size)
        exact, alike = expected(test, pool, rows.numbers())
        found = find_leaks(test, [(pool, rows)])
        np.testing.assert_array_equal(found.exact, exact)
        np.testing.assert_array_equal(found.near, alike)
        chunks = {row // 8 for row in rows.numbers().tolist()}
        assert len(searched) >= len(chunks)
        if start == 9:
            assert searched == [8]
    assert len(searched) == -(-pool.size // 8)


def test_every_copy_of_a_hash_is_found() -> None:
    draw = np.random.default_rng(0)
    few = draw.integers(0, 2, (40, 16), np.uint8) * draw.integers(0, 2, (40, 1), np.uint8)
    many = few[draw.integers(0, 40, 90)].copy()
    many[::3, 15] ^= 1  # the same first half
    expected = np.stack(np.nonzero((few[:, None] == many).all(2)))
    found = leaks._equal(few, many)
    assert sorted(map(tuple, found.T.tolist())) == sorted(map(tuple, expected.T.tolist()))
