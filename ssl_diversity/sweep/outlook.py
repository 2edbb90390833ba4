"""What a worker knows beside the store: how much of its time is left, and which other workers there still are."""

import contextlib
import time

from ssl_diversity.sweep import claims, estimate, slurm
from ssl_diversity.sweep.claims import Process
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.task import Task

RESUMED = frozenset(
    {"pretrain", "train-generator", "sample", "generate", "prepare"}
)  # go on where they stopped


class Clock:
    """How much of a worker's time is left."""

    def __init__(self, order: Order, device: str) -> None:
        self.device, self.threads, profile = device, order.threads, order.profile
        self.ends, self.limit_s = float("inf"), float("inf")
        if isinstance(profile, SlurmProfile) and claims.this_job():
            left_s = slurm.seconds_left(claims.this_job())
            self.limit_s = profile.time_min * 60.0 - profile.signal_delay_s
            known = profile.time_min * 60.0 if left_s is None else left_s
            self.ends = time.monotonic() + known - profile.signal_delay_s

    def over(self) -> bool:
        return time.monotonic() >= self.ends - 1.0

    def has_time_for(self, task: Task) -> bool:
        """Whether it pays to begin: what can go on later needs a tenth of a worker's time, all else its own."""
        left_s = self.ends - time.monotonic()
        if left_s == float("inf"):
            return True
        needed_s = estimate.seconds(task, estimate.rates(), self.device, self.threads)
        most_s = self.limit_s * (0.1 if task.kind in RESUMED else 0.9)
        return left_s >= min(needed_s or 0.0, most_s)


class Neighbours:
    """SLURM's word on other workers, asked for seldom."""

    def __init__(self, order: Order) -> None:
        self.asks = isinstance(order.profile, SlurmProfile)
        self.every_s = order.profile.ask_s if isinstance(order.profile, SlurmProfile) else 0.0
        self.asked = self.supplied = time.monotonic()
        self.alive: set[str] | None = None

    def due(self) -> bool:
        """Whether it is time to look after the number of workers."""
        if not self.asks or time.monotonic() - self.supplied < self.every_s:
            return False
        self.supplied = time.monotonic()
        return True

    def ended(self, process: Process) -> bool:
        """Whether SLURM no longer knows the job of a process; False where it cannot be asked."""
        if not self.asks or not process.job or process.owner != claims.this_process().owner:
            return False
        if self.alive is None or time.monotonic() - self.asked > self.every_s:
            self.asked, self.alive = time.monotonic(), None
            with contextlib.suppress(slurm.NoAnswer):
                self.alive = {job.name for job in slurm.live()}
        return self.alive is not None and process.job not in self.alive
