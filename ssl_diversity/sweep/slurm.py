"""What SLURM says and what it is asked for: a hint, never the truth. Whoever asks must do without an answer."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

ANSWER_S = 30.0  # how long a command may take
OWN = ("SLURM_CONF",)  # of the variables of a job, those that a job submitted from it needs, too
ALIVE = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD"}) | {
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "COMPLETING",
    "RESIZING",
    "EXPEDITING",
}


class NoAnswer(Exception):
    """SLURM did not answer, or not with what was asked for; `text` is what it said instead."""


def ask(*command: str, timeout_s: float = ANSWER_S) -> str:
    """What a SLURM command prints. Raises NoAnswer where it fails, is not there or takes too long."""
    if shutil.which(command[0]) is None:
        raise NoAnswer(f"{command[0]}: not on this machine")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"{command[0]}: exit {done.returncode}"]
        raise NoAnswer(said[-1])
    return done.stdout


@dataclass(frozen=True)
class Job:
    """One job, or one element of an array, that waits or runs."""

    array: str  # its number, or that of the array
    index: str  # "" of a job that is no element
    state: str
    reason: str  # why it waits
    comment: str

    @property
    def name(self) -> str:
        """What scancel and scontrol call it."""
        return f"{self.array}_{self.index}" if self.index else self.array


def live() -> list[Job]:
    """All jobs of this user that have not ended, elements of arrays one by one. Raises NoAnswer."""
    jobs = []
    for line in ask(
        "squeue", f"--user={os.getuid()}", "--noheader", "--array", "--format=%F|%K|%T|%r|%k"
    ).splitlines():
        parts = [part.strip() for part in line.split("|", 4)]
        if len(parts) < 5:
            raise NoAnswer(f"squeue: {line}")
        array, index, state, reason, comment = parts
        if state in ALIVE:
            jobs.append(Job(array, index if index.isdecimal() else "", state, reason, comment))
    return jobs


def meant_to_run(job: str) -> bool | None:
    """Whether a job that is told to end is to go on: not one that was cancelled or that SLURM itself starts again,
    which it ends before it tells them; but one that was told to reach its time limit. None if unknown."""
    with contextlib.suppress(NoAnswer):
        told, _, reason = ask("squeue", "--noheader", "--jobs", job, "--format=%T|%r").strip().partition("|")
        return told in ("RUNNING", "SIGNALING") or (told == "COMPLETING" and reason == "TimeLimit")
    return None


def last_end(job: str) -> str:
    """How the latest run of a job that ended did so, or its present state, in SLURM's words; "" if unknown.

    From the accounting where there is one, which knows of runs before a requeue, else from the controller.
    """
    return last_ends(job).get(job) or state(job)


def last_ends(jobs: str) -> dict[str, str]:
    """How the latest run of a job, or of every element of an array, ended, by name: what the accounting knows."""
    found: dict[str, str] = {}
    with contextlib.suppress(NoAnswer):
        words = ("--duplicates", "--allocations", "--noheader", "--parsable2", "-oJobID,State")
        for line in ask("sacct", "--jobs", jobs, *words).splitlines():
            name, _, told = line.partition("|")
            if told and (told.split()[0] not in ALIVE or told.split()[0] == "REQUEUED"):
                found[name] = told.split()[0]
    return found


def state(job: str) -> str:
    """The controller's word on a job; REQUEUED where it waits or runs again, "" if unknown."""
    with contextlib.suppress(NoAnswer):
        fields = shown("job", job)
        told = fields.get("JobState", "")
        return "REQUEUED" if told in ALIVE and fields.get("Restarts", "0") != "0" else told
    return ""


def shown(what: str, name: str) -> Mapping[str, str]:
    """What `scontrol show` tells of a job or partition. Raises NoAnswer."""
    return dict(re.findall(r"(\S+?)=(\S*)", ask("scontrol", "--oneliner", "show", what, name)))


def configuration() -> Mapping[str, str]:
    """slurm.conf as the controller has it. Raises NoAnswer."""
    lines = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, sign, value in lines if sign}


def largest_array() -> int:
    """How many elements an array may have; 1001, SLURM's default, where it does not say."""
    with contextlib.suppress(NoAnswer, ValueError):
        return max(1, int(configuration()["MaxArraySize"]))
    return 1001


def seconds_left(job: str) -> float | None:
    """Until the time limit of a job that runs; None where there is none or no answer."""
    with contextlib.suppress(NoAnswer):
        return parse_duration(ask("squeue", "--noheader", "--jobs", job, "--format=%L").strip())
    return None


def parse_duration(text: str) -> float | None:
    """`2-03:04:05`, `3:04:05` or `4:05` in seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def rename(job: str, name: str) -> None:
    """What `squeue` shows as the job's name."""
    with contextlib.suppress(NoAnswer):
        ask("scontrol", "update", f"JobId={job}", f"JobName={name}")


def cancel(jobs: Sequence[str], *, pending_only: bool = False) -> None:
    """Raises NoAnswer."""
    _scancel(jobs, *(["--state=PENDING"] if pending_only else []))


def tell(jobs: Sequence[str], signal: str) -> None:
    """Send a signal to the processes of jobs that run."""
    with contextlib.suppress(NoAnswer):
        _scancel(jobs, f"--signal={signal}")


def _scancel(jobs: Sequence[str], *options: str) -> None:
    """Of jobs that have ended meanwhile it says nothing, but exits as if it had failed, having done its work on the
    others."""
    for first in range(0, len(jobs), 100):
        try:
            ask("scancel", "--quiet", *options, *jobs[first : first + 100])
        except NoAnswer as error:
            if not str(error).startswith("scancel: exit "):
                raise


def cancel_quietly(job: str) -> None:
    """Where SLURM answers."""
    with contextlib.suppress(NoAnswer):
        cancel([job])


def release(job: str) -> None:
    """Let a job that was held run."""
    with contextlib.suppress(NoAnswer):
        ask("scontrol", "release", job)


@contextlib.contextmanager
def outside_of_job() -> Iterator[None]:
    """The environment without what SLURM set for this job, which a job submitted from it must not inherit."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    mine = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
    kept = {name: value for name, value in os.environ.items() if name.startswith(mine) and name not in OWN}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


@dataclass(frozen=True)
class Refusal:
    """Why sbatch took no job. `full`: a limit on how many there may be; `passing`: it may take it later."""

    text: str
    full: bool
    passing: bool


_LIMIT = re.compile(r"\b(?:QOS|Assoc)\w+Limit\b")
_FULL = re.compile(
    r"MaxArraySize|job array specification|submit limit|MaxJobCount|too many jobs|maximum number of jobs",
    re.IGNORECASE,
)
_SURELY_PASSING = re.compile(r"munge|timed out|unable to contact", re.IGNORECASE)
_FOR_GOOD = re.compile(
    r"invalid|unrecognized|than permitted|specification|specified|not available$|not permitted|denied|disabled|exceeds|not found"
    r"|no such|unable to open file|violates",
    re.IGNORECASE,
)


def refusal(text: str) -> Refusal:
    """sbatch's words, read."""
    text = " ".join(text.replace("sbatch: error: ", "").split())
    limits = _LIMIT.findall(text)
    full = any("Submit" in limit for limit in limits) if limits else bool(_FULL.search(text))
    passing = not full and (bool(_SURELY_PASSING.search(text)) or not _FOR_GOOD.search(text))
    return Refusal(text, full, passing)
