"""Launching: submitit's local executor with real processes, and its SLURM executor with a scheduler that is a file."""

import contextlib
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from fault_server import wait_until
from rich.console import Console

from ssl_diversity.errors import UserError
from ssl_diversity.sweep import config, fleet, launch, status
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import LocalProfile, SlurmProfile
from ssl_diversity.sweep.store import Done

RUN = (
    "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # which nohup ignores
    "sys.path.insert(0, {folder!r})\n"
    "import sweep_fakes\n"
    "from ssl_diversity.sweep import config, launch, task\n"
    "from ssl_diversity.sweep.profile import LocalProfile\n"
    "task.FUNCTIONS.update(sweep_fakes.FUNCTIONS)\n"
    "profile = LocalProfile.model_validate_json({profile!r})\n"
    "sys.exit(launch.run(config.load('quickstart', {overrides!r}), profile, with_report=False))\n"
)
SMALL = ["sources=[digits]", "methods=[simclr,byol]", "unique_samples=[64,128]", "budget=256"]


def start(profile: LocalProfile) -> subprocess.Popen[str]:
    """A sweep in a process group of its own."""
    code = RUN.format(folder=str(Path(__file__).parent), profile=profile.model_dump_json(), overrides=SMALL)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ran() -> Counter[tuple[str, str]]:
    import sweep_fakes

    return Counter((run["kind"], run["key"]) for run in sweep_fakes.executions())


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.usefixtures("fakes")
def test_two_workers_do_it_all_once_and_a_second_run_launches_none(
    small: SweepConfig, profile: LocalProfile, console: Console
) -> None:
    assert launch.run(small, profile, with_report=False, console=console) == 0
    assert status.snapshot(expand(small)).complete
    assert set(ran().values()) == {1}
    assert said(console).splitlines()[-1] == "quickstart: all 16 tasks are done"
    logs = list((small.folder / "logs").iterdir())
    assert len(logs) == 1
    assert launch.run(small, profile, with_report=False, console=console) == 0
    assert list((small.folder / "logs").iterdir()) == logs


