"""A pool that grew: the pool made at once, the draws that it had, whole at every moment for whoever reads it."""

import contextlib
import errno
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grown_pool import FIELDS, grow, pixels

from ssl_diversity import files
from ssl_diversity.data import verify as verifying
from ssl_diversity.data.attach import attach
from ssl_diversity.data.growing import growing
from ssl_diversity.data.leaks import find_leaks
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import COLUMNS, OPTIONAL_COLUMNS, Pool, list_pools, overlap
from ssl_diversity.data.reading import open_reader
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.verify import verify
from ssl_diversity.data.windowed import WindowedOrder, layout_digest
from ssl_diversity.data.writer import ShardWriter
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

FIRST, SECOND, THIRD = 40, 47, 90


@pytest.fixture
def path(home: Path) -> Path:
    return files.pools_dir() / "made"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """(inode, content) of every file."""
    found = (each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): (each.stat().st_ino, each.read_bytes()) for each in found}


@pytest.mark.parametrize("near_duplicates", [False, True])
def test_a_pool_that_grew_twice_is_the_pool_made_at_once(path: Path, near_duplicates: bool) -> None:
    first = grow(path, FIRST, near_duplicates=near_duplicates)
    assert (first.size, first.info.first_size, verify(first)) == (FIRST, FIRST, [])
    before = snapshot(path / "shards")
    assert len(before) > 2
    for size in (SECOND, THIRD):
        pool = grow(path, size, near_duplicates=near_duplicates)
        assert (pool.size, pool.info.first_size, verify(pool)) == (size, FIRST, [])
    now = snapshot(path / "shards")
    assert {name: now[name] for name in before} == before  # shards that were there were not touched
    assert not (path / ".growth").exists()
    once = grow(path.with_name("once"), THIRD, near_duplicates=near_duplicates)
    assert pool.digest == once.digest != first.digest
    names = ["label", "content", "length", "crc", *(OPTIONAL_COLUMNS if near_duplicates else ())]
    for name in names:
        np.testing.assert_array_equal(getattr(pool, name), getattr(once, name))
    rows = np.arange(THIRD)
    assert pool.read_bytes(rows) == once.read_bytes(rows)
    np.testing.assert_array_equal(pool.images(rows), [pixels(row) for row in rows])
    assert [pool.provenance(row) for row in rows] == [once.provenance(row) for row in rows]
    assert (path / "dropped.jsonl").read_bytes() == (once.path / "dropped.jsonl").read_bytes()
    what_it_is = {"size", "counts", "source_digest", "provenance", "near_duplicates", "spec_digest"}
    assert pool.info.model_dump(include=what_it_is) == once.info.model_dump(include=what_it_is)


def test_draws_are_what_they_were_and_nested_whatever_the_growth(path: Path) -> None:
    def drawn(pool: Pool) -> dict[tuple[int, int], Any]:
        found = {}
        for n in (1, 7, 33, FIRST, SECOND, 60, THIRD):
            for replicate in range(6) if n <= pool.size else ():
                rows = pool.rows(n, replicate)
                subset = Subset(((pool, rows),))
                found[n, replicate] = rows.numbers().tolist(), subset.digest, layout_digest(subset.pieces)
        return found

    first = drawn(grow(path, FIRST))
    second = drawn(grow(path, SECOND))
    third = drawn(grow(path, THIRD))
    assert {key: third[key] for key in second} == second
    assert {key: second[key] for key in first} == first
    for (n, replicate), (numbers, digest, _) in third.items():
        assert sorted(set(numbers)) == sorted(numbers)
        assert numbers == third[THIRD, replicate][0][:n]
        assert (digest == third[n, 0][1]) == (replicate == 0)  # each replicate is a draw of its own
        if n >= FIRST:
            assert set(numbers) == set(range(n))


def test_overlap_of_a_pool_that_grew(path: Path) -> None:
    grow(path, FIRST)
    pool = grow(path, THIRD)
    for n in (1, 20, FIRST - 1, FIRST, FIRST + 1, THIRD):
        for replicates in ([0, 1], [0, 1, 2, 3, 4], [2, 2]):
            sets = [set(pool.rows(n, r).numbers().tolist()) for r in replicates]
            pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
            assert overlap(pool, n, replicates) == pytest.approx(np.mean([len(a & b) / n for a, b in pairs]))


