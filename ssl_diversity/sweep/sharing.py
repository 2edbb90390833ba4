"""How many workers share this machine, where its profile leaves that open: as many as train a sweep soonest.

Decided from what `ssl-diversity profile --at-once` measured here; without such a measurement, the profile's own rule.
"""

from collections import Counter
from collections.abc import Mapping

from ssl_diversity.sweep import estimate
from ssl_diversity.sweep.estimate import Measured
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.profile import LocalProfile, Profile

MOST = 256  # workers that are thought of
GAIN = 1.05  # how much sooner another number of workers must be done, to be preferred to the usual one


def with_workers(profile: LocalProfile, workers: int) -> LocalProfile:
    return profile.model_copy(update={"workers": workers})


def note(like: str, profile: LocalProfile, samples_per_second: float) -> None:
    """Remember what all workers of a profile reached together, on cells like `like`."""
    each = profile.layout()[0] / samples_per_second
    estimate.note(f"together/{like}", Measured(1, each, each), estimate.place(profile))


def settled(profile: Profile, plan: Plan) -> Profile:
    """`profile` with a number of workers, if it leaves that open and another than the usual one was measured to pay.

    The whole plan counts, not what is left of it, so that one sweep is always run by the same number.
    """
    if not isinstance(profile, LocalProfile) or profile.workers != "auto":
        return profile
    work: dict[str, Counter[int]] = {}  # like -> samples of a cell -> number of such cells
    for cell in plan.cells:
        if cell.budget is not None and cell.like:
            work.setdefault(cell.like, Counter())[cell.budget] += 1
    usual = profile.layout()[0]
    known = estimate.times()

    def rates(workers: int) -> dict[str, float]:
        """Seconds of one worker per sample, by what cells are like."""
        place = estimate.place(with_workers(profile, workers))
        found = {like: known.seconds(f"together/{like}", 1, place) for like in work}
        return {like: seconds for like, seconds in found.items() if seconds is not None}

    measured = {workers: rates(workers) for workers in range(1, MOST + 1)}
    likes = measured[usual].keys() if usual in measured else set[str]()
    taken = {
        workers: _seconds(workers, {like: work[like] for like in likes}, found)
        for workers, found in measured.items()
        if likes and likes <= found.keys()
    }
    if not taken:
        return profile
    best = min(taken, key=lambda workers: taken[workers])
    return with_workers(profile, best) if taken[best] * GAIN < taken[usual] else profile


def _seconds(workers: int, work: Mapping[str, Counter[int]], each: Mapping[str, float]) -> float:
    """By the clock: the cells shared among the workers, but not less than the longest of them."""
    cells = [
        (each[like] * samples, count) for like, sizes in work.items() for samples, count in sizes.items()
    ]
    return max(sum(seconds * count for seconds, count in cells) / workers, *(seconds for seconds, _ in cells))
