"""How long tasks will take, from what earlier ones took: store/cache/times.json.

A task of n units takes `fixed + each * n` seconds: what it costs to begin and to end, and a steady rate. Both depend on
what the task is like (`Task.like`) and on where it runs (`place`): device, threads, ranks, and how many workers share
the machine.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ssl_diversity.config import Config
from ssl_diversity.files import digest, read_json, write_json
from ssl_diversity.runtime import machine
from ssl_diversity.sweep.profile import LocalProfile, Profile
from ssl_diversity.sweep.store import cache_dir
from ssl_diversity.sweep.task import Task

KEPT, SIZES = 5, 6  # measurements kept of each number of units, and such numbers: the latest
TOGETHER = "together/"  # how the records of `profile --at-once` begin
APART = 1.5  # how far apart numbers of units must be to tell what is fixed
_EACH = frozenset(
    {"samples", "seed", "rows_digest", "rows_count", "first_block", "blocks"}
)  # of a generator: leave a rate as it is


class Measured(NamedTuple):
    """What one task took; `each` is its steady rate in seconds per unit, where its progress told (else 0)."""

    units: float
    seconds: float
    each: float = 0.0


class Pace:
    """The steady rate of a task that tells how many units are done, from its first word to its last; `tell` hears them too."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] = (0.0, 0)

    def __call__(self, done: int, total: int) -> None:
        self._tell(done, total)
        self._last = time.monotonic(), done
        self._first = self._first or self._last

    def each(self, units: float) -> float:
        """Seconds per unit; 0 where too little of the task lies between the two words."""
        if self._first is None or self._last[1] - self._first[1] < units / 4:
            return 0.0
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])


class Times:
    """What was measured, as estimates."""

    def __init__(self, measured: Mapping[str, Sequence[Sequence[float]]]) -> None:
        self._measured = measured
        self._fits: dict[str, tuple[float, float]] = {}

    def seconds(self, like: str, units: float, place: str) -> float | None:
        """Of a task of so many units; None where none like it was measured, or `units` is 0 (not known)."""
        what = f"{like}@{place}"
        if what not in self._measured:
            what = f"{together(like)}@{place}"
        if what not in self._measured or not units:
            return None
        if what not in self._fits:
            self._fits[what] = fit([Measured(*one) for one in self._measured[what]])
        fixed, each = self._fits[what]
        return fixed + each * units

    def any_together(self) -> bool:
        return any(what.startswith(TOGETHER) for what in self._measured)

    def of(self, task: Task, place: str) -> float | None:
        return self.seconds(task.like, task.units, place)

    @cached_property
    def _cells(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for what, measured in self._measured.items():
            like, _, place = what.rpartition("@")
            if like.startswith("pretrain/"):
                found.setdefault(place, []).append(fit([Measured(*one) for one in measured])[1])
        return found

    def typical(self, place: str) -> float | None:
        """Mean seconds per sample of the kinds of cells measured at a place."""
        return statistics.fmean(self._cells[place]) if place in self._cells else None


def together(like: str) -> str:
    """What `profile --at-once` measured of cells like it is kept as, on this machine."""
    return f"{TOGETHER}{machine()}/{like}"


def times() -> Times:
    return Times(_read())


def place(profile: Profile) -> str:
    """Where the workers of a profile run, as far as their speed depends on it. Jobs of SLURM have their cores alone.

    To be asked before a local worker has chosen its GPUs, so that it says the same as the planner.
    """
    workers, threads = profile.layout()
    neighbours = workers if isinstance(profile, LocalProfile) else 1
    return f"{profile.likely_device}/{threads}threads/{profile.world}ranks/{neighbours}workers"


def record(task: Task, result: Mapping[str, Any], seconds: float, where: str, each: float = 0.0) -> None:
    """Remember what a task took at a place, and its steady rate where it told.

    Of a task that went on from an earlier run's state, `seconds` are the last run's alone: then its training's.
    """
    read = result.get("counts", {}).get("read", 0) if task.kind == "prepare" else 0
    units = result.get("samples_seen") or result.get(
        "made", read or task.units
    )  # `made`: by this task itself
    if units:
        note(task.like, Measured(units, max(seconds, result.get("train_seconds", 0.0)), each), where)


def note(like: str, measured: Measured, where: str) -> None:
    """Keep one measurement. Two workers at once may lose one; the next one brings it back."""
    with contextlib.suppress(OSError):
        known, what = _read(), f"{like}@{where}"
        kept: dict[float, list[Sequence[float]]] = {}
        for one in [*known.get(what, ()), measured]:
            kept[one[0]] = [*kept.pop(one[0], []), one][-KEPT:]
        known[what] = [list(one) for size in list(kept)[-SIZES:] for one in kept[size]]
        write_json(cache_dir() / "times.json", known)


@contextlib.contextmanager
def timed(like: str, units: int, where: str) -> Iterator[None]:
    """Keep how long the block took."""
    start = time.monotonic()
    yield
    note(like, Measured(units, time.monotonic() - start), where)


def fit(measured: Sequence[Measured]) -> tuple[float, float]:
    """(fixed, each), neither below 0.

    Where steady rates are known, their median and the median of what is left; else the least squares of relative
    errors over the medians of each number of units, `fixed` being 0 where these are too close to tell.
    """
    steady = [one for one in measured if one.each]
    if steady:
        fixed = statistics.median(one.seconds - one.each * one.units for one in steady)
        return max(0.0, fixed), statistics.median(one.each for one in steady)
    sizes: dict[float, list[float]] = {}
    for one in measured:
        sizes.setdefault(one.units, []).append(one.seconds)
    points = [(n, max(statistics.median(took), 1e-9)) for n, took in sizes.items()]
    if max(sizes) < APART * min(sizes):
        return 0.0, statistics.median(s / n for n, s in points)
    ones, units = [1 / s for _, s in points], [n / s for n, s in points]
    aa, ab, bb = (
        sum(x * y for x, y in zip(p, q, strict=True))
        for p, q in ((ones, ones), (ones, units), (units, units))
    )
    fixed = (sum(ones) * bb - sum(units) * ab) / (aa * bb - ab**2)
    each = (sum(units) * aa - sum(ones) * ab) / (aa * bb - ab**2)
    if fixed < 0:
        return 0.0, sum(units) / bb
    return (fixed, each) if each >= 0 else (sum(ones) / aa, 0.0)


def likeness(spec: Config) -> str:
    """What the rate of a generator's task depends on."""
    return digest({key: value for key, value in spec.identity().items() if key not in _EACH})[:16]


def _read() -> dict[str, list[list[float]]]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, list[list[float]]] = read_json(cache_dir() / "times.json")
        return found
    return {}
