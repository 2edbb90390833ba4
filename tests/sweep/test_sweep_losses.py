"""What becomes of a task whose worker went: told apart by cause, treated by the policy."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweep_fakes
from slurm_helpers import Scheduler

from ssl_diversity import files
from ssl_diversity.sweep import claims, config, losses, store
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task
from ssl_diversity.sweep.work import run_worker

pytestmark = pytest.mark.usefixtures("fakes")


def profile(**changed: Any) -> SlurmProfile:
    fast = {"poll_s": 0.05, "heartbeat_s": 0.2, "linger_s": 0.2, "stale_s": 30, "device": "cpu", "cpus": 1}
    return SlurmProfile.model_validate({"executor": "slurm", "workers": 2, "time_min": 60, **fast, **changed})


def order(sweep: SweepConfig, profile: SlurmProfile) -> Order:
    """Of a run that began a minute ago."""
    return Order(sweep, profile, 1, time.time() - 60, skip=frozenset({"probe", "distance"}))


@pytest.fixture
def one(home: Path) -> SweepConfig:
    """A sweep of one cell."""
    return config.load(
        "quickstart", ["sources=[digits]", "methods=[simclr]", "unique_samples=64", "budget=256"]
    )


@pytest.fixture
def cell(one: SweepConfig, pools: None) -> Task:
    """That cell, ready to be trained."""
    task = expand(one).cells[0].task
    assert task is not None
    return task


def lost(task: Task, **process: Any) -> None:
    """The task is held by a process of another machine that is silent."""
    claim = claims.claim(task.folder, stale_s=60, log="/logs/7_0_log.out")
    assert claim is not None
    record = json.loads(claim.path.read_text())
    record["process"] |= {"machine": "node2 boot namespace", **process}
    claim.path.write_text(json.dumps(record))
    os.utime(claim.path, (time.time() - 3600,) * 2)


def causes(task: Task) -> list[str]:
    return [loss["cause"] for loss in losses.in_folder(task.folder)]


WORDS = [
    ("REQUEUED", "requeued", False),
    ("PREEMPTED", "preempted", False),
    ("CANCELLED by 1000", "cancelled", False),
    ("DEADLINE", "cancelled", False),
    ("TIMEOUT", "time limit", True),
    ("NODE_FAIL", "node failure", True),
    ("BOOT_FAIL", "node failure", True),
    ("OUT_OF_MEMORY", "out of memory", True),
    ("FAILED", "killed", True),
    ("COMPLETED", "killed", True),
]


@pytest.mark.parametrize(("word", "cause", "counts"), WORDS)
def test_the_policy_for_each_of_slurms_words(
    scheduler: Scheduler, one: SweepConfig, word: str, cause: str, counts: bool
) -> None:
    task = expand(one).tasks[0]
    scheduler.put(7, "COMPLETED", history=[word])
    lost(task, job="7")
    gone = claims.holder(task.folder)
    assert gone is not None
    losses.record(task, gone, profile(), losses.cause(gone))
    assert causes(task) == [cause]
    failed = store.failures(task)
    assert [failure.worker_died for failure in failed] == [True] * counts
    assert all(cause in failure.summary and "7_0_log.out" in failure.summary for failure in failed)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (
            "slurmstepd-node3: error: StepId=55.0 exceeded memory limit (426582016 > 209715200), being killed",
            "out of memory",
        ),
        ("slurmstepd-node3: error: Exceeded job memory limit", "out of memory"),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=55.0. Some of the step tasks ...",
            "out of memory",
        ),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=55.0 cgroup.", "out of memory"),
        ("srun: error: node2: task 0: Killed", "killed"),
        ("Exceeded job memory limit" + "\nof an earlier life" * 200, "killed"),
    ],
)
def test_where_the_state_does_not_tell_of_memory_the_log_does(
    scheduler: Scheduler, one: SweepConfig, tmp_path: Path, words: str, cause: str
) -> None:
    task = expand(one).tasks[0]
    scheduler.put(7, "FAILED", history=["FAILED"])
    (tmp_path / "7_0_log.err").write_text(words + "\n")
    lost(task, job="7")
    gone = claims.holder(task.folder)
    assert gone is not None
    assert losses.cause(replace(gone, log=str(tmp_path / "7_0_log.out"))) == cause


def test_every_cause_has_a_treatment() -> None:
    assert {cause for _, cause, _ in WORDS} == set(losses.CAUSES.values())
    assert losses.__doc__ is not None
    assert all(f"| {cause} " in losses.__doc__ for cause in losses.CAUSES.values())


def test_what_nobody_knows_is_lost_and_what_another_cluster_says_is_not_asked(
    scheduler: Scheduler, cell: Task, one: SweepConfig
) -> None:
    scheduler.put(7, "CANCELLED", history=["CANCELLED"])
    lost(cell, job="7", owner="1@elsewhere")
    run_worker(order(one, profile()))
    assert causes(cell) == ["lost"]


def test_a_loss_counts_only_where_the_task_got_no_further(
    scheduler: Scheduler, cell: Task, one: SweepConfig
) -> None:
    scheduler.put(7, "NODE_FAIL", history=["NODE_FAIL"])
    lost(cell, job="7")
    (cell.folder / "last.ckpt").touch()
    run_worker(order(one, profile()))
    assert causes(cell) == ["node failure"]
    assert not store.failures(cell)


def test_a_task_that_loses_its_workers_without_getting_further_is_given_up(
    scheduler: Scheduler, cell: Task, one: SweepConfig
) -> None:
    now = order(one, profile(max_losses=2))
    for number in (7, 8):
        scheduler.put(number, "FAILED", history=["FAILED"])
    lost(cell, job="7")
    held = claims.holder(cell.folder)
    assert held is not None
    losses.record(cell, held, now.profile, losses.cause(held))
    lost(cell, job="8")
    run_worker(now)
    assert [task.id for task in now.left(expand(one), Done()).failed] == [cell.id]
    assert cell not in Done()


def test_the_latest_life_of_the_same_job_knows_why_the_one_before_it_ended(
    scheduler: Scheduler, cell: Task, one: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.put(7, "RUNNING", history=["PREEMPTED"], restarts=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost(cell)
    os.utime(next(cell.folder.glob("claim.*")))  # its heart beat a moment ago
    assert claims.claim(cell.folder, stale_s=60) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_worker(order(one, profile()))
    assert causes(cell) == ["preempted"]
    assert cell in Done()


def test_a_holder_whose_job_slurm_no_longer_knows_is_gone_before_it_is_stale(
    scheduler: Scheduler, cell: Task, one: SweepConfig
) -> None:
    scheduler.put(7, "RUNNING")
    lost(cell, job="7")
    os.utime(next(cell.folder.glob("claim.*")))
    soon = profile(ask_s=0.1, linger_s=1, successors=False)
    run_worker(order(one, soon))
    assert cell not in Done()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # no answer is no bad news
        run_worker(order(one, soon))
    assert cell not in Done()
    record = json.loads((cell.folder / "claim.1").read_text())
    record["process"]["job"] = "9"
    (cell.folder / "claim.1").write_text(json.dumps(record))
    run_worker(order(one, soon))
    assert cell in Done()


def test_memory_is_doubled_up_to_the_most_and_then_it_counts(
    scheduler: Scheduler, cell: Task, one: SweepConfig
) -> None:
    whole = profile(mem_gb=3, max_mem_gb=10, max_losses=2)
    base = order(one, whole)
    scheduler.put(7, "OUT_OF_MEMORY", history=["OUT_OF_MEMORY"])
    asked = []
    for mem_gb in (3.0, 6.0, 10.0):
        lost(cell, job="7")
        run_worker(base.of("main", mem_gb))
        rest = base.left(expand(one), Done())
        asked += [losses.memory_needed(cell, whole, store.Index("lost"))]
        if mem_gb < 10:
            assert [task.id for task in rest.ready if task.kind == cell.kind] == [
                cell.id
            ]  # left to a worker with more
    assert asked == [6.0, 10.0, 10.0]
    assert causes(cell) == ["out of memory"] * 3
    assert [failure.worker_died for failure in store.failures(cell)] == [True]
    assert cell in Done()  # the last of them, with 10 GiB, went on


def test_a_task_that_fits_nowhere_is_given_up(scheduler: Scheduler, cell: Task, one: SweepConfig) -> None:
    now = order(one, profile(mem_gb=4, max_mem_gb=4, max_losses=1))
    scheduler.put(7, "OUT_OF_MEMORY", history=["OUT_OF_MEMORY"])
    lost(cell, job="7")
    run_worker(now)
    assert [task.id for task in now.left(expand(one), Done()).failed] == [cell.id]
    assert "(out of memory)" in store.failures(cell)[0].summary


def test_a_memory_error_asks_for_more_and_is_no_failure_while_there_is_more(
    cell: Task, one: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(spec: object, out: object, runtime: object) -> dict[str, Any]:
        raise MemoryError("no more")

    monkeypatch.setattr(sweep_fakes, "pretrain", hungry)
    base = order(one, profile(mem_gb=4, max_mem_gb=8, max_attempts=1))
    run_worker(base)
    assert files.read_json(cell.folder / "memory.json") == {"mem_gb": 8.0}
    assert not store.failures(cell)
    assert causes(cell) == ["out of memory"]
    run_worker(base.of("main", 8.0))
    assert store.failures(cell)[0].summary == "MemoryError: no more"


def test_a_holder_elsewhere_is_known_by_job_and_process(cell: Task) -> None:
    lost(cell, job="7")
    held = claims.holder(cell.folder)
    assert held is not None
    losses.record(cell, held, profile(), "killed")
    (loss,) = losses.in_folder(cell.folder)
    assert loss["where"] == f"process {os.getpid()} on node2, job 7"
    assert loss["log"] == "/logs/7_0_log.out"
