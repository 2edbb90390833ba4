"""ImageNet (ILSVRC 2012): the official archives as they are, the extracted folders, or Hugging Face's parquet files.

All forms give the same names (`train/<wnid>/<file>`, `val/<wnid>/<file>`), classes (sorted wnids) and bytes,
hence the same pool. Validation labels of the archive, and of a folder without class folders, are the devkit's.
"""

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from ssl_diversity.config import Config
from ssl_diversity.data.sources import paths
from ssl_diversity.data.sources.base import Item, Part, Source
from ssl_diversity.data.sources.folder import list_archive, list_folder
from ssl_diversity.data.sources.layout import is_image
from ssl_diversity.data.sources.listing import FilePart, Listing, file_parts
from ssl_diversity.data.sources.parquet import Parquet, RowGroups, opened
from ssl_diversity.data.sources.paths import File, Labels, Value
from ssl_diversity.data.sources.tars import Archive, members
from ssl_diversity.errors import UserError

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12"  # a folder, or with .tar.gz
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_PARQUET = {"train": "train-*.parquet", "test": "validation-*.parquet"}
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_IMAGE_BYTES = 110_000  # of a training image, roughly: for progress alone


class Form(Protocol):
    """One split in one form."""

    classes: list[str]

    def images(self, classes: list[str], part_items: int) -> Iterator[Part]: ...


class ImageNet(Source):
    """Opening lists class tars or class folders alone; their images are listed part by part."""

    class Options(Config):
        path: str  # a folder with the archives, or with train/ and val/, or with the parquet files (in data/)

        @field_validator("path")
        @classmethod
        def _absolute(cls, path: str) -> str:
            return paths.absolute(path)

    def __init__(self, options: Any, scratch: Path) -> None:
        self.root = Path(options.path)
        if not self.root.is_dir():
            raise UserError(f"path={self.root}: no such folder; give the one that holds {_TRAIN_TAR}")
        self.forms: dict[str, Form] = {}
        for split, pattern in _PARQUET.items():
            folder = next((f for f in (self.root / "data", self.root) if any(f.glob(pattern))), None)
            if folder:
                self.forms[split] = ParquetFiles(folder, split, scratch)
        devkit = Devkit(self.root)
        if (self.root / _TRAIN_TAR).exists():
            self.forms["train"] = TrainTar(self.root / _TRAIN_TAR)
        elif (self.root / "train").is_dir():
            self.forms["train"] = ClassFolders(self.root, "train")
        if (self.root / _VAL_TAR).exists():
            self.forms["test"] = Validation(self.root / _VAL_TAR, devkit)
        elif (self.root / "val").is_dir():
            classed = any(path.is_dir() for path in (self.root / "val").iterdir())
            self.forms["test"] = ClassFolders(self.root, "val") if classed else Validation(self.root, devkit)
        if not self.forms:
            raise UserError(
                f"path={self.root}: no ImageNet in it; looked for {_TRAIN_TAR} and {_VAL_TAR}, train/ and val/, and"
                " train-*.parquet and validation-*.parquet (also in data/)"
            )
        self.splits = frozenset(self.forms)
        self.classes = self.forms[max(self.forms)].classes  # train's, where it is there
        odd = sorted(set(self.forms[min(self.forms)].classes) - set(self.classes))
        if odd:
            raise UserError(f"{self.root}: validation class {odd[0]} is not among the training classes")

    def parts(self, split: str, part_items: int) -> Iterator[Part]:
        for name in sorted(self.forms) if split == "all" else [split]:
            if name not in self.forms:
                kind = "validation" if name == "test" else "training"
                raise UserError(f"path={self.root}: has no {kind} images; put them there as well")
            yield from self.forms[name].images(self.classes, part_items)


