"""A profile is checked before anything is sent, and all of it reaches the script that sbatch gets."""

from typing import Any

import pytest
from rich.console import Console
from slurm_helpers import Scheduler

from ssl_diversity.errors import UserError
from ssl_diversity.sweep import launch
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.profile import MAIN, SlurmProfile, parse_profile
from ssl_diversity.sweep.task import NUMERICS

BASE = {"executor": "slurm", "workers": 2, "time_min": 10}


def parsed(**changed: Any) -> SlurmProfile:
    profile = parse_profile({**BASE, **changed}, "launch/mine.yaml")
    assert isinstance(profile, SlurmProfile)
    return profile


def classes(**light: Any) -> dict[str, Any]:
    return {"classes": {"light": {"kinds": ["probe", "distance"], **light}}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"wrokers": 1}, ["unknown key 'wrokers'", "did you mean 'workers'"]),
        ({"workers": 0}, ["workers", "greater than or equal to 1", "got 0"]),
        ({"workers": "auto"}, ["workers", "integer", "got 'auto'"]),
        ({"executor": "pbs"}, ["executor=pbs", "local, slurm"]),
        ({"device": "tpu"}, ["device", "'cpu' or 'cuda'", "got 'tpu'"]),
        ({"device": "cuda"}, ["device=cuda", "set gpus or gres, or device: cpu"]),
        ({"time_min": 2, "signal_delay_s": 120}, ["time_min=2", "shorter than signal_delay_s=120 s"]),
        ({"max_mem_gb": 8}, ["max_mem_gb=8", "needs a mem_gb"]),
        ({"mem_gb": 9, "max_mem_gb": 8}, ["max_mem_gb=8", "not above it"]),
        ({"setup": "module load cuda"}, ["setup", "got 'module load cuda'"]),
        ({"environment": {"A": 1}}, ["environment.A", "string", "got 1"]),
        ({"classes": {MAIN: {"kinds": ["probe"]}}}, ["classes.main", "any name but main"]),
        ({"classes": {"a/b": {"kinds": ["probe"]}}}, ["'a/b'", "letters, digits, - and _"]),
        ({"classes": {"light": {}}}, ["classes.light", "`kinds`, a list"]),
        (
            {"classes": {"light": {"kinds": ["prob"]}}},
            ["classes.light.kinds: 'prob'", "did you mean 'probe'"],
        ),
        (
            {"classes": {"a": {"kinds": ["probe"]}, "b": {"kinds": ["probe"]}}},
            ["probe belongs to both a and b"],
        ),
        (classes(gpu=1), ["classes.light: 'gpu'", "did you mean 'gpus'"]),
        (classes(gpus=-1), ["classes.light.gpus", "greater than or equal to 0", "got -1"]),
        (classes(time_min=2), ["classes.light: time_min=2", "signal_delay_s=120"]),
        (classes(device="cuda"), ["classes.light: device=cuda", "set gpus"]),
    ],
)
def test_what_is_wrong_is_named_with_its_file_value_and_remedy(
    changed: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        parsed(**changed)
    assert str(caught.value).startswith("launch/mine.yaml: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_classes_divide_all_kinds_and_differ_in_what_they_say() -> None:
    profile = parsed(
        **classes(gpus=0, workers=9), gpus=4, ranks=4, partition="gpu", setup=["module load cuda"]
    )
    kinds = profile.classes_of_workers
    assert kinds["light"] == {"probe", "distance"}
    assert kinds[MAIN] == NUMERICS.keys() - kinds["light"]
    light, usual = profile.of("light"), profile.of(MAIN)
    assert (light.gpus, light.workers, light.partition, light.setup) == (0, 9, "gpu", ("module load cuda",))
    assert usual.model_dump(exclude={"classes"}) == profile.model_dump(exclude={"classes"})
    alone = parsed(classes={"all": {"kinds": list(NUMERICS)}})
    assert set(alone.classes_of_workers) == {"all"}


def test_a_recorded_profile_is_the_same_profile() -> None:
    profile = parsed(**classes(gpus=0), gpus=4, mem_gb=3.5, additional={"nice": 5}, environment={"A": "1"})
    assert parse_profile(profile.model_dump(mode="json"), "run.json") == profile


@pytest.mark.usefixtures("pools")
def test_all_that_it_says_is_in_the_script(
    scheduler: Scheduler, small: SweepConfig, console: Console
) -> None:
    scheduler.change(slots=0)
    profile = parsed(
        nodes=2,
        ranks=4,
        cpus=6,
        gres="gpu:a100:4",
        gpus=4,
        mem_gb=1.5,
        qos="long",
        constraint="a100|h100",
        container="apptainer exec --nv image.sif",
        python="/opt/python",
        mail_user="me@lab.org",
        mail_type="END,FAIL",
        signal_delay_s=60,
        setup=["module load cuda"],
        environment={"NCCL_DEBUG": "WARN"},
    )
    assert launch.run(small, profile, detach=True, console=console) == 0
    (path,) = scheduler.folder.glob("*.sh")
    lines = path.read_text().splitlines()
    for option in (
        "nodes=2",
        "ntasks-per-node=4",
        "cpus-per-task=6",
        "gres=gpu:a100:4",
        "mem=1536MB",
        "qos=long",
        "constraint='a100|h100'",
        "mail-user=me@lab.org",
        "mail-type=END,FAIL",
        "signal=USR2@60",
        "open-mode=append",
        "requeue",
        "array=0-1%2",
    ):
        assert f"#SBATCH --{option}" in lines
    assert not any("gpus-per-node" in line for line in lines)  # gres asks for them
    assert lines.index("module load cuda") < next(
        i for i, line in enumerate(lines) if line.startswith("srun ")
    )
    assert "apptainer exec --nv image.sif /opt/python -u -m submitit" in path.read_text()
    environment = path.with_suffix(".json").read_text()
    assert '"NCCL_DEBUG": "WARN"' in environment
    assert '"OMP_NUM_THREADS": "6"' in environment


def test_requeue_is_asked_for_or_forbidden() -> None:
    assert parsed().parameters("x")["slurm_additional_parameters"] == {"requeue": True}
    assert parsed(requeue=False).parameters("x")["slurm_additional_parameters"] == {"no-requeue": True}
