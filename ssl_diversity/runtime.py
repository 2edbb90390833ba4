"""What a task's function is told about where and how it runs; nothing in it may change a result."""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ssl_diversity.errors import UserError
from ssl_diversity.ranks import Group


def _no_progress(done: int, total: int) -> None:
    pass


def _no_note(text: str) -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """Device, threads, cache of remote shards, and the wires to whoever runs the task.

    `progress(done, total)` may be called often, and `note(text)`, a few words on the state; `stop()` is true
    once the task must save its state at the next safe point and raise `Interrupted`.
    """

    device: str = "cpu"
    threads: int = 1
    progress: Callable[[int, int], None] = _no_progress
    stop: Callable[[], bool] = bool
    note: Callable[[str], None] = _no_note
    cache_bytes: int = 0  # bound of the node's cache of remote shards; 0: no cache
    cache_dir: str | None = None  # where it lies; None: `home()/cache/shards`
    group: Group = field(default_factory=Group)  # of ranks that do the task together

    def set_threads(self) -> None:
        """Give torch this task's threads, asleep while they wait (spinning ones starve neighbours)."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        torch.set_num_threads(self.threads)


@cache
def device(asked: str) -> str:
    """A device by name; `auto` is the GPU where torch finds one."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_device(asked: str) -> str:
    """What a command is to use; UserError for a name that is none, or a GPU that is not there."""
    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {asked}: expected auto, cpu or cuda")
    require_gpu(asked)
    return device(asked)


def require_gpu(device: str, *, here: bool = True) -> None:
    """Raise UserError for `cuda` where torch finds no GPU or, not `here` but elsewhere, could use none."""
    if device != "cuda":
        return
    import torch

    if not torch.backends.cuda.is_built():
        raise UserError("device=cuda: this build of torch has no support for GPUs; install one that has")
    if here and not torch.cuda.is_available():
        raise UserError(
            "device=cuda: torch finds no GPU here; use `--device cpu`, or `device: cpu` in the launch profile"
        )


def cores() -> int:
    """How many this process may use: what affinity, a container's quota and LOKY_MAX_CPU_COUNT leave of the machine's.

    Threads beyond a quota starve one another.
    """
    from joblib import cpu_count

    return int(cpu_count())


@cache
def machine() -> str:
    """Its first GPU and its processor by their models, and its cores; asks no driver."""
    models = [_told("driver/nvidia/gpus/*/information", "Model"), processor(), f"{cores()} cores"]
    return ", ".join(filter(None, models))


def processor() -> str:
    """Its model, "" where the system does not tell."""
    return _told("cpuinfo", "model name")


def _told(pattern: str, name: str) -> str:
    """The first value of that name in the first such file of /proc."""
    for path in sorted(Path("/proc").glob(pattern))[:1]:
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    return ""


def on_terminal() -> bool:
    """Whether progress bars make sense."""
    return sys.stderr.isatty()
