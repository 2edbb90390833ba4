"""The verbs `data` and `store`, and how the command line shows mappings and progress."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ssl_diversity import files
from ssl_diversity.config import parse_overrides
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime, on_terminal

PLAIN_WIDTH = 160  # columns where the output is not a terminal

data = typer.Typer(no_args_is_help=True, help="Pools: prepare, list, inspect, verify.")
store = typer.Typer(no_args_is_help=True, help="The store of results: ls, du, gc, check.")
out = Console(highlight=False, markup=False, soft_wrap=True)
if not out.is_terminal:
    out.width = PLAIN_WIDTH


def mapping(values: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, value in values.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, f"{shown:,.6g}" if isinstance(shown, float) else str(shown))
    return table


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left on a terminal, nothing elsewhere."""
    if not on_terminal():
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# Data


@data.command("prepare")
def data_prepare(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of datasets/, its path, a source kind, a folder or a tar.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. name=flowers path=~/flowers.tar size=64."),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Worker processes; the cores if not given.")] = None,
    memory_gb: Annotated[float, typer.Option(help="Memory for images, all processes together.")] = 1.0,
) -> None:
    """Make a pool: every unique image of a source, in random order, with its index.

    ssl-diversity data prepare digits

    ssl-diversity data prepare folder name=flowers path=~/flowers.tar size=64
    """
    from ssl_diversity.data import recipes
    from ssl_diversity.data.prepare import prepare
    from ssl_diversity.generation import config as generation

    if recipes.load(recipe)["source"] == generation.SOURCE:
        raise UserError(f"{recipe!r} is generated, not prepared; run `ssl-diversity generate {recipe}`")
    spec = recipes.resolve(recipe, parse_overrides(overrides or []))
    with progress_bar(f"prepare {spec.name}") as tell:
        pool = prepare(
            spec,
            processes=processes or os.cpu_count() or 1,
            memory_bytes=int(memory_gb * 2**30),
            runtime=Runtime(progress=tell),
        )
    out.print(f"{pool.path}: {pool.size:,} images")
    out.print(mapping({name: number for name, number in pool.info.counts.items() if number}))


@data.command("list")
def data_list() -> None:
    """The pools there are.

    ssl-diversity data list
    """
    from ssl_diversity.data.pool import list_pools

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("pool", "images", "classes", "px", "codec", "source", "folder"):
        table.add_column(heading, justify="right" if heading in ("images", "classes", "px") else "left")
    for pool in list_pools():
        info = pool.info
        cells = (
            info.name,
            f"{info.size:,}",
            str(len(info.classes)),
            str(info.image_size),
            info.codec,
            info.source,
        )
        table.add_row(*cells, pool.path.name)
    out.print(table if table.row_count else "no pools yet; make one with `ssl-diversity data prepare digits`")


@data.command("inspect")
def data_inspect(
    name: Annotated[str, typer.Argument(help="A pool, by name or folder name.")],
    sheet: Annotated[Path | None, typer.Option(help="Where to write the contact sheet.")] = None,
    images: Annotated[int, typer.Option(help="Images on the sheet.")] = 64,
) -> None:
    """Counts of a pool, and a contact sheet (PNG) of its first images.

    ssl-diversity data inspect digits --sheet digits.png
    """
    from ssl_diversity.data.pool import find
    from ssl_diversity.data.sheet import contact_sheet, inspect

    pool = find(name)
    path = sheet or Path(f"{pool.path.name}.png")
    files.write_atomic(path, contact_sheet(pool, images))
    out.print(mapping(inspect(pool)))
    out.print(f"contact sheet: {path}")


@data.command("verify")
def data_verify(name: Annotated[str, typer.Argument(help="A pool, by name or folder name.")]) -> None:
    """Recheck everything in a pool; exit status 1 and the file's name where anything differs.

    ssl-diversity data verify digits
    """
    from ssl_diversity.data.pool import find
    from ssl_diversity.data.verify import verify

    pool = find(name)
    with progress_bar(f"verify {pool.name}") as tell:
        problems = verify(pool, tell)
    for problem in problems:
        out.print(problem)
    if problems:
        out.print(f"{pool.path.name}: {len(problems)} problem(s)")
        raise typer.Exit(1)
    out.print(f"{pool.path.name}: all {pool.size:,} images are as they were made")


# Store


@store.command("ls")
def store_ls(kind: Annotated[str | None, typer.Argument(help="For example pretrain.")] = None) -> None:
    """The tasks in the store: kind, key, done or not, and what each is.

    ssl-diversity store ls pretrain
    """
    from ssl_diversity.sweep import store as results

    results.open_store()
    for name, key, state, label in results.listing(kind):
        out.print(f"{name} {key} {state} {label}")


@store.command("du")
def store_du() -> None:
    """Bytes and files of every part of the store.

    ssl-diversity store du
    """
    from ssl_diversity.sweep import store as results

    results.open_store()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("part", "files", "MiB"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, count, size in results.usage():
        table.add_row(name, f"{count:,}", f"{size / 2**20:,.1f}")
    out.print(table)


@store.command("gc")
def store_gc(
    older_than_h: Annotated[
        float, typer.Option(help="Leave files touched in the last hours: they may be in use.")
    ] = 1.0,
) -> None:
    """Remove caches (features, statistics), temporary files, and what only the running of finished tasks needed.

    Results stay, and checkpoints of cells that are not done. While workers run, caches and what they work on stay, too.

    ssl-diversity store gc
    """
    from ssl_diversity.sweep import store as results

    results.open_store()
    count, size = results.collect_garbage(older_than_s=older_than_h * 3600, now=time.time())
    out.print(f"{count:,} files removed, {size / 2**20:,.1f} MiB freed")


@store.command("check")
def store_check() -> None:
    """Rebuild the index of results from the results; exit status 1 if anything was wrong.

    ssl-diversity store check
    """
    from ssl_diversity.sweep import store as results

    notes = results.check()
    for note in notes:
        out.print(note)
    out.print(f"{len(notes)} thing(s) mended" if notes else "the store is consistent")
    if notes:
        raise typer.Exit(1)