class TrainTar:
    """The official training archive: an uncompressed tar of one uncompressed tar per class."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = path.stat().st_mtime_ns
        inner = (member for member in members(path) if member.name.endswith(".tar"))
        self.spans = {Path(member.name).stem: (member.offset, member.size) for member in inner}
        self.classes = sorted(self.spans)
        if not self.classes:
            raise UserError(f"{path}: no class tars (n01440764.tar, ...) in it; fetch the official archive")

    def images(self, classes: list[str], part_items: int) -> Iterator["ClassTar"]:
        for label, wnid in enumerate(classes):
            yield ClassTar(self.path, self.stamp, wnid, label, *self.spans[wnid])


@dataclass(frozen=True)
class ClassTar:
    """One class of the training archive, read in place."""

    path: Path
    stamp: int  # the archive's modification time, ns
    wnid: str
    label: int
    offset: int  # of the class tar in the archive, bytes
    size: int

    def key(self) -> Any:
        return [str(self.path), self.stamp, self.wnid, self.label, self.offset, self.size]

    def __len__(self) -> int:
        """An estimate: counting means reading the class tar."""
        return max(1, self.size // _IMAGE_BYTES)

    def __iter__(self) -> Iterator[Item]:
        where, stop = f"{self.path}/{self.wnid}.tar", self.offset + self.size
        with Archive(self.path, self.stamp) as archive:
            for member in members(self.path, where=where, start=self.offset, stop=stop):
                if member.kind == "file" and is_image(member.name):
                    name = f"train/{self.wnid}/{Path(member.name).name}"
                    yield Item(name, self.label, archive.read(member.offset, member.size))


class ClassFolders:
    """A split as one folder per class."""

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split = root, split
        found = (path for path in (root / split).iterdir() if not path.name.startswith("."))
        self.classes = sorted(path.name for path in found if path.is_dir())
        if not self.classes:
            raise UserError(f"{root / split}: no class folders (n01440764, ...) in it")

    def images(self, classes: list[str], part_items: int) -> Iterator["ClassFolder"]:
        present = set(self.classes)
        for label, wnid in enumerate(classes):
            if wnid in present:
                yield ClassFolder(self.root, f"{self.split}/{wnid}", label)


@dataclass(frozen=True)
class ClassFolder:
    """The images of one class, looked at (size, time of change) by the worker."""

    root: Path
    folder: str  # relative to `root`
    label: int

    def _listed(self) -> FilePart:
        listing, _ = list_folder(self.root, self.folder)
        if not len(listing):
            raise UserError(f"{self.root / self.folder}: empty class; fill or remove the folder")
        return FilePart(self.root, 0, listing, np.full(len(listing), self.label))

    def key(self) -> Any:
        return self._listed().key()

    def __len__(self) -> int:
        """By the names in the folder alone."""
        return max(1, sum(map(is_image, os.listdir(self.root / self.folder))))

    def __iter__(self) -> Iterator[Item]:
        return iter(self._listed())


class Validation:
    """Validation images in one archive or one flat folder, with the devkit's labels."""

    def __init__(self, path: Path, devkit: "Devkit") -> None:
        self.path, self.devkit = path, devkit
        self.classes = devkit.classes

    def images(self, classes: list[str], part_items: int) -> Iterator[FilePart]:
        if self.path.is_dir():
            (listing, _), stamp = list_folder(self.path, "val"), 0
        else:
            (listing, _), stamp = list_archive(self.path, self.path), self.path.stat().st_mtime_ns
        chosen = np.stack([np.arange(len(listing)), self._labels(listing, classes)], axis=1)
        make = partial(ValidationPart, self.path, stamp, wnids=tuple(classes))
        yield from file_parts(make, listing, chosen, part_items)

    def _labels(self, listing: Listing, classes: list[str]) -> NDArray[np.int64]:
        found = [_VALIDATION.search(name) for name in listing.names()]
        numbers = [int(match[1]) if match else 0 for match in found]
        truth = self.devkit.truth
        if not numbers or min(numbers) < 1 or max(numbers) > len(truth):
            raise UserError(
                f"{self.path}: not the {len(truth)} images ILSVRC2012_val_00000001.JPEG, ... that the devkit"
                " labels; fetch the official archive"
            )
        label_of = {wnid: label for label, wnid in enumerate(classes)}
        return np.array([label_of[truth[number - 1]] for number in numbers])


@dataclass(frozen=True, eq=False)
class ValidationPart(FilePart):
    wnids: tuple[str, ...] = ()

    def key(self) -> Any:
        return [*super().key(), self.wnids]

    def name(self, name: str, label: int) -> str:
        return f"val/{self.wnids[label]}/{Path(name).name}"


