"""The workers of a sweep: how many there are, how many there should be, and the sending of the difference.

`Local` keeps the processes that this launcher started. `Slurm` is rebuilt from what the scheduler and
runs/<sweep>/jobs/ say, so that anyone may keep it up: the launcher, a worker that leaves, `status --watch`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ssl_diversity import files
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, losses, slurm, store
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.profile import SlurmProfile, visible_gpus
from ssl_diversity.sweep.remaining import Left

KEPT_LOGS = 5  # runs whose logs are kept, and those that may not have ended
ENDLESS = 10**6  # how often SLURM may requeue a worker that reached its time limit
FIRST_WAIT_S = 1.0  # before a scheduler that did not answer is asked again; doubled each time
LOCK_STALE_S = 120.0
LOOKED = "looked"  # touched whenever somebody looks after the number of workers
LOCK_WAIT_S = 0.2

Work = Callable[[Order, int], Callable[[], Any]]  # a worker, from its order and its number
Wanted = Counter[tuple[str, float | None]]  # (class, GiB where more than the class asks for) -> workers


class Fleet(Protocol):
    """What a launcher needs to know of either."""

    @property
    def ask_s(self) -> float: ...  # how often to call `supply`
    @property
    def ends_itself(self) -> bool: ...  # whether workers with nothing left to do need not be waited for
    @property
    def told(self) -> str: ...  # what keeps workers from being sent, if anything does
    @property
    def hopeless(self) -> bool: ...  # whether no worker will be sent any more

    def supply(self, rest: Left, *, waiting: bool, leaving: str = "", patience_s: float = 0.0) -> int: ...
    def alive(self) -> int: ...
    def dismiss(self) -> None: ...
    def stop(self) -> None: ...


class Local:
    """Workers as processes of this machine, which end with the launcher."""

    ask_s, ends_itself, told = 0.0, False, ""

    def __init__(self, order: Order, work: Work) -> None:
        self.order, self.work, self.jobs, self.sent = order, work, list[Any](), 0
        self.workers = order.profile.layout()[0]
        self.spare = order.profile.max_losses * self.workers
        self.executor: Any = None

    def supply(self, rest: Left, *, waiting: bool, leaving: str = "", patience_s: float = 0.0) -> int:
        """Send what is missing; those that died are replaced a bounded number of times. Returns how many work."""
        self.jobs = [job for job in self.jobs if not job.done()]
        wanted = self.workers if waiting else min(self.workers, len(rest.ready) + len(rest.later))
        missing = min(wanted - len(self.jobs), self.workers + self.spare - self.sent)
        if missing > 0 and not rest.over:
            if self.executor is None:
                self.executor = executor(self.order)
            with _environment(self.order), self.executor.batch():
                numbers = range(self.sent, self.sent + missing)
                self.jobs += [self.executor.submit(self.work(self.order, number)) for number in numbers]
            self.sent += missing
        return len(self.jobs)

    @property
    def hopeless(self) -> bool:
        return self.sent >= self.workers + self.spare

    def alive(self) -> int:
        """How many have not ended."""
        self.jobs = [job for job in self.jobs if not job.done()]
        return len(self.jobs)

    def dismiss(self) -> None:
        """None of them waits."""

    def stop(self) -> None:
        """Ask every worker to save and end: submitit's controllers pass SIGTERM on."""
        for job in self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)


