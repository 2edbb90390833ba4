"""The command `ssl-diversity`: reads what is asked, calls the room that does it, prints what it says."""

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ssl_diversity import cli_data, cli_launch, cli_profile, files
from ssl_diversity.cli_data import mapping, out, progress_bar
from ssl_diversity.config import parse_overrides, validate
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime, chosen_device

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="How diverse must pretraining data be? Controlled self-supervised experiments under a fixed budget.\n\n"
    "Start with `ssl-diversity sweep quickstart`: seven methods, three sources, a report, no download.",
)
app.add_typer(cli_data.data, name="data")
app.add_typer(cli_data.store, name="store")
cli_launch.register(app)
cli_profile.register(app)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any key of the config, e.g. budget=16384."),
]
ProfileName = Annotated[
    str, typer.Option("--profile", help="Where to run: a file of launch/, or a YAML path.")
]
SweepName = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A file of configs/sweeps/, a YAML path, or a run.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for a user's mistake, with one line that says what."""
    try:
        app(args=arguments, prog_name="ssl-diversity")
    except SystemExit as stop:
        if stop.code == 130:
            print("stopped", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        if files.is_disk_full(error):
            return _refuse(files.disk_full(Path(error.filename or files.home() / "store")))
        if error.filename is None:
            raise
        return _refuse(UserError(f"{error.filename}: {error.strerror}"))
    return 0


def _refuse(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


# Sweeps


@app.command()
def plan(
    sweep: SweepName = "quickstart",
    overrides: Overrides = None,
    profile: ProfileName = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Accepted for clarity: plan never runs anything.")
    ] = True,
) -> None:
    """Show the cells of a sweep: samples, FLOPs, estimated time, and what is done already.

    ssl-diversity plan quickstart budget=8192 methods=[simclr,mae]
    """
    from ssl_diversity.sweep import config, flops, launch, sharing, store, table
    from ssl_diversity.sweep.plan import expand
    from ssl_diversity.sweep.profile import load_profile

    where = load_profile(profile)
    asked = config.load(*_named(sweep, overrides))
    store.open_store()
    planned = expand(asked)  # whatever is wrong shows before anything is counted
    if flops.count_missing(asked, lambda text: print(f"{asked.name}: {text}", file=sys.stderr)):
        planned = expand(asked)
    launch.check_cache(planned, where)
    out.print(table.render(planned, sharing.settled(where, planned)))


@app.command()
def sweep(
    sweep: SweepName = "quickstart",
    overrides: Overrides = None,
    profile: ProfileName = "local",
    detach: Annotated[bool, typer.Option("--detach", help="Return once the workers are submitted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False,
) -> None:
    """Run a sweep, or go on with it: what is done is not done again. Ends with a report in runs/SWEEP/.

    ssl-diversity sweep quickstart budget=16384 seeds=5

    ssl-diversity sweep cifar10 sources.cifar10.path=~/cifar10.tar methods=[simclr,mae] unique_samples=[1000,10000]
    """
    from ssl_diversity.sweep import config, launch
    from ssl_diversity.sweep.profile import load_profile

    if dry_run:
        return plan(sweep, overrides, profile)
    where = load_profile(profile)
    asked = config.load(*_named(sweep, overrides))
    raise typer.Exit(launch.run(asked, where, detach=detach, console=out))


@app.command()
def status(
    sweep: SweepName = "quickstart",
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until the sweep is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """How far a sweep is: tasks done, running and failed, workers lost, samples per second, time left.

    With --watch, from any machine that sees the store; on a cluster it also sends the workers that are missing.

    ssl-diversity status quickstart --watch
    """
    from ssl_diversity.sweep import config, store
    from ssl_diversity.sweep import status as reader
    from ssl_diversity.sweep.plan import expand

    store.open_store()
    asked = config.latest(sweep)
    if watch:
        from ssl_diversity.sweep import launch

        launch.join(asked, out)
    current = expand(asked)
    now = reader.snapshot(current)
    if as_json:
        print(json.dumps(reader.as_record(now, reader.lost(current))))
        return
    out.print(f"{asked.name}: {now.words}")
    for running in now.running:
        out.print(
            f"running: {running.label}" + (f" {running.done / running.total:.0%}" if running.total else "")
        )
    out.print(reader.details(now, reader.lost(current)))


@app.command()
def probe(
    sweep: Annotated[str, typer.Option("--sweep", help="A sweep that was run before.")],
    downstream: Annotated[str, typer.Option("--downstream", help="A labelled folder or tar, or a recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of the set, e.g. name=flowers."),
    ] = None,
    profile: ProfileName = "local",
) -> None:
    """Add a downstream set to every checkpoint of a sweep and to its report; trains nothing.

    ssl-diversity probe --sweep quickstart --downstream ~/flowers.tar name=flowers
    """
    from ssl_diversity.sweep import config, launch
    from ssl_diversity.sweep.profile import load_profile

    where = load_profile(profile)
    record = config.recorded(config.load(sweep).name)
    if record is None:
        raise UserError(f"sweep {sweep!r} was never run here; run `ssl-diversity sweep {sweep}` first")
    known = record.model_copy(update={"downstream": record.kept_downstream() or record.downstream})
    asked = config.add_downstream(known, downstream, parse_overrides(overrides or []))
    raise typer.Exit(launch.run(asked, where, skip=launch.TRAINING, console=out))


@app.command()
def report(sweep: SweepName = "quickstart") -> None:
    """Write the report of a sweep from the results there are: table, figures and page in runs/SWEEP/.

    ssl-diversity report quickstart
    """
    from ssl_diversity.report import write_report
    from ssl_diversity.sweep import config, store

    store.open_store()
    out.print(f"{write_report(config.latest(sweep))}")


def _named(sweep: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """`plan budget=8192` means the quickstart, too."""
    first = [sweep] if "=" in sweep else []
    return "quickstart" if first else sweep, first + (overrides or [])


# Single pieces of work


@app.command()
def pretrain(
    overrides: Overrides = None,
    sweep: Annotated[str, typer.Option("--sweep", help="Where all other values come from.")] = "quickstart",
    profile: ProfileName = "local",
) -> None:
    """Pretrain one cell, named by method, source, unique_samples, budget and seed, and show its measures.

    ssl-diversity pretrain method=simclr source=digits unique_samples=1024 budget=16384 seed=0
    """
    from ssl_diversity.sweep import config, launch
    from ssl_diversity.sweep import store as results
    from ssl_diversity.sweep.plan import expand
    from ssl_diversity.sweep.profile import load_profile

    where = load_profile(profile)
    asked = config.load(sweep, config.one_cell(overrides or ()), remembered=False)
    cells = expand(asked).cells
    if len(cells) != 1:
        axes = f"methods={list(asked.methods)} sources={list(asked.sources)} unique_samples={list(asked.unique_samples)}"
        raise UserError(
            f"these are {len(cells)} cells ({axes}); name one: method=... source=... unique_samples=..."
        )
    code = launch.run(asked, where, skip=launch.EVALUATION, console=out, with_report=False)
    task = expand(asked).cells[0].task
    if code == 0 and task is not None:
        measures = results.result(task) or {}
        out.print(f"weights: {task.folder / 'weights.pt'}")
        out.print(mapping({k: v for k, v in measures.items() if not isinstance(v, list | dict)}))
    raise typer.Exit(code)


@app.command()
def generate(
    name: Annotated[
        str,
        typer.Argument(
            help="A recipe with `source: generated`, its path, or a name for what `pipeline` makes."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe, e.g. n=4096 seed=1."),
    ] = None,
    *,
    size: Annotated[int, typer.Option(min=4, help="Pixels of the pool's images.")] = 16,
    profile: ProfileName = "local",
    verify: Annotated[
        int, typer.Option(min=0, help="Of a pool that is there, make the blocks of so many images again.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; make nothing.")] = False,
) -> None:
    """Sample a pool from a diffusion model, which is trained first where the recipe says so.

    Interrupted, it goes on where it was; asked for more images later, it keeps the first as they are.

    ssl-diversity generate generated-digits n=4096 --size 32

    ssl-diversity generate birds pipeline=~/stable-diffusion classes=[wren,owl] n=1000 --size 256

    ssl-diversity generate birds pipeline=~/stable-diffusion classes=[wren,owl] n=1000 --size 256 --verify 16
    """
    from ssl_diversity.sweep import config, launch, table
    from ssl_diversity.sweep.forecast import Forecast
    from ssl_diversity.sweep.plan import expand
    from ssl_diversity.sweep.profile import load_profile

    where = load_profile(profile)
    asked = config.one_source(name, parse_overrides(overrides or []), size)
    if dry_run:
        planned = expand(asked)
        for line in table.generation(planned, Forecast(planned, where)):
            out.print(line)
        waiting = [reason for reason in planned.waiting if planned.sources[0].name in reason]
        return out.print("; ".join(waiting) or f"pool: {planned.sources[0].pool.path}")  # type: ignore[union-attr]
    if verify:
        raise typer.Exit(_verify_generated(expand(asked).sources[0].supplies[0], verify, where))
    code = launch.run(asked, where, skip=launch.EVALUATION | {"pretrain"}, console=out, with_report=False)
    pool = expand(asked).sources[0].pool
    if pool is not None:
        out.print(f"pool: {pool.path} ({pool.size:,} images)")
    raise typer.Exit(code)


def _verify_generated(supply: Any, count: int, where: Any) -> int:
    """The exit status: 1 where an image came out differently."""
    from ssl_diversity.generation.assembly import verify

    if supply.pool is None:
        raise UserError(f"{supply.name}: not made yet; run the same command without --verify first")
    with progress_bar(f"verify {supply.name}") as bar:
        runtime = Runtime(chosen_device(where.device), where.layout()[1], progress=bar, note=bar.note)
        found = verify(supply.tasks[-1].spec, count, runtime)
    out.print(mapping(found))
    return 0 if found["equal"] == found["images"] else 1


@app.command()
def distance(
    *,
    first: Annotated[
        str, typer.Argument(metavar="SET", help="A pool, a recipe, or the path of a folder or tar.")
    ],
    second: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The same; the set that is compared with.")
    ],
    n: Annotated[int, typer.Option(help="Images of each, or what both have.")] = 1024,
    extractor: Annotated[
        str, typer.Option(help="random-resnet, timm:NAME or a weights file.")
    ] = "random-resnet",
    size: Annotated[int | None, typer.Option(help="Pixels, for sets that are not prepared yet.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """How far one set of images is from another: Fréchet distance and VisualDNA.

    ssl-diversity distance photo_patches digits --n 512
    """
    from ssl_diversity.data.subset import Subset
    from ssl_diversity.distance.config import DistanceSpec, extractor_digest

    if n < 2:
        raise UserError(f"n={n}: a distance is one of distributions; give at least 2 images of each set")
    place = chosen_device(device)
    a, b = (_pool(text, size) for text in (first, second))
    n = min(n, a.size, b.size)
    subset = Subset(((a, a.rows(n)),))
    values = {
        "parts": subset.specs,
        "rows_digest": subset.digest,
        "reference_pool": str(b.path),
        "reference_digest": b.digest,
        "extractor": extractor,
        "extractor_digest": extractor_digest(extractor),
    }
    spec = validate(
        DistanceSpec, values, f"distance of {a.name} ({a.size:,} images) and {b.name} ({b.size:,})"
    )
    function = importlib.import_module("ssl_diversity.distance.task").distance
    with tempfile.TemporaryDirectory() as folder, progress_bar(f"{a.name} to {b.name}") as tell:
        found = function(spec, Path(folder), Runtime(device=place, progress=tell))
    out.print(mapping(found))


def _pool(text: str, size: int | None) -> Any:
    from ssl_diversity.data import recipes
    from ssl_diversity.data.pool import find
    from ssl_diversity.data.prepare import prepare

    with contextlib.suppress(UserError):
        pool = find(text)
        if text in (pool.name, pool.path.name):
            return pool
    spec = recipes.resolve(text, {}, defaults={"size": size})
    with progress_bar(f"prepare {spec.name}") as tell:
        return prepare(spec, runtime=Runtime(progress=tell))
