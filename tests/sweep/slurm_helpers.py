"""Installs and steers the scheduler of fake_slurm.py from a test."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fake_slurm
from fake_slurm import ACTIVE, COMMANDS, Job, new_job, remembered, replace

from ssl_diversity.sweep.profile import SlurmProfile

SETTINGS: dict[str, Any] = {
    "slots": 2,  # jobs at a time
    "max_array": 1001,
    "submit_limit": 10**6,
    "accounting": True,
    "requeue_s": 0.3,  # how long a requeued job waits
    "kill_wait_s": 10.0,
    "seed": 0,
    "failing": 0.0,  # share of the calls of sbatch that fail, one way or another
    "faults": [],  # or those of its first, second... call: "", "not taken", "taken", "no contact"
    "deaf": 0.0,  # share of the calls of squeue that begin a silence of `deaf_s`
    "deaf_s": 0.5,
    "config": {},  # what else `scontrol show config` says
    "partitions": {"main": {}},  # the first is the default; what `scontrol show partition` says of each
    "associations": "lab|\n",
    "qos": "normal|\n",
    "test_only": "",  # what `sbatch --test-only` objects
}


def quick_profile(**changed: Any) -> SlurmProfile:
    """Workers of one thread that look around often."""
    quick = {
        "poll_s": 0.1,
        "heartbeat_s": 0.2,
        "linger_s": 20,
        "stale_s": 30,
        "ask_s": 0.5,
        "submit_patience_s": 20,
    }
    own = {"executor": "slurm", "time_min": 60, "cpus": 1, "device": "cpu"}
    return SlurmProfile.model_validate({**own, **quick, **changed})


class Scheduler:
    """What a test does with it: `change` settings, look at the `jobs`, `put` made-up ones, `end` it all."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        script = self.bin / "fake"
        script.write_text(f"#!{sys.executable} -IS\n{Path(fake_slurm.__file__).read_text()}")
        script.chmod(0o755)
        for name in COMMANDS:
            (self.bin / name).symlink_to(script)
        (folder / "settings.json").write_text(json.dumps(SETTINGS))
        self.change(**settings)
        (folder / "state.json").write_text(
            json.dumps({"next": 1000, "calls": {}, "deaf_until": 0, "jobs": []})
        )

    def change(self, **settings: Any) -> None:
        now = json.loads((self.folder / "settings.json").read_text())
        assert now.keys() >= settings.keys()
        replace(self.folder / "settings.json", {**now, **settings})

    @property
    def jobs(self) -> list[Job]:
        found: list[Job] = json.loads((self.folder / "state.json").read_text())["jobs"]
        return found

    @property
    def active(self) -> list[Job]:
        return [job for job in self.jobs if job["state"] in ACTIVE]

    def calls(self, command: str) -> int:
        count: int = json.loads((self.folder / "state.json").read_text())["calls"].get(command, 0)
        return count

    def put(self, array: int, state: str, **values: Any) -> None:
        """A job that no one submitted and that does not run."""
        with remembered(self.folder) as now:
            now["jobs"].append({**new_job(array, ""), "number": array, "state": state, **values})

    def rewrite(self, **values: Any) -> None:
        """Let all jobs that there ever were be so."""
        with remembered(self.folder) as now:
            for job in now["jobs"]:
                job.update(values)

    def end(self, patience_s: float = 20.0) -> None:
        """Kill what runs, and keep anything from starting."""
        self.change(slots=0)
        until = time.monotonic() + patience_s
        while running := [job for job in self.active if job["runner"]]:
            for job in running:
                if job["group"]:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(job["group"], signal.SIGKILL)
            assert time.monotonic() < until, running
            time.sleep(0.05)
