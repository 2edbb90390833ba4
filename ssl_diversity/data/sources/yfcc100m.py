"""YFCC100M: a uniformly random selection of its photos (Thomee et al., CACM 2016), from a folder or fetched."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ssl_diversity.config import Config
from ssl_diversity.data.sources.base import Source
from ssl_diversity.data.sources.listing import FilePart, Lister, Listing
from ssl_diversity.data.sources.paths import absolute, is_address
from ssl_diversity.data.sources.tars import members, truncated
from ssl_diversity.data.yfcc.download import BLOCK, BUCKET, LATE, Folder, Report, download, photo_path
from ssl_diversity.data.yfcc.index import Index, metadata_files, open_index
from ssl_diversity.errors import UserError


class PhotoPart(FilePart):
    """Photos named by their hash, whether they lie in a folder or in the tar of a block."""

    def name(self, name: str, label: int) -> str:
        return PurePosixPath(name).stem


class YFCC100M(Source):
    """Unlabelled. The selection of n is the first n of a random order (data/yfcc/index.py): nested in n.

    Photos come from the public bucket, a folder of its layout, or a folder that `data download` made. Those that
    cannot be had are counted by cause; more of them than `missing_ok` is an error.
    """

    at_hand = False  # giving parts may take an index and a download first

    class Options(Config):
        metadata: tuple[str, ...]  # yfcc100m_dataset.bz2: a path, several, a pattern or a folder
        n: int | None = Field(None, gt=0)  # photos; None: all of them
        draw: int = Field(0, ge=0, lt=1 << 64)  # another one: other photos
        images: str = BUCKET  # address of the bucket or of a copy, or a folder
        missing_ok: float = Field(0.01, ge=0, le=1)  # share of the selection that need not be had

        @field_validator("metadata", mode="before")
        @classmethod
        def _several(cls, metadata: Any) -> Any:
            return (metadata,) if isinstance(metadata, str) else metadata

        @field_validator("metadata")
        @classmethod
        def _absolute(cls, metadata: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(absolute(name) for name in metadata)

        @field_validator("images")
        @classmethod
        def _absolute_images(cls, images: str) -> str:
            return absolute(images)

    def __init__(self, options: Any, scratch: Path) -> None:
        self.options = options
        self.asked = options.n
        self.classes = []
        self.report = Report(0, 0, {})  # of the selection, once its parts were given
        self.files = metadata_files(options.metadata)
        if not is_address(options.images) and not Path(options.images).is_dir():
            raise UserError(f"images={options.images}: no such folder")

    @property
    def counts(self) -> dict[str, int]:
        """What `prepare` adds to a pool's counts: asked = read + those missing, by cause."""
        missing = {f"missing ({cause})": count for cause, count in sorted(self.report.missing.items())}
        return {"asked": self.report.asked, **missing}

    def parts(self, split: str, part_items: int) -> Iterator[PhotoPart]:
        index, images = self._index(), self.options.images
        if is_address(images) or Folder.is_one(Path(images)):
            yield from self._downloaded(self._folder(None if is_address(images) else Path(images)))
        else:
            yield from self._files(Path(images), index, part_items)

    def download(self, to: Path | None = None, **settings: Any) -> tuple[Report, Path]:
        """Fetch what is missing and what failed (`settings` are those of yfcc/download.py) into a folder."""
        folder = self._folder(to)
        if not is_address(self.options.images):
            raise UserError(
                f"images={self.options.images}: a folder; to download, give an address or leave it out"
            )
        self.report = download(folder, self.options.images, runtime=self.runtime, **settings)
        return self.report, folder.path

    def urls(self) -> Iterator[str]:
        """The addresses of the selection."""
        index = self._index()
        for start in range(0, asked := index.selected(self.options.n), BLOCK):
            for photo in index.read(start, min(start + BLOCK, asked)):
                yield f"{self.options.images.rstrip('/')}/{photo_path(photo.decode())}"

    def _index(self) -> Index:
        return open_index(self.files, self.options.draw, self.runtime)

    def _folder(self, path: Path | None) -> Folder:
        index = self._index()
        return Folder((path or index.downloads).expanduser(), index, self.options.n)

    def _downloaded(self, folder: Folder) -> Iterator[PhotoPart]:
        """A part for each block. What was tried once and failed is tried again only where too much is missing."""
        self.report = folder.report()
        if is_address(self.options.images) and (LATE in self.report.missing or self._too_few()):
            self.report = download(folder, self.options.images, runtime=self.runtime)
        self._check(f"`ssl-diversity data download` tries those in {folder.path} again")
        for block in range(folder.blocks):
            wanted = set(folder.names(block)) - folder.missing(block).keys()
            if wanted:
                yield _block_part(folder.tar(block), wanted)

    def _files(self, root: Path, index: Index, part_items: int) -> Iterator[PhotoPart]:
        root = root / "data/images" if (root / "data/images").is_dir() else root
        missing: Counter[str] = Counter()
        asked = index.selected(self.options.n)
        for start in range(0, asked, part_items):
            lister = Lister()
            for photo in index.read(start, min(start + part_items, asked)):
                name = photo_path(photo.decode()).removeprefix("data/images/")
                try:
                    lister.add_file(root, name)
                except FileNotFoundError:
                    missing["no such file"] += 1
            self.report = Report(asked, asked - missing.total(), dict(missing))
            if listing := lister.finish():
                yield _part(root, 0, listing)
        self._check(f"put them into {root}, or leave images= out to download them")

    def _too_few(self) -> bool:
        return self.report.got < (1 - self.options.missing_ok) * self.report.asked

    def _check(self, remedy: str) -> None:
        if self._too_few():
            share = 1 - self.report.got / self.report.asked
            raise UserError(
                f"yfcc100m: {self.report}: {share:.2%} are missing, more than missing_ok={self.options.missing_ok:g};"
                f" {remedy}; or accept it with missing_ok={math.ceil(share * 100) / 100:g}"
            )


def _part(root: Path, stamp: int, listing: Listing) -> PhotoPart:
    return PhotoPart(root, stamp, listing, np.full(len(listing), -1))


def _block_part(tar: Path, wanted: set[str]) -> PhotoPart:
    """The photos wanted of a block, each once: a tar of earlier versions may hold some twice."""
    lister, left = Lister(), set(wanted)
    for member in members(tar):
        name = member.name.removesuffix(".jpg")
        if name in left:
            left.remove(name)
            lister.add(member.name, member.size, member.offset)
    if left:
        raise truncated(tar)
    return _part(tar, tar.stat().st_mtime_ns, lister.finish())
