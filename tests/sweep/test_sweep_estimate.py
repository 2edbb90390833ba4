"""What earlier tasks took tells what later ones will take, by a clock of the test's own."""

import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_diversity.sweep import config, estimate
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.estimate import KEPT, SIZES, Measured, fit
from ssl_diversity.sweep.forecast import Forecast
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.profile import LocalProfile, parse_profile
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task

TRUTH = {"pretrain": (3.0, 0.002), "probe": (0.5, 0.001), "distance": (1.0, 0.0005), "prepare": (2.0, 0.001)}
UNITS = st.lists(st.integers(1, 10**7), min_size=2, max_size=6, unique=True)
SECONDS = st.floats(0.01, 1e4)


def truth(task: Task) -> float:
    fixed, each = TRUTH[task.kind]
    return fixed + each * task.units


def ran(plan: Plan, where: str, noise: float = 0.0) -> None:
    """Every task of the plan was done there; cells tell their steady rate."""
    draw = random.Random(0)
    for task in plan.tasks:
        times = 1 + noise * draw.uniform(-1, 1)
        each = TRUTH["pretrain"][1] * times if task.kind == "pretrain" else 0.0
        estimate.record(task, {}, truth(task) * times, where, each)


def left(plan: Plan) -> list[Task]:
    done = Done()
    return [task for task in plan.tasks if task not in done]


def clock(plan: Plan, workers: int) -> float:
    """Seconds until workers, each of which takes the first task that is ready, have done what is left."""
    free, waiting, ends = [0.0] * workers, left(plan), dict[tuple[str, str], float]()
    open_ids = {task.id for task in waiting}
    while waiting:
        now = heapq.heappop(free)
        ready = (
            t for t in waiting if all(ends.get(n.id, now + 1) <= now for n in t.needs if n.id in open_ids)
        )
        if task := next(ready, None):
            waiting.remove(task)
            ends[task.id] = now + truth(task)
            heapq.heappush(free, ends[task.id])
        else:
            heapq.heappush(free, min(end for end in ends.values() if end > now))
    return max(ends.values())


def larger(*more: str) -> Plan:
    choices = ["sources=[digits]", "methods=[simclr,byol]", "unique_samples=[64,128,256,1024]", "budget=2048"]
    return expand(config.load("quickstart", [*choices, *more]))


def local(**values: object) -> LocalProfile:
    return LocalProfile.model_validate(
        {"executor": "local", "workers": 2, "threads": 1, "device": "cpu"} | values
    )


@given(UNITS, SECONDS, st.floats(1e-6, 1.0))
def test_two_sizes_tell_what_is_fixed_and_what_is_steady(sizes: list[int], fixed: float, each: float) -> None:
    if max(sizes) < estimate.APART * min(sizes):
        return
    found = fit([Measured(n, fixed + each * n) for n in sizes])
    for n in sizes:
        assert found[0] + found[1] * n == pytest.approx(fixed + each * n, rel=1e-3)


@given(
    st.lists(
        st.builds(Measured, st.integers(1, 10**7), SECONDS, st.just(0.0) | st.floats(1e-6, 1.0)), min_size=1
    )
)
def test_an_estimate_is_never_negative_and_grows_with_the_task(measured: list[Measured]) -> None:
    fixed, each = fit(measured)
    assert fixed >= 0
    assert each >= 0
    assert fixed + each > 0


@given(st.integers(1, 10**6), st.floats(0.1, 100), st.floats(1e-6, 1e-2), st.integers(2, 1000))
def test_one_run_that_told_its_pace_is_enough(n: int, fixed: float, each: float, times: int) -> None:
    assert sum(fit([Measured(n, fixed + each * n, each)])) == pytest.approx(fixed + each)
    found = fit([Measured(n, fixed + each * n, each)])
    assert found[0] + found[1] * n * times == pytest.approx(fixed + each * n * times)


def test_a_pace_is_steady_whatever_the_beginning_and_the_end_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: now[0])
    heard: list[tuple[int, int]] = []
    pace = estimate.Pace(lambda *told: heard.append(told))
    assert pace.each(1000) == 0
    for now[0], done in [(9.0, 100), (10.0, 150), (26.0, 950)]:
        pace(done, 1000)
    now[0] = 99.0
    assert pace.each(1000) == pytest.approx(0.02)
    assert pace.each(10_000) == 0  # too little of it was seen
    assert heard == [(100, 1000), (150, 1000), (950, 1000)]


def test_a_task_that_went_on_counts_the_training_of_all_its_runs(small: SweepConfig, pools: None) -> None:
    task = next(task for task in expand(small).tasks if task.kind == "pretrain")
    estimate.record(task, {"samples_seen": 100, "train_seconds": 50.0}, 7.0, "here")
    assert estimate.times().of(task, "here") == pytest.approx(50.0 * task.units / 100)


def test_measurements_are_kept_for_few_sizes_and_the_latest_count(home: None) -> None:
    for size, number in itertools.product(range(1, 20), range(20)):
        estimate.note("probe/x", Measured(size, 1000.0 + number), "here")
    (kept,) = estimate._read().values()
    assert len(kept) == KEPT * SIZES
    assert min(seconds for _, seconds, _ in kept) == 1000 + 20 - KEPT


