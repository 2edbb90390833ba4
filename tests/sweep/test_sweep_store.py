"""A result appears once and whole; the index of results can always be made anew."""

import json
import os
import time
from pathlib import Path

import pytest

from ssl_diversity import files
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import store
from ssl_diversity.sweep.claims import claim, this_process
from ssl_diversity.sweep.config import DistanceConfig
from ssl_diversity.sweep.store import Done, Index
from ssl_diversity.sweep.task import Task


def make(n: int = 2) -> Task:
    return Task("distance", DistanceConfig(n=n), label=f"distance at {n}")


def take(task: Task):  # type: ignore[no-untyped-def]
    got = claim(task.folder, stale_s=60)
    assert got is not None
    return got


def test_published_is_done_and_leaves_only_what_matters() -> None:
    task = make()
    held = take(task)
    (task.folder / "last.ckpt").write_text("state")
    (task.folder / "weights.pt").write_text("weights")
    store.fail(task, "a first attempt that failed")
    assert task not in Done()
    assert store.publish(task, held, {"value": 1})
    assert task in Done()
    assert store.result(task) == {"value": 1}
    assert {path.name for path in task.folder.iterdir()} == {"result.json", "weights.pt", "failed.1.txt"}
    assert task.key not in Index("failed").keys("distance")


def test_a_result_is_never_replaced() -> None:
    task = make()
    assert store.publish(task, take(task), {"value": 1})
    assert store.publish(task, take(task), {"value": 2})
    assert store.result(task) == {"value": 1}


def test_the_result_of_an_output_that_is_made_again_is_replaced(home: Path) -> None:
    task = Task("prepare", DistanceConfig(), output=home / "pools" / "p" / "pool.json")
    for value in (1, 2):
        assert store.publish(task, take(task), {"value": value})
    assert store.result(task) == {"value": 2}


def test_who_lost_the_claim_publishes_nothing() -> None:
    task = make()
    loser = take(task)
    os.utime(loser.path, (0, 0))
    winner = take(task)
    assert not store.publish(task, loser, {"value": "late"})
    assert store.result(task) is None
    assert winner.held()


def test_a_task_with_an_output_is_done_when_that_is_there(home: Path) -> None:
    task = Task("prepare", DistanceConfig(), output=home / "pools" / "p" / "pool.json")
    assert task not in Done()
    task.output.parent.mkdir(parents=True)
    task.output.touch()
    assert task in Done()


def test_failures_are_kept_in_order_and_forgiven_when_a_new_run_begins() -> None:
    task = make()
    try:
        raise RuntimeError("first\nline")
    except RuntimeError as error:
        first = store.fail(task, error)
    store.fail(task, UserError("your disk is full"))
    found = store.failures(task)
    assert [f.summary for f in found] == ["RuntimeError: first line", "UserError: your disk is full"]
    assert [f.by_user for f in found] == [False, True]
    assert "Traceback" in first.path.read_text()
    assert store.failures(task, since=found[-1].when + 1) == []


def test_a_store_of_newer_code_is_refused(home: Path) -> None:
    store.open_store()
    store.open_store()
    (home / "store" / "format").write_text("99\n")
    with pytest.raises(UserError, match="newer than this code"):
        store.open_store()


def test_check_leaves_what_is_published_while_it_looks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish(make(2), take(make(2)), {"value": 1})
    later, leaves = make(3), store._leaves

    def look(folder: Path) -> list[Path]:
        found = list(leaves(folder))
        if folder.name == later.kind and later not in Done():
            store.publish(later, take(later), {"value": 1})
        return found

    monkeypatch.setattr(store, "_leaves", look)
    assert store.check() == []
    assert later in Done()


def test_check_makes_the_index_anew(home: Path) -> None:
    kept, lost, torn = make(2), make(3), make(4)
    for task in (kept, lost, torn):
        store.publish(task, take(task), {"value": 1})
    assert store.check() == []
    files.shutil.rmtree(home / "store" / "done")
    Done().add("distance", "0" * 32)  # marked without a result
    (torn.folder / "result.json").write_text("{")
    notes = store.check()
    assert len(notes) == 4
    done = Done()
    assert kept in done
    assert lost in done
    assert torn not in done
    assert store.check() == []


