"""The effect of diversity on tables with known answers."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ssl_diversity.analysis import answer
from ssl_diversity.analysis.effect import (
    Effect,
    diversity_effects,
    estimate,
    paired_difference,
    source_contrasts,
    summarise,
)


def cell(method: str, n: int, seed: int, accuracy: float | None, **more: object) -> dict[str, object]:
    at = {"source": "a", "downstream": "d", "probe": "linear", "budget_asked": "4096", "backbone": "net"}
    at |= {"recipe": "quick", "batch_size": 64, "precision": "32-true", "replicate": seed}
    return at | {"method": method, "unique_samples": n, "seed": seed, "accuracy": accuracy} | more


def baseline(name: str, seed: int | None, accuracy: float, backbone: str = "") -> dict[str, object]:
    return {"method": name, "source": "", "downstream": "d", "probe": "linear", "budget_asked": "",
            "backbone": backbone, "seed": seed, "accuracy": accuracy}  # fmt: skip


def table(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows))
    frame["accuracy"] = frame["accuracy"].astype(float)
    integers = [c for c in ("seed", "replicate", "unique_samples", "batch_size") if c in frame]
    return frame.astype(dict.fromkeys(integers, "Int64"))


def only(effects: list[Effect]) -> Effect:
    assert len(effects) == 1
    return effects[0]


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_an_interval_is_students(n: int) -> None:
    x = np.random.default_rng(n).normal(0.03, 0.02, n)
    e = estimate([*x, math.nan])
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (e.mean, e.low, e.high) == pytest.approx((x.mean(), expected.low, expected.high))
    critical = stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)
    assert e.smallest_detectable == pytest.approx(critical * x.std(ddof=1) / math.sqrt(n))
    assert e.count == n


def test_an_effect_of_the_smallest_detectable_size_is_found_about_four_times_in_five() -> None:
    draw, n = np.random.default_rng(0), 7
    effect = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) / math.sqrt(n)
    found = [estimate(x).detectable for x in draw.normal(effect, 1, (2000, n))]
    missed = [estimate(x).detectable for x in draw.normal(0, 1, (2000, n))]
    assert 0.75 < np.mean(found) < 0.85
    assert 0.035 < np.mean(missed) < 0.065


@pytest.mark.parametrize(("values", "mean"), [([], math.nan), ([0.5], 0.5), ([math.nan, 0.5], 0.5)])
def test_one_value_or_none_gives_no_interval(values: list[float], mean: float) -> None:
    e = estimate(values)
    assert e.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(e.low)
    assert math.isnan(e.smallest_detectable)
    assert not e.detectable


def test_the_effect_is_the_mean_over_methods_of_paired_differences() -> None:
    gains = {"simclr": 0.02, "byol": 0.04, "dino": 0.06}
    offsets = {0: 0.0, 1: 0.3, 2: -0.2}  # seeds differ wildly: pairing takes that away
    rows = [
        cell(m, n, s, 0.5 + offsets[s] + (g if n == 1024 else 0.0))
        for m, g in gains.items() for n in (64, 1024) for s in offsets
    ]  # fmt: skip
    rows += [cell("simclr", 256, 0, 0.99)]  # an N between the two has no say
    e = only(diversity_effects(table(rows)))
    expected = stats.ttest_1samp(list(gains.values()), 0).confidence_interval(0.95)
    assert (e.low_label, e.high_label) == ("64", "1,024")
    assert (e.overall.mean, e.overall.low, e.overall.high) == pytest.approx(
        (0.04, expected.low, expected.high)
    )
    assert {m: v.mean for m, v in e.per_method.items()} == pytest.approx(gains)
    assert (e.seeds, e.over, e.missing) == ((3, 3), "methods", 0)


def test_a_method_with_more_seeds_has_no_more_weight() -> None:
    rows = [cell("simclr", n, s, 0.5 + 0.1 * (n > 64)) for n in (64, 128) for s in range(9)]
    rows += [cell("mae", n, 0, 0.5) for n in (64, 128)]
    e = only(diversity_effects(table(rows)))
    assert e.overall.mean == pytest.approx(0.05)
    assert e.overall.count == 2
    assert e.seeds == (1, 9)


def test_a_failed_cell_costs_its_pair_and_does_not_move_n() -> None:
    rows = [
        cell(m, n, s, 0.5 + n / 10000) for m in ("simclr", "mae") for n in (64, 256, 1024) for s in (0, 1)
    ]
    for row in rows:
        if row["unique_samples"] == 1024 and row["method"] == "mae":
            row["accuracy"] = None
    e = only(diversity_effects(table(rows)))
    assert (e.low_label, e.high_label) == ("64", "1,024")
    assert list(e.per_method) == ["simclr"]
    assert e.missing == 2
    assert "2 pairs without a result" in answer.sentence(e)


def test_unpaired_seeds_are_left_out() -> None:
    rows = [cell("simclr", 64, 0, 0.5), cell("simclr", 64, 1, 0.6), cell("simclr", 128, 0, 0.7)]
    rows += [cell("simclr", 128, 2, 0.9)]
    e = only(diversity_effects(table(rows)))
    assert e.overall.mean == pytest.approx(0.2)
    assert e.overall.count == 1


def test_one_method_has_an_interval_over_its_seeds_and_one_seed_has_none() -> None:
    rows = [cell("simclr", n, s, 0.5 + (0.1 + 0.01 * s) * (n > 64)) for n in (64, 128) for s in range(3)]
    e = only(diversity_effects(table(rows)))
    assert (e.over, e.overall.count) == ("seeds", 3)
    assert e.overall.detectable
    assert "interval over seeds of one method" in answer.sentence(e)
    alone = only(diversity_effects(table(r for r in rows if r["seed"] == 0)))
    assert answer.verdict(alone.overall) == "unknown"
    assert "no conclusion" in answer.sentence(alone)


def test_one_n_is_no_effect_and_no_result_is_no_number() -> None:
    assert diversity_effects(table([cell("simclr", 64, 0, 0.5), cell("mae", 64, 0, 0.5)])) == []
    assert "cannot tell" in answer.answer([])
    e = only(diversity_effects(table([cell("simclr", 64, 0, None), cell("simclr", 128, 0, None)])))
    assert (e.overall.count, e.missing) == (0, 1)
    assert "no pair of cells has results yet" in answer.sentence(e)


def test_sources_downstream_sets_probes_and_budgets_are_kept_apart() -> None:
    rows = [
        cell("simclr", n, 0, 0.5 + gain * (n > 64), source=source, probe=probe, downstream=d, budget_asked=c)
        for n in (64, 128)
        for source, probe, d, c, gain in [
            ("a", "linear", "d", "1", 0.1), ("b", "linear", "d", "1", 0.2),
            ("a", "knn", "d", "1", 0.3), ("a", "linear", "e", "1", 0.4), ("a", "linear", "d", "2", 0.05),
        ]
    ]  # fmt: skip
    found = {
        (e.source, e.probe, e.downstream, e.budget): e.overall.mean for e in diversity_effects(table(rows))
    }
    assert found == pytest.approx(
        {("a", "linear", "d", "1"): 0.1, ("b", "linear", "d", "1"): 0.2, ("a", "knn", "d", "1"): 0.3,
         ("a", "linear", "e", "1"): 0.4, ("a", "linear", "d", "2"): 0.05}
    )  # fmt: skip


def test_sources_are_compared_at_the_largest_n_that_both_have() -> None:
    rows = [cell(m, n, 0, 0.5 + n / 10000, source="a") for m in ("simclr", "mae") for n in (64, 256, 1024)]
    rows += [cell(m, n, 0, 0.4 + n / 10000, source="b") for m in ("simclr", "mae") for n in (64, 256)]
    (a, b, e), = source_contrasts(table(rows))  # fmt: skip
    assert (a, b, e.high_label) == ("a", "b", "256")
    assert e.overall.mean == pytest.approx(0.1)
    assert answer.contrast_sentence(a, b, e).startswith("a beats b at N = 256 by 10.0 points")


def test_a_baseline_is_paired_by_seed_and_backbone() -> None:
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(0.8, 0.02, 5), draw.normal(0.7, 0.02, 5)
    rows = [cell("simclr", 64, s, ours[s]) for s in range(5)]
    rows += [baseline("random", s, theirs[s], "net") for s in range(5)]
    rows += [baseline("random", s, 0.1, "another") for s in range(5)]
    rows += [baseline("pixels", None, 0.75)]
    frame = table(rows)
    row = paired_difference(frame, "random").iloc[0]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(
        ((ours - theirs).mean(), expected.low, expected.high)
    )
    pixels = paired_difference(frame, "pixels").iloc[0]
    assert pixels["difference"] == pytest.approx(ours.mean() - 0.75)
    assert pixels["count"] == 5


def test_a_baseline_that_lacks_seeds_or_is_absent_gives_fewer_pairs_or_none() -> None:
    rows = [cell("simclr", 64, s, 0.8) for s in range(3)] + [
        baseline("random", s, 0.7, "net") for s in (0, 1)
    ]
    assert paired_difference(table(rows), "random").iloc[0]["count"] == 2
    missing = paired_difference(table(rows), "pixels").iloc[0]
    assert missing["count"] == 0
    assert math.isnan(missing["difference"])


def test_replicates_of_a_seed_are_averaged_before_they_count() -> None:
    rows = [cell("simclr", 64, 0, a, replicate=r) for r, a in enumerate((0.7, 0.9))]
    rows += [baseline("random", 0, 0.6, "net")]
    row = paired_difference(table(rows), "random").iloc[0]
    assert (row["difference"], row["count"]) == (pytest.approx(0.2), 1)


def test_a_summary_takes_seeds_where_there_are_some_and_else_the_probes_interval() -> None:
    rows = [cell("simclr", 64, s, a, accuracy_low=0.1, accuracy_high=0.9) for s, a in enumerate((0.49, 0.51))]
    rows += [cell("mae", 64, 0, 0.5, accuracy_low=0.4, accuracy_high=0.6), cell("byol", 64, 0, None)]
    out = summarise(table(rows), ["method"]).set_index("method")
    assert list(out.index) == ["mae", "simclr"]
    assert tuple(out.loc["mae", ["low", "high"]]) == (0.4, 0.6)
    expected = stats.ttest_1samp([0.49, 0.51], 0).confidence_interval(0.95)
    assert out.loc["simclr", "low"] == pytest.approx(expected.low)
    wide = summarise(table(cell("simclr", 64, s, a) for s, a in enumerate((0.1, 0.9))), ["method"]).iloc[0]
    assert (wide["low"], wide["high"]) == (0, 1)


def test_the_answer_says_what_was_found_for_whom() -> None:
    def effect(source: str, values: list[float]) -> Effect:
        methods = {f"m{i}": estimate([v]) for i, v in enumerate(values)}
        return Effect(source, "d", "linear", "1", "64", "128", estimate(values), methods)

    up, down = effect("a", [0.05, 0.06, 0.07]), effect("b", [-0.05, -0.06, -0.07])
    flat, alone = effect("c", [-0.05, 0.06, 0.01]), effect("e", [0.05])
    text = answer.answer([up, down, flat, alone])
    assert "More unique images help when pretraining on a (+6.0 points)." in text
    assert "Fewer images, seen more often, do better on b (−6.0 points)." in text
    assert "No difference detectable on c (+0.7 points)." in text
    assert "Too few results for an interval on e" in text
    assert "smallest detectable: " in answer.sentence(flat)
    assert "95 % interval +3.5 to +8.5 (3 methods, 1 seed each)." in answer.sentence(up)


def test_nearness_says_so_where_a_generated_source_is_not_nearer() -> None:
    distances = {"digits": 0.1, "generated": 3.0, "patches": 9.0, "textures": 2.0}
    found = dict(
        (s.split(" than ")[1].split(" is")[0], holds)
        for holds, s in answer.nearness(distances, {"generated"}, "d")
    )
    assert found == {"patches": True, "textures": False}
    assert any(
        "is NOT nearer to d than textures is (3 against 2)" in s
        for _, s in answer.nearness(distances, {"generated"}, "d")
    )
    assert answer.nearness({"digits": 0.1, "patches": 9.0}, set(), "d") == []
    (noise,) = answer.nearness({"digits": 0.1, "generated": 3.0}, {"generated"}, "d", noise=2.0)
    assert noise == (False, "generated is NOT nearer to d than noise is (3 against 2).")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0312, "+3.1"), (-0.0312, "−3.1"), (-0.0001, "0.0"), (math.nan, "–")]
)
def test_points_are_signed_and_never_minus_zero(value: float, text: str) -> None:
    assert answer.points(value) == text
