"""From what a user names (a recipe, a source kind, a path) to a `PrepareSpec`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.config import hint, merge, read_yaml, validate
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.sources import SOURCES, paths, source_class
from ssl_diversity.data.sources.layout import is_image
from ssl_diversity.errors import UserError

_NOTES = {"description", "get", "expected", "checksums"}  # keys of a recipe that are for people
_GENERIC = {"folder", "webdataset", "parquet"}  # kinds that say nothing of the set: it is named by its path
_TORCHVISION = "torchvision:"
DOWNSTREAM_HOLDOUT = 0.2  # test share of a downstream set that has no splits (DESIGN 4.1)


def names() -> list[str]:
    """The recipes in datasets/."""
    return sorted(path.stem for path in (files.REPOSITORY / "datasets").glob("*.yaml"))


def load(text: str) -> dict[str, Any]:
    """The raw recipe that `text` names, with `name` and `source` always set.

    `text` is a recipe in datasets/, the path of a recipe (.yaml), a source kind, `torchvision:NAME`, or the path
    of a set (see `kind_of`). Keys are those of `PrepareSpec`, and for people `description`, `get` (how to obtain
    it), `expected` (images by split) and `checksums`; `${oc.env:NAME,null}` reads the environment. The source kind
    need not be known here.
    """
    packaged = files.REPOSITORY / "datasets" / f"{text}.yaml"
    if "/" not in text and packaged.exists():
        path = packaged
    elif text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
    elif text in SOURCES:
        return {"source": text, "name": text}
    elif text.startswith(_TORCHVISION):
        dataset = text.removeprefix(_TORCHVISION)
        get = "give path=FOLDER, torchvision's root (download=true lets torchvision fetch it there)"
        return {"source": "torchvision", "name": dataset.lower(), "options": {"dataset": dataset}, "get": get}
    elif is_path(text):
        return {"source": kind_of(text), "name": set_name(text), "options": {"path": text}}
    else:
        known = hint(text, {*names(), *SOURCES}, "known recipes")
        raise UserError(f"{text!r} is no recipe, source kind, torchvision:NAME or path; {known}")
    recipe = read_yaml(path)
    if "source" not in recipe:
        raise UserError(f"{path}: key 'source' is missing; known kinds: {', '.join(sorted(SOURCES))}")
    return {"name": path.stem, **recipe}


def is_path(text: str) -> bool:
    """Whether a text that names no recipe is the path of a set, there or not."""
    suffixes = (".tar", ".tar.gz", ".tgz", ".parquet")
    return (
        "/" in text or text.endswith(suffixes) or paths.is_pattern(text) or Path(text).expanduser().exists()
    )


def kind_of(path: str) -> str:
    """The source kind of a path: `parquet`, `webdataset` (shards), or `folder` (images, or one tar of them).

    By its name: .parquet files; addresses, and patterns of tars ({000..127}, *), which are shards. Of a folder, by
    what is in it: images make it `folder`, else tars make it `webdataset`, else .parquet files `parquet`.
    """
    if path.endswith(".parquet"):
        return "parquet"
    if paths.is_address(path) or (".tar" in path and paths.is_pattern(paths.absolute(path))):
        return "webdataset"
    found = set()
    for _, folders, entries in os.walk(paths.absolute(path), followlinks=True):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in entries:
            if is_image(name):
                return "folder"
            found.add(os.path.splitext(name)[1])
    return "webdataset" if ".tar" in found else "parquet" if ".parquet" in found else "folder"


def expected(text: str) -> dict[str, int]:
    """How many images, by split ("train", "test", "all"), and `classes` the recipe should give; {} if unsaid."""
    numbers = load(text).get("expected") or {}
    known = {"train", "test", "all", "classes"}
    if not isinstance(numbers, Mapping) or not (
        numbers.keys() <= known and all(isinstance(n, int) for n in numbers.values())
    ):
        raise UserError(f"{text}: expected={numbers}: write a number for some of {', '.join(sorted(known))}")
    return dict(numbers)


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
    if recipe["name"] == recipe["source"] and "name" not in options:  # a kind alone, such as `folder`
        values["name"] = _own_name(str(recipe["source"]), values["options"])
    values["name"] = f"{values['name']}{suffix}"
    if suffix and source.holdout == 0 and values.get("holdout") is None:
        values["holdout"] = DOWNSTREAM_HOLDOUT
    unknown = [key for key in others if key not in source.Options.model_fields]
    if unknown:
        known = hint(unknown[0], {*source.Options.model_fields, *PrepareSpec.model_fields}, "known keys")
        raise UserError(f"{where}: unknown key {unknown[0]!r}; {known}")
    try:
        chosen = {key: value for key, value in values["options"].items() if value is not None}
        values["options"] = validate(source.Options, chosen, where).model_dump(mode="json")
        excluded = values.get("exclude") or ()
        names = (excluded,) if isinstance(excluded, str | int | float) else excluded
        values["exclude"] = tuple(_absolute(str(name)) for name in names)
        spec = validate(PrepareSpec, {k: v for k, v in values.items() if k not in _NOTES}, where)
    except UserError as error:
        raise UserError(f"{error}; {get}" if get else str(error)) from None
    path = spec.options.get("path")
    fetched = spec.options.get("download")  # its folder may be still to make
    if path and not fetched and not _exists(path) and not spec.directory.exists():
        what = "file like that" if paths.is_pattern(path) else "folder or archive"
        raise UserError(f"{where}: path={path}: no such {what}" + (f"; {get}" if get else ""))
    return spec


def _exists(path: str) -> bool:
    """Whether the first of what a path stands for is there; of an address this is not asked."""
    first = next(paths.expand(path), None)
    return first is not None and (paths.is_address(first) or Path(first).exists())


def _absolute(name: str) -> str:
    """A recipe's name as it is; a path such that the working folder does not matter."""
    known = name in names() or name in SOURCES or name.startswith(_TORCHVISION)
    return name if known else paths.absolute(name)


def _own_name(kind: str, options: Mapping[str, Any]) -> str:
    if kind in _GENERIC and "path" in options:
        return set_name(str(options["path"]))
    return str(options["dataset"]).lower() if "dataset" in options else kind


def set_name(path: str) -> str:
    """The name of a set at a path: of the file or folder, or the last folder before a pattern."""
    absolute = paths.absolute(path)
    if paths.is_pattern(absolute):
        absolute = re.split(r"[*?\[{]", absolute, maxsplit=1)[0].rpartition("/")[0]
    name = re.sub(r"(\.tar|\.tar\.gz|\.tgz|\.parquet)$", "", absolute.rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "images"
