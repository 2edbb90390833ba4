"""Sweeps on a real SLURM: profiles, and the process that submits."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import LIMIT_S, environment
from slurm_cluster import Cluster


def profile(path: Path, cluster: Cluster | None, **more: object) -> Path:
    """A profile of three workers of one thread: of this machine, or of the cluster."""
    values: dict[str, object] = {
        "executor": "local",
        "workers": 3,
        "threads": 1,
        "device": "cpu",
        "heartbeat_s": 1,
    }
    if cluster is not None:
        del values["threads"]
        values |= {"executor": "slurm", "conf": cluster.conf, "cpus": 1, "time_min": 30, "signal_delay_s": 20}
        values |= {
            "mem_gb": 1,
            "stale_s": 20,
            "poll_s": 0.5,
            "ask_s": 2,
            "linger_s": 30,
            "submit_patience_s": 20,
        }
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**values, **more}.items()))
    return path


class Submitter:
    """The process that runs the sweep, started again after it was killed."""

    def __init__(self, home: Path, profile: Path, *arguments: str, log: str = "submitter.log") -> None:
        self.home, self.profile, self.arguments, self.log = home, profile, arguments, home / log
        home.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        here = Path(__file__).parent
        path = f"{here}:{here.parent / 'sweep'}:{os.environ.get('PYTHONPATH', '')}"
        self.output = self.log.open("a")
        self.process = subprocess.Popen(
            [sys.executable, here / "drill_launcher.py", self.profile, *self.arguments],
            cwd=self.home,
            env={**environment(self.home), "PYTHONPATH": path},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def over(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> str:
        try:
            self.process.wait(timeout=LIMIT_S)
        finally:
            self.process.kill()
        return self.log.read_text()
