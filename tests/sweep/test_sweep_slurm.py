"""SLURM's words are understood, its silence is borne, and a question about one element is not about its array."""

import os
import time
from pathlib import Path

import pytest
from slurm_helpers import Scheduler

from ssl_diversity.sweep import claims, slurm

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = FAILED + "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
FULL = [
    f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}",
    f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}",
    f"sbatch: error: AssocGrpSubmitJobsLimit\n{POLICY}",
    FAILED + "Invalid job array specification",
]
PASSING = [
    FAILED + "Required partition not available (inactive or drain)",
    FAILED + "Socket timed out on send/recv operation",
    FAILED + "Unable to contact slurm controller (connect failure)",
    "sbatch: error: If munged is up, restart with --num-threads=10\n"
    'sbatch: error: Munge encode failed: Failed to access "/run/munge.sock": No such file or directory\n'
    "sbatch: error: slurm_send_node_msg: auth_g_create: REQUEST_SUBMIT_BATCH_JOB has authentication error\n"
    + FAILED
    + "Protocol authentication error",
]
FOR_EVER = [
    "sbatch: error: invalid partition specified: nope\n" + FAILED + "Invalid partition name specified",
    FAILED + "Invalid account or account/partition combination specified",
    FAILED + "Invalid qos specification",
    FAILED + "Invalid feature specification",
    "sbatch: error: Memory specification can not be satisfied\n"
    + FAILED
    + "Requested node configuration is not available",
    FAILED + "Requested node configuration is not available",
    "sbatch: error: Invalid generic resource (gres) specification",
    "sbatch: unrecognized option '--bogus'",
    "sbatch: error: Invalid --time specification",
    FAILED + "Requested time limit is invalid (missing or exceeds some limit)",
    FAILED + "Node count specification invalid",
    FAILED + "More processors requested than permitted",
    f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}",
]


@pytest.mark.parametrize(
    ("text", "full", "passing"),
    [
        *((text, True, False) for text in FULL),
        *((text, False, True) for text in PASSING),
        *((text, False, False) for text in FOR_EVER),
    ],
)
def test_a_refusal_is_read(text: str, full: bool, passing: bool) -> None:
    read = slurm.refusal(text)
    assert (read.full, read.passing) == (full, passing)
    assert "sbatch: error:" not in read.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2-03:04:05", 183845), ("3:04:05", 11045), ("4:05", 245), ("UNLIMITED", None), ("", None)],
)
def test_durations_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert slurm.parse_duration(text) == seconds


def sent(folder: Path, count: int, comment: str) -> str:
    """The number of an array of jobs that sleep."""
    script = folder / f"{comment}.sh"
    options = f"#SBATCH --array=0-{count - 1}%{count}\n#SBATCH --comment={comment}\n#SBATCH --time=5\n"
    script.write_text(f"#!/bin/bash\n{options}#SBATCH --output={folder}/%A_%a.out\nsleep 60\n")
    return slurm.ask("sbatch", str(script)).split()[-1]


