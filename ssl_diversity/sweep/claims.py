"""Who works on a task: at most one live worker, told by files alone.

A claim is a file `claim.<n>` that can be created only once (a hard link of a finished temporary file, so
it is never seen half-written). The highest n holds the task. A holder that is a dead process of this
machine frees it at once, any other when its heartbeat (the file's mtime) is stale; taking over means
creating `claim.<n+1>`. A holder that wakes up and finds a higher number has lost the task: it stops and
publishes nothing.
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

from ssl_diversity.errors import UserError
from ssl_diversity.files import write_atomic


@dataclass(frozen=True)
class Process:
    """A process, told apart from every other one there was: pids return, so do host names."""

    machine: str  # host name, boot id and pid namespace
    pid: int
    started: str  # the kernel's start time of the pid
    job: str = ""  # the scheduler's word for it, where there is one

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
    job = os.environ.get("SLURM_JOB_ID", "")
    return Process(this_machine(), os.getpid(), _start_time(os.getpid()) or "", job)


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
    except FileExistsError:
        return False
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

    def gone(self, stale_s: float) -> bool:
        return self.process.alive() is False or self.silent_s > stale_s


def holder(folder: Path) -> Holder | None:
    """Who holds the task of this folder, dead or alive."""
    numbers = _numbers(folder)
    if not numbers:
        return None
    path = folder / f"claim.{numbers[-1]}"
    try:
        record = json.loads(path.read_text())
        silent = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # released between the listing and the reading
        return holder(folder)
    return Holder(numbers[-1], Process(**record["process"]), record["nonce"], record["since"], silent)


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
                with contextlib.suppress(OSError, UserError):  # a full disk must not end the heart
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


def claim(folder: Path, *, stale_s: float) -> Claim | None:
    """Claim the task of this folder; None if a live worker holds it or was faster."""
    previous = holder(folder)
    if previous is not None and not previous.gone(stale_s):
        return None
    mine = Claim(folder, previous.number + 1 if previous else 1, secrets.token_hex(8), previous)
    record = {"process": asdict(this_process()), "nonce": mine.nonce, "since": time.time()}
    return mine if create_once(mine.path, json.dumps(record)) else None
