"""What a task's function is told about where and how it runs; nothing in it may change a result."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass


def _no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """Device, threads, and the two wires to whoever runs the task.

    `progress(done, total)` may be called often; `stop()` is true once the task must save its state
    at the next safe point and raise `Interrupted`.
    """

    device: str = "cpu"
    threads: int = 1
    progress: Callable[[int, int], None] = _no_progress
    stop: Callable[[], bool] = bool

    def set_threads(self) -> None:
        """Give torch this task's threads, asleep while they wait (spinning ones starve neighbours)."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        torch.set_num_threads(self.threads)


def on_terminal() -> bool:
    """Whether progress bars make sense."""
    return sys.stderr.isatty()
