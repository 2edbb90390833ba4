"""The verbs `data` and `store`, and how the command line shows mappings and progress."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ssl_diversity import files
from ssl_diversity.config import parse_overrides
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime, chosen_device, cores, on_terminal

PLAIN_WIDTH = 160  # columns where the output is not a terminal

data = typer.Typer(no_args_is_help=True, help="Pools: prepare, download, attach, list, inspect, verify.")
store = typer.Typer(no_args_is_help=True, help="The store of results: ls, du, gc, check.")
out = Console(highlight=False, markup=False, soft_wrap=True)
if not out.is_terminal:
    out.width = PLAIN_WIDTH

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="e.g. name=flowers path=~/flowers.tar size=64."),
]


def mapping(values: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, value in values.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, f"{shown:,.6g}" if isinstance(shown, float) else str(shown))
    return table


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class Bar:
    """What a `progress_bar` is told: how many are done of how many, and in `note` a few words on the state."""

    def __init__(self, update: Callable[..., None] = lambda **_: None) -> None:
        self._update = update

    def __call__(self, done: int, total: int) -> None:
        self._update(completed=done, total=total)

    def note(self, text: str) -> None:
        self._update(note=text)

    @property
    def runtime(self) -> Runtime:
        return Runtime(progress=self, note=self.note)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A progress bar with rate, time left and note on a terminal, nothing elsewhere."""
    if not on_terminal():
        yield Bar()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed:,.0f}"),
        _Rate(),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, note="")
        yield Bar(partial(progress.update, task))


# Data


@data.command("prepare")
def data_prepare(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of datasets/, its path, a source kind, a folder or a tar.")
    ],
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(help="Worker processes; the cores if not given.")] = None,
    memory_gb: Annotated[float, typer.Option(help="Bound on the memory of all processes together.")] = 2.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; make nothing.")] = False,
) -> None:
    """Make a pool: every unique image of a source, in random order, with its index.

    Killed, it goes on where it was when it is run again. From each kind of source:

    ssl-diversity data prepare digits

    ssl-diversity data prepare ~/flowers size=64

    ssl-diversity data prepare folder path=~/flowers.tar name=flowers size=64

    ssl-diversity data prepare webdataset 'path=~/shards/{000000..000127}.tar' name=web size=64

    ssl-diversity data prepare parquet path=~/tables name=tables size=64

    ssl-diversity data prepare torchvision:CIFAR10 path=~/torchvision download=true size=32

    ssl-diversity data prepare imagenet path=~/imagenet --processes 16 --memory-gb 16

    ssl-diversity data prepare yfcc100m metadata=~/yfcc100m_dataset.bz2 n=1000000

    What becomes of the images:

    ssl-diversity data prepare ~/flowers resize=short size=256 codec=jpeg quality=90

    ssl-diversity data prepare ~/flowers resize=none codec=original

    ssl-diversity data prepare ~/flowers near_duplicates=true 'exclude=[digits]'
    """
    from ssl_diversity.data import recipes
    from ssl_diversity.data.prepare import prepare
    from ssl_diversity.generation import config as generation

    if recipes.load(recipe)["source"] == generation.SOURCE:
        raise UserError(f"{recipe!r} is generated, not prepared; run `ssl-diversity generate {recipe}`")
    spec = recipes.resolve(recipe, parse_overrides(overrides or []))
    if dry_run:
        from ssl_diversity.data.outline import outline

        out.print(mapping(outline(spec)))
        return
    with progress_bar(f"prepare {spec.name}") as bar:
        pool = prepare(
            spec,
            processes=processes or cores(),
            memory_bytes=int(memory_gb * 2**30),
            runtime=bar.runtime,
        )
    out.print(f"{pool.path}: {pool.size:,} images")
    out.print(mapping({name: number for name, number in pool.info.counts.items() if number}))
    numbers, read = recipes.expected(recipe), pool.info.counts["read"]
    expected = numbers.get(spec.split, numbers.get("all"))
    if expected not in (None, read):
        out.print(f"{recipe} should have {expected:,} images, {read:,} were read: is it whole?")


