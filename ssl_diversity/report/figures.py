"""The figures, from the results table: accuracy against N, the effect of N, and gain against distance.

Each is small enough to read on a phone; the page lays them out side by side where there is room. Colours are
Okabe and Ito's (jfly.uni-koeln.de/color), and every source has a marker of its own as well.
"""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ssl_diversity.analysis.effect import Effect, summarise
from ssl_diversity.files import write_atomic
from ssl_diversity.report.words import short

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DISTANCES = {"frechet": "Fréchet distance", "visual_dna": "VisualDNA distance"}
DASHES = {"random": (4, 2), "pixels": (1, 2), "chance": (4, 2, 1, 2)}
INK, MUTED, FAINT, PAPER = "#1a1a1a", "#767676", "#d9d9d9", "#ffffff"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "ssl-diversity",  # the same table gives the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def colours(sources: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each source, the same in every figure of a report."""
    return {s: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, s in enumerate(sources)}


def accuracy_panels(table: pd.DataFrame, sources: Sequence[str]) -> tuple[Figure, dict[str, Figure]]:
    """Accuracy against N, a line per source: one figure of all methods, and one of each by its name.

    `table`: the rows of one downstream set, probe and budget, baselines included. All share one y axis.
    Intervals: 95 % over seeds, or the probe's own where there is one seed. Grey: the baselines. A collapsed cell
    does not stretch the axis; where it falls below, its accuracy is written at the edge.
    """
    by = ["method", "backbone", "source", "unique_samples"]
    cells, baselines = table[table["source"] != ""], table[table["source"] == ""]
    sound = summarise(cells[~cells["collapsed"].fillna(False)], by)["accuracy"]
    low, high = _limits(pd.concat([sound, baselines["accuracy"]]))
    limits = max(0.0, low), min(1.0, high)
    cells = summarise(cells, by)
    ticks = sorted(cells["unique_samples"].unique())
    groups = {
        f"{method} · {backbone}": rows for (method, backbone), rows in cells.groupby(["method", "backbone"])
    }

    def panel(axes: Axes, name: str) -> None:
        backbone = name.split(" · ")[1]
        _reference_lines(axes, baselines, backbone, limits)
        for i, (source, line) in enumerate(groups[name].groupby("source")):
            _line(axes, line, colours(sources)[str(source)], shift=1 + 0.04 * (i - 1), floor=limits[0])
        _n_axis(axes, ticks)
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
        axes.set_title(name, loc="left", fontsize=8, weight="bold")

    with rc_context(STYLE):
        columns = min(4, len(groups)) or 1
        rows = math.ceil(len(groups) / columns) or 1
        together = Figure(figsize=(2.3 * columns, 1.9 * rows + 0.3), layout="constrained")
        for i, name in enumerate(groups):
            panel(together.add_subplot(rows, columns, i + 1), name)
        together.legend(handles=[_handle(s, sources) for s in sources], loc="outside lower center",
                        ncols=min(4, len(sources)) or 1, frameon=False)  # fmt: skip
        single = {}
        for name in groups:
            single[name] = Figure(figsize=(2.05, 1.6))  # one geometry for all: they stand side by side
            panel(single[name].add_axes((0.165, 0.23, 0.64, 0.64)), name)
    return together, single


