"""C, N, E, D: parsed, checked, and refused with the nearest value that works."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_diversity import budget
from ssl_diversity.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [(16384, 16384, "samples"), ("5e6", 5e6, "samples"), (5e6, 5e6, "samples"), ("1e15flop", 1e15, "flop")],
)
def test_budgets(text: object, amount: float, unit: str) -> None:
    assert budget.parse_budget(text) == budget.Budget(amount, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5", "", "1e3parsecs"])
def test_a_wrong_budget_is_named(text: str) -> None:
    with pytest.raises(UserError, match="budget="):
        budget.parse_budget(text)


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_flops_pay_for_the_largest_whole_number_of_samples(per_sample: int, samples: int) -> None:
    assert budget.Budget(float(per_sample * samples), "flop").samples(per_sample) in (samples, samples - 1)
    assert budget.parse_budget(f"{samples}").samples(per_sample) == samples


def test_unique_samples() -> None:
    assert budget.parse_unique("C/8", 4096, 10**6) == 512
    assert budget.parse_unique("C", 4096, 10**6) == 4096
    assert budget.parse_unique("all", 4096, 1000) == 1000
    assert budget.parse_unique("all", 4096, 10**6) == 4096
    assert budget.parse_unique(1e3, 4096, 10**6) == 1000
    for wrong in ("C/0", "some", "-1", "0", "1.5"):
        with pytest.raises(UserError, match="unique_samples="):
            budget.parse_unique(wrong, 4096, 10**6)


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 2000))
def test_refused_exactly_where_a_batch_could_hold_an_image_twice(n: int, batch: int, c: int) -> None:
    works = n <= 400 and n <= c and (n == batch or n >= 2 * batch)
    if works:
        budget.check_unique(n, c, batch, 400, "p")
    else:
        with pytest.raises(UserError, match=f"unique_samples={n}"):
            budget.check_unique(n, c, batch, 400, "p")


def test_the_nearest_that_works_is_named() -> None:
    with pytest.raises(UserError, match="nearest that works is 64"):
        budget.check_unique(70, 10**4, 64, 10**4, "p")
    with pytest.raises(UserError, match="nearest that works is 128"):
        budget.check_unique(120, 10**4, 64, 10**4, "p")


def test_whole_batches_are_used() -> None:
    assert budget.used(1000, 64) == 960
    with pytest.raises(UserError, match="less than one batch"):
        budget.used(63, 64)
    assert budget.epochs(64, 16384) == 256
    assert budget.diversity(64, 16384) == 64 / 16384
