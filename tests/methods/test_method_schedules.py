"""Schedules are functions of samples seen over C, and of nothing else."""

import math

import pytest
from method_helpers import tiny

from ssl_diversity.methods.recipe import EMA, METHODS
from ssl_diversity.methods.schedules import cosine, linear, warmup_cosine


def test_cosine_linear_and_warmup_at_known_points() -> None:
    assert cosine(2, 0, 0) == 2
    assert cosine(2, 0, 0.5) == pytest.approx(1)
    assert cosine(2, 0, 1) == 0
    assert [linear(1, 3, p, 0.5) for p in (0, 0.25, 0.5, 1)] == [1, 2, 3, 3]
    assert linear(1, 3, 0, 0) == 3
    assert [warmup_cosine(4, 1, p, 0.1) for p in (0.05, 0.1, 1)] == pytest.approx([2, 4, 1])
    assert warmup_cosine(4, 0, 0, 0) == 4


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_rises_to_its_peak_then_falls_and_is_never_zero(method: str) -> None:
    module = tiny(method, budget=100 * 16, batch_size=16)
    rates = []
    for step in range(100):
        module.samples_seen = step * 16
        rates.append(module.learning_rate())
    peak = module.recipe.lr * 16 / 256
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(peak, rel=0.01)
    assert top == pytest.approx(100 * module.recipe.warmup_fraction, abs=1)
    assert min(rates) > 0
    assert rates[-1] < 1e-3 * peak


def test_schedules_depend_on_the_fraction_of_the_budget_seen() -> None:
    """Of two runs one of which is ten times longer, the same fraction has the same values."""
    short, long = tiny("dino", budget=1600), tiny("dino", budget=16000)
    short.samples_seen, long.samples_seen = 800, 8080 - 8  # the middles of both steps are at (800 + 8) / 1600
    assert short.progress == long.progress
    assert short.learning_rate() == long.learning_rate()
    assert short.teacher_temperature() == long.teacher_temperature()


def test_weight_decay_can_follow_a_cosine() -> None:
    module = tiny("simclr", overrides={"weight_decay": 0.04, "weight_decay_end": 0.4}, budget=16 * 1000)
    assert module.weight_decay() == pytest.approx(0.04, rel=1e-3)
    module.samples_seen = 16 * 999
    assert module.weight_decay() == pytest.approx(0.4, rel=1e-3)


def test_an_ema_forgets_as_much_per_sample_at_any_batch_size() -> None:
    ema = EMA(start=0.99, end=0.99, batch_size=256)
    assert ema.rate(0.3, 256, 10**6) == pytest.approx(0.99)
    assert ema.rate(0.3, 64, 10**6) ** 4 == pytest.approx(0.99)
    assert ema.rate(0.3, 512, 10**6) == pytest.approx(0.99**2)
    assert EMA(start=0.9, end=1, batch_size=64).rate(1, 64, 1) == 1


@pytest.mark.parametrize("budget", [1600, 32768, 10**6])
def test_an_ema_with_a_budget_forgets_as_much_over_a_run_of_any_length(budget: int) -> None:
    ema = EMA(start=0.95, end=1.0, batch_size=64, budget=32768)
    steps = budget / 64
    left = [steps * math.log(ema.rate(p, 64, budget)) for p in (0.1, 0.5, 0.9)]
    reference = [512 * math.log(cosine(0.95, 1.0, p)) for p in (0.1, 0.5, 0.9)]
    assert left == pytest.approx(reference)