@data.command("download")
def data_download(
    recipe: Annotated[str, typer.Argument(help="yfcc100m, or a recipe of that source.")],
    overrides: Overrides = None,
    *,
    to: Annotated[Path | None, typer.Option(help="Folder; where `data prepare` looks if not given.")] = None,
    connections: Annotated[int, typer.Option(min=1, help="Downloads at a time.")] = 64,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests per second, at most.")] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Seconds without a byte after which to try again.")
    ] = 30.0,
    retries: Annotated[int, typer.Option(min=0, help="Of each photo, with back-off.")] = 8,
    share: Annotated[str, typer.Option(help="I/K: of K machines, this is number I (from 0).")] = "0/1",
    urls: Annotated[Path | None, typer.Option(help="Write the addresses here; download nothing.")] = None,
) -> None:
    """Download the photos of a selection; run again, it fetches what is missing and what failed.

    ssl-diversity data download yfcc100m metadata=~/yfcc100m_dataset.bz2 n=1000000 --to ~/yfcc-1m

    ssl-diversity data prepare yfcc100m metadata=~/yfcc100m_dataset.bz2 n=1000000 images=~/yfcc-1m
    """
    from ssl_diversity.data import recipes
    from ssl_diversity.data.sources.yfcc100m import YFCC100M

    spec = recipes.resolve(recipe, parse_overrides(overrides or []))
    if spec.source != "yfcc100m":
        raise UserError(
            f"{recipe!r}: only yfcc100m is downloaded from here; `data prepare {recipe}` says what to get"
        )
    part = re.fullmatch(r"(\d+)/(\d+)", share)
    if not part or not int(part[1]) < int(part[2]):
        raise UserError(f"--share {share}: expected I/K with I from 0 to K - 1, for example 0/4")
    source = YFCC100M(YFCC100M.Options(**spec.options), spec.directory)
    with progress_bar(f"download {spec.name}") as bar:
        source.runtime = bar.runtime
        if urls:
            with files.replacing(urls) as temporary, temporary.open("w") as file:
                file.writelines(f"{url}\n" for url in source.urls())
            return out.print(f"{urls}: addresses, one a line")
        report, where = source.download(
            to,
            connections=connections,
            requests_per_s=rate,
            timeout_s=timeout_s,
            retries=retries,
            share=(int(part[1]), int(part[2])),
        )
    out.print(f"{where}: {report}")


@data.command("attach")
def data_attach(
    url: Annotated[str, typer.Argument(help="Where a pool's folder is: http(s)://, s3://, gs:// or a path.")],
    name: Annotated[str | None, typer.Option(help="What to call it here; as it is called there.")] = None,
) -> None:
    """Use a pool that lies elsewhere: its index comes here, its shards are read from where they are.

    ssl-diversity data attach https://example.org/pools/imagenet-1a2b3c4d
    """
    from ssl_diversity.data.attach import attach

    with progress_bar("attach") as bar:
        pool = attach(url, name=name, runtime=bar.runtime)
    out.print(f"{pool.path}: {pool.size:,} images, shards at {url}")


@data.command("list")
def data_list() -> None:
    """The pools there are.

    ssl-diversity data list
    """
    from ssl_diversity.data.pool import list_pools

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("pool", "images", "classes", "resize", "codec", "source", "shards", "folder"):
        table.add_column(heading, justify="right" if heading in ("images", "classes") else "left")
    for pool in list_pools():
        info = pool.info
        cells = (
            info.name,
            f"{info.size:,}",
            str(len(info.classes)),
            f"{info.resize} {info.image_size or ''}",
            info.codec,
            info.source,
            "remote" if pool.remote else "here",
        )
        table.add_row(*cells, pool.path.name)
    out.print(table if table.row_count else "no pools yet; make one with `ssl-diversity data prepare digits`")


@data.command("inspect")
def data_inspect(
    name: Annotated[str, typer.Argument(help="A pool, by name or folder name.")],
    sheet: Annotated[Path | None, typer.Option(help="Where to write the contact sheet.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 64,
) -> None:
    """Counts of a pool, and a contact sheet (PNG) of its first images.

    ssl-diversity data inspect digits --sheet digits.png
    """
    from ssl_diversity.data.pool import find
    from ssl_diversity.data.sheet import contact_sheet, inspect

    pool = find(name)
    path = sheet or Path(f"{pool.path.name}.png")
    files.write_atomic(path, contact_sheet(pool, images))
    more = {
        "near_duplicates": "dropped" if pool.info.near_duplicates else "kept",
        "shards at": pool.remote or "here",
    }
    out.print(mapping({**inspect(pool), **more}))
    out.print(f"contact sheet: {path}")


@data.command("page")
def data_page(
    name: Annotated[str, typer.Argument(metavar="POOL", help="A pool's name or folder.")],
    *,
    reference: Annotated[str | None, typer.Option(help="A pool of real images to compare it with.")] = None,
    n: Annotated[
        int, typer.Option(min=2, help="Images of each that are compared, or what both have.")
    ] = 1024,
    extractor: Annotated[
        str, typer.Option(help="random-resnet, timm:NAME or a weights file.")
    ] = "random-resnet",
    to: Annotated[Path, typer.Option(help="The page to write.")] = Path("pool.html"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """A pool as a page: counts, samples, and how faithful and how diverse it is beside a reference.

    ssl-diversity data page generated-digits --reference digits --to digits.html
    """
    from ssl_diversity.data.pool import find
    from ssl_diversity.report.pool_page import write_pool_page

    place = chosen_device(device)
    pool, real = find(name), find(reference) if reference else None
    with progress_bar(f"page of {pool.name}") as bar:
        runtime = Runtime(device=place, threads=cores(), progress=bar, note=bar.note)
        path = write_pool_page(pool, to, reference=real, extractor=extractor, n=n, runtime=runtime)
    out.print(f"{path}")


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
