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
LARGE = frozenset(
    {"train-generator", "sample", "generate"}
)  # kinds of tasks that may need a GPU of their own


def with_workers(profile: LocalProfile, workers: int) -> LocalProfile:
    return profile.model_copy(update={"workers": workers})


def note(like: str, profile: LocalProfile, samples_per_second: float) -> None:
    """Remember what all workers of a profile reached together, on cells like `like`."""
    each = profile.layout()[0] / samples_per_second
    estimate.note(estimate.together(f"pretrain/{like}"), Measured(1, each, each), estimate.place(profile))


def settled(profile: Profile, plan: Plan) -> Profile:
    """`profile` with a number of workers, if it leaves that open and another than the usual one was measured to pay.

    Every kind of cell of the plan must have been measured, with both numbers. The whole plan counts, not what is left of
    it, so that one sweep is always run by the same number. On GPUs a plan that generates images keeps the usual one.
    """
    known = estimate.times()
    if not isinstance(profile, LocalProfile) or profile.workers != "auto" or not known.any_together():
        return profile
    if profile.likely_device == "cuda" and any(task.kind in LARGE for task in plan.tasks):
        return profile
    work: dict[str, Counter[int]] = {}  # like -> samples of a cell -> number of such cells
    for cell in plan.cells:
        if cell.budget is None or not cell.like:
            return profile  # not known yet what it is
        work.setdefault(cell.like, Counter())[cell.budget] += 1
    taken = {}
    for workers in range(1, MOST + 1):
        place = estimate.place(with_workers(profile, workers))
        each = {like: known.seconds(estimate.together(f"pretrain/{like}"), 1, place) for like in work}
        measured = {like: seconds for like, seconds in each.items() if seconds is not None}
        if work and measured.keys() == work.keys():
            taken[workers] = _seconds(workers, work, measured)
    usual = profile.layout()[0]
    if usual not in taken:
        return profile
    best = min(taken, key=lambda workers: taken[workers])
    return with_workers(profile, best) if taken[best] * GAIN < taken[usual] else profile


def _seconds(workers: int, work: Mapping[str, Counter[int]], each: Mapping[str, float]) -> float:
    """By the clock: the cells shared among the workers, but not less than the longest of them."""
    cells = [
        (each[like] * samples, count) for like, sizes in work.items() for samples, count in sizes.items()
    ]
    return max(sum(seconds * count for seconds, count in cells) / workers, *(seconds for seconds, _ in cells))