@pytest.mark.usefixtures("fakes")
def test_failures_give_status_1_and_mistakes_of_the_user_2(
    small: SweepConfig, profile: LocalProfile, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = profile.model_copy(update={"workers": 1})
    monkeypatch.setenv("FAKE_FAIL", "distance")
    assert launch.run(small, single, with_report=False, console=console) == 1
    assert said(console).splitlines()[-1] == "quickstart: NOT COMPLETE: 13 of 16 tasks done, 3 failed"
    assert "RuntimeError: made to fail" in said(console)
    monkeypatch.setenv("FAKE_FAIL", "")
    monkeypatch.setenv("FAKE_REFUSE", "distance")
    assert launch.run(small, single, with_report=False, console=console) == 2
    assert ": made to refuse" in said(console)


@pytest.mark.slow
@pytest.mark.usefixtures("fakes")
def test_workers_that_are_killed_are_replaced_until_the_task_is_given_up(
    small: SweepConfig, profile: LocalProfile, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "distance")
    eager = profile.model_copy(update={"max_losses": 3, "workers": 1})
    sweep = small.model_copy(update={"methods": ("simclr",), "unique_samples": (64,)})
    assert launch.run(sweep, eager, with_report=False, console=console) == 1
    assert "ended while running this task" in said(console)
    now = status.snapshot(expand(sweep))
    assert all(done == planned for kind, (done, planned) in now.done_by_kind.items() if kind != "distance")


@pytest.mark.usefixtures("fakes", "pools")
def test_workers_that_had_their_share_are_replaced_as_often_as_it_takes(
    small: SweepConfig, profile: LocalProfile, console: Console
) -> None:
    one_each = profile.model_copy(update={"tasks_per_worker": 1, "max_losses": 1})
    assert launch.run(small, one_each, with_report=False, console=console) == 0
    assert len(ran()) > 2 * (1 + one_each.max_losses)


def test_who_replaces_a_worker_has_its_number(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Job:
        ended = False

        def done(self) -> bool:
            return self.ended

        def exception(self) -> None:
            return None

    class Executor:
        def batch(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        def submit(self, number: int) -> Job:
            numbers.append(number)
            return Job()

    numbers: list[int] = []
    monkeypatch.setattr(fleet, "executor", lambda order: Executor())
    order = Order(small, profile.model_copy(update={"workers": 3, "max_losses": 1}), 1, time.time())
    crew = fleet.Local(order, lambda order, number: number)  # type: ignore[arg-type, return-value]
    rest = order.left(expand(small), Done())
    assert crew.supply(rest, waiting=True) == 3
    for number in (1, 0, 1, 2):
        crew.jobs[number].ended = True
        crew.supply(rest, waiting=True)
    assert numbers == [0, 1, 2, 1, 0, 1]
    assert (crew.alive(), crew.hopeless) == (2, False)


@pytest.mark.usefixtures("fakes")
def test_a_mistake_that_only_the_pool_reveals_ends_the_sweep(profile: LocalProfile, console: Console) -> None:
    sweep = config.load("quickstart", ["sources=[digits]", "methods=[simclr]", "unique_samples=5000"])
    with pytest.raises(UserError, match="more than pool 'digits' has"):
        launch.run(sweep, profile, with_report=False, console=console)


@pytest.mark.usefixtures("fakes")
def test_a_downstream_set_that_cannot_be_prepared_does_not_stay(
    small: SweepConfig, profile: LocalProfile, console: Console, tmp_path: Path
) -> None:
    (tmp_path / "unlabelled").mkdir()
    asked = config.add_downstream(small, str(tmp_path / "unlabelled"), {})
    one = profile.model_copy(update={"workers": 1})
    assert launch.run(asked, one, with_report=False, console=console) == 2
    assert "unlabelled" in said(console)
    record = config.recorded("quickstart")
    assert record is not None
    assert set(record.downstream) == {"digits"}
    assert launch.run(config.load("quickstart", SMALL), one, with_report=False, console=console) == 0


def test_two_launchers_may_look_for_space_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.files, "write_atomic", lambda *_: None)  # the other has removed the file
    assert not launch._disk_is_full()


@pytest.mark.slow
@pytest.mark.usefixtures("fakes")
def test_a_second_sweep_at_once_shares_the_work(
    profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.01")
    both = [start(profile), start(profile)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert set(ran().values()) == {1}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_submitter_stops_its_workers_cleanly(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.2")
    process = start(profile)
    wait_until(lambda: any(kind == "pretrain" for kind, _ in ran()))
    if number != signal.SIGTERM:
        os.killpg(process.pid, number)  # as Ctrl-C does, and a terminal that closes
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    if number == signal.SIGHUP:  # nobody is there to be told
        assert process.returncode == -number, output
        wait_until(lambda: not list((config.runs_dir().parent / "store").rglob("claim.*")))
        assert not status.snapshot(expand(small)).complete
    else:
        assert process.returncode == 128 + number, output
        assert "Run the same command again" in output.splitlines()[-1]
    assert not Order(small, profile, 1, 1.0).cancelled  # others who run it go on
    assert not list((config.runs_dir().parent / "store").rglob("claim.*"))
    assert not list((config.runs_dir().parent / "store").rglob("failed.*"))
    monkeypatch.setenv("FAKE_STEP_S", "0")
    again = start(profile)
    assert "all 16 tasks are done" in again.communicate(timeout=600)[0]


@pytest.mark.usefixtures("fakes", "pools")
def test_workers_are_told_to_stop_until_they_do(
    small: SweepConfig, profile: LocalProfile, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitit keeps a signal from a worker that is not yet at work."""
    stop, told = fleet.Local.stop, []

    def lost_twice(crew: fleet.Local) -> None:
        told.append(1)
        if len(told) > 2:
            stop(crew)

    def interrupt() -> None:
        wait_until(lambda: any(kind == "pretrain" for kind, _ in ran()))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fleet.Local, "stop", lost_twice)
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    threading.Thread(target=interrupt, daemon=True).start()
    code = launch.run(small, profile, with_report=False, console=console)
    assert code == 128 + signal.SIGTERM
    assert not status.snapshot(expand(small)).complete


@pytest.mark.slow
@pytest.mark.usefixtures("fakes")
def test_killed_with_its_whole_group_it_goes_on_at_once(
    profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    for done in (0, 2):
        process = start(profile)
        wait_until(lambda done=done: sum(kind == "pretrain" for kind, _ in ran().elements()) > done)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    monkeypatch.setenv("FAKE_STEP_S", "0")
    process = start(profile)
    output, _ = process.communicate(timeout=600)
    assert "all 16 tasks are done" in output
    assert not list(
        (config.runs_dir().parent / "store").rglob("failed.*")
    )  # a kill is no failure of the task


@pytest.mark.slow
@pytest.mark.usefixtures("fakes")
def test_a_submitter_that_dies_alone_takes_its_workers_with_it(
    profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    process = start(profile)
    wait_until(lambda: any(kind == "pretrain" for kind, _ in ran()))
    threading.Thread(target=process.wait, daemon=True).start()  # so that it is no zombie
    process.kill()
    store = config.runs_dir().parent / "store"
    wait_until(lambda: not list(store.rglob("claim.*")))


def fake_slurm(folder: Path) -> Path:
    """sbatch that keeps the script it is given, and the other commands that submitit looks for."""
    kept = folder / "script.sh"
    commands = {
        "sbatch": f'cat "$1" >> {kept}; echo Submitted batch job 4711',
        "srun": "true",
        "scancel": "true",
        "squeue": "true",
        "scontrol": "echo MaxArraySize = 1001",
    }
    commands["sacct"] = "echo 'JobID|State|NodeList'"
    for name, body in commands.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return kept


def test_slurm_gets_one_array_through_the_same_code(
    small: SweepConfig, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fake_slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    profile = SlurmProfile(
        executor="slurm",
        workers=3,
        time_min=90,
        cpus=6,
        gpus=1,
        mem_gb=24,
        partition="gpu",
        account="lab",
        constraint="a100",
        setup=("module load cuda",),
        additional={"nice": 5},
    )
    assert launch.run(small, profile, detach=True, console=console) == 0
    script = kept.read_text()
    for line in (
        "--array=0-2%3",
        "--time=90",
        "--cpus-per-task=6",
        "--gpus-per-node=1",
        "--mem=24GB",
        "--partition=gpu",
        "--account=lab",
        "--constraint=a100",
        "--nice=5",
        "--job-name=quickstart",
        "module load cuda",
    ):
        assert line in script
    assert script.count("#!/bin/bash") == 1
    assert "3 workers submitted" in said(console)


def test_logs_of_jobs_that_may_still_start_are_kept(
    small: SweepConfig, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    logs = small.folder / "logs"
    for day in range(8):
        folder = logs / f"20200101-00000{day}"
        folder.mkdir(parents=True)
        for job in ("4711_0", "4711_1"):
            (folder / f"{job}_submitted.pkl").touch()
            if day or job == "4711_0":
                (folder / f"{job}_0_result.pkl").touch()
    profile = SlurmProfile(executor="slurm", workers=1, time_min=90)
    assert launch.run(small, profile, detach=True, console=console) == 0
    kept = sorted(path.name for path in logs.iterdir())
    assert len(kept) == 1 + fleet.KEPT_LOGS
    assert kept[0] == "20200101-000000"


def test_slurm_requeues_a_worker_as_often_as_it_takes(
    small: SweepConfig, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    fake_slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    profile = SlurmProfile(executor="slurm", workers=1, time_min=90)
    assert launch.run(small, profile, detach=True, console=console) == 0
    (path,) = (small.folder / "logs").rglob("*_submitted.pkl")
    assert submitit.core.utils.DelayedSubmission.load(path)._timeout_countdown >= 10**4


def test_flops_are_counted_wherever_a_budget_is_given_in_them(
    profile: LocalProfile, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Exception):
        pass

    def count(*_: object) -> None:
        raise Counted

    monkeypatch.setattr(launch.flops, "count_missing", count)
    asked = config.one_cell(["method=simclr", "source=digits", "unique_samples=64", "budget=1e9flop"])
    with pytest.raises(Counted):
        launch.run(config.load("quickstart", asked), profile, console=console)


def test_slurm_without_slurm_is_a_users_mistake(
    small: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    profile = SlurmProfile(executor="slurm", workers=1, time_min=10)
    with pytest.raises(UserError, match="no sbatch"):
        launch.run(small, profile)


def test_a_gpu_that_is_not_there_is_told_before_any_work(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda: torch finds no GPU here"):
        launch.run(small, profile.model_copy(update={"device": "cuda"}))
    assert not small.folder.exists()
