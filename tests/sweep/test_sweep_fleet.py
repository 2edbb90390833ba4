"""Workers on a scheduler that fails, refuses and falls silent: as many as are wanted, and every task done once."""

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sweep_fakes
from rich.console import Console
from slurm_helpers import Scheduler, quick_profile

from ssl_diversity import files
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, config, estimate, fleet, launch, losses, orders, slurm, status
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import LocalProfile, SlurmProfile
from ssl_diversity.sweep.remaining import Left
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.work import Run, Worker, run_worker

FIFTY = [
    "sources=[digits]",
    "methods=[simclr,byol]",
    "unique_samples=[64,128]",
    "seeds=[0,1,2,3]",
    "budget=256",
]
pytestmark = pytest.mark.usefixtures("fakes")


def profile(**changed: Any) -> SlurmProfile:
    return quick_profile(**{"workers": 10, **changed})


def order(sweep: SweepConfig, profile: SlurmProfile) -> Order:
    return Order(sweep, profile, threads=1, since=time.time() - 1e-3)


def rest(order: Order) -> Left:
    return order.left(expand(order.sweep), Done())


def supply(order: Order, *, leaving: str = "", patience_s: float = 10.0) -> tuple[int, fleet.Slurm]:
    crew = fleet.Slurm(order, Worker)
    return crew.supply(rest(order), waiting=False, leaving=leaving, patience_s=patience_s), crew


def sizes(scheduler: Scheduler) -> list[int]:
    """Of the arrays that wait or run."""
    return list(Counter(job["array"] for job in scheduler.active).values())


