"""The workers of a sweep: how many there are, how many there should be, and the sending of the difference.

`Local` keeps the processes that this launcher started. `Slurm` is rebuilt from what the scheduler and
runs/<sweep>/jobs/ say, so that anyone may keep it up: the launcher, a worker that leaves, `status --watch`.
"""

import contextlib
import itertools
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ssl_diversity import files
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import claims, losses, slurm, store
from ssl_diversity.sweep.orders import Order
from ssl_diversity.sweep.profile import SlurmProfile, visible_gpus
from ssl_diversity.sweep.remaining import Left
from ssl_diversity.sweep.task import Task

KEPT_LOGS = 5  # runs whose logs are kept, and those that may not have ended
ENDLESS = 10**6  # how often SLURM may requeue a worker that reached its time limit
FIRST_WAIT_S = 1.0  # before a scheduler that did not answer is asked again; doubled each time
LOCK_STALE_S = 120.0
LOOKED = "looked"  # touched whenever somebody looks after the number of workers
LOCK_WAIT_S = 0.2
JUST_SENT_S = 3.0  # until squeue knows a job for sure
ASIDE = "over-"  # folders of records that say nothing more, by when their run began
COUNTED = losses.CRASHED | {"CANCELLED"}  # ends that bear on how many workers are sent
# not by the user
HELD = re.compile(r"launch.fail|requeued.(in.)?held|JobHeldAdmin|JobHoldMaxRequeue", re.IGNORECASE)

Work = Callable[[Order, int], Callable[[], Any]]  # a worker, from its order and its number
Kind = tuple[str, float | None]  # of workers: their class, and GiB where that is more than the class asks for
Wanted = Counter[Kind]


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
        self.order, self.work, self.jobs, self.ended = order, work, dict[int, Any](), 0
        self.workers = order.profile.layout()[0]
        self.most = (1 + order.profile.max_losses) * self.workers
        self.executor: Any = None

    def supply(self, rest: Left, *, waiting: bool, leaving: str = "", patience_s: float = 0.0) -> int:
        """Send what is missing; those that died are replaced a bounded number of times. Returns how many work."""
        there = self.alive()
        wanted = self.workers if waiting else min(self.workers, len(rest.ready) + len(rest.later))
        missing = min(wanted - there, self.most - there - self.ended)
        if missing > 0 and not (rest.over or self.order.cancelled):
            if self.executor is None:
                self.executor = executor(self.order)
            with _environment(self.order), self.executor.batch():
                free = (number for number in itertools.count() if number not in self.jobs)
                for number in list(itertools.islice(free, missing)):  # it says which GPU is the worker's
                    self.jobs[number] = self.executor.submit(self.work(self.order, number))
        return len(self.jobs)

    @property
    def hopeless(self) -> bool:
        return self.ended >= self.most

    def alive(self) -> int:
        """How many have not ended."""
        for number, job in list(self.jobs.items()):
            if job.done():
                del self.jobs[number]
                had_its_share = self.order.profile.tasks_per_worker is not None and job.exception() is None
                self.ended += not had_its_share
        return len(self.jobs)

    def dismiss(self) -> None:
        """None of them waits."""

    def stop(self) -> None:
        """Ask every worker to save and end: submitit's controllers pass SIGTERM on."""
        for job in self.jobs.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)


