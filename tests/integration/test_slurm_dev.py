"""launch/slurm_dev.sh brings up a SLURM that behaves, and misbehaves, as a real one."""

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import Cluster

pytestmark = pytest.mark.slow

WORKER = """#!/bin/bash
trap 'echo told' USR2
trap 'echo ended; exit 1' TERM
echo "life ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME by $$"
while :; do sleep 0.2; done
"""


@dataclass(frozen=True)
class Struck:
    """A job that something happened to."""

    name: str
    log: Path

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def lives(self, cluster: Cluster, number: int) -> None:
        cluster.wait(
            lambda: sum(line.startswith("life") for line in self.lines) >= number, 120, f"life {number}"
        )


def start(cluster: Cluster, folder: Path, name: str, *options: str) -> Struck:
    """A job that runs until it is ended, and notes what it is told."""
    script, log = folder / f"{name}.sh", folder / f"{name}.log"
    script.write_text(WORKER)
    told = ("-o", str(log), "--open-mode=append", "--mem=100", "--signal=B:USR2@10", "-t", "30")
    job = Struck(cluster.submit(*told, *options, script), log)
    job.lives(cluster, 1)
    return job


@pytest.fixture(scope="module")
def struck(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Struck]]:
    """Four jobs whose misfortunes take a while, all at once, on three nodes of two CPUs."""
    folder = tmp_path_factory.mktemp("struck")
    jobs = {
        "late": start(cluster, folder, "late", "-w", "node3"),
        "requeued": start(cluster, folder, "requeued", "-w", "node3"),
        "preempted": start(cluster, folder, "preempted", "-c2"),
        "node": start(cluster, folder, "node"),
    }
    cluster.kill_slurmd(cluster.job(jobs["node"].name)["NodeList"])
    cluster.preempt(cluster.job(jobs["preempted"].name)["NodeList"])
    cluster.requeue(jobs["requeued"].name)
    cluster.reach_time_limit(jobs["late"].name)
    yield jobs
    for job in jobs.values():
        cluster.scancel(job.name)
        cluster.wait_over(job.name)
    cluster.start_again()


def test_up_again_changes_nothing_and_status_says_so(cluster: Cluster) -> None:
    cluster.up()  # of tests before, a controller that was killed may have drained a node since
    cluster.empty()
    before = cluster.script("status")
    cluster.up()
    after = cluster.script("status")
    assert before.returncode == after.returncode == 0
    assert before.stdout == after.stdout
    assert {f"slurmd.node{k}" for k in (1, 2, 3)} <= {line.split()[0] for line in after.stdout.splitlines()}
    told = cluster.script("env").stdout
    assert told == f"export SLURM_CONF={cluster.conf}\n"


def test_an_array_runs_on_every_node_and_submits_from_within(cluster: Cluster, tmp_path: Path) -> None:
    inner = f"sbatch -o {tmp_path}/inner-%j --wrap='echo $SLURMD_NODENAME'"
    wrap = f"--wrap=echo $SLURMD_NODENAME; {inner}; sleep 2"
    array = cluster.submit("--array=0-5", "--mem=100", "-o", tmp_path / "outer-%a", wrap)
    cluster.wait(lambda: len(list(tmp_path.glob("inner-*"))) == 6, 30, "six inner jobs")
    outer = [path.read_text().split()[0] for path in tmp_path.glob("outer-*")]
    assert sorted(set(outer)) == ["node1", "node2", "node3"]
    cluster.wait(lambda: cluster.history(array) == ["COMPLETED"] * 6, 30, "the array in sacct")


