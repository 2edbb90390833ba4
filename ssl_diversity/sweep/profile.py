"""Where a sweep runs: a profile of launch/*.yaml. Nothing in it may change a result."""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ssl_diversity import config
from ssl_diversity.config import Config
from ssl_diversity.errors import UserError
from ssl_diversity.files import REPOSITORY
from ssl_diversity.runtime import cores

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Profile(Config):
    """What every executor needs to know."""

    executor: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_attempts: Positive = 2  # of a task, in one run of the sweep
    heartbeat_s: Seconds = 5.0  # how often a worker says that it lives and how far it is
    stale_s: Seconds = 120.0  # a worker of another machine that is silent for so long is taken for dead
    poll_s: Seconds = 0.5  # how often a worker with nothing to do, and the display, look again
    linger_s: Seconds = 60.0  # a worker with nothing to do for so long leaves
    cache_gb: Annotated[float, Field(ge=0)] = (
        16.0  # GiB of remote shards kept on a node's disk, for all its workers
    )
    cache_dir: str | None = None  # where; $VARIABLES are read on the node; None: cache/shards/ below the home
    rough_flops_per_second: Seconds = 2e10  # of one worker, to estimate what was never measured
    environment: dict[str, str] = Field({})

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gb * 2**30)

    @property
    def cache_folder(self) -> str | None:
        """`cache_dir` on this machine."""
        return self.cache_dir and os.path.expanduser(os.path.expandvars(self.cache_dir))

    def parameters(self, sweep_name: str) -> dict[str, Any]:
        """Arguments of submitit.AutoExecutor.update_parameters."""
        raise NotImplementedError

    def layout(self) -> tuple[int, int]:
        """(workers, threads of each)."""
        raise NotImplementedError


class LocalProfile(Profile):
    """Workers as processes of this machine, which share its cores and GPUs."""

    executor: Literal["local"]
    workers: Positive | Literal["auto"] = "auto"  # auto: one per GPU, else two, on one core one
    threads: Positive | Literal["auto"] = "auto"  # auto: the cores, divided among the workers
    TIMEOUT_MIN: ClassVar[int] = (
        60 * 24 * 365
    )  # submitit ends a local job after 2 minutes unless told otherwise

    def layout(self) -> tuple[int, int]:
        automatic = (len(visible_gpus()) if self.device != "cpu" else 0) or min(2, cores())
        workers = automatic if self.workers == "auto" else self.workers
        return workers, max(1, cores() // workers) if self.threads == "auto" else self.threads

    def parameters(self, sweep_name: str) -> dict[str, Any]:
        return {"name": sweep_name, "timeout_min": self.TIMEOUT_MIN}


class SlurmProfile(Profile):
    """Workers as the elements of a SLURM job array."""

    executor: Literal["slurm"]
    workers: Positive
    time_min: Positive
    cpus: Positive = 4
    gpus: Annotated[int, Field(ge=0)] = 0
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    signal_delay_s: Positive = 120  # how long before the time limit a worker is told to save and stop
    setup: tuple[str, ...] = ()  # shell lines before the worker starts
    additional: dict[str, Any] = Field({})  # any other sbatch option

    def layout(self) -> tuple[int, int]:
        return self.workers, self.cpus

    def parameters(self, sweep_name: str) -> dict[str, Any]:
        values = {
            "name": sweep_name,
            "timeout_min": self.time_min,
            "cpus_per_task": self.cpus,
            "gpus_per_node": None if self.gres else self.gpus or None,
            "mem_gb": self.mem_gb,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_gres": self.gres,
            "slurm_signal_delay_s": self.signal_delay_s,
            "slurm_array_parallelism": self.workers,
            "slurm_setup": list(self.setup) or None,
            "slurm_additional_parameters": self.additional or None,
        }
        return {key: value for key, value in values.items() if value is not None}


EXECUTORS: dict[str, type[Profile]] = {"local": LocalProfile, "slurm": SlurmProfile}


def load_profile(name: str) -> Profile:
    """The profile `name` of launch/, or of a YAML path.

    Raises UserError for one that is not there, an unknown executor or an unknown key.
    """
    path = (
        Path(name).expanduser()
        if name.endswith((".yaml", ".yml"))
        else REPOSITORY / "launch" / f"{name}.yaml"
    )
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (REPOSITORY / "launch").glob("*.yaml")))
        raise UserError(
            f"no such launch profile: {name!r}; known: {known} (launch/*.yaml), or the path of a YAML file"
        )
    values = config.read_yaml(path)
    executor = values.get("executor")
    if not isinstance(executor, str) or executor not in EXECUTORS:
        raise UserError(f"{path}: executor={executor}: expected one of {', '.join(EXECUTORS)}")
    return config.validate(EXECUTORS[executor], values, str(path))


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a process may use, as CUDA_VISIBLE_DEVICES names them; asks no driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
