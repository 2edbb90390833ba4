"""report.html: one self-contained page with the question, the answer, figures, tables and how it was run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from ssl_diversity.analysis import answer, effect
from ssl_diversity.report import figures, tables, words
from ssl_diversity.report.records import Collected
from ssl_diversity.report.tables import BASELINES, Table
from ssl_diversity.sweep.status import duration

EFFECT_CAPTION = (
    "Change in accuracy from the fewest to the most unique images at the same budget: mean over methods with its "
    "95 % interval; filled where the interval leaves 0 out. Small dots: single methods."
)


@dataclass(frozen=True)
class Plot:
    """A figure of the page: SVGs that flow side by side where `wide`."""

    caption: str
    svgs: list[Markup]
    wide: bool = True


@dataclass(frozen=True)
class Block:
    """Everything about one downstream set at one budget; headline and sentences speak of the first probe."""

    downstream: str
    budget: str
    first: bool  # of its downstream set: distances and baselines do not depend on the budget
    headline: str
    sentences: list[tuple[str, str]]  # (source, sentence)
    contrasts: list[str]
    nearness: list[tuple[bool, str]]  # (holds, sentence)
    without_collapsed: str
    effects: Plot | None
    effect_table: Table
    accuracy: dict[str, tuple[Plot, Table]]  # by probe
    distance: Plot | None
    distance_table: Table
    baseline_table: Table
    over: Table
    over_sentences: list[str]


def render(collected: Collected, table: pd.DataFrame, folder: Path) -> str:
    """The page, with figures also written to `folder`/figures/ as SVG and PNG."""
    sources = sorted(s for s in table["source"].unique() if s)
    cells = table[table["source"] != ""].drop_duplicates("cell")
    budgets = list(dict.fromkeys(cells.sort_values("budget", ascending=False)["budget_asked"]))
    blocks = [
        _block(
            table[(table["downstream"] == downstream) & table["budget_asked"].isin(["", budget])],
            (downstream, budget, budget == budgets[0]), sources, list(collected.probes), folder / "figures",
        )
        for budget in budgets
        for downstream in dict.fromkeys(table["downstream"])
    ]  # fmt: skip
    loader = PackageLoader("ssl_diversity", "report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["amount"] = words.amount
    html: str = environment.get_template("page.html.j2").render(
        c=collected,
        blocks=blocks,
        legend=figures.colours(sources),
        facts=_facts(cells, budgets),
        collapsed=_collapsed(cells),
        leaks=tables.leak_sentences(table, collected.probes[0]),
        near_known=bool(cells["leaked_near"].notna().all()),
        generators=_generators(cells),
        palette=list(enumerate((figures.INK, figures.MUTED, figures.FAINT, *figures.PALETTE))),
    )
    return html.replace(" %", "\u00a0%")  # a number and its sign stay on one line


def _block(
    rows: pd.DataFrame, at: tuple[str, str, bool], sources: list[str], probes: list[str], folder: Path
) -> Block:
    downstream, budget, is_first = at
    stem = f"{downstream}-{budget}"

    def asked(probe: str) -> int:
        return probes.index(probe) if probe in probes else len(probes)

    effects = sorted(effect.diversity_effects(rows), key=lambda e: (asked(e.probe), sources.index(e.source)))
    first = [e for e in effects if e.probe == probes[0]]
    main = rows[rows["probe"] == probes[0]]
    over = {b: effect.paired_difference(main, b) for b in BASELINES}
    by_probe = {p: rows[rows["probe"] == p] for p in sorted(rows["probe"].unique(), key=asked)}
    return Block(
        downstream=downstream,
        budget=budget,
        first=is_first,
        headline=answer.answer(first),
        sentences=[(e.source, answer.sentence(e)) for e in first],
        contrasts=[
            answer.contrast_sentence(a, b, e) for a, b, e in effect.source_contrasts(main) if e.overall.count
        ],
        nearness=_nearness(rows, downstream),
        without_collapsed=_without_collapsed(main),
        effects=Plot(
            EFFECT_CAPTION,
            [_saved(figures.effect_figure(effects, sources), "Effect of unique images", folder / f"effect-{stem}")],
            wide=False,
        ) if any(e.overall.count for e in effects) else None,
        effect_table=tables.effect_table(effects),
        accuracy={
            probe: (_accuracy(of_probe, sources, folder / f"accuracy-{stem}-{probe}"),
                    tables.accuracy_table(of_probe, sources))
            for probe, of_probe in by_probe.items()
        },
        distance=_distance(main, over["random"], sources, folder / f"gain-{stem}"),
        distance_table=tables.distance_table(rows, sources),
        baseline_table=tables.baseline_table(rows, list(by_probe)),
        over=tables.over_table(over, sources),
        over_sentences=tables.over_sentences(over, sources),
    )  # fmt: skip


def _saved(figure: Figure, title: str, path: Path) -> Markup:
    return Markup(figures.inline(figures.save(figure, path), title, path.name))


def _accuracy(rows: pd.DataFrame, sources: list[str], path: Path) -> Plot:
    together, single = figures.accuracy_panels(rows, sources)
    figures.save(together, path)
    svgs = [
        Markup(figures.inline(figures.to_svg(figure), f"{name}: accuracy against N", f"{path.name}-{i}"))
        for i, (name, figure) in enumerate(single.items())
    ]
    chance = rows["chance"].dropna()
    at_chance = f" Chance is {100 * chance.iloc[0]:.3g} %." if len(chance) else ""
    cells = rows[rows["source"] != ""]
    interval = tables.interval(effect.summarise(cells, ["method", "backbone", "source", "unique_samples"]))
    caption = f"Accuracy against the number of unique images N, a panel per method. Thin bars: {interval}.{at_chance}"
    return Plot(caption, svgs)


def _distance(rows: pd.DataFrame, gains: pd.DataFrame, sources: list[str], path: Path) -> Plot | None:
    cells = rows[rows["source"] != ""]
    svgs = []
    for name, label in figures.DISTANCES.items():
        figure = figures.distance_figure(gains, cells.groupby("source")[name].mean(), sources, name)
        if figure is not None:
            svgs.append(_saved(figure, f"Gain against {label}", path.with_name(f"{path.name}-{name}")))
    caption = (
        "Gain over the untrained network at the largest N, against how far the source lies from the downstream set. "
        f"Bars: mean over methods. Markers, left to right: {', '.join(sorted(cells['method'].unique()))}."
    )
    return Plot(caption, svgs) if svgs else None


def _nearness(rows: pd.DataFrame, downstream: str) -> list[tuple[bool, str]]:
    cells = rows[(rows["source"] != "") & rows["frechet"].notna()]
    generated = set(cells.loc[cells["source_kind"] == "generated", "source"])
    distances = cells.groupby("source")["frechet"].mean().to_dict()
    return answer.nearness(distances, generated, downstream, noise=float(cells["frechet_noise"].mean()))


def _without_collapsed(rows: pd.DataFrame) -> str:
    """The headline with collapsed cells left out; "" where nothing collapsed."""
    collapsed = rows["collapsed"].fillna(False).astype(bool)
    if not collapsed.any():
        return ""
    kept = rows.assign(accuracy=rows["accuracy"].where(~collapsed))
    return answer.answer(effect.diversity_effects(kept))


def _facts(cells: pd.DataFrame, budgets: Sequence[str]) -> list[tuple[str, str]]:
    flops = float(cells["flops"].sum())
    unique = sorted(cells["unique_samples"].dropna().unique())
    return [
        ("methods", str(cells["method"].nunique())),
        ("sources", str(cells["source"].nunique())),
        ("seeds", str(cells["seed"].nunique())),
        ("cells trained", f"{int(cells['train_seconds'].notna().sum())} of {len(cells)}"),
        ("budget C (images seen)", ", ".join(words.amount(b) for b in reversed(budgets))),
        ("unique images N", ", ".join(words.short(n) for n in unique)),
        ("training FLOPs", words.scientific(flops) if flops else "–"),
        ("training time", duration(float(cells["train_seconds"].sum()))),
    ]


def _collapsed(cells: pd.DataFrame) -> list[str]:
    lines = []
    collapsed = cells[cells["collapsed"].fillna(False).astype(bool)]
    for (method, source, n), group in collapsed.groupby(["method", "source", "unique_samples"]):
        seeds = ", ".join(str(seed) for seed in sorted(group["seed"]))
        ranks = " to ".join(dict.fromkeys(f"{r:.2f}" for r in (group["effective_rank"].agg(["min", "max"]))))
        lines.append(f"{method} on {source}, N = {n:,}, seed {seeds}: effective rank {ranks}")
    return lines


def _generators(cells: pd.DataFrame) -> list[str]:
    """What each saw, and what its images cost beside the training on them."""
    lines = []
    for source, rows in cells[cells["source_kind"] == "generated"].groupby("source"):
        most = rows[rows["unique_samples"] == rows["unique_samples"].max()]
        real, price, flops = (
            most[name].dropna().mean() for name in ("source_real_images", "source_cost_flops", "flops")
        )
        line = f"The generator behind {source} saw {tables.integer(real)} real images."
        if pd.isna(real):
            line = f"How many real images the generator behind {source} saw is not known."
        if pd.notna(price) and pd.notna(flops):
            line += (
                f" Making {tables.integer(most['unique_samples'].max())} of its images, the training of the generator"
                f" included where the sweep did it, took {words.scientific(price)} FLOPs: {price / flops:.2g} times what"
                " pretraining a cell on them took (mean over cells; column source_cost_flops)."
            )
        lines.append(line)
    return lines
