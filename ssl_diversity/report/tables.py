"""The tables of the page, from the results table and the numbers of the analysis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ssl_diversity.analysis import answer, effect
from ssl_diversity.analysis.answer import points
from ssl_diversity.analysis.effect import Effect

BASELINES = {"random": "an untrained network", "pixels": "raw pixels"}


@dataclass(frozen=True)
class Cell:
    """One table cell: a number, a smaller remark below it, and whether it stands out."""

    text: str
    note: str = ""
    mark: str = ""  # "up", "down" or "" : an interval above or below 0
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page. `groups`: (name, number of columns) above the heads."""

    caption: str
    heads: list[str]
    rows: list[tuple[list[str], list[Cell]]]  # (row heads, cells)
    groups: list[tuple[str, int]] = field(default_factory=list)

    @property
    def row_heads(self) -> int:
        return len(self.rows[0][0]) if self.rows else 1


def accuracy_table(rows: pd.DataFrame, sources: Sequence[str]) -> Table:
    """Methods by (source, N), from the rows of one downstream set, probe and budget."""
    cells = effect.summarise(rows[rows["source"] != ""], ["method", "backbone", "source", "unique_samples"])
    columns = [
        (s, n) for s in sources for n in sorted(cells.loc[cells["source"] == s, "unique_samples"].unique())
    ]
    best = cells.groupby(["source", "unique_samples"])["accuracy"].max()
    out = []
    for (method, backbone), group in cells.groupby(["method", "backbone"]):
        at = {(r.source, r.unique_samples): r for r in group.itertuples()}
        out.append(([method, backbone], [_accuracy(at.get(c), best[c]) for c in columns]))
    groups = [(s, n) for s in sources if (n := sum(c[0] == s for c in columns))]
    caption = f"Accuracy in %, by source and number of unique images N; below it {interval(cells)}. Bold: best method."
    return Table(caption, ["method", "backbone", *(f"{n:,}" for _, n in columns)], out, groups)


def interval(summary: pd.DataFrame) -> str:
    """What the intervals of `effect.summarise` are."""
    if (summary["count"] > 1).any():
        return "the 95 % interval over seeds"
    return "the probe's 95 % interval over test images (one seed)"


def _accuracy(row: Any, best: float = math.nan) -> Cell:
    if row is None:
        return Cell("–")
    note = f"{points(row.low, False)}–{points(row.high, False)}" if math.isfinite(row.low) else ""
    return Cell(points(row.accuracy, False), note, best=row.accuracy == best)


def effect_table(effects: Sequence[Effect]) -> Table:
    rows = []
    for e in effects:
        o = e.overall
        mark = {"help": "up", "hurt": "down"}.get(answer.verdict(o), "")
        span = f"{points(o.low)} to {points(o.high)}" if math.isfinite(o.low) else "none"
        fewest, most = e.seeds
        seeds = str(most) if fewest == most else f"{fewest}–{most}"
        cells = [Cell(f"{e.low_label} → {e.high_label}"), Cell(points(o.mean), mark=mark), Cell(span)]
        cells += [Cell(points(o.smallest_detectable, False)), Cell(str(len(e.per_method))), Cell(seeds)]
        rows.append(([e.probe, e.source], cells))
    heads = ["probe", "source", "N", "change", "95 % interval", "smallest detectable", "methods", "seeds"]
    return Table("Change in accuracy, in points, per probe and source.", heads, rows)


def baseline_table(rows: pd.DataFrame, probes: Sequence[str]) -> Table:
    baselines = effect.summarise(rows[rows["source"] == ""], ["method", "backbone", "probe"])
    out = []
    for (method, backbone), group in baselines.groupby(["method", "backbone"]):
        at = {r.probe: r for r in group.itertuples()}
        cells = [_accuracy(at.get(p)) for p in probes]
        out.append(([str(method), str(backbone)], cells))
    return Table(
        "Accuracy of the baselines in %, with 95 % intervals.", ["baseline", "backbone", *probes], out
    )