def test_garbage_is_collected_and_results_are_not(home: Path) -> None:
    task = make()
    store.publish(task, take(task), {"value": 1})
    (task.folder / "last.ckpt").write_text("left by a kill")
    temporary = task.folder / ".result.json.x.tmp"
    temporary.write_text("left by a kill")
    features = home / "store" / "embed" / "ab" / "abc" / "features.npy"
    features.parent.mkdir(parents=True)
    features.write_bytes(bytes(100))
    now = features.stat().st_mtime
    assert store.collect_garbage(older_than_s=3600, now=now) == (0, 0)
    count, size = store.collect_garbage(older_than_s=3600, now=now + 3601)
    assert count == 3
    assert size >= 100
    assert {path.name for path in task.folder.iterdir()} == {"result.json"}
    assert [name for name, *_ in store.usage() if name == "embed"] == []


def test_garbage_spares_what_live_workers_and_unfinished_tasks_need(home: Path) -> None:
    finished, unfinished = make(2), make(3)
    pool = Task("generate", DistanceConfig(n=4), output=home / "pools" / "p" / "pool.json")
    store.publish(finished, take(finished), {"value": 1})
    held = take(finished)
    store.describe(pool)
    block = pool.folder / "blocks" / "ab" / "00000000.npy"
    features = home / "store" / "embed" / "ab" / "abc" / "features.npy"
    kept = [finished.folder / "last.ckpt", unfinished.folder / "last.ckpt", features, block]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("needed")
    worker = home / "store" / "workers" / "a.json"
    files.write_json(worker, {"process": vars(this_process()), "heartbeat_s": 1})
    later = features.stat().st_mtime + 3601
    assert store.collect_garbage(older_than_s=3600, now=later) == (0, 0)
    assert all(path.exists() for path in kept)
    held.release()
    worker.unlink()
    files.write_json(home / "pools" / "p" / "pool.json", {})
    assert store.collect_garbage(older_than_s=3600, now=later)[0] == 3
    assert [path.exists() for path in kept] == [False, True, False, False]


def test_the_store_lists_its_tasks() -> None:
    done, begun = make(2), make(3)
    for task in (done, begun):
        store.describe(task)
    store.publish(done, take(done), {})
    states = {label: state for _, _, state, label in store.listing("distance")}
    assert states == {"distance at 2": "done", "distance at 3": "begun"}
    with pytest.raises(UserError, match="known"):
        list(store.listing("nonsense"))


def test_what_a_task_was_is_written_beside_its_result() -> None:
    task = make()
    store.describe(task)
    assert json.loads((task.folder / "task.json").read_text())["spec"]["n"] == 2


def listings(index: Index, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many folders a refresh lists."""
    listed: list[object] = []
    real = os.listdir
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))  # type: ignore[func-returns-value]
        index.refresh()
    return len(listed)


def test_a_refreshed_index_shows_what_others_added_and_removed() -> None:
    mine, others = Done(), Done()
    keys = {f"{i:032x}" for i in range(5)} | {f"{i:02x}" + "0" * 30 for i in range(1, 9)}
    assert mine.keys("probe") == set()
    for key in keys:
        others.add("probe", key)
    mine.refresh()
    assert mine.keys("probe") == keys
    for key in sorted(keys)[::2]:
        others.discard("probe", key)
    mine.refresh()
    assert mine.keys("probe") == set(sorted(keys)[1::2]) == Done().keys("probe")


def test_folders_that_have_not_changed_for_long_are_not_listed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("ssl_diversity.sweep.store.time.monotonic", lambda: clock)
    index = Done()
    for i in range(9):
        index.add("probe", f"{i:02x}" + "0" * 30)
    folder = index.path("probe", "00" + "0" * 30).parent
    assert len(index.keys("probe")) == 9
    times = os.stat(folder).st_atime_ns, os.stat(folder).st_mtime_ns
    for clock in (1.0, 2.0):  # may have changed again within the granularity of the time of change
        (folder / f"00{clock}").touch()
        os.utime(folder, ns=times)
        assert listings(index, monkeypatch) == 1 + 9
        assert f"00{clock}" in index.keys("probe")
    clock = 10.0
    assert listings(index, monkeypatch) == 1 + 9
    assert listings(index, monkeypatch) == 1
    Done().add("probe", "03" + "1" * 30)
    os.utime(
        folder.with_name("03"), ns=(0, time.time_ns() + 10**9)
    )  # times of change may be as coarse as 10 ms
    assert listings(index, monkeypatch) == 1 + 1
    assert "03" + "1" * 30 in index.keys("probe")
