"""Cells at once: all of them train for real, at the same time, and what goes wrong in one is told."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssl_diversity import files, together
from ssl_diversity.cli import main
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import config, estimate, sharing
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import load_profile
from ssl_diversity.train import CellSpec

FEW = ["method=simclr", "source=digits", "unique_samples=128", "budget=1024"]


def prepared() -> CellSpec:
    """The cell of FEW, its pool there: as `profile` leaves it."""
    from ssl_diversity.cli_profile import _cells

    (cell,) = _cells("quickstart", FEW, load_profile("local"))
    assert cell.task is not None
    return CellSpec.model_validate(cell.task.spec.model_dump())


def test_what_was_measured_is_what_plans_go_by(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *FEW, "--at-once", "2,1", "--json"]) == 0
    (record,) = json.loads(capfd.readouterr().out)
    assert list(record["samples_per_second"]) == ["1", "2"]
    assert not (home / "store" / "pretrain").exists()
    plan = expand(config.load("quickstart", [*config.one_cell(FEW)]))
    local = load_profile("local")
    known = estimate.times()
    for count in (1, 2):
        place = estimate.place(sharing.with_workers(local, count))  # type: ignore[arg-type]
        seconds = known.seconds(f"pretrain/{plan.cells[0].like}", 1, place)
        assert seconds == pytest.approx(count / record["samples_per_second"][str(count)])


def test_one_that_fails_ends_them_all(home: Path) -> None:
    spec = prepared()
    broken = spec.model_copy(update={"rows_digest": "0" * 16})
    with pytest.raises(UserError):
        together.samples_per_second(broken, Runtime(), 2)
    with pytest.raises(UserError, match="give it at least 448"):
        together.samples_per_second(spec.model_copy(update={"budget": 384}), Runtime(), 2)


def test_one_that_finds_no_memory_ends_the_measuring_and_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(spec: CellSpec, runtime: Runtime, count: int) -> float:
        if count > 2:
            raise together.ProcessFailed("OutOfMemoryError: CUDA out of memory")
        return 100.0 * count

    monkeypatch.setattr(together, "samples_per_second", reached)
    assert main(["profile", *FEW, "--at-once", "1,2,4,8"]) == 0
    said = capsys.readouterr()
    assert "simclr: 4 at once: OutOfMemoryError: CUDA out of memory\n" in said.err
    assert said.out.splitlines()[-1].split() == [
        "simclr",
        "conv-tiny",
        "100",
        "1.00",
        "200",
        "2.00",
        "-",
        "-",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--at-once", "0,1"], "expected numbers of cells"),
        (["--at-once", "two"], "expected numbers of cells"),
        (["--at-once", "1,2", "--steps", "3"], "draws nothing"),
        (["--at-once", "1,2", "--profile", "slurm"], "slurm has others"),
        (["--at-once", "1,2", "--device", "cuda"], "finds no GPU here"),
    ],
)
def test_mistakes_are_a_line(
    home: Path,
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["profile", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not files.pools_dir().exists()  # told before any work


def begun(count: int) -> "tuple[subprocess.Popen[str], list[psutil.Process]]":
    """The command on a cell without end, and its processes once all of them train."""
    prepared()
    run = [
        sys.executable,
        "-m",
        "ssl_diversity",
        "profile",
        *FEW[:3],
        "budget=100000000",
        "--at-once",
        str(count),
    ]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children: list[psutil.Process] = []
    while len(children) < count:
        assert process.poll() is None
        time.sleep(0.05)
        alive = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = [child for child in alive if "spawn_main" in " ".join(child.cmdline())]
    while not _catches_sigint(process.pid):  # again, once they are started
        time.sleep(0.05)
    return process, children


def all_end(processes: list[psutil.Process]) -> bool:
    """Whether none works any more within a minute; whoever adopts orphans may leave them as zombies."""

    def works(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    end = time.monotonic() + 60
    while any(map(works, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(works, processes))


def _catches_sigint(pid: int) -> bool:
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.slow
def test_a_ctrl_c_leaves_no_process_behind(home: Path) -> None:
    process, children = begun(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=1500)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert all_end(children)


@pytest.mark.slow
def test_nor_does_its_death(home: Path) -> None:
    process, children = begun(2)
    process.kill()
    process.communicate()
    assert all_end(children)


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_and_the_others_end(home: Path) -> None:
    process, children = begun(2)
    children[0].kill()
    _, said = process.communicate(timeout=1500)
    assert "2 at once: a process was killed (out of memory?)" in said
    assert "Traceback" not in said
    assert all_end(children)
