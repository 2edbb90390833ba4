"""Workers do every task once, survive what fails, and stop where they are told to."""

import gc
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from ssl_diversity import files
from ssl_diversity.ranks import Group, Ranks
from ssl_diversity.sweep import claims, orders, status, store, work
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import LocalProfile, SlurmProfile
from ssl_diversity.sweep.remaining import left
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.work import Worker, run_worker

pytestmark = pytest.mark.usefixtures("fakes")
UNKNOWN = "slurm_load_jobs error: Unable to contact slurm controller"
TOTAL = 3 + 4 + 6 + 3


def order(sweep: SweepConfig, profile: LocalProfile) -> Order:
    return Order(sweep, profile, threads=1, since=time.time() - 1e-3)


def ran(kind: str) -> list[str]:
    import sweep_fakes

    return [run["key"] for run in sweep_fakes.executions() if run["kind"] == kind]


def test_one_worker_does_it_all_once(small: SweepConfig, profile: LocalProfile) -> None:
    assert run_worker(order(small, profile)) == 0
    now = status.snapshot(expand(small))
    assert now.complete
    assert now.total == TOTAL
    assert now.samples == now.samples_asked == 4 * 256
    assert len(ran("pretrain")) == len(set(ran("pretrain"))) == 4
    assert not list((store.store_dir() / "workers").iterdir())
    assert not list(store.store_dir().rglob("claim.*"))
    run_worker(order(small, profile))
    assert len(ran("pretrain")) == 4


def test_a_result_says_how_it_came_about(small: SweepConfig, profile: LocalProfile) -> None:
    run_worker(order(small, profile))
    cell = expand(small).cells[0]
    assert cell.task is not None
    result = store.result(cell.task)
    assert result is not None
    assert {"device", "threads", "machine", "started", "seconds", "versions", "commit"} <= set(result["run"])
    assert (cell.task.folder / "task.json").exists()