class Slurm:
    """Workers as elements of job arrays. An array that was sent is recorded in runs/<sweep>/jobs/<number>.json:
    its class, its size, and how each element ended that needed to be known."""

    def __init__(self, order: Order, work: Work) -> None:
        profile = order.whole or order.profile
        assert isinstance(profile, SlurmProfile)
        self.order, self.work, self.profile = order, work, profile
        self.folder = order.sweep.folder / "jobs"
        self.tag = f"ssl-diversity/{files.digest(str(order.sweep.folder))[:12]}"
        self.ask_s, self.ends_itself, self.told, self.hopeless = self.profile.ask_s, True, "", False

    def supply(self, rest: Left, *, waiting: bool, leaving: str = "", patience_s: float = 0.0) -> int:
        """Send the workers that are missing, unless another does so at this moment; returns how many there are.

        `leaving` is the job of a worker that is about to end and is not counted; another who sends workers may
        have counted it and is waited for. A scheduler that does not take them is asked again for `patience_s`.
        Raises slurm.NoAnswer where it does not tell how many there
        are, UserError where it never takes such jobs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / LOOKED).touch()
        until = time.monotonic() + patience_s
        while (lock := claims.claim(self.folder, stale_s=LOCK_STALE_S)) is None:
            if not leaving or time.monotonic() > until:
                return self.alive()
            time.sleep(LOCK_WAIT_S)
        try:
            with lock.heartbeat(LOCK_STALE_S / 10):
                there = self._there()
                self._note_ends(there)
                there.pop(leaving, None)
                wanted = self._wanted(rest)
                self.hopeless = not wanted.total() and bool(rest.ready)
                missing = wanted - Counter(there.values())
                if self.order.cancelled or rest.over:
                    return len(there)
                return len(there) + sum(self._send(*kind, count, until) for kind, count in missing.items())
        finally:
            lock.release()

    def looked_at(self) -> float:
        """When somebody last looked after the number of workers, seconds since 1970."""
        with contextlib.suppress(OSError):
            return (self.folder / LOOKED).stat().st_mtime
        return 0.0

    def alive(self) -> int:
        """How many wait or run. Raises slurm.NoAnswer."""
        return len(self._there())

    def dismiss(self) -> None:
        """Take those that wait out of the queue."""
        slurm.cancel(list(self._there()), pending_only=True)

    def stop(self) -> None:
        """As `dismiss`; the others are told by `orders.cancel` and woken by a signal."""
        self.dismiss()
        slurm.tell(list(self._there()), "USR2")

    def cancel(self) -> None:
        """End all of them at once."""
        slurm.cancel(list(self._there()))

    # How many there are

    def _there(self) -> dict[str, tuple[str, float | None]]:
        """(class, GiB) by job of the workers that wait or run."""
        found: dict[str, tuple[str, float | None]] = {}
        waits: set[str] = set()
        self.told = ""
        records = {path.stem: files.read_json(path) for path in self._records()}
        for job in slurm.live():
            tagged = job.comment.startswith(self.tag + "/")
            if not (tagged or job.array in records):
                continue
            waits.add(job.reason if job.state == "PENDING" else "")
            if tagged:
                name, mem = job.comment.split("/")[2:4]
                found[job.name] = name, float(mem) if mem else None
            else:
                found[job.name] = records[job.array]["class"], records[job.array]["mem_gb"]
        if found and "" not in waits:
            self.told = f"{len(found)} workers wait in the queue ({', '.join(sorted(waits))})"
        return found

    def _records(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.json"))

    def _note_ends(self, there: dict[str, Any]) -> None:
        """Ask once of every element that has ended how it did: cancelled ones and crashed ones are not replaced for ever."""
        for path in self._records():
            record = files.read_json(path)
            gone = [i for i in range(record["count"]) if str(i) not in record["ended"]]
            gone = [i for i in gone if f"{path.stem}_{i}" not in there and path.stem not in there]
            if gone and time.time() - record["sent"] > slurm.ANSWER_S / 10:
                for i in gone:
                    job = f"{path.stem}_{i}" if record["count"] > 1 else path.stem
                    record["ended"][str(i)] = slurm.last_end(job) or "UNKNOWN"
                files.write_json(path, record)

    def _wanted(self, rest: Left) -> Wanted:
        """As many of each class as have something to do, less those that somebody cancelled, within `workers`."""
        wanted: Wanted = Counter()
        lost = store.Index("lost")
        ends = Counter[tuple[str, str]]()
        for path in self._records():
            record = files.read_json(path)
            if record["since"] >= self.order.since:
                ends.update((record["class"], end) for end in record["ended"].values())
        for name, kinds in self.profile.classes_of_workers.items():
            own = self.profile.of(name)
            bad = sum(n for (of, end), n in ends.items() if of == name and end in losses.CRASHED)
            room = own.workers - ends[name, "CANCELLED"]
            if bad > self.profile.max_losses * own.workers:
                self.told = f"{bad} workers of class {name} ended in the middle of their work; see {self.order.sweep.folder / 'logs'}"
                room = 0
            mine = [task for task in rest.ready if task.kind in kinds]
            needs = Counter(losses.memory_needed(task, own.mem_gb, lost) for task in mine)
            for mem_gb, count in sorted(needs.items(), key=lambda item: -(item[0] or 0)):
                wanted[name, mem_gb] = max(0, min(room, count))
                room -= wanted[name, mem_gb]
        return wanted

    # Sending

    def _send(self, name: str, mem_gb: float | None, count: int, until: float) -> int:
        """Send `count` workers of a class in arrays that the cluster takes; returns how many it took."""
        order = self.order.of(name, mem_gb)
        largest, sent, wait_s = min(count, slurm.largest_array()), 0, FIRST_WAIT_S
        while sent < count:
            size = min(largest, count - sent)
            comment = f"{self.tag}/{name}/{mem_gb or ''}/{secrets.token_hex(4)}"
            refused = self._sbatch(order, size, comment)
            if refused is None:
                sent, wait_s = sent + size, FIRST_WAIT_S
            elif refused.full and size > 1:
                largest = max(1, size // 2)
            elif refused.full:
                self.told = f"the cluster takes no more jobs now: {refused.text}"
                return sent
            elif refused.passing:
                slurm.cancel_comment(comment)  # it may have taken them all the same
                self.told = f"the scheduler does not answer: {refused.text}"
                if time.monotonic() + wait_s > until or self.order.cancelled:
                    return sent
                time.sleep(wait_s)
                wait_s *= 2
            else:
                raise UserError(
                    f"sbatch refuses the workers of class {name}: {refused.text}; change the profile"
                )
        return sent

    def _sbatch(self, order: Order, count: int, comment: str) -> slurm.Refusal | None:
        import submitit

        with (
            _environment(order),
            slurm.outside_of_job(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):
            sender = executor(order, comment)
            try:
                with sender.batch():
                    jobs = [sender.submit(self.work(order, number)) for number in range(count)]
            except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
                shutil.rmtree(sender.folder, ignore_errors=True)
                return slurm.refusal(str(error))
        record: dict[str, Any] = {
            "class": order.worker_class,
            "mem_gb": _more(order),
            "count": count,
            "ended": {},
        }
        record |= {"since": order.since, "sent": time.time(), "logs": str(sender.folder)}
        files.write_json(self.folder / f"{jobs[0].job_id.split('_')[0]}.json", record)
        return None


def of(order: Order, work: Work) -> Fleet:
    """The fleet that the order's profile speaks of."""
    return Slurm(order, work) if isinstance(order.profile, SlurmProfile) else Local(order, work)