def over_table(over: dict[str, pd.DataFrame], sources: Sequence[str]) -> Table:
    """Every (method, N) against both baselines, per source; points."""
    out = []
    both = pd.concat([rows.assign(baseline=baseline) for baseline, rows in over.items()])
    for (method, backbone, n), group in both.groupby(["method", "backbone", "unique_samples"]):
        at = {(r.source, r.baseline): r for r in group.itertuples()}
        cells = [_difference(at.get((source, baseline))) for source in sources for baseline in BASELINES]
        out.append(([str(method), str(backbone), f"{n:,}"], cells))
    heads = ["method", "backbone", "N", *[f"over {b}" for _ in sources for b in BASELINES]]
    groups = [(s, len(BASELINES)) for s in sources]
    return Table(
        "Points above the baselines, paired by seed, with 95 % intervals over seeds.", heads, out, groups
    )


def _difference(row: Any) -> Cell:
    if row is None or row.count == 0:
        return Cell("–")
    note = f"{points(row.low)} to {points(row.high)}" if math.isfinite(row.low) else ""
    return Cell(points(row.difference), note, "up" if row.low > 0 else "down" if row.high < 0 else "")


def over_sentences(over: dict[str, pd.DataFrame], sources: Sequence[str]) -> list[str]:
    """How many methods are surely above each baseline at their largest N, where there are seeds to tell."""
    out = []
    for source in sources:
        parts = []
        for baseline, rows in over.items():
            of_source = rows[rows["source"] == source]
            largest = of_source.groupby(["method", "backbone"])["unique_samples"].transform("max")
            of_source = of_source[of_source["unique_samples"] == largest]
            if (of_source["count"] > 1).any():
                above = int((of_source["low"] > 0).sum())
                parts.append(f"{above} of {len(of_source)} methods beat {BASELINES[baseline]}")
        if parts:
            out.append(
                f"{source}, at the largest N: {', and '.join(parts)} (95 % interval over seeds above 0)."
            )
    return out


def leak_sentences(table: pd.DataFrame, probe: str) -> list[str]:
    """Per source and downstream set that it leaks: how many test images at most, and what they do to accuracy."""
    known = table["leaked_near"].fillna(table["leaked"]).fillna(0)
    cells = table[(table["source"] != "") & (known > 0)]
    out = []
    for (source, downstream), rows in cells.groupby(["source", "downstream"]):
        near = rows["leaked_near"].max()
        counts = f"up to {integer(rows['leaked'].max())} of {integer(rows['n_test'].max())} test images"
        also = "" if pd.isna(near) else f", and {integer(near)} an exact or near one"
        sentence = (
            f"{downstream} leaks into {source}: {counts} have an exact copy among the images of a cell{also}."
        )
        change = (rows["accuracy_clean"] - rows["accuracy"])[rows["probe"] == probe].dropna()
        if len(change):
            sentence += (
                f" Without them, {probe} accuracy changes by {points(change.mean())} points"
                f" (mean of {len(change)} cells; column accuracy_clean)."
            )
        out.append(sentence)
    return out


def distance_table(rows: pd.DataFrame, sources: Sequence[str]) -> Table:
    """A row per source, from the rows of one downstream set."""
    out = []
    for source in sources:
        first = next(rows[rows["source"] == source].itertuples(), None)
        if first is not None:
            numbers = [Cell(_number(first.frechet), _floor(first.frechet_floor))]
            numbers += [
                Cell(_number(first.visual_dna), _floor(first.visual_dna_floor)),
                Cell(_number(first.vendi)),
            ]
            counts = [first.distance_n, first.shared_images, first.source_real_images]
            out.append(
                ([source], [*numbers, *(Cell(integer(n)) for n in counts), Cell(first.extractor or "–")])
            )
    heads = [
        "source",
        "Fréchet",
        "VisualDNA",
        "Vendi score",
        "images n",
        "of them shared",
        "real images behind it",
    ]
    caption = (
        "Distance of each source to the downstream set's training images, at one n common to all. Floor: what two "
        "draws of those training images give. Shared: images that are among those training images themselves."
    )
    return Table(caption, [*heads, "extractor"], out)


def _number(value: Any) -> str:
    return "–" if pd.isna(value) else f"{value:.3g}"


def integer(value: Any) -> str:
    return "–" if pd.isna(value) else f"{int(value):,}"


def _floor(value: Any) -> str:
    return "" if pd.isna(value) else f"floor {value:.2g}"