def test_what_is_said_of_the_last_element_is_not_said_of_its_array(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.change(slots=3)
    array = sent(tmp_path, 3, "three")
    last = next(job for job in scheduler.jobs if str(job["number"]) == array)
    monkeypatch.setenv("SLURM_JOB_ID", array)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", last["index"])
    job = claims.this_job()
    assert claims.this_process().job == job == f"{array}_{last['index']}"
    assert slurm.meant_to_run(job)
    left_s = slurm.seconds_left(job)
    assert left_s is not None
    assert 280 < left_s <= 300
    slurm.rename(job, "a cell")
    assert [job["name"] for job in scheduler.jobs].count("a cell") == 1
    slurm.cancel([job])
    while len(scheduler.active) == 3:
        time.sleep(0.02)
    assert slurm.last_end(job) == "CANCELLED"
    assert slurm.meant_to_run(job) is False
    assert {found.state for found in slurm.live()} == {"RUNNING"}
    assert {found.name for found in slurm.live()} == {f"{array}_{i}" for i in range(3)} - {job}


def test_those_that_ended_meanwhile_do_not_keep_others_from_being_cancelled(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    scheduler.change(slots=0)
    array = sent(tmp_path, 102, "ours")
    names = [job.name for job in slurm.live()]
    slurm.cancel(names[:1])
    slurm.cancel(names, pending_only=True)
    assert slurm.live() == []
    assert {slurm.last_end(f"{array}_{i}") for i in (0, 1, 101)} == {"CANCELLED"}


def test_elements_that_wait_are_told_one_by_one_and_cancelled_by_what_they_carry(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    scheduler.change(slots=1)
    array, other = sent(tmp_path, 3, "ours"), sent(tmp_path, 2, "theirs")
    assert [job.name for job in slurm.live()] == [f"{array}_{i}" for i in range(3)] + [
        f"{other}_0",
        f"{other}_1",
    ]
    slurm.cancel([f"{array}_0", f"{array}_1"], pending_only=True)
    assert [job.state for job in slurm.live()] == ["RUNNING", "PENDING", "PENDING", "PENDING"]
    scheduler.change(slots=0)
    slurm.cancel([job.name for job in slurm.live() if job.comment == "ours"])
    while len(scheduler.active) > 2:
        time.sleep(0.02)
    assert {job.array for job in slurm.live()} == {other}


@pytest.mark.parametrize("accounting", [True, False])
@pytest.mark.parametrize(
    ("state", "history", "told"),
    [
        ("COMPLETED", ["COMPLETED"], "COMPLETED"),
        ("CANCELLED", ["CANCELLED by 1000"], "CANCELLED"),
        ("TIMEOUT", ["REQUEUED", "TIMEOUT"], "TIMEOUT"),
        ("RUNNING", ["REQUEUED"], "REQUEUED"),
        ("PENDING", ["REQUEUED"], "REQUEUED"),
    ],
)
def test_how_a_job_ended_is_known_with_and_without_accounting(
    scheduler: Scheduler, accounting: bool, state: str, history: list[str], told: str
) -> None:
    scheduler.change(accounting=accounting)
    scheduler.put(7, state, history=history, restarts=history.count("REQUEUED"))
    assert slurm.last_end("7") == told
    assert slurm.last_end("8") == ""


def test_a_run_that_was_preempted_is_told_from_the_one_that_goes_on_by_the_accounting_alone(
    scheduler: Scheduler,
) -> None:
    scheduler.put(7, "RUNNING", history=["REQUEUED", "PREEMPTED"], restarts=2)
    assert slurm.last_end("7") == "PREEMPTED"
    scheduler.change(accounting=False)
    assert slurm.last_end("7") == "REQUEUED"


def test_no_answer_is_no_bad_news(scheduler: Scheduler) -> None:
    scheduler.put(7, "RUNNING")
    assert slurm.seconds_left("7") is not None
    scheduler.change(deaf=1.0, deaf_s=60)
    with pytest.raises(slurm.NoAnswer, match="Unable to contact slurm controller"):
        slurm.live()
    assert slurm.seconds_left("7") is None
    assert [job["state"] for job in scheduler.jobs] == ["RUNNING"]


def test_where_there_is_no_slurm_everything_has_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.NoAnswer, match="squeue: not on this machine"):
        slurm.live()
    assert slurm.largest_array() == 1001
    assert slurm.last_end("7") == ""
    assert slurm.meant_to_run("7") is None


def test_a_command_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nexec sleep 36000\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(slurm.NoAnswer, match="timed out"):
        slurm.ask("squeue", timeout_s=0.2)


def test_a_job_inherits_nothing_of_the_job_that_submits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_TIMELIMIT", "SUBMITIT_EXECUTOR", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    with slurm.outside_of_job():
        left = {name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))}
        assert left == {"SLURM_CONF"}
    assert os.environ["SLURM_JOB_ID"] == "1"