def effect_figure(effects: Sequence[Effect], sources: Sequence[str]) -> Figure:
    """Δ with its interval for each source, grouped by probe, and a small dot per method. Points of accuracy."""
    probes = list(dict.fromkeys(e.probe for e in effects))
    with rc_context({**STYLE, "axes.grid.axis": "x", "axes.spines.left": False}):
        height = 0.55 + 0.24 * (len(effects) + len(probes))
        figure = Figure(figsize=(3.5, height), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=MUTED, linewidth=1)
        y, ticks, labels = 0.0, [], []
        for probe in probes:
            ticks.append(y)
            labels.append(probe)
            for effect in sorted(
                (e for e in effects if e.probe == probe), key=lambda e: sources.index(e.source)
            ):
                y -= 1
                colour, marker = colours(sources)[effect.source]
                e = effect.overall
                dots = [100 * m.mean for m in effect.per_method.values()]
                axes.plot(
                    dots, [y] * len(dots), "o", color=colour, markersize=2.5, alpha=0.45, markeredgewidth=0
                )
                if math.isfinite(e.low):
                    axes.plot([100 * e.low, 100 * e.high], [y, y], color=colour, linewidth=2)
                face = colour if e.detectable else PAPER
                axes.plot([100 * e.mean], [y], marker, color=colour, markerfacecolor=face, markersize=6)
                ticks.append(y)
                labels.append(effect.source)
            y -= 1.2
        axes.set_yticks(ticks, labels)
        for label in axes.get_yticklabels():
            text = label.get_text()
            label.set(
                **{"color": colours(sources)[text][0]}
                if text in sources
                else {"color": INK, "weight": "bold"}
            )
        axes.set_ylim(y + 0.5, 0.7)
        axes.set_xlabel("← fewer better · points · more better →")
    return figure


def distance_figure(
    gains: pd.DataFrame, at: pd.Series, sources: Sequence[str], distance: str
) -> Figure | None:
    """Gain over the untrained network (points, at each source's largest N) against distance.

    `gains`: `paired_difference` of one downstream set, probe and budget; `at`: distance by source. A marker per
    source x method, the methods side by side around their source's distance; the bar is their mean. None where
    no source has both.
    """
    largest = gains.groupby(["source", "method", "backbone"])["unique_samples"].transform("max")
    gains = gains[(gains["unique_samples"] == largest) & gains["source"].isin(at.dropna().index)]
    gains = gains.dropna(subset=["difference"])
    if gains.empty:
        return None
    at = at[at.index.isin(gains["source"])].sort_values()
    methods = sorted(gains["method"].unique())
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=MUTED, linewidth=1)
        logarithmic = bool(0 < at.max() / 100 < at.min() < at.max() / 5)
        width = 0.05 * ((math.log(at.max() / at.min()) if logarithmic else at.max() - at.min()) or 1.0)
        for i, (source, x0) in enumerate(at.items()):
            colour, marker = colours(sources)[str(source)]
            rows = gains[gains["source"] == source]
            for _, row in rows.iterrows():
                offset = width * (2 * methods.index(row["method"]) / max(1, len(methods) - 1) - 1)
                x = x0 * math.exp(offset) if logarithmic else x0 + offset
                if math.isfinite(row["low"]):
                    axes.plot(
                        [x, x], [100 * row["low"], 100 * row["high"]], color=colour, linewidth=1, alpha=0.5
                    )
                axes.plot(
                    x,
                    100 * row["difference"],
                    marker,
                    color=colour,
                    markersize=4,
                    alpha=0.8,
                    markeredgewidth=0,
                )
            edges = [x0 * math.exp(s * width) if logarithmic else x0 + s * width for s in (-1.3, 1.3)]
            mean = 100 * rows["difference"].mean()
            axes.plot(edges, [mean, mean], color=colour, linewidth=2)
            axes.annotate(str(source), (x0, 1), xycoords=("data", "axes fraction"), color=colour, ha="center",
                          va="bottom", weight="bold", xytext=(0, 2 + 10 * (i % 2)), textcoords="offset points")  # fmt: skip
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sorted(at)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.margins(x=0.18)
        low, high = _limits(100 * pd.concat([gains["difference"], pd.Series([0.0])]))
        axes.set_ylim(low, high)
        axes.set_xlabel(f"{DISTANCES[distance]} to the downstream set")
        axes.set_ylabel("gain over an untrained network, points")
    return figure


