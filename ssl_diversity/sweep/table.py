"""A plan as a table for people: what would be trained, what it costs, what is done already."""

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ssl_diversity import budget
from ssl_diversity.sweep.forecast import Cost, Forecast
from ssl_diversity.sweep.plan import Cell, Plan
from ssl_diversity.sweep.profile import Profile
from ssl_diversity.sweep.store import Done


def render(plan: Plan, profile: Profile) -> RenderableType:
    """The cells of a plan by source, method, N and C; below it the tasks by kind and the time they may take."""
    forecast = Forecast(plan, profile)
    done = forecast.done
    table = Table(box=None, header_style="bold", pad_edge=False)
    left = ("source", "method", "backbone", "recipe")
    for heading in (*left, "N", "C", "E", "D", "FLOPs", "seeds", "time", "done"):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault(_group(cell), []).append(cell)
    for cells in groups.values():
        cell, finished = cells[0], sum(c.task is not None and c.task in done for c in cells)
        n, c, flops = cell.unique_samples, cell.budget, cell.flops_per_sample
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
            forecast.cell(cell).words,
            f"{finished}/{len(cells)}",
        )
    return Group(table, Text(), *generation(plan, forecast), *_totals(plan, done), Text(forecast.words))


def _group(cell: Cell) -> tuple[object, ...]:
    return cell.source.name, cell.method, cell.unique_asked, cell.budget_asked


def generation(plan: Plan, forecast: Forecast) -> list[Text]:
    """What generated sources are made by, and how long what is left of it may take one worker."""
    lines = []
    supplies = {supply.name: supply for source in plan.sources for supply in source.supplies}
    for supply in supplies.values():
        for kind, unit in (("train-generator", "samples"), ("sample", "images")):
            tasks = [task for task in supply.tasks if task.kind == kind]
            if not tasks:
                continue
            left = [task for task in tasks if task not in forecast.done]
            time = sum(map(forecast.task, left), Cost()).words if left else "done"
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
