"""Where a sweep runs: a profile of launch/*.yaml. Nothing in it may change a result."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ssl_diversity import config
from ssl_diversity.config import Config
from ssl_diversity.errors import UserError
from ssl_diversity.files import REPOSITORY
from ssl_diversity.runtime import cores, require_gpu
from ssl_diversity.sweep.task import NUMERICS

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Gigabytes = Annotated[float, Field(gt=0)]
MAIN = "main"  # the class of workers that do whatever no other class does


class Profile(Config):
    """What every executor needs to know."""

    executor: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: Positive = 1  # processes per node of a worker: they train a cell together, one GPU each
    max_attempts: Positive = 2  # of a task, in one run of the sweep
    tasks_per_worker: Positive | None = None  # a worker ends after so many; 1: one job per cell
    max_losses: Positive = 5  # workers that may die on a task without its getting any further
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

    @property
    def classes_of_workers(self) -> Mapping[str, frozenset[str]]:
        """Name of each class of workers -> the kinds of tasks that they do; together all kinds."""
        return {MAIN: frozenset(NUMERICS)}

    def of(self, name: str) -> Self:
        """The profile as workers of class `name` see it."""
        return self

    @property
    def world(self) -> int:
        """Processes of one worker."""
        return self.ranks

    @property
    def likely_device(self) -> str:
        """`device`, `auto` being the GPU where this machine has one; asks no driver."""
        return ("cuda" if visible_gpus() else "cpu") if self.device == "auto" else self.device

    @property
    def gpus_of_worker(self) -> float:
        """GPUs that one worker takes, where it is on GPUs."""
        return float(self.world)

    def parameters(self, job_name: str) -> dict[str, Any]:
        """Arguments of submitit.AutoExecutor.update_parameters."""
        raise NotImplementedError

    def layout(self) -> tuple[int, int]:
        """(workers, threads of each process)."""
        raise NotImplementedError


class LocalProfile(Profile):
    """Workers as processes of this machine, which share its cores and GPUs."""

    executor: Literal["local"]
    workers: Positive | Literal["auto"] = "auto"  # auto: one per GPU, else two, on one core one
    threads: Positive | Literal["auto"] = "auto"  # auto: the cores, divided among the processes
    TIMEOUT_MIN: ClassVar[int] = (
        60 * 24 * 365
    )  # submitit ends a local job after 2 minutes unless told otherwise

    def layout(self) -> tuple[int, int]:
        automatic = (len(visible_gpus()) if self.device != "cpu" else 0) or min(2, cores())
        workers = max(1, automatic // self.ranks) if self.workers == "auto" else self.workers
        each = max(1, cores() // (workers * self.ranks))
        return workers, each if self.threads == "auto" else self.threads

    @property
    def gpus_of_worker(self) -> float:
        seen = len(visible_gpus())
        return (
            min(self.world, seen / self.layout()[0]) if seen else float(self.world)
        )  # workers may share one

    def parameters(self, job_name: str) -> dict[str, Any]:
        return {"name": job_name, "timeout_min": self.TIMEOUT_MIN, "tasks_per_node": self.ranks}


class Resources(Config):
    """What one job asks SLURM for. None: the cluster's default."""

    workers: Positive
    time_min: Positive
    nodes: Positive = 1
    cpus: Positive = 4  # of each process
    gpus: Annotated[int, Field(ge=0)] = 0  # per node
    gres: str | None = None  # for clusters that ask for gres=gpu:a100:1; then gpus is not asked for
    mem_gb: Gigabytes | None = None  # per node
    max_mem_gb: Gigabytes | None = None  # a task that ran out of memory is tried again with up to so much
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    additional: dict[str, Any] = Field({})  # any other sbatch option


