"""`launch check` says what the cluster would answer, and submits nothing."""

from pathlib import Path
from typing import Any

import pytest
from slurm_helpers import Scheduler

from ssl_diversity.cli import main
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import launch
from ssl_diversity.sweep.check import FINE, NOTE, WRONG, check
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.profile import LocalProfile, SlurmProfile


def profile(**changed: Any) -> SlurmProfile:
    return SlurmProfile.model_validate(
        {"executor": "slurm", "workers": 4, "time_min": 60, "device": "cpu", **changed}
    )


def findings(**changed: Any) -> dict[str, list[tuple[str, str]]]:
    """(level, text) by subject."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in check(profile(**changed)):
        found.setdefault(finding.subject, []).append((finding.level, finding.text))
    return found


def only(found: list[tuple[str, str]], level: str) -> str:
    texts = [text for of, text in found if of == level]
    assert len(texts) == 1, found
    return texts[0]


def test_a_cluster_that_suits_it(scheduler: Scheduler) -> None:
    found = findings()
    levels = {subject: [level for level, _ in said] for subject, said in found.items()}
    levels.pop("store")
    levels.pop("preemption")
    assert all(level == FINE for said in levels.values() for level in said), levels
    assert "fake, SLURM 22.05.8" in only(found["controller"], FINE)
    assert "4 of 1 x 1 x 4 CPUs" in only(found["workers"], FINE)
    assert "2030-01-01T00:00:00" in only(found["workers"], FINE)
    assert not scheduler.jobs


def test_no_controller_is_the_only_finding(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (finding,) = check(profile())
    assert (finding.level, finding.subject) == (WRONG, "controller")
    assert "is this a login node" in finding.text


def test_no_accounting_is_a_note(scheduler: Scheduler) -> None:
    scheduler.change(accounting=False)
    assert "Connection refused" in only(findings()["accounting"], NOTE)


@pytest.mark.parametrize(
    ("requeue", "config", "words"),
    [
        (True, {}, "allowed"),
        (True, {"JobRequeue": 0}, "JobRequeue=0"),
        (False, {}, "replaced by another"),
    ],
)
def test_requeue(scheduler: Scheduler, requeue: bool, config: dict[str, Any], words: str) -> None:
    scheduler.change(config=config)
    ((_, text),) = findings(requeue=requeue)["requeue"]
    assert words in text


def test_preemption_without_a_signal_is_a_note(scheduler: Scheduler) -> None:
    scheduler.change(config={"PreemptMode": "REQUEUE", "KillWait": "30 sec"})
    assert "KillWait=30 sec" in only(findings()["preemption"], NOTE)
    scheduler.change(config={"PreemptMode": "REQUEUE", "SlurmctldParameters": "preempt_send_user_signal"})
    assert "preemption" not in findings()


def test_limits(scheduler: Scheduler) -> None:
    scheduler.change(max_array=3, associations="lab|2\nother|\n", qos="normal|\nlong|8\n")
    found = findings()
    assert "4 workers are more than MaxArraySize=3: sent as 2 arrays" in only(found["arrays"], NOTE)
    assert "account lab: 2 jobs at a time for 4 workers; the sweep runs with fewer" in only(
        found["submit limit"], NOTE
    )
    assert "qos long: 8 jobs" in only(found["submit limit"], FINE)


@pytest.mark.parametrize(
    ("partition", "changed", "words"),
    [
        ({"State": "DRAIN"}, {}, "partition main is DRAIN; choose one of gpu, main"),
        ({"MaxTime": "00:30:00"}, {}, "time_min=60: partition main allows 30; jobs would wait for ever"),
        ({"MaxNodes": "2"}, {"nodes": 3}, "nodes=3: partition main allows 2"),
        ({}, {"partition": "nope"}, "partition=nope: Partition nope not found; known: gpu, main"),
    ],
)
def test_partitions(
    scheduler: Scheduler, partition: dict[str, str], changed: dict[str, Any], words: str
) -> None:
    scheduler.change(partitions={"main": partition, "gpu": {}})
    assert words in only(findings(**changed)["workers"], WRONG)


def test_where_jobs_may_not_submit_jobs(scheduler: Scheduler) -> None:
    scheduler.change(partitions={"main": {"AllocNodes": "login1"}})
    assert "login1 alone: set successors: false" in only(findings()["workers"], NOTE)
    assert all(level != NOTE for level, _ in findings(successors=False)["workers"])


def test_what_sbatch_objects_and_for_which_class(scheduler: Scheduler) -> None:
    scheduler.change(test_only="allocation failure: Requested node configuration is not available")
    found = findings(classes={"light": {"kinds": ["probe"]}})
    for subject in ("workers", "workers of class light"):
        assert "Requested node configuration is not available; change the profile" in only(
            found[subject], WRONG
        )


def test_a_local_profile_needs_no_cluster() -> None:
    (finding,) = check(LocalProfile(executor="local", workers=2, threads=3))
    assert finding.level == FINE
    assert "2 of 1 processes with 3 threads" in finding.text


def test_the_command_fails_where_something_is_wrong(
    scheduler: Scheduler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("executor: slurm\nworkers: 2\ntime_min: 60\ndevice: cpu\n")
    assert main(["launch", "check", str(path)]) == 0
    assert "ok controller: fake, SLURM 22.05.8" in capsys.readouterr().out
    path.write_text("executor: slurm\nworkers: 2\ntime_min: 60\ndevice: cpu\npartition: nope\n")
    assert main(["launch", "check", str(path)]) == 1
    assert "wrong workers: partition=nope: " in capsys.readouterr().out


def test_a_cluster_with_gpus_that_this_torch_cannot_use_is_told_before_any_work(
    small: SweepConfig, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    where = SlurmProfile(executor="slurm", workers=1, time_min=10, device="cuda", gpus=1)
    with pytest.raises(UserError, match="this build of torch has no support for GPUs"):
        launch.run(small, where)
    told = [finding.text for finding in check(where) if finding.level == "wrong"]
    assert any("this build of torch" in text for text in told)
    launch.check_gpus(where.model_copy(update={"python": "/opt/gpu/bin/python"}))  # whose torch is another
    launch.check_gpus(where.model_copy(update={"device": "auto"}))
