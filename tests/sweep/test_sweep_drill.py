"""Kill drill with real training: a sweep that was killed again and again ends as the one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_diversity import files
from ssl_diversity.sweep import config, store
from ssl_diversity.sweep.plan import expand

KILLS = 3
OVERRIDES = [
    "name=drill",
    "sources=[digits]",
    "methods=[simclr,mae]",
    "unique_samples=[64,128]",
    "budget=8192",
    "probes=[knn]",
    "distance.n=64",
    "checkpoint_samples=512",
]
MEASURED = {"run", "train_seconds", "samples_per_second", "peak_memory_bytes"}


def start(home: Path) -> subprocess.Popen[bytes]:
    profile = home.parent / "profile.yaml"
    profile.write_text("executor: local\nworkers: 2\nthreads: 1\ndevice: cpu\n")
    command = [
        sys.executable,
        "-m",
        "ssl_diversity",
        "sweep",
        "quickstart",
        "--profile",
        str(profile),
        *OVERRIDES,
    ]
    environment = {**os.environ, "SSL_DIVERSITY_HOME": str(home)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def results(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """What the sweep in this home came to, less what a clock or a process measures."""
    import torch

    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(home))
    out: dict[tuple[str, str], Any] = {}
    for task in expand(config.load("quickstart", OVERRIDES)).tasks:
        result = store.result(task)
        assert result is not None, task.label
        out[task.id] = {key: value for key, value in result.items() if key not in MEASURED}
        if task.kind == "pretrain":
            weights = torch.load(task.folder / "weights.pt", weights_only=True)
            tensors = {name: value.tolist() for name, value in weights["state_dict"].items()}
            out[task.id]["weights"] = files.digest([weights["pooling"], tensors])
    return out


@pytest.mark.slow
def test_killed_at_random_moments_it_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    began = time.monotonic()
    assert start(calm).wait(timeout=3000) == 0
    duration_s = time.monotonic() - began
    seed = random.randrange(1000)
    print(f"kill moments from seed {seed}")
    moments = random.Random(seed)
    for _ in range(KILLS):
        process = start(killed)
        try:
            process.wait(timeout=moments.uniform(0.1, 0.6) * duration_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert start(killed).wait(timeout=3000) == 0
    assert results(killed, monkeypatch) == results(calm, monkeypatch)
    assert not list((killed / "store").rglob("failed.*"))
    assert not list((killed / "store").rglob("last.ckpt"))
