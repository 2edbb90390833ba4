"""Stopping, looking into and forgiving a sweep; a worker that was frozen and woken does no harm."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sweep_fakes
from rich.console import Console
from slurm_helpers import Scheduler, quick_profile

from ssl_diversity.cli import main
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, config, control, launch, losses, orders, status, store, work
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import LocalProfile, Profile, SlurmProfile
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.task import Task
from ssl_diversity.sweep.work import run_worker

pytestmark = pytest.mark.usefixtures("fakes", "pools")


def profile(**changed: Any) -> SlurmProfile:
    return quick_profile(**{"workers": 3, **changed})


def kept(sweep: SweepConfig, profile: Profile) -> Order:
    """The order of a run that began now and is remembered."""
    order = Order(sweep, profile, 1, time.time() - 1e-3)
    orders.keep(order)
    remember(sweep, tell=print)
    return order


def first_cell(sweep: SweepConfig) -> Task:
    task = expand(sweep).cells[0].task
    assert task is not None
    return task


def wait_for(condition: Any, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# cancel


def test_cancel_takes_those_that_wait_out_of_the_queue_and_lets_the_others_save(
    scheduler: Scheduler, small: SweepConfig, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    scheduler.change(slots=1)
    assert launch.run(small, profile(), detach=True, with_report=False, console=console) == 0
    wait_for(sweep_fakes.executions)
    assert control.cancel(small).startswith("quickstart: 3 workers told to save and end")
    wait_for(lambda: not scheduler.active)
    assert sorted(job["state"] for job in scheduler.jobs) == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert not list(store.store_dir().rglob("claim.*"))
    assert not list(store.store_dir().rglob("failed.*"))
    assert len(sweep_fakes.executions()) == 1


HERE = LocalProfile(executor="local", workers=2, threads=1, device="cpu", poll_s=0.05, heartbeat_s=0.2)


@pytest.mark.parametrize("where", [HERE, quick_profile(workers=2)], ids=["here", "slurm"])
def test_cancel_ends_the_launcher_too(
    scheduler: Scheduler,
    small: SweepConfig,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    where: Profile,
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.5")

    def cancel() -> None:
        wait_for(sweep_fakes.executions)
        control.cancel(small)

    threading.Thread(target=cancel, daemon=True).start()
    assert launch.run(small, where, with_report=False, console=console) == 1
    said = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert said.startswith("quickstart: cancelled; ")
    assert len(sweep_fakes.executions()) <= 2
    wait_for(lambda: not scheduler.active)


def test_cancel_at_once(scheduler: Scheduler, small: SweepConfig, console: Console) -> None:
    scheduler.change(slots=0)
    launch.run(small, profile(), detach=True, with_report=False, console=console)
    assert "3 workers cancelled" in control.cancel(small, at_once=True)
    assert not scheduler.active


def test_cancel_works_where_the_scheduler_is_silent(scheduler: Scheduler, small: SweepConfig) -> None:
    order = kept(small, profile())
    scheduler.change(deaf=1.0, deaf_s=60)
    assert "does not answer" in control.cancel(small)
    assert order.cancelled
    run_worker(order)
    assert not any(task in store.Done() for task in expand(small).tasks if task.kind != "prepare")


def test_cancel_ends_local_workers_and_the_next_run_goes_on(
    small: SweepConfig, profile: LocalProfile
) -> None:
    order = kept(small, profile)
    assert "save and end" in control.cancel(small)
    run_worker(order)
    assert not status.snapshot(expand(small)).complete
    run_worker(kept(small, profile))
    assert status.snapshot(expand(small)).complete


def test_what_never_ran_cannot_be_cancelled(small: SweepConfig) -> None:
    with pytest.raises(UserError, match="was never run here"):
        control.cancel(small)


# retry


def test_forgiven_failures_are_tried_again_by_the_workers_that_run(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = kept(small, profile)
    monkeypatch.setenv("FAKE_FAIL", "pretrain")
    run_worker(order)
    assert len(control.forgive(small, "byol N=64")) == 1
    assert len(control.forgive(small, first_cell(small).key[:8])) == 1
    assert control.forgive(small, "byol N=64") == []
    monkeypatch.delenv("FAKE_FAIL")
    run_worker(order)
    now = status.snapshot(expand(small))
    assert now.done_by_kind["pretrain"] == (2, 4)
    assert len(control.forgive(small)) == 2
    run_worker(order)
    assert status.snapshot(expand(small)).complete
    assert list(first_cell(small).folder.glob("forgiven.*.txt"))


def test_retry_runs_what_the_last_run_left_alone(
    small: SweepConfig, profile: LocalProfile, console: Console
) -> None:
    remember(small, tell=print)
    orders.keep(Order(small, profile, 1, time.time() - 1e-3, skip=frozenset({"pretrain"})))
    task = first_cell(small)
    store.fail(task, "RuntimeError: made up")
    forgiven = control.forgive(small)
    assert [each.key for each in forgiven] == [task.key]
    assert control.go_on(small, {each.kind for each in forgiven}, console) == 0
    assert task in store.Done()


def test_failures_forgiven_while_the_report_is_written_are_tried_again(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(sweep: SweepConfig) -> Path:
        monkeypatch.delenv("FAKE_FAIL", raising=False)
        control.forgive(small)
        return report_(sweep)

    report_ = sweep_fakes.report
    monkeypatch.setattr(sweep_fakes, "report", report)
    monkeypatch.setattr(work, "REPORT", "sweep_fakes:report")
    monkeypatch.setenv("FAKE_FAIL", "pretrain")
    remember(small, tell=print)
    run_worker(Order(small, profile, 1, time.time() - 1e-3, with_report=True))
    assert status.snapshot(expand(small)).complete
    assert len([one for one in sweep_fakes.executions() if one["kind"] == "report"]) == 2


def test_retry_runs_the_sweep_as_it_was_run_unless_workers_are_about_it(
    scheduler: Scheduler, small: SweepConfig, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler.change(slots=0)
    launch.run(small, profile(), detach=True, with_report=False, console=console)
    task = first_cell(small)
    store.fail(task, "RuntimeError: made up")
    assert main(["retry", "quickstart", "simclr N=64"]) == 0
    out = capsys.readouterr().out
    assert f"to be tried again: {task.label}" in out
    assert "its workers go on" in out
    assert main(["retry", "quickstart"]) == 2
    assert "no task that failed" in capsys.readouterr().err


# logs


def test_logs_show_each_try_and_where_its_files_are(
    small: SweepConfig, profile: LocalProfile, tmp_path: Path
) -> None:
    task = first_cell(small)
    other = expand(small).cells[1].task
    assert other is not None
    store.describe(task)
    log = tmp_path / "7_0_log.out"
    mark = f"{task.label} [pretrain {task.key}]"
    log.write_text(f"before\n2026 begin: {mark}\nepoch 1\nepoch 2\n2026 done: {mark}\nafter\n")
    log.with_suffix(".err").write_text("slurmstepd: error: Detected 1 oom_kill event\n")
    losses.note(task, "out of memory", "process 3 on node1, job 7_0", str(log))
    losses.note(task, "node failure", "process 4 on node2, job 8_0", str(tmp_path / "gone.out"))
    store.fail(task, "RuntimeError: made up")
    claim = claims.claim(task.folder, stale_s=60, log=str(log))
    assert claim is not None
    text = "\n".join(control.logs(task.key[:6], 3))
    for words in (
        f"{task.label}: failed [pretrain {task.key}]",
        f"files: {task.folder}",
        "worker lost (out of memory): process 3 on node1, job 7_0",
        "worker lost (node failure): process 4 on node2, job 8_0",
        f"held by process {os.getpid()}",
        "RuntimeError: made up",
        f"epoch 1\nepoch 2\n2026 done: {mark}",
        "oom_kill event",
        "gone.out: no longer there",
    ):
        assert words in text
    assert "before" not in text
    assert "after" not in text
    store.describe(other)
    assert list(control.logs("simclr N=64", 3))
    with pytest.raises(UserError, match="names 2 tasks; give more"):
        list(control.logs("simclr", 3))
    with pytest.raises(UserError, match="no task begins with"):
        list(control.logs("supcon", 3))


def test_a_workers_own_words_are_found(
    scheduler: Scheduler, small: SweepConfig, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    only = small.model_copy(update={"methods": ("simclr",), "unique_samples": (64,)})
    assert launch.run(only, profile(workers=1), with_report=False, console=console) == 0
    task = first_cell(only)
    assert main(["logs", task.key[:10]]) == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"done: {task.label} [pretrain {task.key}]" in out
    result = store.result(task)
    assert result is not None
    assert result["run"]["job"] in {str(job["number"]) for job in scheduler.jobs}


# A worker that was frozen

FROZEN = """
import sys, time
from ssl_diversity.sweep import config
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.profile import LocalProfile
from ssl_diversity.sweep.work import run_worker
import sweep_fakes, json
profile = LocalProfile.model_validate_json(sys.argv[1])
sweep = config.load("quickstart", json.loads(sys.argv[2]))
skip = frozenset({"probe", "distance"})
run_worker(Order(sweep, profile, 1, time.time(), skip, functions=json.loads(sys.argv[3])))
"""
ONE = ["sources=[digits]", "methods=[simclr]", "unique_samples=64", "budget=256"]


def test_a_worker_that_was_frozen_for_too_long_publishes_nothing_when_it_wakes(
    scheduler: Scheduler, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = config.load("quickstart", ONE)
    task = first_cell(sweep)
    soon = profile.model_copy(update={"stale_s": 1.0})
    order = Order(sweep, soon, 1, time.time(), frozenset({"probe", "distance"}))
    code = [FROZEN, soon.model_dump_json(), json.dumps(ONE), json.dumps(order.functions)]
    environment = {**os.environ, "FAKE_STEP_S": "2", "SLURM_JOB_ID": "7"}
    frozen = subprocess.Popen(
        [sys.executable, "-c", *code], env=environment, text=True, stdout=subprocess.PIPE
    )
    try:
        wait_for(sweep_fakes.executions)
        frozen.send_signal(signal.SIGSTOP)
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        run_worker(order)
        path = task.folder / "result.json"
        before = path.stat()
    finally:
        frozen.send_signal(signal.SIGCONT)
    output, _ = frozen.communicate(timeout=600)
    assert frozen.returncode == 0
    assert f"begin: {task.label}" in output
    assert "done:" not in output
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    result = store.result(task)
    assert result is not None
    assert result["run"]["job"] == "8"
    first, second = sweep_fakes.executions()
    assert first["key"] == second["key"]
    assert first["pid"] == frozen.pid != second["pid"]
    assert [loss["cause"] for loss in losses.in_folder(task.folder)] == ["lost"]
    assert not list(task.folder.glob("claim.*"))
