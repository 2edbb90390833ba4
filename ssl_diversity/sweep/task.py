"""A task: what is to be done, as a frozen record, and the key that names its result."""

from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from ssl_diversity import features
from ssl_diversity.config import Config
from ssl_diversity.distance import config as distance
from ssl_diversity.files import digest, task_dir
from ssl_diversity.generation import sampling

NUMERICS: dict[
    str, int | list[int]
] = {  # raised when the results of a kind change: old results are then never taken for new ones
    "prepare": 2,
    "train-generator": 2,
    "sample": sampling.NUMERICS,
    "generate": [2, sampling.NUMERICS],
    "pretrain": 2,
    "probe": [2, features.NUMERICS],
    "distance": distance.NUMERICS,
}

FUNCTIONS = {  # (spec, out, runtime) -> result; imported only where a task is run
    "prepare": "ssl_diversity.sweep.work:prepare_pool",
    "train-generator": "ssl_diversity.generation.training:train_generator",
    "sample": "ssl_diversity.generation.chunks:sample",
    "generate": "ssl_diversity.generation.assembly:generate",
    "pretrain": "ssl_diversity.train:pretrain",
    "probe": "ssl_diversity.evaluation.task:probe",
    "distance": "ssl_diversity.distance.task:distance",
}
REPORT = "ssl_diversity.report:write_report"  # (sweep) -> its page; a floor above, so known by name alone


@dataclass(frozen=True, eq=False)
class Task:
    """One piece of work. Its key is a digest of what determines its result; it knows no sweep.

    `needs` are the tasks whose results it reads. `output` is a file outside the store (a pool's
    `pool.json`) whose presence says that the work is done, whoever did it. `label` is for people.
    """

    kind: str
    spec: Config
    needs: tuple["Task", ...] = ()
    output: Path | None = None
    label: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        return digest({"kind": self.kind, "numerics": NUMERICS[self.kind], "spec": self.spec.identity()})

    @property
    def folder(self) -> Path:
        return task_dir(self.kind, self.key)

    @property
    def id(self) -> tuple[str, str]:
        return self.kind, self.key


def function(path: str) -> Any:
    """What `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
