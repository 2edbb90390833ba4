"""The command `profile`: what one training step costs, part by part."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ssl_diversity.cli_data import out, progress_bar
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime, chosen_device

if TYPE_CHECKING:
    from ssl_diversity.profiling import StepProfile
    from ssl_diversity.sweep.plan import Cell


def profile(
    sweep: Annotated[
        str, typer.Argument(metavar="[SWEEP]", help="Where all other values come from.")
    ] = "quickstart",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="method (or `all`), backbone, source, batch_size, ..."),
    ] = None,
    *,
    where: Annotated[str, typer.Option("--profile", help="Whose device and threads are used.")] = "local",
    device: Annotated[str | None, typer.Option(help="cpu or cuda, where not the profile's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Where not the profile's.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="In each of three rounds; about two seconds of them.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it, for example to profile.png.")] = None,
    at_once: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4", help="Measure so many cells at once on a device, for `plan` to choose."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON: a list with an object per method.")
    ] = False,
) -> None:
    """What one training step costs: reading, views, forward, loss, backward, optimiser, EMA, the loop; FLOP/s.

    ssl-diversity profile method=simclr

    ssl-diversity profile quickstart method=all --picture profile.png

    ssl-diversity profile cifar10 method=mae backbone=vit-s batch_size=256 --device cuda

    ssl-diversity profile quickstart --at-once 1,2,4
    """
    from ssl_diversity import profiling
    from ssl_diversity.report import step_figure
    from ssl_diversity.sweep.profile import LocalProfile, load_profile

    texts = [*([sweep] if "=" in sweep else []), *(overrides or [])]
    profile = load_profile(where)
    if device is not None:
        profile = profile.model_copy(update={"device": device})
    counts: list[int] = []
    if at_once is not None:
        if steps is not None or threads is not None or picture is not None:
            raise UserError(
                "--at-once: measures for some seconds, with the profile's threads, and draws nothing"
            )
        if not isinstance(profile, LocalProfile) or profile.ranks > 1:
            raise UserError(f"--at-once: measures this machine's workers of one process; {where} has others")
        counts = _counts(at_once)
    if picture is not None:
        step_figure.check(picture)
    os.environ.update(profile.environment)  # as workers have it, before torch is imported
    chosen = chosen_device(profile.device)
    cells = _cells("quickstart" if "=" in sweep else sweep, texts, profile)
    if counts:
        return _at_once(cells, profile, chosen, counts, as_json)
    found = []
    for cell in cells:
        with progress_bar(f"profile {cell.method}") as bar:
            runtime = _runtime(profile, chosen, threads or profile.layout()[1], progress=bar)
            assert cell.task is not None
            found.append(profiling.profile(cell.task.spec, runtime, steps))  # type: ignore[arg-type]
    if as_json:
        print(json.dumps([one.as_record() for one in found], indent=2))
    else:
        out.print(table(found))
    if picture is not None:
        step_figure.save(found, picture)


def _counts(text: str) -> list[int]:
    """`1,2,4`, ascending."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise UserError(f"--at-once {text}: expected numbers of cells, such as 1,2,4")
    return counts