def test_who_had_it_open_goes_on(path: Path) -> None:
    """With columns read before, with columns read after, and in another process."""
    pool, late, sent = grow(path, FIRST), Pool.open(path), pickle.dumps(Pool.open(path))
    rows = np.arange(FIRST)
    images = pool.images(rows)
    digest = pool.rows_digest(pool.rows(FIRST, 3))
    specs = Subset(((pool, pool.rows(FIRST, 3)),)).specs
    assert grow(path, THIRD).size == THIRD
    for each in (pool, late, pickle.loads(sent)):
        assert len(each.label) == each.size == FIRST
        np.testing.assert_array_equal(each.images(rows), images)
        assert each.rows_digest(each.rows(FIRST, 3)) == digest
    assert Subset.open(specs, digest, "cell").digest == digest  # what was planned before is found after
    with pytest.raises(UserError, match="plan again"):
        Subset.open([specs[0].model_copy(update={"rows_start": FIRST})], digest, "cell")


def test_verify_while_it_grows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where all files are moved between reading pool.json and looking at them."""
    grow(path, FIRST)
    sizes = iter([SECOND, THIRD])

    def moved(path: Path) -> None:
        for size in sizes:
            grow(path, size)
            return

    monkeypatch.setattr(verifying, "unfinished", moved)
    assert verify(path) == []
    assert next(sizes, None) is None


@pytest.mark.parametrize("tier", ["random", "resident", "streaming"])
def test_every_tier_reads_it(path: Path, tier: Any) -> None:
    grow(path, FIRST)
    pool = grow(path, THIRD)
    far = attach(str(path), name="far")
    assert far.size == THIRD
    for each in (pool, far):
        subset = Subset(((each, each.rows(80, 2)),))
        numbers = subset.parts[0][1].numbers()
        windowed = WindowedOrder(subset.pieces, 8, 1, 200, shards=2, lanes=4)
        for order in (GlobalOrder(80, 8, 1, 200), windowed):
            reader = open_reader(subset, tier=tier, order=order)
            for step in range(order.steps):
                indices = order.batch(step)
                expected = pool.images(numbers[indices])
                np.testing.assert_array_equal(reader.read(indices).transpose(0, 2, 3, 1), expected)


def test_leaks_are_those_of_the_rows(path: Path) -> None:
    grow(path, FIRST)
    pool = grow(path, THIRD)
    test = grow(path.with_name("test"), 60)
    for n in (5, 30, FIRST, 70):
        for replicate in range(3):
            rows = pool.rows(n, replicate)
            expected = np.isin(np.arange(60), rows.numbers())  # both pools have the same images
            np.testing.assert_array_equal(find_leaks(test, [(pool, rows)]).exact, expected)


def fatal(moment: int, die: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let the process die at that one of all the calls by which a growth changes or secures files."""
    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                die()
            return original(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
        patch.setattr(os, name, counted(getattr(os, name)))


def killed(moment: int, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do `work` in a process that kills itself (-9) at `moment`; whether it came that far."""
    child = os.fork()
    if not child:
        status = 1
        try:
            fatal(moment, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def failed(moment: int, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do `work` with a call that fails at `moment`; whether it came that far."""
    came = False

    def die() -> None:
        nonlocal came
        came = True
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch, contextlib.suppress(OSError):
        fatal(moment, die, patch)
        work()
    return came


@pytest.mark.parametrize(("interrupted", "every"), [(killed, 1), (failed, 4)])
def test_interrupted_at_any_moment_it_is_the_old_pool_or_the_new_one(
    path: Path, interrupted: Callable[..., bool], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kill -9, or by an error: readers see one of the two, `verify` says how it is, and running again heals it."""
    old = grow(path, 8, near_duplicates=True)
    saved = shutil.copytree(path, path.with_name("saved"))
    new = grow(path.with_name("new"), 13, near_duplicates=True)
    expected = new.images(np.arange(13))
    seen = set()

    def again() -> Pool:
        return grow(path, 13, near_duplicates=True)

    moment = 1
    while True:
        shutil.rmtree(path)
        shutil.copytree(saved, path)
        came = interrupted(moment, again, monkeypatch)
        pool = Pool.open(path)
        assert pool.digest == (old if pool.size == 8 else new).digest
        np.testing.assert_array_equal(pool.images(np.arange(pool.size)), expected[: pool.size])
        assert len(pool.signature) == pool.size
        problems = verify(pool)
        assert [each for each in problems if "a growth to 13 rows" not in each] == []
        seen.add((pool.size, len(problems)))
        healed = again()
        assert (healed.digest, healed.info.first_size, verify(healed)) == (new.digest, 8, [])
        np.testing.assert_array_equal(healed.images(np.arange(13)), expected)
        assert sorted(snapshot(path)) == sorted(
            [*healed.info.files, *(shard.file for shard in healed.info.shards), "pool.json"]
        )
        if not came:
            break
        moment += every
    assert seen == {(8, 0), (8, 1), (13, 0)}
    assert moment > 30


def test_a_new_pool_that_is_killed_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 1
    while killed(moment, lambda: grow(path, 12), monkeypatch):
        assert [pool.size for pool in list_pools()] in ([], [12])
        moment += 1
        shutil.rmtree(path, ignore_errors=True)
    assert verify(grow(path, 12)) == []
    assert moment > 10


def test_without_finish_nothing_has_happened(path: Path) -> None:
    with growing(path, FIELDS) as pool:
        assert pool.content.shape == (0, 16)
        pool.add(bytes(16), 0, b"any")
    assert not path.exists()
    with growing(path, FIELDS) as pool, pytest.raises(UserError, match="not one image"):
        pool.finish({}, source_digest="", provenance={})
    grow(path, FIRST)
    before = snapshot(path)
    with pytest.raises(RuntimeError), growing(path, FIELDS) as pool:
        pool.add(bytes(16), 0, b"any")
        raise RuntimeError
    with growing(path, FIELDS) as pool:
        assert (pool.rows, pool.content.shape) == (FIRST, (FIRST, 16))
        assert pool.finish({}, source_digest="", provenance={}).size == FIRST
    assert snapshot(path) == before


def test_one_at_a_time(path: Path) -> None:
    stopped = Runtime(stop=lambda: True)
    with (
        growing(path, FIELDS),
        pytest.raises(Interrupted, match="another process"),
        growing(path, FIELDS, runtime=stopped),
    ):
        pass


def test_a_full_disk_is_told_and_leaves_the_pool_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(path, FIRST)
    before = snapshot(path)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "full")

        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(UserError, match="disk full"):
            grow(path, THIRD)
    assert snapshot(path) == before


def test_what_cannot_grow_is_refused_in_one_line(path: Path) -> None:
    pool = grow(path, FIRST)
    other: dict[str, Any] = {"image_size": 8, "classes": ["a"], "codec": "jpeg", "spec": {"seed": 4}}
    for key, value in other.items():
        with pytest.raises(UserError, match=rf"made otherwise \({key}.* differ"):
            grow(path, THIRD, **{key: value})
    with pytest.raises(UserError, match=r"\(near_duplicates differ\)"):
        grow(path, THIRD, near_duplicates=True)
    with pytest.raises(UserError, match="unknown key"):
        grow(path, THIRD, colour=1)
    attach(str(path), name="far")
    with pytest.raises(UserError, match="it grows there"):
        grow(attach(str(path), name="far").path, THIRD)
    for file, message in (("index/offset.npy", "damaged index"), (pool.info.shards[1].file, "shard .* has")):
        data = (path / file).read_bytes()
        (path / file).write_bytes(data[:-1])
        with pytest.raises(UserError, match=message):
            grow(path, THIRD)
        (path / file).write_bytes(data)
    assert verify(grow(path, THIRD)) == []


def test_every_column_gets_its_value(path: Path) -> None:
    with growing(path, FIELDS, near_duplicates=True) as pool, pytest.raises(ValueError, match="signature"):
        pool.add(bytes(16), 0, b"any")
    with growing(path, FIELDS) as pool, pytest.raises(ValueError, match="wants no bytes"):
        pool.add(bytes(16), 0, b"any", signature=bytes(32), thumbnail=bytes(242))
    pool = grow(path, FIRST, near_duplicates=True)
    assert all(len(getattr(pool, name)) == FIRST for name in (*COLUMNS, *OPTIONAL_COLUMNS))
