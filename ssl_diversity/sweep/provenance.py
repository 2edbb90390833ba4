"""How a result came about: recorded beside it, and no part of its identity."""

import contextlib
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ssl_diversity import files
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import claims

PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "lightly",
    "diffusers",
    "timm",
    "numpy",
    "ssl-diversity",
)


def of(runtime: Runtime, started: float, seconds: float, log: str) -> dict[str, Any]:
    """Of a task that has just ended: `started` in seconds since 1970, `log` where its output went."""
    return {
        "device": runtime.device,
        "threads": runtime.threads,
        "machine": claims.this_machine().split()[0],
        "job": claims.this_process().job,
        "ranks": runtime.group.ranks.world,
        "log": log,
        "started": started,
        "seconds": seconds,
        "python": sys.version.split()[0],
        "versions": _versions(),
        "commit": _commit(),
    }


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def _commit() -> str:
    """The code's git commit, `+` if files differ from it; "" where git cannot tell."""
    git = ["git", "--no-optional-locks", "-C", str(files.REPOSITORY)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")