def _at_once(cells: "Sequence[Cell]", profile: Any, device: str, counts: list[int], as_json: bool) -> None:
    """Show what so many cells on one device reach together."""
    from ssl_diversity.sweep.profile import visible_gpus

    devices = max(1, len(visible_gpus())) if device == "cuda" else 1
    counts = sorted({*counts, max(1, profile.layout()[0] // devices)})  # to be compared with the usual number
    records = [
        {
            "method": cell.method,
            "backbone": cell.backbone,
            "samples_per_second": _reached(cell, profile, device, counts, devices),
        }
        for cell in cells
    ]
    if as_json:
        print(json.dumps(records, indent=2))
    else:
        out.print(_at_once_table(records, counts, device))
    raise typer.Exit(int(any(not record["samples_per_second"] for record in records)))


def _reached(cell: "Cell", profile: Any, device: str, counts: list[int], devices: int) -> dict[int, float]:
    """Measure each number of cells until one is too many, and remember it for `plan` and `sweep`."""
    from ssl_diversity import together
    from ssl_diversity.sweep import sharing

    assert cell.task is not None
    reached: dict[int, float] = {}
    with progress_bar(f"at once {cell.method}") as bar:
        for number, count in enumerate(counts):
            bar(number, len(counts))
            crew = sharing.with_workers(profile, count * devices)
            runtime = _runtime(profile, device, crew.layout()[1])
            try:
                reached[count] = together.samples_per_second(cell.task.spec, runtime, count)  # type: ignore[arg-type]
            except together.ProcessFailed as error:
                print(f"{cell.method}: {count} at once: {error}", file=sys.stderr)
                break
            sharing.note(cell.like, crew, reached[count] * devices)
    return reached


def _at_once_table(records: "Sequence[dict[str, Any]]", counts: list[int], device: str) -> Table:
    """A row per cell: its samples/s by the number at once, each also as a ratio to the first number's."""
    shown = Table(
        title=f"samples/s of so many cells at once on one {device}, and to {counts[0]}",
        title_justify="left", box=None, header_style="bold", pad_edge=False,
    )  # fmt: skip
    for name in ("method", "backbone", *map(str, counts)):
        shown.add_column(name, justify="right" if name.isdigit() else "left", no_wrap=True)
    for record in records:
        reached = record["samples_per_second"]
        rates = (
            f"{reached[count]:,.0f} {reached[count] / reached[counts[0]]:5.2f}" if count in reached else "-"
            for count in counts
        )
        shown.add_row(record["method"], record["backbone"], *rates)
    return shown


def _runtime(profile: Any, device: str, threads: int, **more: Any) -> Runtime:
    return Runtime(
        device,
        threads,
        cache_bytes=profile.cache_bytes,
        cache_dir=profile.cache_folder,
        **more,
    )


def _cells(sweep: str, texts: list[str], profile: Any) -> "list[Cell]":
    """One cell per method asked for, of one source and the last N and C, its pool prepared if need be."""
    from ssl_diversity.sweep import config, launch, store
    from ssl_diversity.sweep.plan import expand

    texts = [text for text in texts if text != "method=all"]
    asked = config.load(sweep, [*config.one_cell(texts), "name=profile"], remembered=False)
    first = next(iter(asked.sources))
    alone = {
        "sources": {first: asked.sources[first]},
        "unique_samples": asked.unique_samples[-1:],
        "budget": asked.budget[-1:],
        "downstream": {},
    }
    asked = asked.model_copy(update=alone)
    store.open_store()
    if any(cell.task is None for cell in expand(asked).cells):
        told = Console(stderr=True, highlight=False, soft_wrap=True)
        code = launch.run(asked, profile, skip=_OTHERS, console=told, with_report=False)
        if code:
            raise typer.Exit(code)
    return list(expand(asked).cells)


_OTHERS = frozenset({"pretrain", "probe", "distance"})


def table(profiles: "Sequence[StepProfile]") -> Table:
    """A column per method: milliseconds of each part and its share of the step, then what the step achieves."""
    first = profiles[0]
    title = (
        f"one step of {first.batch_size} images, {first.image_size} px, {first.precision}, "
        f"{first.device}, {first.threads} thread(s)"
    )
    shown = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    shown.add_column("ms", no_wrap=True)
    for one in profiles:
        shown.add_column(f"{one.method}\n{one.backbone}", justify="right", no_wrap=True)
    for part in first.parts:
        shown.add_row(
            part, *(f"{1e3 * p.parts[part]:,.2f} {p.parts[part] / p.step_s:4.0%}" for p in profiles)
        )
    rows: dict[str, Any] = {
        "step": lambda p: f"{1e3 * p.step_s:,.2f} 100%",
        "reading, in the background": lambda p: f"{1e3 * p.reading_s:,.2f} {p.reading_s / p.step_s:4.0%}",
        "samples/s": lambda p: f"{p.samples_per_second:,.0f}",
        "FLOPs per sample": lambda p: f"{p.flops_per_sample:.3g}",
        "GFLOP/s": lambda p: f"{p.flops_per_second / 1e9:,.1f}",
        f"peak GFLOP/s, {first.precision}": lambda p: f"{p.peak_flops[p.precision] / 1e9:,.1f}",
        "peak GFLOP/s, 32-true": lambda p: f"{p.peak_flops['32-true'] / 1e9:,.1f}",
        "share of peak": lambda p: f"{p.share_of_peak:.1%}",
    }
    for name, words in rows.items():
        shown.add_row(name, *(words(p) for p in profiles), style="bold" if name == "step" else "")
    return shown


def register(app: Any) -> None:
    """Add the command to `ssl-diversity`."""
    app.command()(profile)
