"""What becomes of a task whose worker went without a word: the policy, and the record of what happened.

| cause            | known by                                      | treatment                                         |
|------------------|-----------------------------------------------|---------------------------------------------------|
| requeued         | the job waits or runs again                    | goes on from its checkpoint                       |
| preempted        | SLURM: PREEMPTED                               | goes on from its checkpoint                       |
| cancelled        | SLURM: CANCELLED                               | goes on from its checkpoint, with one worker less |
| time limit       | SLURM: TIMEOUT                                 | goes on; counts where it got no further           |
| node failure     | SLURM: NODE_FAIL, BOOT_FAIL                    | goes on; counts where it got no further           |
| killed           | a dead process, SLURM: FAILED                  | goes on; counts where it got no further           |
| lost             | silent, and nobody knows why                   | goes on; counts where it got no further           |
| broken device    | the GPU fails at anything                      | goes on elsewhere; the worker ends                |
| rank lost        | another process of a cell's ranks went         | goes on; counts where it got no further           |
| out of memory    | SLURM: OUT_OF_MEMORY or its log; MemoryError   | goes on with twice the memory, up to max_mem_gb   |

What counts is written as a failed attempt; `max_losses` of them, and the task is given up. An error of the
task itself counts in `max_attempts`, a user's mistake at once.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.sweep import claims, slurm, store
from ssl_diversity.sweep.claims import Holder
from ssl_diversity.sweep.profile import Profile
from ssl_diversity.sweep.task import Task

OUT_OF_MEMORY = "out of memory"
CAUSES = {  # SLURM's words -> ours
    "REQUEUED": "requeued",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "DEADLINE": "cancelled",
    "TIMEOUT": "time limit",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "FAILED": "killed",
    "COMPLETED": "killed",
}
_MEMORY = re.compile(r"exceeded (?:job )?memory limit|oom[-_]kill", re.IGNORECASE)  # where no state tells
LAST_WORDS = 2000  # characters
BROKEN_DEVICE = "broken device"
INNOCENT = frozenset({"requeued", "preempted", "cancelled", BROKEN_DEVICE})  # says nothing about the task
CRASHED = frozenset({"FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL"})  # ends of a worker


def cause(gone: Holder) -> str:
    """Why a holder went: in the scheduler's words where it has some, else what its process tells."""
    process = gone.process
    if process.job and process.owner == claims.this_process().owner:
        if process.restart < claims.this_process().restart and process.job == claims.this_job():
            return CAUSES.get(slurm.last_end(process.job), "requeued")
        if told := CAUSES.get(slurm.last_end(process.job)):
            return OUT_OF_MEMORY if told == "killed" and _says_memory(gone.log) else told
    return "killed" if process.alive() is False else "lost"


def _says_memory(log: str) -> bool:
    """Whether the last that SLURM wrote beside a worker's output is that it used too much memory."""
    with contextlib.suppress(OSError):
        return bool(
            log and _MEMORY.search(Path(log).with_suffix(".err").read_text(errors="replace")[-LAST_WORDS:])
        )
    return False


def record(task: Task, gone: Holder, profile: Profile, why: str) -> None:
    """Write down that a worker was lost, as an attempt that failed where the policy says that it counts."""
    process = gone.process
    where = f"process {process.pid} on {process.machine.split()[0]}"
    where += f", job {process.job}" if process.job else ""
    note(task, why, where, gone.log)
    if why == OUT_OF_MEMORY and ask_for_more(task, profile, gone.mem_gb or getattr(profile, "mem_gb", None)):
        return
    if why not in INNOCENT and not _got_further(task, gone.since):
        told = f"{store.WORKER_DIED}: {where} ended while running this task ({why})"
        store.fail(task, told + (f"; its output: {gone.log}" if gone.log else ""))


def note(task: Task, why: str, where: str, log: str = "") -> None:
    """One line more in the task's `losses.jsonl`."""
    line = json.dumps({"cause": why, "when": time.time(), "where": where, "log": log})
    task.folder.mkdir(parents=True, exist_ok=True)
    with (task.folder / "losses.jsonl").open("a") as file:
        file.write(line + "\n")
    store.Index("lost").add(task.kind, task.key)


def in_folder(folder: Path) -> list[dict[str, Any]]:
    """The losses of the task of a folder, oldest first."""
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return []


def ask_for_more(task: Task, profile: Profile, had_gb: float | None) -> bool:
    """Have a task that ran out of `had_gb` tried again with twice as much; False where no more may be asked for."""
    most = getattr(profile, "max_mem_gb", None)
    if had_gb is None or most is None or had_gb >= most:
        return False
    files.write_json(task.folder / "memory.json", {"mem_gb": min(2 * had_gb, most)})
    return True


def memory_needed(task: Task, profile: Profile, lost: store.Index) -> float | None:
    """GiB that a task has shown to need, within `max_mem_gb`, where that is more than workers of this profile have.

    `lost` is the index of the tasks that workers were lost on.
    """
    usual, most = getattr(profile, "mem_gb", None), getattr(profile, "max_mem_gb", None)
    if usual is None or most is None or task.key not in lost.keys(task.kind):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        asked = min(float(files.read_json(task.folder / "memory.json")["mem_gb"]), most)
        return asked if asked > usual else None
    return None


def refuse(tasks: Iterable[Task], mem_gb: float, why: str) -> None:
    """Give up tasks that need more memory than the cluster has."""
    for task in tasks:
        told = f"UserError: ran out of memory, and a job of {mem_gb:g} GiB is refused: {why}; "
        store.fail(task, told + "lower max_mem_gb, or name a partition with larger nodes, and `retry`")


def _got_further(task: Task, since: float) -> bool:
    """Whether a task saved its state after `since`."""
    with contextlib.suppress(OSError):
        return (task.folder / "last.ckpt").stat().st_mtime > since
    return False
