"""A task: what is to be done, as a frozen record, and the key that names its result."""

from collections.abc import Collection, Mapping
from importlib import import_module
from json import JSONEncoder
from pathlib import Path
from typing import Any

from ssl_diversity import features, files
from ssl_diversity.config import Config
from ssl_diversity.distance import config as distance
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
COMPUTES_WITH = {  # what takes seconds to import: a worker does it once, so it is no task's own time
    FUNCTIONS["train-generator"]: ("ssl_diversity.loop", "ssl_diversity.generation.diffusion"),
    FUNCTIONS["sample"]: ("ssl_diversity.generation.diffusion",),
    FUNCTIONS["pretrain"]: ("ssl_diversity.loop", "ssl_diversity.methods.base"),
    FUNCTIONS["probe"]: ("torch",),
    FUNCTIONS["distance"]: ("torch",),
}
_WRITE = JSONEncoder(allow_nan=False).encode
REPORT = "ssl_diversity.report:write_report"  # (sweep) -> its page; a floor above, so known by name alone


class Task:
    """One piece of work. Its key is a digest of what determines its result; it knows no sweep.

    `needs` are the tasks whose results it reads. `output` is a file outside the store (a pool's
    `pool.json`) whose presence says that the work is done, whoever did it. `label` is for people. `units` is
    what its time grows with: samples trained on, images made or embedded, or 1 (0: not known yet); `like` is the
    same for tasks whose time depends on `units` alone.
    The spec of a task out of a `Series` is made when it is first read: a base, but for some values.
    """

    __slots__ = ("_spec", "_values", "key", "kind", "label", "like", "needs", "output", "units")

    def __init__(
        self,
        kind: str,
        spec: Config,
        needs: "tuple[Task, ...]" = (),
        output: Path | None = None,
        label: str = "",
        *,
        units: int = 1,
        like: str = "",
        key: str = "",
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self.kind, self.needs, self.output, self.label, self.units = kind, needs, output, label, units
        self.like = f"{kind}/{like}"
        self._spec, self._values = spec, values
        self.key = key or files.digest(_identity(kind, self.spec.identity()))

    @property
    def spec(self) -> Config:
        if self._values:
            self._spec, self._values = self._spec.model_copy(update=self._values), None
        return self._spec

    @property
    def folder(self) -> Path:
        return files.task_dir(self.kind, self.key)

    @property
    def id(self) -> tuple[str, str]:
        return self.kind, self.key


class Series:
    """Tasks of one kind whose specs are `spec` but for some `fields`: plain values, or none of the identity.

    What they have in common is validated and written as JSON once; their keys are those of single tasks.
    """

    def __init__(self, kind: str, spec: Config, fields: Collection[str]) -> None:
        self.kind, self.spec = kind, spec
        identity = spec.identity()
        names = sorted(identity.keys() & fields)  # as the text has them
        mark = "\0"
        text = files.canonical(_identity(kind, identity | dict.fromkeys(names, mark)))
        self._head, *tails = text.encode().split(files.canonical(mark).encode())
        self._tails = list(zip(names, tails, strict=True))

    def task(
        self, values: Mapping[str, Any], needs: tuple[Task, ...], label: str, *, units: int, like: str
    ) -> Task:
        """The one with these values of the fields."""
        text = self._head
        for name, tail in self._tails:
            text += _json(values[name]) + tail
        key = files.bytes_digest(text)
        return Task(self.kind, self.spec, needs, None, label, units=units, like=like, key=key, values=values)


def _identity(kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "numerics": NUMERICS[kind], "spec": spec}


def _json(value: object) -> bytes:
    return b"%d" % value if type(value) is int else _WRITE(value).encode()


def function(path: str) -> Any:
    """What `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