def test_one_step_over_two_nodes(cluster: Cluster) -> None:
    said = cluster.client("srun", "-N2", "--mem=100", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(line.split()[0] for line in said.splitlines()) == ["0", "1"]
    assert len({line.split()[1] for line in said.splitlines()}) == 2


def test_requeued_within_seconds(cluster: Cluster, struck: dict[str, Struck]) -> None:
    job = struck["requeued"]
    job.lives(cluster, 2)
    assert "ended" in job.lines
    assert job.lines[-1].startswith("life 1 ")
    assert cluster.job(job.name)["Restarts"] == "1"
    cluster.wait(lambda: cluster.history(job.name) == ["REQUEUED", "RUNNING"], 20, "both lives in sacct")


def test_preempted_after_a_warning(cluster: Cluster, struck: dict[str, Struck]) -> None:
    job = struck["preempted"]
    job.lives(cluster, 2)
    assert job.lines.index("told") < job.lines.index("ended")
    cluster.wait(lambda: cluster.history(job.name)[0] == "PREEMPTED", 20, "PREEMPTED in sacct")


def test_time_limit_after_a_warning(cluster: Cluster, struck: dict[str, Struck]) -> None:
    job = struck["late"]
    assert cluster.wait_over(job.name, 150) == "TIMEOUT"
    assert job.lines.index("told") < job.lines.index("ended")
    assert cluster.job(job.name)["Reason"] == "TimeLimit"


def test_killed_slurmd_leaves_a_stray_and_its_job_runs_elsewhere(
    cluster: Cluster, struck: dict[str, Struck]
) -> None:
    job = struck["node"]
    job.lives(cluster, 2)
    first, second = [line.split() for line in job.lines if line.startswith("life")]
    assert first[3] != second[3]
    cluster.wait(lambda: cluster.history(job.name)[0] == "NODE_FAIL", 20, "NODE_FAIL in sacct")
    stray = int(first[5])
    os.kill(stray, 0)
    cluster.start_again()
    cluster.wait(lambda: stray not in cluster.pids(job.name), 20, "the returning node ends the stray")
    assert int(second[5]) in cluster.pids(job.name)


def test_controller_killed_and_started_again_keeps_its_jobs(cluster: Cluster, tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "job")
    cluster.settle()
    pids = cluster.pids(job.name)
    cluster.kill_slurmctld()
    cluster.start_again()
    assert cluster.job(job.name)["JobState"] == "RUNNING"
    assert set(cluster.pids(job.name)) & set(pids)
    cluster.scancel(job.name)
    assert cluster.wait_over(job.name) == "CANCELLED"
    assert "ended" in job.lines
    assert len([line for line in job.lines if line.startswith("life")]) == 1


def test_limits_refuse_with_the_texts_users_see(cluster: Cluster) -> None:
    job = ("-H", "-o", "/dev/null", "--wrap=true")
    with cluster.full_queue(room=2):
        limit = f"MaxSubmitJobsPU={len(cluster.submitted_jobs()) + 2}("
        show = ("scontrol", "show", "assoc_mgr", "flags=qos")  # sacctmgr may end before the controller knows
        cluster.wait(lambda: limit in cluster.client(*show), 30, limit)
        told = cluster.client("sbatch", "--array=0-2", *job, status=1)
        assert "QOSMaxSubmitJobPerUserLimit" in told
        assert "Job violates accounting/QOS policy (job submit limit" in told
        held = cluster.submit("--array=0-1", *job)
    told = cluster.client("sbatch", "--array=1-1001", *job, status=1)
    assert told.endswith("Batch job submission failed: Invalid job array specification")
    cluster.scancel(held)
    assert {job.state for job in cluster.squeue() if job.name.startswith(held)} <= {"COMPLETING"}


def test_one_element_cancelled_and_its_neighbour_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(WORKER)
    array = cluster.submit("--array=0-1", "--mem=100", "-o", tmp_path / "%a.log", script)
    cluster.wait(
        lambda: len([j for j in cluster.running_jobs() if j.name.startswith(array)]) == 2, 20, "both run"
    )
    cluster.scancel(f"{array}_0")
    assert cluster.wait_over(f"{array}_0") == "CANCELLED"
    assert [job.name for job in cluster.running_jobs() if job.name.startswith(array)] == [f"{array}_1"]
    cluster.scancel(array)
    assert cluster.wait_over(f"{array}_1") == "CANCELLED"


def test_out_of_memory_says_so(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hog = "python3 -c 'import time; x = bytearray(300 << 20); time.sleep(60)'"
    job = cluster.submit("--mem=100", "-o", log, f"--wrap=srun {hog}")
    assert cluster.wait_over(job) == "FAILED"
    assert re.search(r"(?i)exceeded (job )?memory limit", log.read_text())


def test_two_clusters_side_by_side_and_down_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        other = Cluster(Path(folder) / "cluster", SLURM_NODES=1, SLURM_ACCT=0, SLURM_MAX_ARRAY=8)
        taken = other.script("up", SLURM_BASE_PORT=cluster.options["SLURM_BASE_PORT"])
        assert taken.returncode == 1
        assert "is taken by another program; choose others: SLURM_BASE_PORT=" in taken.stderr
        with other.running():
            job = start(other, tmp_path, "job")
            other.up(SLURM_MAX_ARRAY=4, SLURM_NODES=2)
            assert other.job(job.name)["JobState"] == "RUNNING"
            told = other.client("sbatch", "--array=0-4", "--wrap=true", status=1)
            assert "Invalid job array specification" in told
            other.kill_slurmd("node1")
            assert other.pids(job.name)
        assert other.processes() == {}
        assert not other.root.exists()
    assert cluster.script("status").returncode == 0
