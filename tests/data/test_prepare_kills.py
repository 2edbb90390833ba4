"""Preparing, killed at any moment and by any means."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssl_diversity.data import recipes
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.verify import verify

Tree = dict[str, bytes]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from ssl_diversity.data import prepare, recipes
from ssl_diversity.runtime import Runtime
prepare._PART_ITEMS = 40
def note(text):
    if text.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    if len(sys.argv) > 3 and len(list(Path(sys.argv[3]).glob("*.json"))) >= int(sys.argv[4]):
        time.sleep(600)  # until it is killed
if __name__ == "__main__":
    prepare.prepare(recipes.resolve("digits"), processes=int(sys.argv[1]), runtime=Runtime(note=note))
"""
NEVER = "no note begins so"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_dash_nine_at_random_moments(processes: int, tmp_path: Path) -> None:
    """Killed four times on the way: the pool of an undisturbed run, and every finished part reused."""
    expected = prepare(recipes.resolve("digits", {"name": "undisturbed"}))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    directory = recipes.resolve("digits").directory
    work = directory.with_name(f".{directory.name}.work")
    for kill, parts in enumerate((2, 9, 17, 26)):
        process = subprocess.Popen(
            [sys.executable, str(script), str(processes), NEVER, str(work), str(parts)],
            start_new_session=True,
        )
        while len(list(work.glob("*.json"))) < parts and process.poll() is None:
            time.sleep(0.002)
        assert process.poll() is None, "it finished before it could be killed"
        if kill % 2:
            process.kill()  # the parent alone: its workers end by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not directory.exists()
    for moment in ("finding copies", "writing"):
        done = subprocess.run([sys.executable, str(script), str(processes), moment], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not directory.exists()
        assert len(list(work.glob("*.json"))) == 36  # parts
    pool = prepare(recipes.resolve("digits"))
    assert pool.digest == expected.digest
    assert [s.blake2b for s in pool.info.shards] == [s.blake2b for s in expected.info.shards]
    assert verify(pool) == []


@pytest.mark.slow
def test_a_killed_worker_and_ctrl_c_end_all_processes_and_keep_finished_parts(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("= 40", "= 8"))  # many parts, to be in time
    directory = recipes.resolve("digits").directory
    work = directory.with_name(f".{directory.name}.work")

    def summaries() -> int:
        return len(list(work.glob("*.json")))

    def begun() -> tuple[psutil.Process, list[psutil.Process]]:
        """A process that has begun, its workers having finished two parts more."""
        there = summaries()
        command = [sys.executable, str(script), "2", NEVER]
        process = psutil.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        while summaries() < there + 2 and process.poll() is None:
            time.sleep(0.002)
        workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        return process, workers

    process, workers = begun()
    workers[0].kill()
    assert process.wait() == 1
    assert "UserError: a worker process was killed (out of memory?)" in process.stderr.read()
    process, workers = begun()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0
    said = process.stderr.read()
    assert "KeyboardInterrupt" in said
    assert "SpawnProcess" not in said  # only the parent answers
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert not directory.exists()
    assert verify(prepare(recipes.resolve("digits"))) == []


TOLD = """
import signal, sys, threading, time
from ssl_diversity.data import prepare, recipes
from ssl_diversity.errors import Interrupted
from ssl_diversity.runtime import Runtime
prepare._PART_ITEMS = 8
stop = threading.Event()
def slow(text):  # so that it is told in time
    time.sleep(0.05)
if __name__ == "__main__":
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        prepare.prepare(recipes.resolve("digits"), processes=2, runtime=Runtime(stop=stop.is_set, note=slow))
    except Interrupted as error:
        sys.exit(f"Interrupted: {error}")
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_scheduler_that_tells_all_processes_of_a_job_to_end_interrupts(
    number: signal.Signals, tmp_path: Path
) -> None:
    """SLURM signals a whole step: the processes that decode are told, too."""
    script = tmp_path / "told.py"
    script.write_text(TOLD)
    directory = recipes.resolve("digits").directory
    work = directory.with_name(f".{directory.name}.work")
    process = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not list(work.glob("*.json")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, number)
    assert "Interrupted: stopped while preparing; finished parts are kept" in process.communicate()[1]
    assert process.returncode == 1
    assert not directory.exists()
    assert verify(prepare(recipes.resolve("digits"))) == []
