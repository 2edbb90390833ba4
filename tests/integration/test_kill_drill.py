"""kill -9 at random moments costs time, never results."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import command, comparable, environment, equal_weights, results, run

KILLS = 3


def kill_drill(home: Path, arguments: list[str], seconds: float, draw: random.Random) -> int:
    """Start the sweep KILLS times, each time killing its whole process group; returns how often it was hit alive."""
    hit = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(*arguments),
            cwd=home,
            env=environment(home),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(seconds * draw.uniform(0.3, 1.0))
        if process.poll() is None:
            hit += 1
        kill_session(process.pid)
        process.wait()
    return hit


def kill_session(leader: int) -> None:
    """kill -9 every process of the session (submitit's workers have groups of their own)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader or str(leader) in _ancestors(int(entry.name)):
                    os.kill(int(entry.name), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def _ancestors(pid: int) -> list[str]:
    chain = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            break
        pid = int(stat.rsplit(")", 1)[1].split()[1])
        chain.append(str(pid))
    return chain


def drill(folder: Path, arguments: list[str], sweep: str, parts: int) -> None:
    """Run a sweep undisturbed and, elsewhere, killed KILLS times and started again at once: the same results."""
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    start = time.monotonic()
    run(undisturbed, *arguments)
    took = time.monotonic() - start
    seed = random.randrange(10**6)
    print(f"{sweep}: undisturbed {took:.0f} s; kill moments drawn from seed {seed}")
    assert (
        kill_drill(killed, arguments, took / parts, random.Random(seed)) >= KILLS / 2
    )  # others came too late
    run(killed, *arguments)
    assert equal_weights(undisturbed, killed)
    assert comparable(results(killed, sweep)).equals(comparable(results(undisturbed, sweep)))


@pytest.mark.slow
def test_killed_three_times_equals_undisturbed(tmp_path: Path) -> None:
    cut = ["methods=[simclr,dino,mae]", "unique_samples=[64,512]", "budget=4096", "checkpoint_samples=512"]
    drill(tmp_path, ["sweep", "quickstart", *cut], "quickstart", parts=6)


@pytest.mark.slow
def test_real_photographs_killed_three_times(tmp_path: Path) -> None:
    data = os.environ.get("SSL_DIVERSITY_TEST_DATA")
    if data is None:
        pytest.skip(
            "needs SSL_DIVERSITY_TEST_DATA, a folder with cifar10.tar; the drill on digits runs without it"
        )
    cut = [
        f"sources.cifar10.path={data}/cifar10.tar",
        "methods=[simclr,mae]",
        "backbone={default: conv-tiny, mae: vit-micro}",
        "unique_samples=[1000,10000]",
        "budget=10000",
        "seeds=1",
        "checkpoint_samples=1000",
        "baselines=[random]",
    ]
    drill(tmp_path, ["sweep", "cifar10", *cut], "cifar10", parts=6)
