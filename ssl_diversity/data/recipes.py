"""From what a user names (a recipe, a source kind, a path) to a `PrepareSpec`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.config import hint, merge, read_yaml, validate
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.sources import SOURCES, source_class
from ssl_diversity.errors import UserError

_NOTES = {"description", "get"}  # keys of a recipe that are for people
DOWNSTREAM_HOLDOUT = 0.2  # test share of a downstream set that has no splits (DESIGN 4.1)


def names() -> list[str]:
    """The recipes in datasets/."""
    return sorted(path.stem for path in (files.REPOSITORY / "datasets").glob("*.yaml"))


def load(text: str) -> dict[str, Any]:
    """The raw recipe that `text` names, with `name` and `source` always set.

    `text` is a recipe in datasets/, the path of a recipe (.yaml), a source kind, or the path of a folder or
    tar (source `folder`). Keys are those of `PrepareSpec`, and `description` and `get` (how to obtain it);
    `${oc.env:NAME,null}` reads the environment. The source kind need not be known here.
    """
    packaged = files.REPOSITORY / "datasets" / f"{text}.yaml"
    if "/" not in text and packaged.exists():
        path = packaged
    elif text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
    elif text in SOURCES:
        return {"source": text, "name": text}
    elif "/" in text or text.endswith((".tar", ".tar.gz", ".tgz")) or Path(text).expanduser().exists():
        return {"source": "folder", "name": _stem(text), "options": {"path": text}}
    else:
        known = hint(text, {*names(), *SOURCES}, "known recipes")
        raise UserError(f"{text!r} is no recipe, source kind, folder or tar; {known}")
    recipe = read_yaml(path)
    if "source" not in recipe:
        raise UserError(f"{path}: key 'source' is missing; known kinds: {', '.join(sorted(SOURCES))}")
    return {"name": path.stem, **recipe}


def resolve(
    text: str, options: Mapping[str, Any] | None = None, *, defaults: Mapping[str, Any] | None = None
) -> PrepareSpec:
    """The spec of the pretraining pool that `text` (see `load`) names.

    `options` are the user's: keys of `PrepareSpec` go there, all others are options of the source.
    `defaults` are what the caller wants of all its sets (size, filter, codec, quality, seed); they stand over
    the recipe's own values and below `options`. A wrong key, a missing option or path is a UserError.
    """
    return _spec(text, options or {}, defaults or {}, {}, suffix="")


def downstream(
    text: str, options: Mapping[str, Any] | None = None, *, defaults: Mapping[str, Any] | None = None
) -> tuple[PrepareSpec, PrepareSpec]:
    """(train, test) of the labelled set that `text` names, nothing dropped as a duplicate.

    A set without splits of its own is split 80/20 by content hash within classes.
    """
    fixed = {"deduplicate": False, "exclude": (), "labels_required": True}
    train, test = (
        _spec(text, options or {}, defaults or {}, {**fixed, "split": split}, suffix=f"-{split}")
        for split in ("train", "test")
    )
    return train, test


def _spec(
    text: str, options: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any], suffix: str
) -> PrepareSpec:
    recipe = load(text)
    where = f"set {text!r}"
    get = recipe.pop("get", "")
    source = source_class(str(recipe["source"]))
    fields = {key: value for key, value in options.items() if key in PrepareSpec.model_fields}
    others = {key: value for key, value in options.items() if key not in PrepareSpec.model_fields}
    given = {key: value for key, value in defaults.items() if value is not None}
    values = merge(recipe, given, fields, {"options": others}, fixed)
    unnamed = recipe["name"] == recipe["source"] and "name" not in options  # a kind alone, such as `folder`
    if unnamed and "path" in values["options"]:
        values["name"] = _stem(str(values["options"]["path"]))
    values["name"] += suffix
    if suffix and source.holdout == 0 and values.get("holdout") is None:
        values["holdout"] = DOWNSTREAM_HOLDOUT
    try:
        chosen = {key: value for key, value in values["options"].items() if value is not None}
        values["options"] = validate(source.Options, chosen, where).model_dump(mode="json")
        values["exclude"] = tuple(_absolute(name) for name in values.get("exclude", ()))
        spec = validate(PrepareSpec, {k: v for k, v in values.items() if k not in _NOTES}, where)
    except UserError as error:
        raise UserError(f"{error}; {get}" if get else str(error)) from None
    path = spec.options.get("path")
    if path and not Path(path).exists() and not spec.directory.exists():
        raise UserError(f"{where}: path={path}: no such folder or archive" + (f"; {get}" if get else ""))
    return spec


def _absolute(name: str) -> str:
    """A recipe's name as it is; a path such that the working folder does not matter."""
    return name if name in names() or name in SOURCES else str(Path(name).expanduser().absolute())


def _stem(path: str) -> str:
    name = re.sub(r"(\.tar|\.tar\.gz|\.tgz)$", "", Path(path).expanduser().absolute().name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "images"