def test_what_a_task_leaves_in_cycles_is_gone_before_the_next(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sweep_fakes

    class Trainer:
        def __init__(self) -> None:
            self.me = self

    made: list[weakref.ref[Trainer]] = []
    still: list[int] = []
    pretrain = sweep_fakes.pretrain

    def trains(*args: Any) -> dict[str, Any]:
        still.append(sum(trainer() is not None for trainer in made))
        made.append(weakref.ref(Trainer()))
        return pretrain(*args)

    monkeypatch.setattr(sweep_fakes, "pretrain", trains)
    gc.disable()
    try:
        run_worker(order(small, profile))
    finally:
        gc.enable()
    assert still == [0, 0, 0, 0]


def test_a_failure_stays_local_and_is_retried_a_bounded_number_of_times(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pretrain")
    now = order(small, profile)
    run_worker(now)
    rest = left(expand(small), Done(), since=now.since, max_attempts=profile.max_attempts)
    assert rest.over
    assert len(rest.failed) == 4
    assert len(rest.blocked) == 4  # their probes; baselines and distances are done
    assert len(ran("pretrain")) == 4 * profile.max_attempts
    text = store.failures(rest.failed[0])[0].text
    assert text.startswith("RuntimeError: made to fail")
    assert "Traceback" in text
    monkeypatch.delenv("FAKE_FAIL")
    run_worker(order(small, profile))  # a later run forgives
    assert status.snapshot(expand(small)).complete


def test_a_users_mistake_is_not_retried(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSE", "pretrain")
    run_worker(order(small, profile))
    assert len(ran("pretrain")) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_stops_it_and_frees_its_task(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.5")

    def interrupt() -> None:
        while not ran("pretrain"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    assert run_worker(order(small, profile)) == number
    assert signal.getsignal(number) is before
    assert len(ran("pretrain")) == 1
    assert not list(store.store_dir().rglob("claim.*"))
    assert not list(store.store_dir().rglob("failed.*"))
    monkeypatch.setenv("FAKE_STEP_S", "0")
    assert run_worker(order(small, profile)) == 0
    assert status.snapshot(expand(small)).complete


@pytest.mark.parametrize(
    ("case", "again"),
    [
        (([signal.SIGUSR2], "RUNNING|None"), True),
        (([signal.SIGTERM], "RUNNING|None"), True),
        (([signal.SIGTERM], "SIGNALING|None"), True),
        (([signal.SIGTERM], "COMPLETING|None"), False),  # cancelled
        (([signal.SIGUSR2, signal.SIGTERM], "COMPLETING|None"), False),
        (([signal.SIGTERM], "COMPLETING|TimeLimit"), True),
        (([signal.SIGUSR2, signal.SIGTERM], "COMPLETING|TimeLimit"), True),
        (([signal.SIGTERM, signal.SIGUSR2], "COMPLETING|TimeLimit"), True),
        (([], "RUNNING|None"), False),
        (([signal.SIGTERM], ""), False),  # gone
        (([signal.SIGTERM], UNKNOWN), False),
        (([signal.SIGUSR2, signal.SIGTERM], UNKNOWN), True),
    ],
)
def test_slurm_gets_its_job_back_after_a_time_limit_or_a_preemption(
    small: SweepConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[list[int], str],
    again: bool,
) -> None:
    signals, state = case
    monkeypatch.setattr(work.Run, "lead", lambda run: run.signals.extend(signals))
    assert bool(asked_for_a_requeue(small, tmp_path, monkeypatch, state)) == again


def asked_for_a_requeue(
    sweep: SweepConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, state: str, refused: bool = False
) -> int:
    """How often a worker asks submitit for it, of whose job squeue tells that `state`."""
    squeue = folder / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{state}'\nexit {int(state == UNKNOWN)}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    asked: list[int] = []

    def submitit(number: int, frame: Any) -> None:
        asked.append(number)
        if refused:
            raise RuntimeError("Requested operation is presently disabled for job 4711")

    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, submitit)
    try:
        slurm = SlurmProfile(executor="slurm", workers=1, time_min=10, submit_patience_s=0.1)
        order = Order(sweep, slurm, 1, time.time())
        orders.keep(order)
        Worker(order)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return len(asked)


@pytest.mark.parametrize(("state", "sent"), [("RUNNING|None", True), ("COMPLETING|None", False)])
def test_another_worker_is_sent_where_slurm_refuses_unless_it_has_the_job_already(
    small: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, sent: bool
) -> None:
    calls: list[SlurmProfile] = []
    monkeypatch.setattr(work.Run, "lead", lambda run: run.signals.append(signal.SIGUSR2))
    monkeypatch.setattr(work.Run, "successor", lambda run, profile: calls.append(profile) or True)
    assert asked_for_a_requeue(small, tmp_path, monkeypatch, state, refused=True) == 1
    assert bool(calls) == sent


@pytest.mark.usefixtures("pools")
def test_a_worker_whose_other_rank_was_told_to_stop_comes_back_and_begins_nothing(small: SweepConfig) -> None:
    slurm = SlurmProfile(executor="slurm", workers=1, time_min=10)
    order = Order(small, slurm, 1, time.time())
    orders.keep(order)
    (cell, *_) = (task for task in expand(small).tasks if task.kind == "pretrain")
    cell.folder.mkdir(parents=True)
    claim = claims.claim(cell.folder, stale_s=60)
    assert claim is not None
    for ranks, stops in ((1, False), (2, True)):
        run = work.Run(order, Group(Ranks(0, ranks)))
        run.attempts._heard_by_a_rank(cell, claim)
        assert (run.stop.is_set(), run.comes_back) == (stops, stops)


def test_a_signal_that_comes_before_it_works_is_not_lost(
    small: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit lets SIGTERM pass, and importing torch takes its time."""
    take = Worker._take_gpus

    def told(worker: Worker, ranks: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        take(worker, ranks)

    monkeypatch.setattr(Worker, "_take_gpus", told)
    assert asked_for_a_requeue(small, tmp_path, monkeypatch, "RUNNING|None") == 1
    assert ran("prepare") == []


def test_a_failed_task_that_is_tried_again_is_running(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pretrain")
    run_worker(order(small, profile))
    now = status.snapshot(expand(small))
    assert now.over
    task = now.left.failed[0]
    doing = {
        "label": task.label,
        "kind": task.kind,
        "key": task.key,
        "done": 1,
        "total": 2,
        "started": 0.0,
        "note": "",
    }
    path = store.store_dir() / "workers" / "a.json"
    files.write_json(path, {**doing, "heartbeat_s": 1, "process": vars(claims.this_process())})
    now = status.snapshot(expand(small))
    assert not now.over
    assert [running.key for running in now.running] == [task.key]
    assert (len(now.left.failed), len(now.left.blocked)) == (3, 3)


def test_idle_workers_write_the_report_one_at_a_time(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_worker(order(small, profile))
    monkeypatch.setattr(work, "REPORT", "sweep_fakes:report")
    last = Order(small, profile, 1, time.time(), with_report=True)
    other = claims.claim(small.folder, stale_s=60)
    assert other is not None
    run_worker(last)
    assert not ran("report")
    other.release()
    run_worker(last)
    assert len(ran("report")) == 1
    assert not list(small.folder.glob("claim.*"))


def test_a_worker_whose_submitter_died_stops(small: SweepConfig, profile: LocalProfile) -> None:
    dead = claims.Process(claims.this_machine(), os.getpid(), "not our start time")
    late = Order(small, profile.model_copy(update={"linger_s": 600.0}), 1, time.time(), submitter=dead)
    plan = expand(small)
    blocker = claims.claim(plan.tasks[0].folder, stale_s=60)  # so that it must wait
    assert blocker is not None
    run_worker(late)
    assert not status.snapshot(plan).complete


def test_a_worker_with_nothing_to_do_leaves(small: SweepConfig, profile: LocalProfile) -> None:
    held = [claims.claim(task.folder, stale_s=60) for task in expand(small).tasks]
    assert all(held)
    assert run_worker(order(small, profile.model_copy(update={"linger_s": 0.2}))) == 0
    assert not Done().all(expand(small).tasks)


def test_what_a_kill_left_unmarked_is_found_done(small: SweepConfig, profile: LocalProfile) -> None:
    run_worker(order(small, profile))
    for path in (store.store_dir() / "done" / "pretrain").rglob("*"):
        if path.is_file():
            path.unlink()
    run_worker(order(small, profile))
    assert status.snapshot(expand(small)).complete
    assert len(ran("pretrain")) == 4


def test_a_task_that_kills_its_workers_is_given_up(small: SweepConfig, profile: LocalProfile) -> None:
    now = order(small, profile)
    run_worker(Order(small, profile, 1, now.since, skip=frozenset({"pretrain", "probe", "distance"})))
    cell = expand(small).cells[0].task
    assert cell is not None
    for attempt in range(profile.max_losses):
        taken = claims.claim(cell.folder, stale_s=60)
        assert taken is not None, attempt
        record = taken.path.read_text().replace(
            f'"started": "{claims.this_process().started}"', '"started": "gone"'
        )
        taken.path.write_text(record)
        if attempt < profile.max_losses - 1:
            store.fail(cell, "WorkerDied: earlier")
    run_worker(now)
    rest = now.left(expand(small), Done())
    assert [task.id for task in rest.failed] == [cell.id]
    assert "ended while running this task" in store.failures(cell)[-1].summary


def test_a_full_disk_stops_the_worker_and_is_the_users_to_mend(
    small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sweep_fakes

    def full(spec: object, out: Path, runtime: object) -> dict[str, object]:
        raise OSError(28, "No space left on device", str(out / "weights.pt"))

    monkeypatch.setattr(sweep_fakes, "pretrain", full)
    with pytest.raises(OSError, match="No space left"):
        run_worker(order(small, profile))
    failed = [f for t in expand(small).tasks for f in store.failures(t)]
    assert len(failed) == 1
    assert failed[0].by_user
    assert "disk full" in failed[0].summary
    assert not any(task in Done() for task in expand(small).tasks if task.kind == "pretrain")


def test_the_plan_grows_when_pools_appear(small: SweepConfig, profile: LocalProfile) -> None:
    assert len(expand(small).tasks) == 3
    run_worker(order(small, profile))
    assert len(expand(small).tasks) == TOTAL


def test_status_in_words(small: SweepConfig, profile: LocalProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status.snapshot(expand(small)).words == "0 of 3 or more tasks done"
    monkeypatch.setenv("FAKE_FAIL", "pretrain")
    run_worker(order(small, profile))
    words = status.snapshot(expand(small)).words
    assert words == f"{TOTAL - 8} of {TOTAL} tasks done, 4 failed, 4 not possible without them"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "unknown"),
        (5.0, "5 s"),
        (200.0, "3 min 20 s"),
        (18600.0, "5 h 10 min"),
        (100000.0, "1 day 3 h"),
    ],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert status.duration(seconds) == words
