"""Who works on a task: at most one live worker, told by files alone.

A claim is a file `claim.<n>` that can be created only once (a hard link of a finished temporary file, so
it is never seen half-written). The highest n holds the task. A holder that is a dead process of this
machine frees it at once, any other when its heartbeat (the file's mtime) is stale; taking over means
creating `claim.<n+1>`. A holder that wakes up and finds a higher number has lost the task: it stops and
publishes nothing. (Between its last look and its publishing lie microseconds in which it may still be too
late to notice; a result is created once, so that even then there is one, and it is that of the same task.)
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from ssl_diversity.files import home, write_atomic

SKEW_KEPT_S = 600.0
LOOKS, LOOK_AGAIN_S = 50, 0.1
FINE_SKEW_S = 0.1  # less is the coarseness of a file's time


@dataclass(frozen=True)
class Process:
    """A process, told apart from every other one there was: pids return, so do host names."""

    machine: str  # host name, boot id and pid namespace
    pid: int
    started: str  # the kernel's start time of the pid
    job: str = ""  # the scheduler's name for it, where there is one
    restart: int = 0  # how often the job had been requeued
    owner: str = ""  # whose job on which cluster

    def alive(self) -> bool | None:
        """Whether it still runs; None where only another machine could tell."""
        if self.machine != this_machine():
            return None
        started = _start_time(self.pid)
        return started is not None and started == self.started


@lru_cache
def this_machine() -> str:
    def read(path: str) -> str:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
        return ""

    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {read('/proc/sys/kernel/random/boot_id')} {namespace}"


def this_process() -> Process:
    told = os.environ
    owner = f"{os.getuid()}@{told.get('SLURM_CLUSTER_NAME', '')}"
    restart = int(told.get("SLURM_RESTART_COUNT", 0))
    return Process(this_machine(), os.getpid(), _start_time(os.getpid()) or "", this_job(), restart, owner)


def this_job() -> str:
    """What SLURM's commands call the job that this process is in; "" outside of any.

    The number alone of an element means the whole array where it is the last of it.
    """
    number, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID", "")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if number and array else number


def _start_time(pid: int) -> str | None:
    """Start time of a running process; None if there is none (a zombie has ended, too)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:  # no /proc: ask whether the pid exists at all
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def create_once(path: Path, text: str) -> bool:
    """Create `path` with all of `text`; False if it exists already, whoever was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        write_atomic(temporary, text)
        os.link(temporary, path)
        return True
    except FileExistsError:  # or it was made, and the file server's word got lost
        return temporary.stat().st_nlink > 1
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Holder:
    """What a claim file says, and for how long its heart has not beaten."""

    number: int
    process: Process
    nonce: str
    since: float  # when the task was claimed, seconds since 1970
    silent_s: float
    log: str = ""  # where its output goes
    mem_gb: float | None = None  # what its job had asked for

    def gone(self, stale_s: float, ended: "Ended" = lambda holder: False) -> bool:
        """Whether it will not come back, or has been silent for too long to be waited for.

        `ended` is the scheduler's word on holders on other machines.
        """
        alive = self.process.alive()
        if alive is False or self.silent_s > stale_s:
            return True
        return alive is None and (_previous_life(self.process) or ended(self))


Ended = Callable[[Holder], bool]


def _previous_life(process: Process) -> bool:
    """Whether it ran before the job of this process was requeued."""
    mine = this_process()
    return (
        bool(mine.job)
        and (mine.job, mine.owner) == (process.job, process.owner)
        and process.restart < mine.restart
    )


def holder(folder: Path) -> Holder | None:
    """Who holds the task of this folder, dead or alive."""
    for _ in range(LOOKS):
        numbers = _numbers(folder)
        if not numbers:
            return None
        with contextlib.suppress(FileNotFoundError):  # released between the listing and the reading
            return _read(folder / f"claim.{numbers[-1]}")
        time.sleep(LOOK_AGAIN_S)  # or listed by a file server that does not know it yet
    return None


def _read(path: Path) -> Holder:
    record = json.loads(path.read_text())
    silent = file_time() - path.stat().st_mtime
    own = {key: record.get(key) for key in ("nonce", "since", "log", "mem_gb")}
    return Holder(int(path.name[6:]), Process(**record["process"]), silent_s=silent, **own)


def file_time() -> float:
    """Now, by the clock that stamps the store's files: a file server's may differ from this machine's."""
    return time.time() + _skew_s(home() / "store", int(time.monotonic() / SKEW_KEPT_S))


@lru_cache(maxsize=8)
def _skew_s(store: Path, period: int) -> float:
    """How far the clock of the file system is ahead of ours."""
    probe = store / f".clock.{secrets.token_hex(8)}.tmp"
    try:
        before = time.time()
        probe.touch()
        modified, after = probe.stat().st_mtime, time.time()
        ahead, unknown = modified - (before + after) / 2, (after - before) / 2  # a disk may be slow
        return ahead if abs(ahead) > FINE_SKEW_S + unknown else 0.0
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name[6:]) for name in names if name.startswith("claim.") and name[6:].isdecimal())


@dataclass
class Claim:
    """A task held by this process. `lost` is set once another has taken it over.

    `previous` is the holder that went without releasing it, if there was one.
    """

    folder: Path
    number: int
    nonce: str
    previous: Holder | None = None
    lost: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        return self.folder / f"claim.{self.number}"

    def held(self) -> bool:
        """Whether the task is still ours; read from the files, not from memory."""
        now = holder(self.folder)
        ours = now is not None and now.nonce == self.nonce
        if not ours:
            self.lost.set()
        return ours

    def release(self) -> None:
        """Free the task. Older claims go first, so that no dead one comes back to life."""
        if self.held():
            for number in _numbers(self.folder):
                (self.folder / f"claim.{number}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def heartbeat(self, every_s: float, beat: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep the claim fresh from a thread, calling `beat` each time, until the block is left."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(every_s):
                with contextlib.suppress(
                    Exception
                ):  # neither a full disk nor a file server must end the heart
                    if not self.held():
                        return
                    os.utime(self.path)
                    beat()

        thread = threading.Thread(target=run, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def claim(
    folder: Path,
    *,
    stale_s: float,
    ended: Ended = lambda holder: False,
    log: str = "",
    mem_gb: float | None = None,
) -> Claim | None:
    """Claim the task of this folder; None if a live worker holds it or was faster.

    `ended` is the scheduler's word on holders on other machines; `log` is where this process's output goes,
    `mem_gb` what its job asked for.
    """
    previous = holder(folder)
    if previous is not None and not previous.gone(stale_s, ended):
        return None
    mine = Claim(folder, previous.number + 1 if previous else 1, secrets.token_hex(8), previous)
    record = {"process": asdict(this_process()), "nonce": mine.nonce, "since": file_time()}
    record |= {"log": log, "mem_gb": mem_gb}
    return mine if create_once(mine.path, json.dumps(record)) else None