def executor(order: Order, comment: str = "") -> Any:
    """A submitit executor for workers of this order, with a log folder of its own."""
    import submitit

    profile, logs = order.profile, order.sweep.folder / "logs"
    for old in sorted(logs.glob("*"))[: -KEPT_LOGS + 1]:
        if ended(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = logs / time.strftime("%Y%m%d-%H%M%S", time.localtime(order.since)) / secrets.token_hex(4)
    folder.mkdir(parents=True)
    more: dict[str, Any] = {}
    if isinstance(profile, SlurmProfile):
        more = {"slurm_max_num_timeout": ENDLESS}
        if profile.container or profile.python:
            more["slurm_python"] = f"{profile.container or ''} {profile.python or sys.executable}".strip()
    found = submitit.AutoExecutor(folder=folder, cluster=profile.executor, **more)
    parameters = profile.parameters(order.sweep.name)
    if comment:
        parameters["slurm_comment"] = comment
    found.update_parameters(**parameters)
    return found


def ended(logs: Path) -> bool:
    """Whether every job of a run's logs has its result: one that waits in a queue still needs its folder."""
    jobs = [
        path.with_name(path.name.removesuffix("_submitted.pkl")) for path in logs.rglob("*_submitted.pkl")
    ]
    return all(any(job.parent.glob(f"{job.name}_*_result.pkl")) for job in jobs)


def _more(order: Order) -> float | None:
    """GiB of these workers, where that is more than their class asks for."""
    mine = getattr(order.profile, "mem_gb", None)
    usual = getattr((order.whole or order.profile).of(order.worker_class), "mem_gb", None)
    return mine if mine != usual else None


@contextlib.contextmanager
def _environment(order: Order) -> Iterator[None]:
    """What workers inherit. SIGINT is for the submitting process: it tells its workers to save and end
    (submitit's local controller would kill them one second after a Ctrl-C)."""
    values = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve their neighbours
        "OMP_NUM_THREADS": str(order.threads),
        "MKL_NUM_THREADS": str(order.threads),
        "SSL_DIVERSITY_HOME": str(files.home()),
        "PYTHONSAFEPATH": "1",  # the folder datasets/ must not pass for the package of that name
        **order.profile.environment,
    }
    if not isinstance(order.profile, SlurmProfile) and order.profile.device != "cpu":
        values["SSL_DIVERSITY_GPUS"] = ",".join(visible_gpus())
    before = {name: os.environ.get(name) for name in values}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(values)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
