"""A scheduler that is this one script and a folder: sbatch, squeue and their like, which really run their jobs.

Under the name of a command the script is that command; slurm_helpers.py installs it. What it prints, also where
it refuses, is what SLURM 22.05 prints. There is no daemon: a command that changes something, and a job that
ends, start what may start next.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "sacctmgr", "sinfo", "srun")
ACTIVE = ("PENDING", "RUNNING", "COMPLETING")
COMES_BACK = ("REQUEUED", "PREEMPTED", "NODE_FAIL")
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
NO_CONTACT = "Unable to contact slurm controller (connect failure)"
UNKNOWN = "slurm_load_jobs error: Invalid job id specified"
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"

Job = dict[str, Any]


# What it remembers


@contextlib.contextmanager
def remembered(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        now = json.loads((folder / "state.json").read_text())
        try:
            yield now
        finally:
            replace(folder / "state.json", now)


def replace(path: Path, value: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def new_job(array: int, index: str) -> Job:
    job: Job = {"array": array, "index": index, "number": 0, "state": "PENDING", "comment": "", "name": ""}
    job |= {"restarts": 0, "history": [], "exit": "0:0", "runner": 0, "group": 0, "step": 0, "begin": 0.0}
    return {**job, "asked": "", "started": 0.0, "time_s": 3600, "notice_s": 0, "requeue": True}


def _label(job: Job) -> str:
    return f"{job['array']}_{job['index']}" if job["index"] else str(job["array"])


def _named(jobs: list[Job], name: str) -> list[Job]:
    """The elements that a number or `<array>_<index>` means: the number of an array, all of them."""
    if "_" in name:
        return [job for job in jobs if _label(job) == name]
    return [job for job in jobs if name in (str(job["array"]), str(job["number"]))]


def _fail(text: str, status: int = 1) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(status)


class Command:
    """One call of a command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, json.loads((folder / "settings.json").read_text())

    def count(self, now: dict[str, Any], name: str) -> random.Random:
        """Chance that is the same for the same seed and the same number of the call."""
        number = now["calls"][name] = now["calls"].get(name, 0) + 1
        return random.Random(f"{self.settings['seed']} {name} {number}")

    def start_pending(self, now: dict[str, Any]) -> None:
        slots = json.loads((self.folder / "settings.json").read_text())["slots"]
        busy = sum(job["state"] in ("RUNNING", "COMPLETING") for job in now["jobs"])
        for job in now["jobs"]:
            if busy < slots and job["state"] == "PENDING" and job["begin"] <= time.time():
                busy += 1
                waiting = [j for j in now["jobs"] if j["array"] == job["array"] and not j["number"]]
                if not job["number"]:  # the last to start has the number of the array, as in SLURM
                    job["number"] = job["array"] if len(waiting) == 1 else now["next"]
                    now["next"] += 1
                job |= {"state": "RUNNING", "started": time.time(), "group": 0, "step": 0, "asked": ""}
                fake = self.folder / "bin" / "fake"
                job["runner"] = subprocess.Popen(
                    [sys.executable, "-IS", fake, "run", str(job["array"]), job["index"]],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                ).pid

    # Submitting

    def sbatch(self, *words: str) -> None:
        if words[0] == "--test-only":
            if self.settings["test_only"]:
                _fail(self.settings["test_only"])
            print(
                "sbatch: Job 7 to start at 2030-01-01T00:00:00 using 1 processors on nodes node1",
                file=sys.stderr,
            )
            return
        script = Path(words[-1]).read_text()
        given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
        given = {key: value.strip("'") for key, value in given.items()}
        count = int(given["array"].partition("%")[0].partition("-")[2]) + 1 if "array" in given else 1
        fault = ""
        with remembered(self.folder) as now:
            chance = self.count(now, "sbatch")
            if self.settings["faults"]:
                fault = dict(enumerate(self.settings["faults"], 1)).get(now["calls"]["sbatch"], "")
            elif chance.random() < self.settings["failing"]:
                fault = chance.choice(["not taken", "taken", "no contact"])
            if fault == "no contact":
                _fail(f"sbatch: error: Batch job submission failed: {NO_CONTACT}")
            if fault == "not taken":
                _fail(TIMED_OUT)
            if count > self.settings["max_array"]:
                _fail("sbatch: error: Batch job submission failed: Invalid job array specification")
            if count + sum(job["state"] in ACTIVE for job in now["jobs"]) > self.settings["submit_limit"]:
                _fail(
                    f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: {POLICY}"
                )
            array, now["next"] = now["next"], now["next"] + 1
            (self.folder / f"{array}.sh").write_text(script)
            (self.folder / f"{array}.json").write_text(
                json.dumps({**given, "cwd": os.getcwd(), "env": dict(os.environ)})
            )
            for i in range(count):
                job = new_job(array, str(i) if "array" in given else "")
                job |= {"comment": given.get("comment", ""), "name": given.get("job-name", "sbatch")}
                job |= {"time_s": int(given.get("time", 60)) * 60, "requeue": "no-requeue" not in given}
                job["notice_s"] = int(given.get("signal", "@0").partition("@")[2])
                now["jobs"].append(job)
            self.start_pending(now)
        if fault == "taken":
            _fail(TIMED_OUT)
        print(f"Submitted batch job {array}")

    # Running

    def run(self, array: str, index: str) -> None:
        """A job from its start to its end: what slurmstepd does."""
        for number in (signal.SIGTERM, signal.SIGUSR2):  # whatever who submitted it ignores
            signal.signal(number, signal.SIG_DFL)
        given = json.loads((self.folder / f"{array}.json").read_text())
        name = f"{array}_{index}" if index else array
        with remembered(self.folder) as now:
            (job,) = (job for job in now["jobs"] if _label(job) == name)
            variables = {
                "SLURM_JOB_ID": str(job["number"]),
                "SLURM_CLUSTER_NAME": "fake",
                "SLURM_NTASKS": "1",
            }
            if index:
                variables |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
            if job["restarts"]:
                variables["SLURM_RESTART_COUNT"] = str(job["restarts"])
            log = Path(_filled(given["output"], variables))
            if log.parent.exists():
                with log.open("a") as out:
                    script = subprocess.Popen(
                        ["bash", self.folder / f"{array}.sh"],
                        env={**given["env"], **variables},
                        cwd=given["cwd"],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                job["group"] = script.pid
        status = self._wait(script, name) if log.parent.exists() else 1
        with remembered(self.folder) as now:
            (job,) = _named(now["jobs"], name)
            job["exit"] = f"{status}:0" if status >= 0 else f"0:{-status}"
            asked, job["runner"] = job["asked"], 0
            word = asked or ("FAILED" if status else "COMPLETED")
            job["history"].append(f"CANCELLED by {os.getuid()}" if word == "CANCELLED" else word)
            if asked in COMES_BACK:
                later = time.time() + self.settings["requeue_s"]
                job |= {"state": "PENDING", "restarts": job["restarts"] + 1, "begin": later}
            else:
                job["state"] = word
            self.start_pending(now)
        if asked in COMES_BACK:
            time.sleep(self.settings["requeue_s"] + 0.05)
            with remembered(self.folder) as now:
                self.start_pending(now)

    def _wait(self, script: "subprocess.Popen[bytes]", name: str) -> int:
        """Until the script has ended; tells it of its time limit, and kills what does not end when it must."""
        told, must_end = False, 0.0
        while script.poll() is None:
            time.sleep(0.05)
            (job,) = _named(json.loads((self.folder / "state.json").read_text())["jobs"], name)
            age_s = time.time() - job["started"]
            if not told and job["notice_s"] and age_s > job["time_s"] - job["notice_s"]:
                told = True
                _signal(job, signal.SIGUSR2)
            if age_s > job["time_s"] and not job["asked"]:
                with remembered(self.folder) as now:
                    (job,) = _named(now["jobs"], name)
                    _stop(job, "TIMEOUT")
            if job["asked"]:
                must_end = must_end or time.time() + self.settings["kill_wait_s"]
                if time.time() > must_end:
                    os.killpg(script.pid, signal.SIGKILL)
        return script.returncode

    def srun(self, *words: str) -> None:
        """Becomes the command itself, so that signals to the step reach it."""
        given = _options(words, "output", "error")
        with remembered(self.folder) as now:
            job = next(j for j in now["jobs"] if str(j["number"]) == os.environ["SLURM_JOB_ID"])
            job["step"] = os.getpid()
        for name, number in (("output", 1), ("error", 2)):
            path = _filled(given.get(name, "/dev/null"), os.environ)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        os.environ |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
        os.execvp(given["words"][0], given["words"])

    # Asking

    def squeue(self, *words: str) -> None:
        given = _options(words, "jobs", "format")
        with remembered(self.folder) as now:
            chance = self.count(now, "squeue")
            if chance.random() < self.settings["deaf"]:
                now["deaf_until"] = time.time() + self.settings["deaf_s"]
            deaf, jobs = time.time() < now["deaf_until"], now["jobs"]
        if deaf:
            _fail(f"slurm_load_jobs error: {NO_CONTACT}")
        if "jobs" in given:
            jobs = _named(jobs, given["jobs"])
            if not jobs:
                _fail(UNKNOWN)
        seen = set()
        for job in jobs:
            whole = not job["number"] and "array" not in given  # pending elements are one line
            if job["state"] not in ACTIVE or (whole and job["array"] in seen):
                continue
            seen |= {job["array"]} if whole else set()
            left_s = int(job["time_s"] - (time.time() - job["started"] if job["started"] else 0))
            values = {"%A": job["number"] or job["array"], "%F": job["array"], "%K": job["index"] or "N/A"}
            values |= {
                "%r": "TimeLimit" if job["asked"] == "TIMEOUT" else "None",
                "%T": job["state"],
                "%k": job["comment"] or "(null)",
                "%j": job["name"],
            }
            values["%L"] = f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"
            print(re.sub(r"%[A-Za-z]", lambda match, values=values: str(values[match[0]]), given["format"]))

    def sacct(self, *words: str) -> None:
        given = _options(words, "jobs", "format", "starttime")
        if not self.settings["accounting"]:
            _fail("sacct: error: Problem talking to the database: Connection refused")
        fields = given.get("format", "JobID,State").split(",")
        if "noheader" not in given:
            print("|".join(fields))
        with remembered(self.folder) as now:
            jobs = _named(now["jobs"], given["jobs"]) if "jobs" in given else []
        for job in jobs:
            states = job["history"] + ([job["state"]] if job["state"] in ACTIVE else [])
            for state in states if "duplicates" in given else states[-1:]:
                values = {"JobID": _label(job), "State": state, "ExitCode": job["exit"], "NodeList": "node1"}
                print("|".join(values[field] for field in fields))

    def sinfo(self, *words: str) -> None:
        for number, name in enumerate(self.settings["partitions"]):
            print(name + "*" * (number == 0))

    def sacctmgr(self, *words: str) -> None:
        print(self.settings["associations" if "assoc" in words else "qos"], end="")

    # Changing

    def scontrol(self, *words: str) -> None:
        match [word for word in words if not word.startswith("--")]:
            case ["show", "config"]:
                told = {
                    "ClusterName": "fake",
                    "SLURM_VERSION": "22.05.8",
                    "MaxArraySize": self.settings["max_array"],
                }
                for key, value in {**told, **self.settings["config"]}.items():
                    print(f"{key:<23} = {value}")
            case ["show", "partition", name]:
                if name not in self.settings["partitions"]:
                    print(f"Partition {name} not found")
                    sys.exit(1)
                told = {
                    "PartitionName": name,
                    "AllocNodes": "ALL",
                    "MaxNodes": "UNLIMITED",
                    "MaxTime": "UNLIMITED",
                }
                told |= {"State": "UP", **self.settings["partitions"][name]}
                print(" ".join(f"{key}={value}" for key, value in told.items()))
            case ["show", "job", name]:
                with remembered(self.folder) as now:
                    found = _named(now["jobs"], name)
                for job in found or _fail(UNKNOWN):
                    ids = f"JobId={job['number'] or job['array']} ArrayJobId={job['array']} ArrayTaskId={job['index']}"
                    how = f"JobState={job['state']} Reason=None Restarts={job['restarts']} ExitCode={job['exit']}"
                    print(f"{ids} JobName={job['name']} {how}")
            case ["update", which, what]:
                with remembered(self.folder) as now:
                    for job in _named(now["jobs"], which.partition("=")[2]):
                        job["name"] = what.partition("=")[2]
            case ["requeue", name]:
                with remembered(self.folder) as now:
                    found = _named(now["jobs"], name)
                    for job in found or _fail(f"Invalid job id specified for job {name}"):
                        if not job["requeue"]:
                            _fail(f"Requested operation is presently disabled for job {name}")
                        if job["state"] == "RUNNING":
                            _stop(job, "REQUEUED")
                        elif job["state"] == "COMPLETING":
                            job["asked"] = "REQUEUED"

    def scancel(self, *words: str) -> None:
        given = _options(words, "state", "signal")
        with remembered(self.folder) as now:
            live = [job for job in now["jobs"] if job["state"] in ("PENDING", "RUNNING")]
            known = all(_named(live, name) for name in given["words"])
            for job in (job for name in given["words"] for job in _named(now["jobs"], name)):
                if job["state"] not in ACTIVE or given.get("state", job["state"]) != job["state"]:
                    continue
                if "signal" in given:
                    _signal(job, getattr(signal, f"SIG{given['signal']}"))
                elif job["state"] == "PENDING":
                    job["state"] = "CANCELLED"
                    job["history"].append(f"CANCELLED by {os.getuid()}")
                elif job["asked"] != "CANCELLED":
                    _stop(job, "CANCELLED")
            self.start_pending(now)
        if not known:
            _fail("" if "quiet" in given else f"scancel: {UNKNOWN}")


def _stop(job: Job, word: str) -> None:
    """A running job has to end, as `word` says in the accounting."""
    job |= {"asked": word, "state": "COMPLETING"}
    _signal(job, signal.SIGCONT)
    _signal(job, signal.SIGTERM)


def _signal(job: Job, number: int) -> None:
    """To the step of a running job, or to its script where it has none yet; SLURM ends that one, too."""
    if job["state"] in ("RUNNING", "COMPLETING"):
        with contextlib.suppress(ProcessLookupError):
            if job["step"]:
                os.kill(job["step"], number)
            elif job["group"] and number != signal.SIGUSR2:
                os.killpg(job["group"], number)


def _filled(pattern: str, told: Any) -> str:
    number = told["SLURM_JOB_ID"]
    values = {
        "%A": told.get("SLURM_ARRAY_JOB_ID", number),
        "%a": told.get("SLURM_ARRAY_TASK_ID", ""),
        "%j": number,
    }
    return re.sub("%[Aajt]", lambda match: {**values, "%t": "0"}[match[0]], pattern)


def _options(words: tuple[str, ...], *with_value: str) -> dict[str, Any]:
    """{name: value or ""} of the options up to the first word that is none; the rest as `words`."""
    short = {"-j": "jobs", "-o": "format"}
    given: dict[str, Any] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, _, value = word.removeprefix("--").partition("=")
        if word[:2] in short:
            name, value = short[word[:2]], word[2:]
        given[name] = value if value or name not in with_value else rest.pop(0)
    return {**given, "words": rest}


if __name__ == "__main__":
    me = Path(sys.argv[0])
    name, arguments = (me.name, sys.argv[1:]) if me.name in COMMANDS else (sys.argv[1], sys.argv[2:])
    getattr(Command(me.absolute().parent.parent), name)(*arguments)
