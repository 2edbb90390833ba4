"""Everything that can go wrong on a cluster costs time, never results: on a real SLURM."""

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from drill_launcher import samples_trained
from helpers import comparable, equal_weights, results
from slurm_cluster import Cluster
from slurm_sweeps import Submitter, profile

FAULTS = 20
EVERY_S = (0.5, 3.0)
SWEEP = [
    "sources=[digits,photo_patches]",
    "methods=[simclr,dino,mae]",
    "unique_samples=[64,512]",
    "budget=40960",
    "checkpoint_samples=512",
]


def some_worker(cluster: Cluster, draw: random.Random) -> str | None:
    jobs = [job.name for job in cluster.running_jobs()]
    return draw.choice(jobs) if jobs else None


def faults(cluster: Cluster, submitter: Submitter, draw: random.Random) -> dict[str, Callable[[], object]]:
    """By name; each returns a false value where it found nothing to strike."""

    def on_worker(strike: Callable[[str], object]) -> Callable[[], object]:
        def fault() -> object:
            job = some_worker(cluster, draw)
            with contextlib.suppress(AssertionError):  # SLURM refuses: the job has ended meanwhile
                return job is not None and (strike(job) or job)
            return None

        return fault

    def kill_worker(job: str) -> object:
        number = next((one.id for one in cluster.running_jobs() if one.name == job), "")
        mine = [pid for pid in cluster.pids(number) if b"submitit.core._submit" in cmdline(pid)]
        if mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(mine), signal.SIGKILL)
        return mine

    def kill_node() -> str:
        node = f"node{draw.randint(1, 3)}"
        draw.choice([cluster.kill_slurmd, cluster.fail_node])(node)
        time.sleep(2)
        cluster.start_again()
        return node

    def kill_controller() -> str:
        cluster.kill_slurmctld()
        time.sleep(draw.uniform(0, 5))
        cluster.start_again()
        return "slurmctld"

    def full_queue() -> str:
        with cluster.full_queue():
            job = some_worker(cluster, draw)
            if job is not None:
                kill_worker(job)
            time.sleep(6)
        return f"with {job} killed"

    def preempt() -> str:
        node = f"node{draw.randint(1, 3)}"
        cluster.preempt(node, seconds=1)
        return node

    def kill_submitter() -> str:
        submitter.kill()
        return "and started again"

    return {
        "requeue": on_worker(cluster.requeue),
        "time limit": on_worker(cluster.reach_time_limit),
        "kill worker": on_worker(kill_worker),
        "kill slurmd": kill_node,
        "kill slurmctld": kill_controller,
        "kill submitter": kill_submitter,
        "full queue": full_queue,
        "preemption": preempt,
    }


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def published(home: Path) -> Counter[str]:
    """How often workers said that they published the result of each task."""
    logs = [path.read_text(errors="replace") for path in (home / "runs").rglob("*_log.out")]
    return Counter(re.findall(r" done: .* \[(\S+ \w+)\]$", "\n".join(logs), re.MULTILINE))


@pytest.mark.slow
def test_twenty_faults_change_no_result(cluster: Cluster, tmp_path: Path) -> None:
    quiet, stormy = tmp_path / "quiet", tmp_path / "stormy"
    begun = time.monotonic()
    told = Submitter(quiet, profile(tmp_path / "quiet.yaml", None), *SWEEP).finish()
    assert "tasks are done" in told, told[-3000:]
    seed = int(os.environ.get("SSL_DIVERSITY_DRILL_SEED", random.randrange(10**6)))
    print(f"undisturbed {time.monotonic() - begun:.0f} s; faults drawn from seed {seed}")
    draw, count, begun = random.Random(seed), 0, time.monotonic()
    submitter = Submitter(stormy, profile(tmp_path / "stormy.yaml", cluster), *SWEEP)
    struck = faults(cluster, submitter, draw)
    bag: list[str] = []
    cancelled = False
    while count < FAULTS and not submitter.over():
        time.sleep(draw.uniform(*EVERY_S))
        if not cancelled and count == FAULTS // 2 and (job := some_worker(cluster, draw)):
            cluster.scancel(job)
            name, what, cancelled = "scancel", job, True
        else:
            bag = bag or draw.sample(sorted(struck), len(struck))
            name = bag.pop()
            what = struck[name]()
        if what:
            count += 1
            print(f"{time.monotonic() - begun:6.1f} s  fault {count}: {name} {what}", flush=True)
    told = submitter.finish()
    print(f"all done after {time.monotonic() - begun:.0f} s")
    assert count >= FAULTS, f"the sweep was over after {count} faults; raise its budget"
    assert "tasks are done" in told.splitlines()[-1], told[-4000:]
    assert equal_weights(quiet, stormy)
    assert comparable(results(stormy)).equals(comparable(results(quiet)))
    assert max(published(stormy).values()) == 1
    claims = (stormy / "store").rglob("claim.*")  # but for those who published, and were killed just then
    assert [path for path in claims if not path.with_name("result.json").exists()] == []
    ratio = samples_trained(stormy) / samples_trained(quiet)
    print(
        f"samples trained: {samples_trained(quiet)} undisturbed, {ratio:.3f} times as many with {count} faults"
    )
    assert ratio <= 1.2
