"""Sweeps on real digits with task functions that cost nothing, in this process and in submitit's."""

from pathlib import Path

import pytest

from ssl_diversity.sweep import config, task, work
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.profile import LocalProfile

SMALL = ["sources=[digits]", "methods=[simclr,byol]", "unique_samples=[64,128]", "budget=256"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    monkeypatch.setattr(task, "FUNCTIONS", {**task.FUNCTIONS, **_functions()})
    monkeypatch.setattr(work, "FUNCTIONS", task.FUNCTIONS)


def _functions() -> dict[str, str]:
    import sweep_fakes

    return sweep_fakes.FUNCTIONS


@pytest.fixture
def small(home: Path) -> SweepConfig:
    return config.load("quickstart", SMALL)


@pytest.fixture
def profile() -> LocalProfile:
    return LocalProfile(
        executor="local", workers=2, threads=1, device="cpu", poll_s=0.05, heartbeat_s=0.2, linger_s=60
    )
