"""The number of workers is the profile's, or the one that was measured to end the plan soonest."""

from pathlib import Path

import pytest

from ssl_diversity.runtime import cores
from ssl_diversity.sweep import config, sharing
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.profile import LocalProfile, load_profile


@pytest.fixture(autouse=True)
def four_cores(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "4")
    if cores() < 2:
        pytest.skip("one core")


def local(**values: object) -> LocalProfile:
    profile = load_profile("local")
    assert isinstance(profile, LocalProfile)
    return profile.model_copy(update={"device": "cpu", **values})


def plan(*texts: str) -> Plan:
    """Of cells that wait for their pool, which is enough to know what they are like."""
    return expand(config.load("quickstart", ["methods=[simclr,byol]", "sources=[digits]", "seeds=4", *texts]))


def likes(planned: Plan) -> dict[str, str]:
    return {cell.method: cell.like for cell in planned.cells}


def measured(like: str, **rates: float) -> None:
    """`two=100`: two workers reached 100 samples/s together."""
    for name, rate in rates.items():
        workers = {"one": 1, "two": 2, "four": 4}[name]
        sharing.note(like, sharing.with_workers(local(), workers), rate)


def test_without_a_measurement_it_is_the_usual_number() -> None:
    planned = plan()
    assert sharing.settled(local(), planned) == local()
    measured(likes(planned)["simclr"], four=1000)  # nothing to compare it with
    assert sharing.settled(local(), planned) == local()


def test_what_reaches_most_samples_is_taken_if_it_is_much() -> None:
    planned = plan()
    like = likes(planned)
    measured(like["simclr"], one=90, two=100, four=104)
    assert sharing.settled(local(), planned) == local()
    measured(like["byol"], one=90, two=100, four=150)
    assert sharing.settled(local(), planned).layout()[0] == 4
    for _ in range(2):
        measured(like["byol"], one=400)  # of three measurements the one between
    assert sharing.settled(local(), planned).layout()[0] == 1


def test_a_number_that_not_all_of_them_were_measured_with_is_not_compared() -> None:
    planned = plan()
    measured(likes(planned)["simclr"], two=100, four=1000)
    measured(likes(planned)["byol"], two=100)
    assert sharing.settled(local(), planned) == local()


def test_cells_that_are_not_known_yet_leave_it_at_the_usual_number() -> None:
    for like in likes(plan()).values():
        measured(like, two=100, four=1000)
    assert sharing.settled(local(), plan()).layout()[0] == 4
    assert sharing.settled(local(), plan("unique_samples=[64,all]")) == local()


def test_more_workers_than_cells_gain_nothing() -> None:
    planned = plan("unique_samples=[64]", "budget=4096", "methods=[simclr]", "seeds=1")
    assert len(planned.cells) == 1
    measured(likes(planned)["simclr"], one=100, two=110, four=150)
    assert sharing.settled(local(), planned).layout()[0] == 1


def test_the_users_own_number_stays() -> None:
    planned = plan()
    for like in likes(planned).values():
        measured(like, two=100, four=1000)
    assert sharing.settled(local(workers=3), planned) == local(workers=3)
    assert sharing.settled(local(), planned).layout() == (4, max(1, cores() // 4))
