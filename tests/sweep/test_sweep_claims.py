"""At most one live worker holds a task; the dead and the silent lose it, and know that they did."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ssl_diversity.sweep import claims
from ssl_diversity.sweep.claims import Process, claim, create_once, holder, this_process

STALE_S = 60.0


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The folder of a task."""
    folder = tmp_path / "task"
    folder.mkdir()
    return folder


def held_by(folder: Path, process: Process, *, silent_s: float = 0.0) -> None:
    """Make the newest claim of the folder look like another process's."""
    now = holder(folder)
    assert now is not None
    path = folder / f"claim.{now.number}"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "process": vars(process)}))
    os.utime(path, (time.time() - silent_s,) * 2)


def dead_process() -> Process:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return replace(this_process(), pid=child.pid)


def test_a_slow_disk_is_no_clock_of_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe(type(tmp_path)):  # type: ignore[misc]
        def touch(self) -> None:
            super().touch()
            time.sleep(0.6)

    assert claims._skew_s(Probe(tmp_path), 0) == 0
    ahead = time.time() + 3600
    monkeypatch.setattr(Probe, "touch", lambda self: self.write_bytes(b"") or os.utime(self, (ahead, ahead)))
    assert claims._skew_s(Probe(tmp_path), 1) == pytest.approx(3600, abs=60)


def test_one_holds_it_until_it_lets_go(task: Path) -> None:
    first = claim(task, stale_s=STALE_S)
    assert first is not None
    assert first.held()
    assert claim(task, stale_s=STALE_S) is None
    first.release()
    assert not list(task.iterdir())
    assert claim(task, stale_s=STALE_S) is not None


def test_of_many_at_once_one_gets_it(task: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda _: claim(task, stale_s=STALE_S), range(64)))
    assert sum(c is not None for c in got) == 1


def test_of_many_at_once_one_takes_over(task: Path) -> None:
    claim(task, stale_s=STALE_S)
    held_by(task, dead_process())
    with ThreadPoolExecutor(16) as pool:
        got = [c for c in pool.map(lambda _: claim(task, stale_s=STALE_S), range(64)) if c]
    assert [c.number for c in got] == [2]


def test_a_dead_process_frees_it_at_once(task: Path) -> None:
    first = claim(task, stale_s=STALE_S)
    assert first is not None
    held_by(task, dead_process())
    second = claim(task, stale_s=STALE_S)
    assert second is not None
    assert second.number == 2
    assert second.previous is not None
    assert not first.held()


def test_a_reused_pid_is_another_process(task: Path) -> None:
    claim(task, stale_s=STALE_S)
    held_by(task, replace(this_process(), started="12345"))
    assert claim(task, stale_s=STALE_S) is not None


def test_a_zombie_is_dead(task: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # it ended, and nobody has waited for it
    deadline = time.monotonic() + 10
    while "Z" not in Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        assert replace(this_process(), pid=child.pid).alive() is False
    finally:
        child.wait()


def test_another_machine_loses_it_only_by_silence(task: Path) -> None:
    claim(task, stale_s=STALE_S)
    elsewhere = replace(this_process(), machine="elsewhere boot namespace")
    held_by(task, elsewhere, silent_s=STALE_S / 2)
    assert claim(task, stale_s=STALE_S) is None
    held_by(task, elsewhere, silent_s=STALE_S * 2)
    assert claim(task, stale_s=STALE_S) is not None


def test_a_woken_holder_knows_that_it_lost(task: Path) -> None:
    sleeper = claim(task, stale_s=STALE_S)
    assert sleeper is not None
    held_by(task, this_process(), silent_s=STALE_S * 2)  # stopped, not dead
    taker = claim(task, stale_s=STALE_S)
    assert taker is not None
    assert not sleeper.held()
    assert sleeper.lost.is_set()
    sleeper.release()  # must not free what is not its own
    assert taker.held()


def test_after_the_taker_lets_go_the_loser_is_still_a_loser(task: Path) -> None:
    sleeper = claim(task, stale_s=STALE_S)
    assert sleeper is not None
    held_by(task, this_process(), silent_s=STALE_S * 2)
    taker = claim(task, stale_s=STALE_S)
    assert taker is not None
    taker.release()
    assert not sleeper.held()


def test_the_heartbeat_keeps_it_fresh_and_notices_a_loss(task: Path) -> None:
    mine = claim(task, stale_s=STALE_S)
    assert mine is not None
    os.utime(mine.path, (0, 0))
    beats: list[int] = []
    with mine.heartbeat(0.01, lambda: beats.append(1)):
        while not beats:
            time.sleep(0.005)
        assert mine.path.stat().st_mtime > time.time() - 10
        taken = {"process": vars(this_process()), "nonce": "other", "since": time.time()}
        assert create_once(task / "claim.2", json.dumps(taken))
        assert mine.lost.wait(10)


def test_a_file_is_created_once_and_whole(task: Path) -> None:
    path = task / "once"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_once(path, str(i) * 1000), range(8)))
    assert sum(made) == 1
    assert path.read_text() == str(made.index(True)) * 1000
    assert list(task.iterdir()) == [path]


def test_a_process_without_proc_is_found_by_its_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert claims.this_process().alive() is True