class Slurm:
    """Workers as elements of job arrays. An array that was sent is recorded in runs/<sweep>/jobs/<number>.json:
    its class, its size, and how each element ended. A job's comment says whose it is, what it was sent for and
    where its logs lie."""

    def __init__(self, order: Order, work: Work) -> None:
        profile = order.given
        assert isinstance(profile, SlurmProfile)
        self.order, self.work, self.profile = order, work, profile
        self.folder = order.sweep.folder / "jobs"
        self.tag = f"ssl-diversity/{files.digest(str(order.sweep.folder))[:12]}"
        self.ask_s, self.ends_itself, self.told, self.hopeless = self.profile.ask_s, True, "", False

    def supply(self, rest: Left, *, waiting: bool, leaving: str = "", patience_s: float = 0.0) -> int:
        """Send the workers that are missing, unless another does so at this moment; returns how many there are.

        `leaving` is the job of a worker that is about to end and is not counted. Another who sends workers, and a
        scheduler that does not take them, are waited for up to `patience_s`. Raises slurm.NoAnswer where the
        scheduler does not tell how many there are, UserError where it never takes such jobs and there are none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            (self.folder / LOOKED).touch()
        until = time.monotonic() + patience_s
        while (lock := claims.claim(self.folder, stale_s=LOCK_STALE_S)) is None:
            if time.monotonic() > until:
                return len(self._there().keys() - {leaving})
            time.sleep(LOCK_WAIT_S)
        try:
            with lock.heartbeat(LOCK_STALE_S / 10):
                there = self._there(tidy=True)
                records = self._records(there)
                there.pop(leaving, None)
                if self.order.cancelled or rest.over or self._is_superseded():
                    return len(there)
                return len(there) + self._send_missing(rest, records, Counter(there.values()), until)
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
        """Take those that wait out of the queue, unless a later run has work for them."""
        if not self._is_superseded():
            slurm.cancel(list(self._there()), pending_only=True)

    def stop(self) -> None:
        """Take those that wait out of the queue; the others are told by `orders.cancel` and woken by a signal."""
        slurm.cancel(list(self._there()), pending_only=True)
        slurm.tell(list(self._there()), "USR2")

    def cancel(self) -> None:
        """End all of them at once."""
        slurm.cancel(list(self._there()))

    def _is_superseded(self) -> bool:
        self.hopeless = self.order.superseded
        if self.hopeless:
            self.told = (
                "a later run of this sweep with other tasks has its workers; run this one again after it"
            )
        return self.hopeless

    # How many there are

    def _there(self, *, tidy: bool = False) -> dict[str, Kind]:
        """What each worker that waits or runs was sent for, by job.

        With `tidy`, jobs that a failed start left held are released, and those that sbatch took although it said
        that it had not are cancelled: they have nothing to run.
        """
        found: dict[str, Kind] = {}
        waits: set[str] = set()
        laid = {path.name for path in (self.order.sweep.folder / "logs").glob("*/*")}
        for job in slurm.live():
            parts = job.comment.split("/")
            if len(parts) != 5 or "/".join(parts[:2]) != self.tag:
                continue
            if parts[4] not in laid:
                if tidy:
                    slurm.cancel_quietly(job.name)
                continue
            if tidy and HELD.search(job.reason):
                slurm.release(job.name)
            waits.add(job.reason if job.state == "PENDING" else "")
            found[job.name] = parts[2], float(parts[3]) if parts[3] else None
        self.told = ""
        if found and "" not in waits:
            self.told = f"{len(found)} workers wait in the queue ({', '.join(sorted(waits))})"
        return found

    def _records(self, there: Iterable[str]) -> list[dict[str, Any]]:
        """Of the arrays of this run, with how their elements ended: asked once, so that those that were cancelled or
        crashed are not replaced for ever. Those whose elements all ended well say nothing more and are put aside (with
        a job for each task they are thousands), those of earlier runs that are over are dropped."""
        alive, records = set(there), []
        for aside in self.folder.glob(f"{ASIDE}*"):
            if float(aside.name.removeprefix(ASIDE)) < self.order.since:
                shutil.rmtree(aside, ignore_errors=True)
        for path in sorted(self.folder.glob("[0-9]*.json")):
            record = files.read_json(path)
            if record.get("uid", os.getuid()) != os.getuid():
                continue  # of another user, whose jobs are not among those that are there
            names = {
                str(i): f"{path.stem}_{i}" if record["count"] > 1 else path.stem
                for i in range(record["count"])
            }
            open_ = [i for i, name in names.items() if i not in record["ended"] and name not in alive]
            if open_ and time.time() - record["sent"] > JUST_SENT_S:
                told = slurm.last_ends(path.stem)
                record["ended"] |= {
                    i: told.get(names[i]) or slurm.state(names[i]) or "UNKNOWN" for i in open_
                }
                files.write_json(path, record)
            is_over = len(record["ended"]) == record["count"]
            if record["since"] < self.order.since:
                if is_over:
                    path.unlink(missing_ok=True)
            elif is_over and COUNTED.isdisjoint(record["ended"].values()):
                aside = self.folder / f"{ASIDE}{record['since']!r}"
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
            else:
                records.append(record)
        return records

    # Sending

    def _send_missing(self, rest: Left, records: list[dict[str, Any]], there: Wanted, until: float) -> int:
        """As many of each class as have something to do, less those that somebody cancelled, within `workers`."""
        ends = Counter((record["class"], end) for record in records for end in record["ended"].values())
        lost, sent, wanted, refused = store.Index("lost"), 0, 0, ""
        for name, kinds in self.profile.classes_of_workers.items():
            own = self.profile.of(name)
            bad = sum(n for (of, end), n in ends.items() if of == name and end in losses.CRASHED)
            room = own.workers - ends[name, "CANCELLED"]
            marked = sum(len(lost.keys(kind)) for kind in kinds)
            excused = min(ends[name, "OUT_OF_MEMORY"], marked)  # made again with more memory
            if bad > self.profile.max_losses * own.workers + excused:
                self.told = f"{bad} workers of class {name} ended in the middle of their work; see `logs`, {self.order.sweep.folder / 'logs'}"
                room = 0
            asked: dict[float | None, list[Task]] = defaultdict(list)
            for task in rest.ready:
                if task.kind in kinds:
                    asked[losses.memory_needed(task, own, lost)].append(task)
            for mem_gb, tasks in sorted(asked.items(), key=lambda item: -(item[0] or 0)):
                count = max(0, min(room, len(tasks)))
                room, wanted = room - count, wanted + count
                try:
                    sent += self._send(name, mem_gb, count - there[name, mem_gb], until)
                except UserError as error:
                    if mem_gb is None:
                        refused = str(error)
                    else:
                        losses.refuse(tasks, mem_gb, str(error))
        self.hopeless = not wanted and bool(rest.ready)
        if refused and not sent and not there.total():
            raise UserError(f"{refused}; change the profile")
        self.told = refused or self.told
        return sent

    def _send(self, name: str, mem_gb: float | None, count: int, until: float) -> int:
        """Send `count` workers of a class in arrays that the cluster takes; returns how many it took."""
        order = self.order.of(name, mem_gb)
        largest, sent, wait_s = min(count, slurm.largest_array()) if count > 0 else 0, 0, FIRST_WAIT_S
        while sent < count:
            size = min(largest, count - sent)
            refused = self._sbatch(order, size)
            if refused is None:
                sent, wait_s = sent + size, FIRST_WAIT_S
            elif refused.full and size > 1:
                largest = max(1, size // 2)
            elif refused.full:
                self.told = f"the cluster takes no more jobs now: {refused.text}"
                return sent
            elif refused.passing:
                self.told = f"the scheduler does not answer: {refused.text}"
                if time.monotonic() + wait_s > until or self.order.cancelled:
                    return sent
                time.sleep(wait_s)
                wait_s *= 2
            else:
                raise UserError(f"sbatch refuses the workers of class {name}: {refused.text}")
        return sent

    def _sbatch(self, order: Order, count: int) -> slurm.Refusal | None:
        import submitit

        nowhere = open(os.devnull, "w")  # noqa: SIM115
        with _environment(order), slurm.outside_of_job(), nowhere, contextlib.redirect_stderr(nowhere):
            sender = executor(order, f"{self.tag}/{order.worker_class}/{_more(order) or ''}")
            try:
                with sender.batch():
                    jobs = [sender.submit(self.work(order, number)) for number in range(count)]
            except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
                shutil.rmtree(sender.folder, ignore_errors=True)  # should it have taken them: see `_there`
                return slurm.refusal(str(error))
        record: dict[str, Any] = {"class": order.worker_class, "count": count, "ended": {}}
        record |= {
            "mem_gb": _more(order),
            "since": order.since,
            "sent": time.time(),
            "logs": str(sender.folder),
            "uid": os.getuid(),
        }
        files.write_json(self.folder / f"{jobs[0].job_id.split('_')[0]}.json", record)
        return None


def of(order: Order, work: Work) -> Fleet:
    """The fleet that the order's profile speaks of."""
    return Slurm(order, work) if isinstance(order.profile, SlurmProfile) else Local(order, work)