def test_a_larger_sweep_takes_what_the_plan_said(small: SweepConfig, pools: None) -> None:
    profile = local()
    ran(expand(small), estimate.place(profile), noise=0.1)
    plan = larger("methods=[simclr,byol]")
    forecast = Forecast(plan, profile)
    assert not forecast.unmeasured
    assert not forecast.left.rough
    assert forecast.wall_s == pytest.approx(clock(plan, 2), rel=0.2)
    assert forecast.core_hours == pytest.approx(sum(map(truth, left(plan))) / 3600, rel=0.1)
    for cell in plan.cells:
        assert cell.task is not None
        assert forecast.cell(cell).seconds == pytest.approx(truth(cell.task), rel=0.1)


def test_workers_share_the_work_down_to_its_longest_chain(small: SweepConfig, pools: None) -> None:
    plan, found = larger(), []
    for workers in (1, 2, 1000):
        profile = local(workers=workers)
        ran(expand(small), estimate.place(profile))
        found.append(Forecast(plan, profile))
    assert found[1].wall_s == pytest.approx(found[0].wall_s / 2)
    chain = max(truth(c.task) + max(truth(p) for p in c.probes.values()) for c in plan.cells if c.task)
    assert found[2].wall_s == found[2].chain_s == pytest.approx(chain, rel=0.01)
    assert found[2].core_hours == pytest.approx(found[0].core_hours)


@pytest.mark.parametrize(
    "other",
    [
        "batch_size=32",
        "precision=32-true",
        "order={windowed: {shards: 2, lanes: 2}}",
        "hyperparameters.simclr.views=[{count: 2, size: 8}]",
    ],
)
def test_what_changes_the_rate_is_not_taken_for_measured(small: SweepConfig, pools: None, other: str) -> None:
    profile = local()
    ran(expand(small), estimate.place(profile))
    for choices, measured in (((), True), ((other,), False)):
        plan = larger("methods=[simclr]", *choices)
        assert all((Forecast(plan, profile).cell(cell).seconds > 0) == measured for cell in plan.cells)
    crowded = local(workers=4)
    assert Forecast(larger("methods=[simclr]"), crowded).left.unknown


def test_what_was_never_measured_is_said_to_be_rough(small: SweepConfig, pools: None) -> None:
    profile = local(rough_flops_per_second=1e9)
    plan = larger("methods=[simclr]")
    cells = tuple(cell.vary(flops_per_sample=1000) for cell in plan.cells)
    forecast = Forecast(Plan(**{**vars(plan), "cells": cells}), profile)
    assert forecast.cell(cells[0]) == forecast.task(cells[0].task)  # type: ignore[arg-type]
    assert forecast.cell(cells[0]).seconds == 2048 * 1000 / 1e9
    assert "unmeasured: rough, from FLOPs" in forecast.words
    assert f"not counted: {forecast.unmeasured} tasks" in forecast.words
    assert forecast.unmeasured == len(left(plan)) - len(cells)


def test_gpu_hours_are_those_of_the_workers_on_gpus(
    small: SweepConfig, pools: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    shared = local(device="cuda")  # two workers on one GPU
    values = {"executor": "slurm", "workers": 4, "time_min": 60, "cpus": 2, "device": "cuda", "gpus": 1}
    light = {"light": {"kinds": ["probe"], "device": "cpu", "gpus": 0, "workers": 2}}
    slurm = parse_profile(values | {"classes": light}, "test")
    plan = expand(small)
    trained = sum(truth(task) for task in left(plan) if task.kind != "probe")
    probed = sum(truth(task) for task in left(plan) if task.kind == "probe")
    ran(plan, estimate.place(shared))
    assert Forecast(plan, shared).gpu_hours == pytest.approx((trained + probed) / 2 / 3600)
    for name in ("main", "light"):
        ran(plan, estimate.place(slurm.of(name)))
    forecast = Forecast(plan, slurm)
    assert forecast.gpu_hours == pytest.approx(trained / 3600)
    assert forecast.core_hours == pytest.approx(2 * (trained + probed) / 3600)
    assert "GPU-hours" in forecast.words
    assert forecast.worker_s == {"main": pytest.approx(trained), "light": pytest.approx(probed)}


def test_cells_that_wait_for_their_pool_are_counted_with_their_probes(
    small: SweepConfig, pools: None
) -> None:
    profile = local()
    ran(expand(small), estimate.place(profile))
    waiting = expand(small.model_copy(update={"sources": {"patches": {"recipe": "photo_patches"}}}))
    assert all(cell.task is None for cell in waiting.cells)
    there = expand(small)
    forecast = Forecast(waiting, profile)
    cells = sum(truth(c.task) + sum(map(truth, c.probes.values())) for c in there.cells if c.task)
    done_already = sum(truth(b.task) for b in there.baselines)
    assert sum(forecast.worker_s.values()) == pytest.approx(cells + done_already, rel=0.25)
    assert forecast.chain_s > max(forecast.cell(cell).seconds for cell in waiting.cells)
