"""What a worker knows beside the store: how much of its time is left, and which other workers there still are."""

import contextlib
import time
from importlib import import_module

from ssl_diversity.sweep import claims, estimate, slurm
from ssl_diversity.sweep.claims import Holder
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.task import COMPUTES_WITH, Task

RESUMED = frozenset(
    {"pretrain", "train-generator", "sample", "generate", "prepare"}
)  # go on where they stopped
EARLY_S = 61.0  # SLURM may give its signal so much before its time


class Clock:
    """How much of a worker's time is left."""

    def __init__(self, order: Order, place: str) -> None:
        self.place, profile = place, order.profile
        self.ends, self.limit_s = float("inf"), float("inf")
        self.known = estimate.Times({})
        if isinstance(profile, SlurmProfile) and claims.this_job():
            left_s = slurm.seconds_left(claims.this_job())
            known_s = profile.time_min * 60.0 if left_s is None else left_s
            self.limit_s = known_s - profile.signal_delay_s
            self.ends = time.monotonic() + self.limit_s

    def over(self) -> bool:
        """Whether a signal that came now is that of the time limit."""
        return time.monotonic() >= self.ends - EARLY_S

    def look(self) -> None:
        """Read what tasks are known to take, for `has_time_for`."""
        if self.limit_s < float("inf"):
            self.known = estimate.times()

    def has_time_for(self, task: Task) -> bool:
        """Whether it pays to begin: what can go on later needs a tenth of a worker's time, all else its own."""
        left_s = self.ends - time.monotonic()
        if left_s == float("inf"):
            return True
        needed_s = self.known.of(task, self.place)
        most_s = self.limit_s * (0.1 if task.kind in RESUMED else 0.9)
        return left_s >= min(needed_s or 0.0, most_s)


class Libraries:
    """What tasks compute with: imported before the first of a kind begins, so that no task's time holds it."""

    def __init__(self, order: Order, place: str) -> None:
        self.functions, self.place, self._ready = order.functions, place, set[str]()

    def ready_for(self, kind: str) -> None:
        if kind not in self._ready:
            self._ready.add(kind)
            with estimate.timed(f"imports {kind}", 1, self.place):
                for module in COMPUTES_WITH.get(self.functions[kind], ()):
                    import_module(module)


class Neighbours:
    """SLURM's word on other workers, asked for seldom."""

    def __init__(self, order: Order) -> None:
        profile = order.profile
        self.asks = isinstance(profile, SlurmProfile)
        self.every_s = profile.ask_s if isinstance(profile, SlurmProfile) else 0.0
        self.silence_s = 2 * profile.heartbeat_s
        self.supplied, self.asked = time.monotonic(), float("-inf")
        self.told_at = 0.0  # when SLURM last answered, by the clock that claims go by
        self.alive: set[str] = set()

    def due(self) -> bool:
        """Whether it is time to look after the number of workers."""
        if not self.asks or time.monotonic() - self.supplied < self.every_s:
            return False
        self.supplied = time.monotonic()
        return True

    def ended(self, holder: Holder) -> bool:
        """Whether a silent holder's job was unknown to SLURM after it had its claim; False where nobody says so."""
        process = holder.process
        if not self.asks or not process.job or process.owner != claims.this_process().owner:
            return False
        if holder.silent_s < self.silence_s:
            return False
        if time.monotonic() - self.asked > self.every_s:
            self.asked = time.monotonic()
            with contextlib.suppress(slurm.NoAnswer):
                asked_at = claims.file_time()
                self.alive = {job.name for job in slurm.live()}
                self.told_at = asked_at
        return self.told_at > holder.since and process.job not in self.alive
