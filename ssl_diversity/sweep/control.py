"""What users do with a sweep that runs or has failed: stop it, look into a task, forgive failures, go on."""

from collections.abc import Collection, Iterator
from pathlib import Path

from rich.console import Console

from ssl_diversity import files
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, fleet, launch, losses, orders, slurm, store
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import SlurmProfile
from ssl_diversity.sweep.task import Task
from ssl_diversity.sweep.work import Worker


def cancel(sweep: SweepConfig, *, at_once: bool = False) -> str:
    """Stop the latest run; returns what was done, in words."""
    order = orders.latest(sweep.folder)
    orders.cancel(sweep)
    if not isinstance(order.profile, SlurmProfile):
        return f"{sweep.name}: workers save and end within {order.profile.heartbeat_s:g} s"
    launch.reach(order.profile)
    crew = fleet.Slurm(order, Worker)
    try:
        count = crew.alive()
        crew.cancel() if at_once else crew.stop()
    except slurm.NoAnswer as error:
        return f"{sweep.name}: the scheduler does not answer ({error}); workers that run save and end by themselves"
    how = "cancelled" if at_once else "told to save and end"
    return f"{sweep.name}: {count} workers {how}; `ssl-diversity sweep {sweep.name}` goes on"


def forgive(sweep: SweepConfig, text: str = "") -> list[Task]:
    """Forget the failures of the tasks of a sweep that `text` names (all, by default); returns them."""
    failed = store.Index("failed")
    forgiven = []
    for task in expand(sweep).tasks:
        if task.key in failed.keys(task.kind) and (not text or _matches(text, task.key, task.label)):
            for failure in store.failures(task):
                failure.path.rename(failure.path.with_name(failure.path.name.replace("failed.", "forgiven.")))
            failed.discard(task.kind, task.key)
            forgiven.append(task)
    return forgiven


def go_on(sweep: SweepConfig, kinds: Collection[str], console: Console) -> int:
    """Run a sweep as it was run last, and these kinds of tasks in any case; returns the exit status.

    Unless workers are still about it.
    """
    order = orders.latest(sweep.folder)
    skip = order.skip.difference(kinds)
    if isinstance(order.profile, SlurmProfile):
        launch.reach(order.profile)
        try:
            if skip == order.skip and fleet.Slurm(order, Worker).alive():
                console.print(
                    f"{sweep.name}: its workers go on; `ssl-diversity status {sweep.name} --watch` shows them"
                )
                return 0
        except slurm.NoAnswer as error:
            raise UserError(
                f"the scheduler does not answer ({error}); the failures are forgiven, run the sweep"
            ) from None
    return launch.run(sweep, order.profile, skip=skip, console=console)


def logs(text: str, lines: int) -> Iterator[str]:
    """What is known of the tasks that `text` names, and the end of what their workers printed.

    Raises UserError where it names none, or too many to show.
    """
    found = [row for row in store.listing(None) if _matches(text, row[1], row[3])]
    if not found:
        raise UserError(f"no task begins with or is called {text!r}; `ssl-diversity store ls` lists them")
    if len(found) > 1 and not any(key == text for _, key, _, _ in found):
        names = "\n".join(f"  {kind} {key[:12]}  {state}  {label}" for kind, key, state, label in found[:20])
        raise UserError(f"{text!r} names {len(found)} tasks; give more of a key or label:\n{names}")
    kind, key, state, label = found[0]
    folder = files.task_dir(kind, key)
    yield f"{label}: {state} [{kind} {key}]"
    yield f"files: {folder}"
    shown = []
    for loss in losses.in_folder(folder):
        yield f"worker lost ({loss['cause']}): {loss['where']}"
        shown.append(loss["log"])
    holder = claims.holder(folder)
    if holder is not None:
        yield f"held by process {holder.process.pid} on {holder.process.machine.split()[0]} {_job(holder.process.job)}"
        shown.append(holder.log)
    if state == "done":
        shown.append(files.read_json(folder / "result.json").get("run", {}).get("log", ""))
    for path in sorted(folder.glob("failed.*.txt")):
        yield f"--- {path}\n{path.read_text().rstrip()}"
    for log in dict.fromkeys(name for name in shown if name):
        yield from _tail(Path(log), key, lines)


def _tail(log: Path, key: str, lines: int) -> Iterator[str]:
    """What a worker printed from the beginning of the task to its end, the last lines of it."""
    for path in (log, log.with_suffix(".err")):
        try:
            text = path.read_text(errors="replace").splitlines()
        except OSError:
            yield f"--- {path}: no longer there"
            continue
        if path == log:
            marks = [i for i, line in enumerate(text) if line.endswith(f"{key}]")]
            text = text[marks[0] : marks[-1] + 1 if len(marks) > 1 else None] if marks else []
        if text:
            yield f"--- {path}\n" + "\n".join(text[-lines:])


def _matches(text: str, key: str, label: str) -> bool:
    """Whether it is the beginning of the key (6 characters or more), or all its words are in the label."""
    words = label.replace("/", " ").split()
    return (len(text) >= 6 and key.startswith(text)) or all(
        word in words or word == label for word in text.split()
    )


def _job(job: str) -> str:
    return f"(job {job})" if job else ""