def to_svg(figure: Figure) -> str:
    with rc_context(STYLE):
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def save(figure: Figure, path: Path) -> str:
    """Write `path`.svg and `path`.png (200 dpi, on white) and return the SVG for the page."""
    svg, png = to_svg(figure), io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    write_atomic(path.parent / f"{path.name}.svg", svg)
    write_atomic(path.parent / f"{path.name}.png", png.getvalue())
    return svg


def inline(svg: str, title: str, prefix: str) -> str:
    """An SVG of `save` as an element of the page: scales with it, follows its light and dark colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(
        r'<svg([^>]*?) width="[^"]*"', rf'<svg\1 role="img" aria-label="{escape(title)}"', svg, count=1
    )
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)  # ids are the page's: one figure each
    for i, colour in enumerate((INK, MUTED, FAINT, *PALETTE)):
        svg = svg.replace(colour, f"var(--f{i}, {colour})")
    return svg.replace(PAPER, f"var(--paper, {PAPER})")


def _limits(means: pd.Series) -> tuple[float, float]:
    """A y axis for the means; an interval that is much wider than them all (two seeds) runs off it."""
    means = means.dropna()
    if means.empty:
        return 0.0, 1.0
    margin = max(0.25 * (means.max() - means.min()), 0.01)
    return float(means.min() - margin), float(means.max() + margin)


def _reference_lines(axes: Axes, baselines: pd.DataFrame, backbone: str, limits: tuple[float, float]) -> None:
    """Grey lines with their names: the untrained network of this backbone, raw pixels, and chance if in view."""
    rows = baselines[baselines["backbone"].isin(["", backbone])].dropna(subset=["accuracy"])
    lines = {str(name): float(group["accuracy"].mean()) for name, group in rows.groupby("method")}
    chance = baselines["chance"].dropna()
    if not chance.empty and chance.iloc[0] >= limits[0]:
        lines["chance"] = float(chance.iloc[0])
    order = sorted(lines, key=lambda name: lines[name])
    heights = _spread([lines[name] for name in order], gap=0.085 * (limits[1] - limits[0]))
    for name, height in zip(order, heights, strict=True):
        axes.axhline(lines[name], color=MUTED, linewidth=0.9, dashes=DASHES[name])
        axes.text(
            1.02, height, name, transform=axes.get_yaxis_transform(), color=MUTED, fontsize=7, va="center"
        )


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending `values` moved apart, symmetrically, so that neighbours are `gap` or more from each other."""
    out = list(values)
    for _ in range(len(out)):
        for i in range(len(out) - 1):
            push = max(0.0, gap - (out[i + 1] - out[i])) / 2
            out[i], out[i + 1] = out[i] - push, out[i + 1] + push
    return out


def _line(axes: Axes, line: pd.DataFrame, style: tuple[str, str], shift: float, floor: float) -> None:
    colour, marker = style
    x = line["unique_samples"].astype(float) * shift
    y = line["accuracy"]
    axes.vlines(x, line["low"].fillna(y), line["high"].fillna(y), color=colour, linewidth=0.9, alpha=0.6)
    axes.plot(x, y, marker=marker, color=colour, linewidth=1.5, markersize=3.5, markeredgewidth=0)
    for left, value in zip(x, y, strict=True):
        if value < floor:
            axes.annotate(f"↓{100 * value:.0f}%", (left, floor), color=colour, fontsize=7, va="bottom", ha="left",
                          xytext=(3, 1), textcoords="offset points")  # fmt: skip


def _n_axis(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log")
    shown = [n for i, n in enumerate(ticks) if i % math.ceil(len(ticks) / 5) == 0 or n == ticks[-1]]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    span = (ticks[-1] / ticks[0]) ** 0.12 if len(ticks) > 1 else 2.0
    axes.set_xlim(ticks[0] / span, ticks[-1] * span)
    axes.set_xlabel("N")


def _handle(source: str, sources: Sequence[str]) -> Line2D:
    colour, marker = colours(sources)[source]
    return Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.5, label=source)
