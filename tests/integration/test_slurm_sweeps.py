"""Sweeps on a real SLURM: the same results as on one machine, within its limits, whoever starts them."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import comparable, equal_weights, results, run
from slurm_cluster import Cluster
from slurm_sweeps import Submitter, profile

pytestmark = pytest.mark.slow
FAKES = ["--fakes", "sources=[digits]", "methods=[simclr,byol]", "unique_samples=[64,128]", "budget=256"]


@pytest.fixture(autouse=True)
def nobody_else(cluster: Cluster) -> None:
    cluster.empty()


def executed(home: Path) -> Counter[str]:
    """How often each task was run, of those that log it."""
    lines = (home / "executions.log").read_text().splitlines()
    return Counter(json.loads(line)["key"] for line in lines)


def said(home: Path) -> str:
    return "\n".join(path.read_text() for path in (home / "runs").rglob("*_log.out"))


def test_the_same_results_as_on_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    cut = ["sources=[digits]", "methods=[simclr,mae]", "unique_samples=[64]", "budget=2048"]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    local = profile(tmp_path / "local.yaml", None, workers=2)
    slurm = profile(tmp_path / "slurm.yaml", cluster, workers=2)
    run(here, "sweep", "quickstart", "--profile", str(local), *cut)
    run(there, "sweep", "quickstart", "--profile", str(slurm), *cut)
    assert equal_weights(here, there)
    assert comparable(results(there)).equals(comparable(results(here)))


def test_fifty_jobs_within_small_limits(cluster: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    one_each = profile(
        tmp_path / "p.yaml", cluster, workers=50, tasks_per_worker=1, linger_s=2, requeue="false"
    )
    most = 0
    cluster.up(SLURM_MAX_ARRAY=8)
    try:
        with cluster.full_queue(room=10):
            begun = Submitter(home, one_each, *FAKES, "seeds=4")
            while not begun.over():
                most = max(most, len(cluster.submitted_jobs()))
                time.sleep(1)
            told = begun.finish()
    finally:
        cluster.up(SLURM_MAX_ARRAY=1001)
    assert "tasks are done" in told, told
    assert set(executed(home).values()) == {1}
    assert len(executed(home)) >= 45
    assert most <= 10
    records = [json.loads(path.read_text()) for path in (home / "runs/quickstart/jobs").rglob("[0-9]*.json")]
    assert max(record["count"] for record in records) <= 8
    assert sum(record["count"] for record in records) >= 45


def test_two_people_start_one_sweep_at_once(cluster: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    where = profile(tmp_path / "p.yaml", cluster, workers=2)
    os.environ["FAKE_STEP_S"] = "0.05"
    try:
        both = [Submitter(home, where, *FAKES, "seeds=2", log=f"{who}.log") for who in ("one", "two")]
        told = [each.finish() for each in both]
    finally:
        del os.environ["FAKE_STEP_S"]
    assert all("all 27 tasks are done" in text for text in told), told
    assert not list((home / "store").rglob("losses.jsonl"))
    assert set(executed(home).values()) == {1}
    assert not list((home / "store").rglob("claim.*"))


def test_a_worker_that_wakes_up_publishes_nothing_that_another_has_taken_over(
    cluster: Cluster, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    where = profile(tmp_path / "p.yaml", cluster, workers=1, stale_s=4)
    os.environ["FAKE_STEP_S"] = "0.4"
    try:
        begun = Submitter(home, where, *FAKES, "methods=[simclr]", "unique_samples=[64]")
        claims = lambda: list((home / "store" / "pretrain").rglob("claim.*"))  # noqa: E731
        cluster.wait(claims, 300, "a cell is begun")
        sleeper = json.loads(claims()[0].read_text())["process"]["pid"]
        os.kill(sleeper, signal.SIGSTOP)
        job = cluster.running_jobs()[0]
        other = Submitter(
            home,
            profile(tmp_path / "q.yaml", None, workers=1, stale_s=4),
            *FAKES,
            "methods=[simclr]",
            "unique_samples=[64]",
            log="other.log",
        )
        assert "tasks are done" in other.finish()
        before = {path: path.read_bytes() for path in (home / "store").rglob("result.json")}
        os.kill(sleeper, signal.SIGCONT)
        told = begun.finish()
        cluster.wait(
            lambda: job.name not in {one.name for one in cluster.squeue()}, 300, "the sleeper has left"
        )
    finally:
        del os.environ["FAKE_STEP_S"]
    assert "tasks are done" in told, told
    assert before == {path: path.read_bytes() for path in (home / "store").rglob("result.json")}
    (cell,) = (home / "store" / "pretrain").rglob("result.json")
    assert json.loads(cell.read_text())["run"]["job"] == ""  # the other's, which is no job
    assert not list((home / "store").rglob("claim.*"))


def test_submit_and_walk_away_then_cancel_and_go_on(cluster: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    where = profile(tmp_path / "p.yaml", cluster, workers=2)
    os.environ["FAKE_STEP_S"] = "2"
    try:
        assert "2 workers submitted" in Submitter(home, where, *FAKES, "--detach").finish()
        cluster.wait(lambda: list((home / "store" / "pretrain").rglob("claim.*")), 300, "a cell is begun")
        assert "told to save and end" in run(home, "cancel", "quickstart").stdout
        cluster.wait(lambda: not cluster.squeue(), 300, "all workers have left")
    finally:
        del os.environ["FAKE_STEP_S"]
    assert not list((home / "store").rglob("claim.*"))
    assert "interrupted: pretrain" in said(home)
    assert "workers submitted" in Submitter(home, where, *FAKES, "--detach").finish()
    status = run(home, "status", "quickstart", "--watch").stdout
    assert "16 of 16 tasks done" in status
    assert max(executed(home).values()) <= 2


def test_two_nodes_train_as_one_process(cluster: Cluster, tmp_path: Path) -> None:
    cut = ["sources=[digits]", "methods=[simclr,barlow_twins,dino]", "unique_samples=[512]", "budget=4096"]
    cut += ["precision=32-true", "probes=[knn]", "baselines=[]"]
    methods = ("simclr", "barlow_twins", "dino")
    cut += [f"hyperparameters.{method}.lr=1e-4" for method in methods]  # a larger one makes more of rounding
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run(one, "sweep", "quickstart", "--profile", str(profile(tmp_path / "one.yaml", None, workers=1)), *cut)
    where = profile(tmp_path / "two.yaml", cluster, workers=1, nodes=2, ranks=1)
    run(two, "sweep", "quickstart", "--profile", str(where), *cut)
    worst = 0.0
    cells = sorted((one / "store" / "pretrain").rglob("result.json"))
    assert len(cells) == 3
    for path in cells:
        alone, together = (json.loads((home / path.relative_to(one)).read_text()) for home in (one, two))
        assert (alone["run"]["ranks"], together["run"]["ranks"]) == (1, 2)
        assert alone["samples_seen"] == together["samples_seen"]
        a, b = np.array(alone["history"]), np.array(together["history"])
        np.testing.assert_array_equal(a[:, 0], b[:, 0])
        gaps = np.abs(a - b)[:, 1] / np.abs(a[:, 1])
        worst = max(worst, float(gaps.max()))
    print(f"largest relative difference of the loss, over {len(a)} points of each curve: {worst:.2e}")
    assert worst < 1e-3


def test_a_task_that_needs_more_memory_gets_it(cluster: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    where = profile(tmp_path / "p.yaml", cluster, workers=1, mem_gb=0.5, max_mem_gb=2)
    os.environ |= {"FAKE_MEMORY_GB": "0.9", "FAKE_STEP_S": "0.5"}
    try:
        told = Submitter(home, where, *FAKES, "methods=[simclr]", "unique_samples=[64]").finish()
    finally:
        del os.environ["FAKE_MEMORY_GB"], os.environ["FAKE_STEP_S"]
    assert "tasks are done" in told, told
    (loss,) = (json.loads(line) for path in (home / "store").rglob("losses.jsonl") for line in path.open())
    assert loss["cause"] == "out of memory"
    assert "1 out of memory" in run(home, "status", "quickstart").stdout
    sizes = [
        json.loads(path.read_text())["mem_gb"]
        for path in (home / "runs/quickstart/jobs").rglob("[0-9]*.json")
    ]
    assert {size or 0.5 for size in sizes} == {0.5, 1.0}


def test_what_the_cluster_would_answer(cluster: Cluster, tmp_path: Path) -> None:
    fine = run(tmp_path, "launch", "check", str(profile(tmp_path / "p.yaml", cluster))).stdout
    assert "wrong" not in fine
    assert "in partition main" in fine
    bad = profile(tmp_path / "q.yaml", cluster, partition="nope", time_min=10)
    assert "known: high, main" in run(tmp_path, "launch", "check", str(bad), status=1).stdout
    assert not cluster.squeue()
