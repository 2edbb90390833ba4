"""A plan as a table for people: what would be trained, what it costs, what is done already."""

from collections import Counter
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ssl_diversity import budget
from ssl_diversity.sweep import estimate
from ssl_diversity.sweep.plan import Cell, Plan
from ssl_diversity.sweep.profile import Profile
from ssl_diversity.sweep.status import duration
from ssl_diversity.sweep.store import Done


@dataclass(frozen=True)
class Cost:
    """Seconds of one worker; `rough` where they come from FLOPs and not from a measurement."""

    seconds: float = 0.0
    rough: bool = False
    unknown: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.rough or other.rough, self.unknown or other.unknown)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.seconds * times, self.rough, self.unknown) if times else Cost()

    @property
    def words(self) -> str:
        if self.unknown:
            return "unknown" if not self.seconds else f"over {duration(self.seconds)}"
        return ("~" if self.rough else "") + duration(self.seconds)


def render(plan: Plan, profile: Profile, device: str) -> RenderableType:
    """The cells of a plan by source, method, N and C; below it the tasks by kind and the time they may take."""
    done, (workers, threads) = Done(), profile.layout()
    known = estimate.rates()

    def cost(cell: Cell) -> Cost:
        if cell.budget is None:
            return Cost(unknown=True)
        measured = estimate.cell_seconds(cell, plan.sweep, known, device, threads)
        if measured is not None:
            return Cost(measured)
        if cell.flops_per_sample is None:
            return Cost(unknown=True)
        return Cost(cell.flops_per_sample * cell.budget / profile.rough_flops_per_second, rough=True)

    table = Table(box=None, header_style="bold", pad_edge=False)
    left = ("source", "method", "backbone", "recipe")
    for heading in (*left, "N", "C", "E", "D", "FLOPs", "seeds", "time", "done"):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault(_group(cell), []).append(cell)
    remaining = Cost()
    for cells in groups.values():
        cell, finished = cells[0], sum(c.task is not None and c.task in done for c in cells)
        n, c, flops = cell.unique_samples, cell.budget, cell.flops_per_sample
        each = cost(cell)
        remaining += each * (len(cells) - finished)
        table.add_row(
            cell.source.name,
            cell.method,
            cell.backbone,
            cell.recipe.name if cell.recipe else "?",
            f"{n:,}" if n else cell.unique_asked,
            f"{c:,}" if c else cell.budget_asked,
            f"{budget.epochs(n, c):,.4g}" if n and c else "?",
            f"{budget.diversity(n, c):.3g}" if n and c else "?",
            f"{flops * c:.2g}" if flops and c else "?",
            str(len(cells)),
            each.words,
            f"{finished}/{len(cells)}",
        )
    others = [task for task in plan.tasks if task.kind != "pretrain" and task not in done]
    remaining += Cost(sum(estimate.seconds(task, known, device, threads) or 0.0 for task in others))
    share = Cost(remaining.seconds / workers, remaining.rough, remaining.unknown)
    note = "; roughly, from FLOPs: cells like these have not been measured here" if share.rough else ""
    time_left = f"time left: {share.words} with {workers} worker(s) of {threads} thread(s) on {device}{note}"
    return Group(table, Text(), *generation(plan, profile, device), *_totals(plan, done), Text(time_left))


def _group(cell: Cell) -> tuple[object, ...]:
    return cell.source.name, cell.method, cell.unique_asked, cell.budget_asked


def generation(plan: Plan, profile: Profile, device: str) -> list[Text]:
    """What generated sources are made by, and how long what is left of it may take one worker."""
    done, known, threads = Done(), estimate.rates(), profile.layout()[1]
    lines = []
    supplies = {supply.name: supply for source in plan.sources for supply in source.supplies}
    for supply in supplies.values():
        for kind, unit in (("train-generator", "samples"), ("sample", "images")):
            tasks = [task for task in supply.tasks if task.kind == kind]
            if not tasks:
                continue
            left = [task for task in tasks if task not in done]
            seconds = [estimate.seconds(task, known, device, threads) for task in left]
            time = Cost(sum(filter(None, seconds)), unknown=None in seconds).words if left else "done"
            amount = sum(task.units for task in tasks)
            parts = f" in {len(tasks)} tasks" if len(tasks) > 1 else ""
            lines.append(Text(f"{kind} {supply.name}: {amount:,} {unit}{parts}, {time}"))
    return lines


def _totals(plan: Plan, done: Done) -> list[Text]:
    planned = Counter(task.kind for task in plan.tasks)
    finished = Counter(task.kind for task in plan.tasks if task in done)
    samples = sum(cell.budget or 0 for cell in plan.cells)
    flops = sum((cell.flops_per_sample or 0) * (cell.budget or 0) for cell in plan.cells)
    lines = [
        f"{len(plan.cells)} cells, {samples:,} samples" + (f", {flops:.3g} FLOPs" if flops else ""),
        "tasks done: " + ", ".join(f"{finished[kind]} of {planned[kind]} {kind}" for kind in planned),
    ]
    return [Text(line) for line in [*lines, *(f"waiting: {reason}" for reason in plan.waiting)]]