class ParquetFiles(Parquet):
    """A split in the layout of Hugging Face's ILSVRC/imagenet-1k, whose file names tell the wnids."""

    def __init__(self, folder: Path, split: str, scratch: Path) -> None:
        pattern = f"{glob.escape(str(folder))}/{_PARQUET[split]}"
        super().__init__(Parquet.Options(path=pattern, labelled=True), scratch)
        self.split = "train" if split == "train" else "val"
        state = ["wnids", [file.state() for file in self.files["all"]]]
        self.value_of = dict(paths.remembered(scratch, state, self._wnids))  # wnid -> label in the files
        self.classes = sorted(self.value_of)

    def images(self, classes: list[str], part_items: int) -> Iterator[RowGroups]:
        self.labels = Labels(classes, [self.value_of.get(wnid, wnid) for wnid in classes])
        yield from self.parts("all", part_items)

    def part(self, file: File, groups: tuple[int, ...], first: int, count: int) -> RowGroups:
        return Rows(file, groups, first, count, self.image, self.label, self.labels, self.split)

    def _wnids(self) -> list[tuple[str, Value]]:
        """(wnid, label) of the classes: reads the names of images until each label has come."""
        found: dict[Value, str] = {}
        columns = [f"{self.image}.path", str(self.label)]
        for file in self.files["all"]:
            with opened(file) as table:
                for batch in table.iter_batches(1000, columns=columns):
                    names = batch.column(0).to_pylist()
                    for name, label in zip(names, batch.column(1).to_pylist(), strict=True):
                        found[label] = _official(name["path"], file.where)[0]
                    if len(found) == len(self.classes):
                        return [(wnid, label) for label, wnid in found.items()]
        return [(wnid, label) for label, wnid in found.items()]


@dataclass(frozen=True)
class Rows(RowGroups):
    split: str = "train"

    def key(self) -> Any:
        return [*super().key(), self.split]

    def name(self, row: int, path: str | None, label: int) -> str:
        wnid, file = _official(path, self.file.where)
        return f"{self.split}/{wnid}/{file}"


def _official(path: str | None, where: str) -> tuple[str, str]:
    """(wnid, name in the official archive); Hugging Face's names are `<official stem>_<wnid>.JPEG`."""
    match = re.fullmatch(r"(?:.*/)?(.+?)(?:_(n\d{8}))?(\.\w+)", path or "")
    wnid = match and (match[2] or match[1].partition("_")[0])
    if not match or not wnid or not re.fullmatch(r"n\d{8}", wnid):
        raise UserError(
            f"{where}: image {path!r} is not named as ImageNet's are (n01440764_10026_n01440764.JPEG);"
            " say source=parquet for a table of another kind"
        )
    return wnid, match[1] + match[3]


class Devkit:
    """Reads the development kit when first asked: which class each validation image is of."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _read(self, name: str) -> bytes:
        folder, archive = self.root / _DEVKIT, self.root / f"{_DEVKIT}.tar.gz"
        try:
            if folder.is_dir():
                return (folder / name).read_bytes()
            with tarfile.open(archive, "r:gz") as tar:
                file = tar.extractfile(f"{_DEVKIT}/{name}")
                return file.read() if file else b""
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: missing; validation labels come from it (or sort the images into"
                " val/<wnid>/ folders)"
            ) from None
        except (KeyError, EOFError, OSError, tarfile.TarError) as error:
            raise UserError(f"{archive}: damaged, or no devkit ({error}); fetch it again") from None

    @cached_property
    def wnids(self) -> dict[int, str]:
        """ILSVRC2012_ID -> wnid of the synsets without children: the classes."""
        from scipy.io import loadmat

        synsets = np.atleast_1d(loadmat(io.BytesIO(self._read(_META)), squeeze_me=True)["synsets"])
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}

    @cached_property
    def classes(self) -> list[str]:
        return sorted(self.wnids.values())

    @cached_property
    def truth(self) -> list[str]:
        """The wnid of each validation image."""
        numbers = list(map(int, self._read(_TRUTH).split()))
        if not set(numbers) <= set(self.wnids):
            raise UserError(f"{self.root / _DEVKIT}: {_TRUTH} names a class that {_META} does not have")
        return [self.wnids[number] for number in numbers]
