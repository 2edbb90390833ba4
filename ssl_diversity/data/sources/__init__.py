"""Where images come from: one file per kind, each with a class that extends `base.Source`.

To add a kind: write its file, name it here (docs/adding-a-source.md).
"""

import importlib
from pathlib import Path

from ssl_diversity.config import validate
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.sources.base import Source
from ssl_diversity.errors import UserError

SOURCES = {  # kind -> module, class; imported when used
    "digits": ("ssl_diversity.data.sources.digits", "Digits"),
    "photo_patches": ("ssl_diversity.data.sources.photo_patches", "PhotoPatches"),
    "folder": ("ssl_diversity.data.sources.folder", "Folder"),
    "webdataset": ("ssl_diversity.data.sources.webdataset", "WebDatasetShards"),
    "parquet": ("ssl_diversity.data.sources.parquet", "Parquet"),
    "torchvision": ("ssl_diversity.data.sources.torchvision", "Torchvision"),
    "imagenet": ("ssl_diversity.data.sources.imagenet", "ImageNet"),
    "yfcc100m": ("ssl_diversity.data.sources.yfcc100m", "YFCC100M"),
}


def source_class(kind: str) -> type[Source]:
    """The class of a source kind; UserError names the known ones."""
    if kind not in SOURCES:
        raise UserError(f"source={kind}: unknown kind; known: {', '.join(sorted(SOURCES))}")
    module, name = SOURCES[kind]
    found: type[Source] = getattr(importlib.import_module(module), name)
    return found


def open_source(spec: PrepareSpec, scratch: Path) -> Source:
    """The source that a spec names, opened with its options; UserError for what is wrong with them."""
    kind = source_class(spec.source)
    return kind(validate(kind.Options, spec.options, f"set {spec.name!r}"), scratch)
