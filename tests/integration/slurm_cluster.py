"""A real SLURM cluster for tests, and every misfortune that can come over it."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm_dev.sh"
NODES = 3
OVER = {"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


@dataclass(frozen=True)
class Job:
    """A line of squeue. `name` is what scontrol and scancel take (`12` or `12_3`), `id` is its own number."""

    name: str
    id: str
    title: str
    state: str
    reason: str
    nodes: str


class Cluster:
    """One cluster of launch/slurm_dev.sh below `root`; options are its environment variables: SLURM_MAX_ARRAY=8."""

    def __init__(self, root: Path, **options: object) -> None:
        self.root = root
        self.options = {"SLURM_NODES": NODES, "SLURM_BASE_PORT": free_ports(), **options}

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """What makes a process use this cluster."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.conf)}

    def script(self, verb: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run launch/slurm_dev.sh VERB for this cluster; `options` go over its own, for this call."""
        values = {name: str(value) for name, value in {**self.options, **options}.items()}
        return subprocess.run(
            [SCRIPT, verb],
            env={**self.env, "SLURM_ROOT": str(self.root), **values},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator["Cluster"]:
        """Up within, down afterwards, whatever happens."""
        try:
            self.up()
            yield self
        finally:
            self.down()

    def up(self, **options: object) -> None:
        """Start what is not running; `options` change the cluster from now on."""
        self.options |= options
        done = self.script("up")
        assert done.returncode == 0, done.stderr

    def down(self) -> None:
        done = self.script("down")
        assert done.returncode == 0, done.stderr

    def client(self, *command: str | Path, status: int = 0) -> str:
        """What a SLURM command prints, or where it is to fail what it complains of; its exit status must be `status`."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == status, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return (done.stderr if status else done.stdout).strip()

    def submit(self, *arguments: str | Path) -> str:
        """The id that sbatch gives."""
        return self.client("sbatch", "--parsable", *arguments)

    def squeue(self) -> list[Job]:
        """Every job that is not over, array elements one by one."""
        lines = self.client("squeue", "-r", "-h", "-o", "%i|%A|%j|%T|%r|%N").splitlines()
        return [Job(*line.split("|")) for line in lines]

    def submitted_jobs(self) -> list[Job]:
        """Those that count for the submit limit."""
        return [job for job in self.squeue() if job.state != "COMPLETING"]

    def running_jobs(self) -> list[Job]:
        return [job for job in self.squeue() if job.state == "RUNNING"]

    def job(self, name: str) -> dict[str, str]:
        """`scontrol show job` of one job: JobState, Reason, ExitCode, Restarts, ..."""
        fields = self.client("scontrol", "-o", "show", "job", name).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def history(self, name: str) -> list[str]:
        """The states that sacct knows of a job, its earlier lives first."""
        return self.client("sacct", "-D", "-X", "-n", "-P", "-j", name, "-o", "state").splitlines()

    def requeue(self, name: str) -> None:
        self.client("scontrol", "requeue", name)

    def scancel(self, name: str) -> None:
        self.client("scancel", name)

    def reach_time_limit(self, name: str) -> None:
        """Bring a running job's time limit near: its --signal comes within 30 s, its end within some 75 s.

        The controller looks at limits every 30 s. A limit nearer than that may get both at the same look, and then
        either may arrive first.
        """
        self.client("scontrol", "update", f"jobid={name}", "EndTime=now+40")

    def preempt(self, node: str, seconds: int = 1) -> str:
        """A job of the partition `high` that wants the whole of a node for a while."""
        wrap = f"--wrap=sleep {seconds}"
        return self.submit("-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", wrap)

    def limit_submitted(self, jobs: int) -> None:
        """At most so many jobs of one user in the queue; -1: any number."""
        self.client("sacctmgr", "-i", "modify", "qos", "normal", "set", f"MaxSubmitJobsPerUser={jobs}")

    @contextlib.contextmanager
    def full_queue(self, room: int = 0) -> Iterator[None]:
        """Within, the user's submit limit lets `room` more jobs in than there are."""
        self.limit_submitted(len(self.submitted_jobs()) + room)
        try:
            yield
        finally:
            self.limit_submitted(-1)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Within, no job starts: every partition is down for new ones."""
        for partition in ("main", "high"):
            self.client("scontrol", "update", f"partition={partition}", "state=down")
        try:
            yield
        finally:
            for partition in ("main", "high"):
                self.client("scontrol", "update", f"partition={partition}", "state=up")

    def pids(self, job: str) -> list[int]:
        """The processes of a job by its own id, whether or not SLURM still knows of them; srun's included."""
        wanted = {f"SLURM_CONF={self.conf}".encode(), f"SLURM_JOB_ID={job}".encode()}
        return [pid for pid, values in _environments() if wanted <= values]

    def processes(self) -> dict[int, str]:
        """Every process that has to do with this cluster, with its name: daemons, steps, jobs."""
        root = str(self.root).encode()
        pids = [pid for pid, values in _environments() if any(root in value for value in values)]
        names = {}
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                names[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        return names

    def pid(self, daemon: str) -> int:
        """Of `slurmctld`, `slurmd.node1`, ..."""
        return int((self.root / f"{daemon}.pid").read_text())

    def kill_slurmd(self, node: str) -> None:
        """kill -9 of a node's daemon: its jobs go on, unsupervised; they are requeued after some 25 s."""
        self._kill(f"slurmd.{node}")

    def fail_node(self, node: str) -> None:
        """A node is gone with all that ran on it, and the controller is told so at once."""
        jobs = [job.id for job in self.running_jobs() if job.nodes == node]
        self.kill_slurmd(node)
        self.client("scontrol", "update", f"nodename={node}", "state=down", "reason=drill")
        for pid in [pid for job in jobs for pid in self.pids(job)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def settle(self) -> None:
        """Until the controller has written down what it knows now; it may put that off while little happens.

        It writes first of jobs, then of nodes: once it writes of jobs again, it has of nodes.
        """
        state = self.root / "state" / "job_state"
        for _ in range(2):
            since = time.time()
            while not state.exists() or state.stat().st_mtime < since:
                self.scancel(self.submit("-H", "-o", "/dev/null", "--wrap=true"))
                time.sleep(0.5)

    def empty(self) -> None:
        """End what tests before have left: workers that are leaving, jobs that a failed start holds."""
        for job in self.squeue():
            with contextlib.suppress(AssertionError):  # it has ended meanwhile
                self.scancel(job.name)
        self.wait(lambda: not self.squeue(), 90, "no job is there")

    def kill_slurmctld(self) -> None:
        """kill -9 of the controller, which loses what it has not written down (`settle`), job ids included."""
        self._kill("slurmctld")

    def _kill(self, daemon: str) -> None:
        pid = self.pid(daemon)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/exe").exists():  # not so for a zombie
            time.sleep(0.01)

    start_again = up  # whatever was killed

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Until `condition` holds; AssertionError with the queue and the controller's log when it does not."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                queue = "\n".join(map(str, self.squeue()))
                log = (self.root / "log" / "slurmctld.log").read_text()[-3000:]
                raise AssertionError(f"not within {seconds} s: {what}\n{queue}\n{log}")
            time.sleep(0.2)

    def wait_over(self, name: str, seconds: float = 60) -> str:
        """The state that a job ends in."""
        states = [""]

        def over() -> bool:
            states.append(self.job(name)["JobState"])
            return states[-1] in OVER

        self.wait(over, seconds, f"{name} is over")
        return states[-1]


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    """The environment of every process but this one, and its arguments."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                told = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
                yield int(folder.name), set(told.split(b"\0"))


def free_ports() -> int:
    """A base port whose hundred followers nobody listens at."""
    for _ in range(100):
        base = random.randrange(20000, 30000, 100)
        if all(_free(port) for port in (base, base + 1, *range(base + 11, base + 11 + NODES))):
            return base
    raise AssertionError("no free ports between 20000 and 30000")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