class SlurmProfile(Profile, Resources):
    """Workers as elements of SLURM job arrays, of one class or of several."""

    executor: Literal["slurm"]
    classes: dict[str, dict[str, Any]] = Field({})  # name -> {kinds: [...], and what differs from the above}
    signal_delay_s: Positive = 120  # how long before the time limit a worker is told to save and stop
    requeue: bool = True  # whether a worker that must stop asks for its place in the queue again
    successors: bool = (
        True  # whether workers may submit workers; False: the launcher or `status --watch` does
    )
    ask_s: Seconds = 30.0  # how often SLURM is asked which workers there are
    submit_patience_s: Seconds = 300.0  # for how long a scheduler that does not answer is asked again
    setup: tuple[str, ...] = ()  # shell lines before the worker starts
    container: str | None = None  # what stands before `python`, such as `apptainer exec --nv image.sif`
    python: str | None = None  # the interpreter within the container, or on the nodes; None: this one
    mail_user: str | None = None
    mail_type: str | None = None  # such as END,FAIL
    conf: str | None = None  # slurm.conf of a cluster that is not this machine's own

    @model_validator(mode="after")
    def _sound(self) -> Self:
        taken: dict[str, str] = {}
        for name, own in self.classes.items():
            kinds = own.get("kinds")
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"classes: {name!r}; name it with letters, digits, - and _ alone")
            if name == MAIN or not isinstance(kinds, list | tuple) or not kinds:
                raise UserError(
                    f"classes.{name}: give it `kinds`, a list of kinds of tasks, and any name but {MAIN}"
                )
            for kind in kinds:
                if kind not in NUMERICS:
                    raise UserError(f"classes.{name}.kinds: {kind!r}; {config.hint(kind, NUMERICS, 'known')}")
                if kind in taken:
                    raise UserError(f"classes: {kind} belongs to both {taken[kind]} and {name}")
                taken[kind] = name
            for key in own.keys() - {"kinds"} - CLASS_KEYS:
                raise UserError(f"classes.{name}: {key!r}; {config.hint(key, CLASS_KEYS, 'known')}")
            try:
                self.of(name)
            except UserError as error:
                raise UserError(f"classes.{name}: {error}") from None
            except ValidationError as error:
                wrong = error.errors()[0]
                told = f"{wrong['loc'][0]}: {wrong['msg']} (got {wrong['input']!r})"
                raise UserError(f"classes.{name}.{told}") from None
        if self.signal_delay_s >= self.time_min * 60:
            raise UserError(f"time_min={self.time_min}: shorter than signal_delay_s={self.signal_delay_s} s")
        if self.max_mem_gb is not None and (self.mem_gb is None or self.max_mem_gb < self.mem_gb):
            raise UserError(f"max_mem_gb={self.max_mem_gb}: needs a mem_gb that is not above it")
        if self.device == "cuda" and not (self.gpus or self.gres):
            raise UserError("device=cuda: asks for no GPU; set gpus or gres, or device: cpu")
        return self

    @property
    def classes_of_workers(self) -> Mapping[str, frozenset[str]]:
        special = {name: frozenset(own["kinds"]) for name, own in self.classes.items()}
        rest = frozenset(NUMERICS).difference(*special.values())
        return {MAIN: rest, **special} if rest else special

    def of(self, name: str) -> Self:
        own = self.classes.get(name, {})
        values = {**self.model_dump(exclude={"classes"}), **own}
        return type(self).model_validate({key: value for key, value in values.items() if key != "kinds"})

    @property
    def world(self) -> int:
        return self.nodes * self.ranks

    @property
    def gpus_of_worker(self) -> float:
        return float(self.nodes * self.gpus) if self.gpus else float(self.world)

    def layout(self) -> tuple[int, int]:
        return self.workers, self.cpus

    def require_torch(self) -> None:
        """Raise UserError where workers run this environment's torch on GPUs that it cannot use."""
        if not (self.container or self.python):
            require_gpu(self.device, here=False)

    def parameters(self, job_name: str) -> dict[str, Any]:
        more = {"requeue": True} if self.requeue else {"no-requeue": True}
        mail = {"mail_user": self.mail_user, "mail_type": self.mail_type}
        values = {
            "name": job_name,
            "timeout_min": self.time_min,
            "nodes": self.nodes,
            "tasks_per_node": self.ranks,
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
            # srun does not inherit the CPUs; rank 0 must live to ask for a requeue when another rank has died
            "slurm_srun_args": [f"--cpus-per-task={self.cpus}", "--kill-on-bad-exit=0"],
            "slurm_additional_parameters": {**more, **self.additional},
            **{f"slurm_{key}": value for key, value in mail.items()},
        }
        return {key: value for key, value in values.items() if value is not None}


CLASS_KEYS = frozenset(Resources.model_fields) | {"device", "ranks", "tasks_per_worker", "environment"}
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
    return parse_profile(config.read_yaml(path), str(path))


def parse_profile(values: Mapping[str, Any], where: str) -> Profile:
    """A profile from what its file, or the record of a run, holds."""
    executor = values.get("executor")
    if not isinstance(executor, str) or executor not in EXECUTORS:
        raise UserError(f"{where}: executor={executor}: expected one of {', '.join(EXECUTORS)}")
    try:
        return config.validate(EXECUTORS[executor], values, where)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None


def visible_gpus() -> list[str]:
    """The GPUs of this machine that a process may use, as CUDA_VISIBLE_DEVICES names them; asks no driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
