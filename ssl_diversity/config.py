"""YAML files and `key=value` overrides, loaded into typed configs; unknown keys are refused.

Each room defines its own configs as subclasses of `Config`. A config that is a task's spec is also its
identity: `identity()` holds every field except those named in `NOT_IDENTITY`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from ssl_diversity.errors import UserError


class Config(BaseModel):
    """A frozen record; `identity()` is the part of it that determines results."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """JSON value of every field that determines results, in nested configs too."""
        dumped: dict[str, Any] = self.model_dump(mode="json", exclude=set(self.NOT_IDENTITY))
        return {name: _identity(getattr(self, name), value) for name, value in dumped.items()}


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity(item, plain) for item, plain in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {key: _identity(item, dumped[str(key)]) for key, item in value.items()}
    return dumped


C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; numbers such as `5e6` are numbers."""
    try:
        value = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return {str(k): v for k, v in value.items()}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["budget=5e6", "methods=[simclr,mae]", "probes.k=5"]` as a nested mapping."""
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise UserError(f"{item!r}: expected key=value (for example budget=16384)")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise UserError(f"{' '.join(overrides)}: {_one_line(error)}") from None
    assert isinstance(value, dict)
    return {str(k): v for k, v in value.items()}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings, later ones winning; lists and scalars are replaced whole."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = out.get(key)
            out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def validate(model: type[C], values: Mapping[str, Any], where: str) -> C:
    """`values` as a `model`; a wrong or unknown key is a `UserError` that names it, `where` and a remedy."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            known = _nested(model, first["loc"][:-1]).model_fields
            raise UserError(f"{where}: unknown key {key!r}; {hint(name, known, 'known keys')}") from None
        message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        value = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}{value}") from None


def hint(name: str, known: Iterable[str], label: str) -> str:
    """What to write instead of an unknown name: the closest of `known`, else all of them after `label`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{label}: {', '.join(names)}"


def _nested(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The config that `path` leads to, as far as fields that are configs themselves go."""
    for name in path:
        field = model.model_fields.get(str(name))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            break
        model = field.annotation
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