def executor(order: Order, comment: str = "") -> Any:
    """A submitit executor for workers of this order, with a log folder of its own, which ends their `comment`."""
    import submitit

    profile, logs, own = order.profile, order.sweep.folder / "logs", secrets.token_hex(4)
    run = logs / time.strftime("%Y%m%d-%H%M%S", time.localtime(order.since))
    if not run.exists():
        for old in sorted(logs.glob("*"))[: -KEPT_LOGS + 1]:
            if ended(old):
                shutil.rmtree(old, ignore_errors=True)
    (run / own).mkdir(parents=True)
    more: dict[str, Any] = {}
    if isinstance(profile, SlurmProfile):
        more = {"slurm_max_num_timeout": ENDLESS}
        if profile.container or profile.python:
            more["slurm_python"] = f"{profile.container or ''} {profile.python or sys.executable}".strip()
    found = submitit.AutoExecutor(folder=run / own, cluster=profile.executor, **more)
    parameters = profile.parameters(order.sweep.name)
    if comment:
        parameters["slurm_comment"] = f"{comment}/{own}"
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
    usual = getattr(order.given.of(order.worker_class), "mem_gb", None)
    return mine if mine != usual else None


@contextlib.contextmanager
def _environment(order: Order) -> Iterator[None]:
    """What workers inherit. SIGINT is for the submitting process: it tells its workers to save and end
    (submitit's local controller would kill them one second after a Ctrl-C). Of SIGHUP that process dies, which they see."""
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
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    os.environ.update(values)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
