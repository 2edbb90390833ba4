"""The diversity effect: what more unique images change at an equal budget, and how sure that is.

Input is the results table (docs/results.md): one row per (cell, downstream, probe), accuracies in [0, 1].
Every interval is Student's t on paired differences; nothing here draws random numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.special import stdtrit

CONFIDENCE = 0.95
POWER = 0.8
GROUP = ["source", "downstream", "probe", "budget_asked"]  # one answer each
UNIT = ["method", "backbone", "recipe", "batch_size", "precision"]  # equal within a pair of cells
PAIR = ["seed", "replicate"]


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` independent differences with its t-interval; NaN where it cannot be had.

    `smallest_detectable` is the true difference that this design would have told from 0 with 80 % power:
    (t(0.975, count - 1) + t(0.8, count - 1)) * standard error.
    """

    mean: float
    low: float
    high: float
    count: int
    smallest_detectable: float

    @property
    def detectable(self) -> bool:
        """Whether the interval exists and leaves 0 out."""
        return self.low > 0 or self.high < 0


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of the finite `values` with a 95 % t-interval; one value has a mean but no interval."""
    x = np.asarray(list(values), dtype=np.float64)
    x = x[np.isfinite(x)]
    if x.size < 2:
        return Estimate(float(x[0]) if x.size else math.nan, math.nan, math.nan, x.size, math.nan)
    error = float(x.std(ddof=1)) / math.sqrt(x.size)
    critical = float(stdtrit(x.size - 1, 0.5 + CONFIDENCE / 2))
    detectable = (critical + float(stdtrit(x.size - 1, POWER))) * error
    mean = float(x.mean())
    return Estimate(mean, mean - critical * error, mean + critical * error, x.size, detectable)


@dataclass(frozen=True)
class Effect:
    """accuracy(`high_label`) - accuracy(`low_label`) for one source, downstream set, probe and budget."""

    source: str
    downstream: str
    probe: str
    budget: str
    low_label: str
    high_label: str
    overall: Estimate  # over methods; over seeds where there is one method
    per_method: dict[str, Estimate] = field(default_factory=dict)  # over seeds and replicates
    missing: int = 0  # pairs planned of which a half has no result

    @property
    def seeds(self) -> tuple[int, int]:
        """The fewest and the most pairs (seeds and replicates) that a method has."""
        counts = [e.count for e in self.per_method.values()] or [0]
        return min(counts), max(counts)

    @property
    def over(self) -> str:
        return "methods" if len(self.per_method) > 1 else "seeds"


def diversity_effects(table: pd.DataFrame) -> list[Effect]:
    """Per source, downstream set, probe and budget: Δ = accuracy(N_max) - accuracy(N_min).

    Paired by seed and replicate within equal coordinates; averaged within a method; then a t-interval over
    methods as clusters (DESIGN: methods share the pool and the test set, seeds within one share more). N_min
    and N_max are those planned, so a failed cell costs its pair and does not move the comparison. Groups in
    which every cell has the same N are left out.
    """
    cells = table[table["source"] != ""]
    planned = cells.groupby([*GROUP, *UNIT], dropna=False)["unique_samples"]
    low, high = planned.transform("min"), planned.transform("max")
    unique = cells["unique_samples"]
    low_cells, high_cells = cells[(unique == low) & (low < high)], cells[(unique == high) & (low < high)]
    effects = []
    for group, pairs in _pairs(high_cells, low_cells).groupby(GROUP, sort=True):
        effects.append(_effect(group, pairs))
    return effects


def source_contrasts(table: pd.DataFrame) -> list[tuple[str, str, Effect]]:
    """(a, b, accuracy(a) - accuracy(b)) for every two sources, at the largest N that both have.

    Paired by method, seed and replicate at equal coordinates, clustered by method as in `diversity_effects`;
    `low_label` and `high_label` are both that N, and `source` is a.
    """
    cells = table[table["source"] != ""]
    names = sorted(cells["source"].unique())
    out = []
    for a, b in [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]:
        of_b = cells[cells["source"] == b].assign(source=a)
        pairs = _pairs(cells[cells["source"] == a], of_b, same=["unique_samples"])
        pairs["unique_samples_a"] = pairs["unique_samples_b"] = pairs["unique_samples"]
        largest = pairs.groupby([*GROUP, *UNIT], dropna=False)["unique_samples"].transform("max")
        for group, rows in pairs[pairs["unique_samples"] == largest].groupby(GROUP, sort=True):
            out.append((a, b, _effect(group, rows)))
    return out


def paired_difference(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Each group of cells minus a baseline (`random` or `pixels`) on the same downstream set and probe.

    Paired by seed where the baseline has seeds (and by backbone where it has one), else against its one value.
    Returns a row per source, downstream, probe, budget, method, backbone, recipe and N, with columns
    difference, low, high, count (of seeds): a 95 % t-interval over seeds, replicates averaged first.
    """
    reference = table[(table["source"] == "") & (table["method"] == baseline)]
    keys = ["downstream", "probe"]
    keys += ["backbone"] if (reference["backbone"] != "").any() else []
    keys += ["seed"] if reference["seed"].notna().any() else []
    expected = reference.groupby(keys)["accuracy"].mean().rename("expected").reset_index()
    cells = table[table["source"] != ""].merge(expected, on=keys, how="left")
    cells["difference"] = cells["accuracy"] - cells["expected"]
    by = [*GROUP, "method", "backbone", "recipe", "unique_samples"]
    per_seed = cells.groupby([*by, "seed"])["difference"].mean().reset_index()
    rows = []
    for key, values in per_seed.groupby(by, sort=True)["difference"]:
        e = estimate(values)
        at = dict(zip(by, key, strict=True))
        rows.append({**at, "difference": e.mean, "low": e.low, "high": e.high, "count": e.count})
    return pd.DataFrame(rows, columns=[*by, "difference", "low", "high", "count"])


