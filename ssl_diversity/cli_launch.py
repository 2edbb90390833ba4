"""Commands on sweeps that run: `launch check`, `cancel`, `logs`, `retry`."""

from typing import Annotated, Any

import typer
from rich.text import Text

from ssl_diversity.cli_data import out
from ssl_diversity.errors import UserError

launch = typer.Typer(no_args_is_help=True, help="Where sweeps run: profiles of launch/.")

SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep that was run before.")]
LEVELS = {"ok": "green", "note": "yellow", "wrong": "red"}


@launch.command()
def check(
    profile: Annotated[str, typer.Argument(help="A file of launch/, or a YAML path.")] = "slurm",
) -> None:
    """What the cluster would answer to a profile: partitions, limits, accounting, requeue. Submits nothing.

    ssl-diversity launch check slurm-dev
    """
    from ssl_diversity.sweep.check import WRONG
    from ssl_diversity.sweep.check import check as check_profile
    from ssl_diversity.sweep.launch import reach
    from ssl_diversity.sweep.profile import load_profile

    where = load_profile(profile)
    reach(where)
    bad = 0
    for finding in check_profile(where):
        bad += finding.level == WRONG
        out.print(Text(f"{finding.level:>5}", LEVELS[finding.level]), f"{finding.subject}: {finding.text}")
    raise typer.Exit(1 if bad else 0)


def cancel(
    sweep: SweepName = "quickstart",
    now: Annotated[bool, typer.Option("--now", help="End jobs at once, without letting them save.")] = False,
) -> None:
    """Stop a sweep that runs: its workers save and end, those that wait leave the queue.

    ssl-diversity cancel quickstart
    """
    from ssl_diversity.sweep import config, control

    out.print(control.cancel(config.latest(sweep), at_once=now))


def logs(
    task: Annotated[str, typer.Argument(help="The beginning of a task's key, or words of its label.")],
    lines: Annotated[int, typer.Option("-n", min=1, help="How many lines of each worker's output.")] = 40,
) -> None:
    """What the workers of a task printed, how each try ended, and where its files are.

    ssl-diversity logs 3ec01c3a

    ssl-diversity logs "simclr digits N=64 seed 0"
    """
    from ssl_diversity.sweep import control

    for text in control.logs(task, lines):
        out.print(text)


def retry(
    sweep: SweepName = "quickstart",
    task: Annotated[
        str, typer.Argument(help="The beginning of a task's key, or words; all that failed.")
    ] = "",
) -> None:
    """Forgive what failed and let it be tried again, by the workers that run or by new ones.

    ssl-diversity retry quickstart

    ssl-diversity retry quickstart "byol digits N=64"
    """
    from ssl_diversity.sweep import config, control

    asked = config.latest(sweep)
    forgiven = control.forgive(asked, task)
    if not forgiven:
        raise UserError(f"{asked.name}: no task that failed{f' matches {task!r}' if task else ''}")
    for each in forgiven:
        out.print(f"to be tried again: {each.label}")
    raise typer.Exit(control.go_on(asked, {each.kind for each in forgiven}, out))


def register(app: Any) -> None:
    """Add these commands to `ssl-diversity`."""
    app.add_typer(launch, name="launch")
    for command in (cancel, logs, retry):
        app.command()(command)
