"""Sweeps on real digits with task functions that cost nothing, in this process, in submitit's, and on a fake SLURM."""

import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from slurm_helpers import Scheduler

from ssl_diversity.sweep import config, orders, task
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.profile import LocalProfile
from ssl_diversity.sweep.work import run_worker

SMALL = ["sources=[digits]", "methods=[simclr,byol]", "unique_samples=[64,128]", "budget=256"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    monkeypatch.setattr(task, "FUNCTIONS", {**task.FUNCTIONS, **_functions()})
    monkeypatch.setattr(orders, "FUNCTIONS", task.FUNCTIONS)


def _functions() -> dict[str, str]:
    import sweep_fakes

    return sweep_fakes.FUNCTIONS


@pytest.fixture
def small(home: Path) -> SweepConfig:
    return config.load("quickstart", SMALL)


@pytest.fixture(scope="session")
def home_with_pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_DIVERSITY_HOME", str(folder))
        profile = LocalProfile(executor="local", workers=1, threads=1, device="cpu")
        others = frozenset({"pretrain", "probe", "distance"})
        run_worker(Order(config.load("quickstart", SMALL), profile, 1, time.time(), skip=others))
    return folder


@pytest.fixture
def pools(home: Path, home_with_pools: Path) -> None:
    """The pools of `small` are there."""
    shutil.copytree(home_with_pools, home, dirs_exist_ok=True)


@pytest.fixture
def profile() -> LocalProfile:
    return LocalProfile(
        executor="local", workers=2, threads=1, device="cpu", poll_s=0.05, heartbeat_s=0.2, linger_s=60
    )


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=500, markup=False, highlight=False)


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    """A SLURM of this test's own, whose commands come first on the path."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    made = Scheduler(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    yield made
    made.end()
