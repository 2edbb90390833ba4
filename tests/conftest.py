"""Every test gets a home of its own, one thread, and no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Slow machines are none of these tests' business, and what they find is found by everybody.
settings.register_profile(
    "suite", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # run by a shell in the background: tests interrupt children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh SSL_DIVERSITY_HOME."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(folder))
    return folder