def summarise(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean accuracy per group with an interval: t over seeds, or the probe's own where there is one result.

    Columns: `by`, accuracy, low, high, count; intervals end at 0 and 1. Rows without an accuracy are left out.
    """
    rows = []
    for key, group in table.dropna(subset=["accuracy"]).groupby(list(by), dropna=False, sort=True):
        e = estimate(group["accuracy"])
        first = group.iloc[0]
        low, high = (
            (max(0.0, e.low), min(1.0, e.high))
            if e.count > 1
            else (first["accuracy_low"], first["accuracy_high"])
        )
        at = dict(zip(by, key, strict=True))
        rows.append({**at, "accuracy": e.mean, "low": low, "high": high, "count": e.count})
    return pd.DataFrame(rows, columns=[*by, "accuracy", "low", "high", "count"])


def _pairs(a: pd.DataFrame, b: pd.DataFrame, same: Sequence[str] = ()) -> pd.DataFrame:
    """Cells of `a` and `b` at equal coordinates, side by side as accuracy_a, accuracy_b (and their N)."""
    keys = [*GROUP, *UNIT, *PAIR, *same]
    columns = [*GROUP, *UNIT, *PAIR, "unique_samples", "accuracy"]
    return a[columns].merge(b[columns], on=keys, suffixes=("_a", "_b"))


def _effect(group: tuple[str, str, str, str], pairs: pd.DataFrame) -> Effect:
    difference = pairs["accuracy_a"] - pairs["accuracy_b"]
    per_method = {
        str(method): e
        for method, values in difference.groupby(pairs["method"], sort=True)
        if (e := estimate(values)).count
    }
    means = [e.mean for e in per_method.values()]
    overall = next(iter(per_method.values())) if len(means) == 1 else estimate(means)
    low_label, high_label = _span(pairs["unique_samples_b"]), _span(pairs["unique_samples_a"])
    return Effect(*group, low_label, high_label, overall, per_method, int(difference.isna().sum()))


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