@pytest.fixture
def idle(scheduler: Scheduler, pools: None, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A scheduler on which nothing starts, for a sweep of 9 tasks that could."""
    scheduler.change(slots=0)
    monkeypatch.setattr(fleet, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(fleet, "JUST_SENT_S", 0.0)
    return scheduler


# Whole sweeps


def ran_once(sweep: SweepConfig) -> None:
    now = status.snapshot(expand(sweep))
    assert now.complete
    assert now.total == 49
    counts = Counter((run["kind"], run["key"]) for run in sweep_fakes.executions())
    assert set(counts.values()) == {1}
    assert len(counts) == now.total - 3  # the pools are made by the real function
    assert not list(config.runs_dir().parent.rglob("failed.*.txt"))


def wait_until(condition: Any, timeout_s: float = 1200) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


HARD = {"max_array": 8, "submit_limit": 10, "deaf": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "failing", "requeue"), [(0, 0.5, False), (1, 0.4, False), (2, 0.3, True)])
def test_every_task_is_done_once_whatever_the_scheduler_says(
    scheduler: Scheduler, console: Console, seed: int, failing: float, requeue: bool
) -> None:
    scheduler.change(**HARD, seed=seed, failing=failing)
    sweep = config.load("quickstart", FIFTY)
    code = launch.run(sweep, profile(tasks_per_worker=6, requeue=requeue), with_report=False, console=console)
    assert code == 0
    ran_once(sweep)


@pytest.mark.slow
def test_a_sweep_that_nobody_watches_is_done_by_workers_that_send_workers(
    scheduler: Scheduler, console: Console
) -> None:
    scheduler.change(**HARD, seed=3, failing=0.4)
    sweep = config.load("quickstart", FIFTY)
    alone = profile(tasks_per_worker=6, requeue=False, workers=3)
    assert launch.run(sweep, alone, detach=True, with_report=False, console=console) == 0
    wait_until(lambda: status.snapshot(expand(sweep)).complete)
    ran_once(sweep)
    assert scheduler.calls("sbatch") > 4


@pytest.mark.slow
def test_where_workers_may_not_send_workers_whoever_joins_does(
    scheduler: Scheduler, console: Console
) -> None:
    scheduler.change(**HARD, seed=4)
    sweep = config.load("quickstart", FIFTY)
    alone = profile(tasks_per_worker=6, requeue=False, workers=2, successors=False)
    assert launch.run(sweep, alone, detach=True, with_report=False, console=console) == 0
    wait_until(lambda: not scheduler.active)
    assert len(sweep_fakes.executions()) <= 12
    assert not status.snapshot(expand(sweep)).complete
    scheduler.change(failing=0.4)
    launch.join(sweep, console)
    ran_once(sweep)


# How many are sent


def test_arrays_are_as_large_as_the_cluster_takes_them(idle: Scheduler, small: SweepConfig) -> None:
    idle.change(max_array=4)
    now = order(small, profile(workers=9))
    assert supply(now)[0] == 9
    assert sizes(idle) == [4, 4, 1]
    assert supply(now)[0] == 9
    assert sizes(idle) == [4, 4, 1]


def test_no_more_workers_than_tasks(idle: Scheduler, small: SweepConfig) -> None:
    ready = len(rest(order(small, profile())).ready)
    assert supply(order(small, profile(workers=100)))[0] == ready == sum(sizes(idle))


def test_a_limit_on_jobs_is_filled_and_told(idle: Scheduler, small: SweepConfig) -> None:
    idle.change(submit_limit=5)
    now = order(small, profile(workers=9))
    count, crew = supply(now)
    assert count == 5
    assert sizes(idle) == [4, 1]
    assert "QOSMaxSubmitJobPerUserLimit" in crew.told
    idle.change(submit_limit=20)
    count, crew = supply(now)
    assert count == 9
    assert "takes no more jobs" not in crew.told


@pytest.mark.parametrize("fault", ["not taken", "taken", "no contact"])
def test_a_submission_that_failed_is_made_again_and_what_was_taken_all_the_same_is_cancelled(
    idle: Scheduler, small: SweepConfig, fault: str
) -> None:
    idle.change(faults=["", fault, fault], max_array=3)
    now = order(small, profile(workers=6))
    assert supply(now)[0] == 6
    assert supply(now)[0] == 6
    assert sizes(idle) == [3, 3]
    cancelled = Counter(job["state"] for job in idle.jobs)["CANCELLED"]
    assert cancelled == (6 if fault == "taken" else 0)


def test_a_job_taken_in_silence_has_nothing_to_run_and_does_not_count(
    idle: Scheduler, small: SweepConfig
) -> None:
    idle.change(faults=["taken"])
    now = order(small, profile(workers=3))
    count, crew = supply(now, patience_s=0.0)
    assert count == 0
    assert "Socket timed out" in crew.told
    assert supply(now)[0] == 3
    assert sizes(idle) == [3]


def test_without_an_answer_nothing_is_sent(idle: Scheduler, small: SweepConfig) -> None:
    idle.change(deaf=1.0)
    with pytest.raises(slurm.NoAnswer):
        supply(order(small, profile()))
    assert not idle.jobs


def test_jobs_that_the_cluster_never_takes_are_the_users_to_mend(
    idle: Scheduler, small: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = idle.bin / "sbatch"
    sbatch.unlink()
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1\n"
    )
    sbatch.chmod(0o755)
    with pytest.raises(
        UserError, match=r"workers of class main: .*Invalid qos specification; change the profile"
    ):
        supply(order(small, profile()))


def test_a_cancelled_worker_is_not_replaced_and_another_run_forgives(
    idle: Scheduler, small: SweepConfig
) -> None:
    now = order(small, profile(workers=3))
    supply(now)
    slurm.cancel(["1000_1"])
    assert supply(now)[0] == 2
    assert sizes(idle) == [2]
    assert supply(order(small, profile(workers=3)))[0] == 3


def test_workers_that_crash_are_replaced_a_bounded_number_of_times(
    idle: Scheduler, small: SweepConfig
) -> None:
    now = order(small, profile(workers=2, max_losses=2))
    for _ in range(2):
        assert supply(now)[0] == 2
        idle.rewrite(state="FAILED", history=["FAILED"])
    assert supply(now)[0] == 2  # 4 crashed, and 4 may
    idle.rewrite(state="FAILED", history=["FAILED"])
    count, crew = supply(now)
    assert count == 0
    assert crew.hopeless
    assert "6 workers of class main ended in the middle of their work" in crew.told


def test_arrays_that_ended_well_are_not_read_again(idle: Scheduler, small: SweepConfig) -> None:
    now, jobs = order(small, profile(workers=2)), small.folder / "jobs"
    supply(now)
    idle.rewrite(state="COMPLETED", history=["COMPLETED"])
    assert supply(now)[0] == 2
    slurm.cancel(["1001_0"])
    idle.rewrite(state="CANCELLED", history=["CANCELLED"])
    supply(now)
    assert [path.name for path in sorted(jobs.glob("*.json"))] == ["1001.json"]
    assert [path.name for path in jobs.glob("over-*/*")] == ["1000.json"]
    supply(order(small, profile(workers=2)))
    assert not list(jobs.glob("over-*"))


def test_who_leaves_is_not_counted_and_is_replaced(idle: Scheduler, small: SweepConfig) -> None:
    now = order(small, profile(workers=2))
    supply(now)
    assert supply(now, leaving="1000_1")[0] == 2
    assert sizes(idle) == [2, 1]
    (record,) = (small.folder / "jobs").glob("1000.json")
    assert files.read_json(record)["ended"] == {}  # how it ends is yet to be seen


def test_who_leaves_waits_for_another_who_counted_it(idle: Scheduler, small: SweepConfig) -> None:
    now = order(small, profile(workers=1))
    supply(now)
    other = claims.claim(small.folder / "jobs", stale_s=60)
    assert other is not None
    threading.Timer(0.5, other.release).start()
    assert supply(now, leaving="1000")[0] == 1
    assert sizes(idle) == [1, 1]


def test_who_leaves_is_not_its_own_successor_where_another_holds_the_lock(
    idle: Scheduler, small: SweepConfig
) -> None:
    now = order(small, profile(workers=1))
    supply(now)
    other = claims.claim(small.folder / "jobs", stale_s=60)
    assert other is not None
    assert supply(now, leaving="1000", patience_s=0.3)[0] == 0
    other.release()


def test_a_later_run_with_other_tasks_has_the_workers(idle: Scheduler, small: SweepConfig) -> None:
    now = order(small, profile(workers=2))
    orders.keep(now)
    assert supply(now)[0] == 2
    more = small.model_copy(update={"budget": ("512",)})
    later = order(more, profile(workers=2))
    orders.keep(later)
    count, crew = supply(now)
    assert (count, crew.hopeless) == (2, True)
    assert "a later run of this sweep with other tasks" in crew.told
    crew.dismiss()
    assert sizes(idle) == [2]  # the later one's
    crew = fleet.Slurm(later, Worker)
    crew.dismiss()
    assert sizes(idle) == []


def test_an_equal_run_or_one_elsewhere_leaves_a_run_its_workers(idle: Scheduler, small: SweepConfig) -> None:
    here = LocalProfile(executor="local", workers=1, threads=1, device="cpu")
    now = order(small, profile(workers=2))
    orders.keep(order(small, profile(workers=2)))
    assert not now.superseded
    orders.keep(Order(small.model_copy(update={"budget": ("512",)}), here, 1, time.time()))
    assert not now.superseded
    assert orders.newer(now) is now  # and so does a worker that starts now
    assert supply(now)[0] == 2


def test_jobs_of_another_user_are_not_looked_after(idle: Scheduler, small: SweepConfig) -> None:
    now = order(small, profile(workers=3))
    supply(now)
    (path,) = (small.folder / "jobs").glob("1000.json")
    record = files.read_json(path)
    assert record["uid"] == os.getuid()
    files.write_json(path, {**record, "uid": os.getuid() + 1})
    slurm.cancel(["1000_0", "1000_1", "1000_2"])
    assert supply(now)[0] == 3  # one's own cancelled workers would not be replaced
    assert files.read_json(path)["ended"] == {}


def test_a_try_that_ran_out_of_memory_and_is_made_again_with_more_is_no_crash(
    idle: Scheduler, small: SweepConfig
) -> None:
    now = order(small, profile(workers=1, max_losses=1, mem_gb=1.0, max_mem_gb=4.0))
    for task in rest(now).ready[:3]:
        losses.note(task, losses.OUT_OF_MEMORY, "process 3", "")
        assert losses.ask_for_more(task, now.profile, 1.0)
    for _ in range(3):
        assert supply(now)[0] >= 1
        idle.rewrite(state="OUT_OF_MEMORY", history=["OUT_OF_MEMORY"])
    count, crew = supply(now)
    assert count >= 1
    assert not crew.hopeless


def test_a_cancelled_run_gets_no_more_workers(idle: Scheduler, small: SweepConfig) -> None:
    now = order(small, profile())
    orders.cancel(small)
    assert supply(now)[0] == 0
    assert not idle.jobs


# What they do


LIGHT = {"light": {"kinds": ["probe", "distance"], "gpus": 0, "workers": 2, "mem_gb": 4}}


def test_each_class_is_sent_for_its_own_tasks_and_does_those_alone(
    idle: Scheduler, small: SweepConfig
) -> None:
    now = order(small, profile(classes=LIGHT, workers=9, gpus=1, mem_gb=32, linger_s=0.1))
    assert supply(now)[0] == 6
    assert Counter(job["comment"].split("/")[2] for job in idle.jobs) == {"main": 4, "light": 2}
    scripts = {path.stem: path.read_text() for path in idle.folder.glob("*.sh")}
    assert [("--gpus-per-node=1" in text, "--mem=4GB" in text) for _, text in sorted(scripts.items())] == [
        (True, False),
        (False, True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        run_worker(now.of("light"))
        assert {run["kind"] for run in sweep_fakes.executions()} == {"probe", "distance"}
        run_worker(now.of("main"))
    assert {run["kind"] for run in sweep_fakes.executions()} == {"pretrain", "probe", "distance"}


def test_a_worker_of_one_task_ends_after_it_and_comes_back(
    idle: Scheduler, small: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(order(small, profile(tasks_per_worker=1, successors=False)))
    run.lead()
    assert run.share_done
    assert not run.comes_back
    assert len(sweep_fakes.executions()) == 1


def test_a_worker_with_too_little_time_left_begins_nothing_and_comes_back(
    idle: Scheduler, small: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = order(small, profile(time_min=60, signal_delay_s=60, successors=False))
    task = next(task for task in rest(now).ready if task.kind == "probe")
    for ready in rest(now).ready:
        estimate.record(ready, {}, 1500.0, estimate.place(now.profile))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    idle.put(7, "RUNNING", started=time.time())
    run = Run(now)
    assert 3400 < run.clock.limit_s < 3600
    run.clock.look()
    assert run.clock.has_time_for(task)
    run.clock.ends -= 2800  # of 3540 s; a probe needs 1500
    assert not run.clock.has_time_for(task)
    run.lead()
    assert run.comes_back
    assert {r["kind"] for r in sweep_fakes.executions()} == {"pretrain"}  # which can go on later
