"""A folder of images, or a tar of one: class folders or flat, with train/ and test/ (or val/) or without."""

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator

from ssl_diversity import files
from ssl_diversity.config import Config
from ssl_diversity.data.sources import paths
from ssl_diversity.data.sources.base import Source
from ssl_diversity.data.sources.layout import is_image, read_layout
from ssl_diversity.data.sources.listing import FilePart, Lister, Listing, file_parts
from ssl_diversity.data.sources.tars import members, truncated, unreadable
from ssl_diversity.errors import UserError


class Folder(Source):
    """ImageFolder tree, flat folder, or a .tar or .tar.gz of either."""

    class Options(Config):
        path: str  # of the folder or archive
        labelled: bool | None = None  # None: labelled if all images lie in class folders

        @field_validator("path")
        @classmethod
        def _absolute(cls, path: str) -> str:
            return paths.absolute(path)

    def __init__(self, options: Any, scratch: Path) -> None:
        path = Path(options.path)
        if not path.exists():
            raise UserError(f"path={path}: no such folder or archive")
        if path.is_dir():
            self.root, self.stamp = path, 0
            self.listing, folders = list_folder(path)
        else:
            self.root = unpacked(path, scratch)
            self.stamp = self.root.stat().st_mtime_ns
            self.listing, folders = list_archive(self.root, path)
        layout = read_layout(self.listing.names(), folders, options.labelled, str(path))
        self.classes = layout.classes
        self.chosen = layout.chosen
        self.splits = frozenset(layout.chosen) - {"all"}
        self.strip = len(layout.base) + 1 if layout.base else 0

    def parts(self, split: str, part_items: int) -> Iterator[FilePart]:
        names = [split] if split in self.chosen else sorted(self.chosen)
        chosen = np.concatenate([self.chosen[name] for name in names])
        make = partial(FilePart, self.root, self.stamp, strip=self.strip)
        return file_parts(make, self.listing, chosen, part_items)


def list_folder(root: Path, top: str = "") -> tuple[Listing, list[str]]:
    """Images and folders below `root`/`top`, named relative to `root`, sorted; links are followed."""
    lister, folders = Lister(), []
    waiting = [f"{top}/" if top else ""]
    while waiting:
        prefix = waiting.pop()
        path = os.path.join(root, prefix)
        below, images = [], []
        try:
            with os.scandir(path) as found:
                for entry in found:
                    name = prefix + entry.name
                    if entry.is_dir():
                        below.append(name)
                    elif is_image(name):
                        images.append(name)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None
        for name in sorted(images):
            try:
                lister.add_file(root, name)
            except OSError as error:
                raise unreadable(root / name, error) from None
        folders += sorted(below)
        waiting += [f"{name}/" for name in sorted(below, reverse=True)]
    return lister.finish(), folders


def list_archive(archive: Path, where: Path) -> tuple[Listing, list[str]]:
    """Images and folders in a plain tar, in its order; of a name that comes twice the later one counts.

    Raises UserError for a truncated archive, a name that leaves the folder, an image that is a link.
    """
    lister, folders = Lister(), []
    for member in members(archive, where=where):
        if member.kind == "folder":
            folders.append(member.name)
        elif is_image(member.name):
            if member.kind == "other":
                raise UserError(
                    f"{where}: member {member.name!r} is a link; extract the archive and give its folder"
                )
            lister.add(member.name, member.size, member.offset)
    return _latest(lister.finish()), folders


def _latest(listing: Listing) -> Listing:
    """Without what has the name of a later one. Only names with equal hashes are held at once."""
    hashes = np.fromiter(map(hash, listing.names()), np.int64, len(listing))
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    twice = counts[inverse] > 1
    if not twice.any():
        return listing
    latest = {name: i for i, name in enumerate(listing.names()) if twice[i]}
    twice[list(latest.values())] = False
    return listing.take(np.flatnonzero(~twice))


def unpacked(path: Path, scratch: Path) -> Path:
    """`path` itself, or for a gzipped tar its plain copy in `scratch`, made once."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    status = path.stat()
    plain = scratch / f"unpacked-{files.digest([str(path), status.st_size, status.st_mtime_ns])}.tar"
    if not plain.exists():
        try:
            with (
                files.replacing(plain) as temporary,
                gzip.open(path) as source,
                temporary.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise truncated(path) from None
    return plain
