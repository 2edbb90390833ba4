"""The classification sets of `torchvision.datasets`, as torchvision lays them out on disk.

Sets whose images are files are read from those files, byte for byte; of the others torchvision gives the pixels.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ssl_diversity import files
from ssl_diversity.config import Config, hint
from ssl_diversity.data.sources import paths
from ssl_diversity.data.sources.base import Item, Part, Source
from ssl_diversity.data.sources.listing import FilePart, Listing, file_parts, list_files
from ssl_diversity.data.table import as_bytes
from ssl_diversity.errors import UserError

Arguments = Mapping[str, Any]  # of a constructor
Paths = Callable[[Any], list[tuple[Any, int | None]]]  # dataset -> (path of an image, label)


def _classes(dataset: Any) -> list[str]:
    return [name if isinstance(name, str) else ", ".join(name) for name in dataset.classes]


def _opened(dataset: Any) -> list[tuple[Any, int | None]]:
    """For a dataset whose images are files that are opened, but not yet read."""
    return [(image.filename, label) for image, label in (dataset[i] for i in range(len(dataset)))]


@dataclass(frozen=True)
class Set:
    """Which constructor arguments give the splits (several: joined), and where names and files come from."""

    train: tuple[Arguments, ...] = ({"split": "train"},)
    test: tuple[Arguments, ...] = ({"split": "test"},)  # (): no official split
    classes: Callable[[Any], list[str]] = _classes
    paths: Paths | None = None  # where the class has files, but takes no `loader`


def _splits(*train: str, test: str = "test", **rest: Any) -> Set:
    return Set(tuple({"split": name} for name in train), ({"split": test},), **rest)


def _numbered(count: int, width: int = 1) -> Callable[[Any], list[str]]:
    return lambda dataset: [f"{number:0{width}d}" for number in range(count)]


_FLAG = Set(({"train": True},), ({"train": False},))
_WHOLE = Set(({},), ())

SETS = {  # validation splits are part of train: probes choose on a part of train of their own
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "Caltech101": Set(({},), (), lambda dataset: list(dataset.categories), _opened),
    "Caltech256": Set(({},), (), lambda dataset: list(dataset.categories), _opened),
    "Country211": _splits("train", "valid"),
    "DTD": _splits("train", "val"),  # of partition 1; arguments.partition=2 for another
    "EuroSAT": _WHOLE,
    "FGVCAircraft": _splits("trainval"),
    "FashionMNIST": _FLAG,
    "Flowers102": _splits("train", "val"),
    "Food101": _splits("train"),
    "GTSRB": Set(classes=_numbered(43, 5), paths=lambda dataset: dataset._samples),
    "INaturalist": Set(
        ({"version": "2021_train"},),
        ({"version": "2021_valid"},),
        lambda dataset: list(dataset.all_categories),
    ),
    "Imagenette": _splits("train", test="val"),
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": _splits(
        "trainval", paths=lambda dataset: list(zip(dataset._images, dataset._labels, strict=True))
    ),
    "PCAM": _splits("train", "val", classes=_numbered(2)),  # 1: metastatic tissue
    "Places365": _splits(
        "train-standard",
        test="val",
        classes=lambda dataset: sorted(dataset.class_to_idx, key=dataset.class_to_idx.__getitem__),
    ),
    "RenderedSST2": _splits("train", "val"),
    "STL10": _splits("train"),
    "SUN397": _WHOLE,
    "SVHN": _splits("train", classes=_numbered(10)),
    "StanfordCars": _splits("train"),
    "USPS": Set(({"train": True},), ({"train": False},), _numbered(10)),
}


class Torchvision(Source):
    """One set of the table above.

    A set whose images are no files is held in memory whole while its pixels are written out (CIFAR 0.2 GB, SVHN's
    extra 1.6 GB, STL-10's unlabelled 2.8 GB): so torchvision reads it.
    """

    class Options(Config):
        dataset: str  # the name of its class, in any case
        path: str  # torchvision's `root`
        download: bool = False  # let torchvision fetch what is missing
        train_split: str | None = None  # another one: unlabeled (STL10), extra (SVHN), ...
        arguments: dict[str, Any] = Field({})  # more of the constructor's: small=true (Places365), ...

        @field_validator("dataset")
        @classmethod
        def _known(cls, dataset: str) -> str:
            found = next((name for name in SETS if name.lower() == dataset.lower()), None)
            if found is None:
                raise ValueError(f"not a set that this kind reads; {hint(dataset, SETS, 'known sets')}")
            return found

        @field_validator("path")
        @classmethod
        def _absolute(cls, path: str) -> str:
            return paths.absolute(path)

    def __init__(self, options: Any, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.set = SETS[options.dataset]
        train = ({"split": options.train_split},) if options.train_split else self.set.train
        self.pieces: dict[str, tuple[Arguments, ...]] = {"train": train, "test": self.set.test}
        self.splits = frozenset({"train", "test"} if self.set.test else ())
        self.found: dict[str, tuple[Listing | Path, NDArray[np.int64]]] = {}
        self.classes = self.set.classes(self._any())

    def parts(self, split: str, part_items: int) -> Iterator[Part]:
        for name in ("train", "test") if split == "all" or not self.splits else (split,):
            for arguments in self.pieces[name]:
                yield from self._parts(arguments, part_items)

    def _any(self) -> Any:
        """A split that is there, the smaller one if both are: for the names of the classes."""
        *first, last = [*self.pieces["test"][:1], self.pieces["train"][0]]
        for arguments in first:
            try:
                return self._open(arguments)
            except UserError:
                continue
        return self._open(last)

    def _open(self, arguments: Arguments) -> Any:
        import torchvision

        name, path, download = self.options.dataset, self.options.path, self.options.download
        constructor = getattr(torchvision.datasets, name)
        more: dict[str, Any] = {**arguments, **self.options.arguments}
        if "loader" in signature(constructor).parameters:
            more["loader"] = str  # gives the path of an image in place of the image
        if "download" in signature(constructor).parameters:
            more["download"] = download
        try:
            return constructor(path, **more)
        except MemoryError:
            raise
        except Exception as error:  # nearly anything for files that are not what it expects
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if download:
                raise UserError(
                    f"path={path}: torchvision could not download {name} ({reason}); where there is no network,"
                    " put its files there as torchvision lays them out"
                ) from None
            raise UserError(
                f"path={path}: torchvision's {name} with {dict(arguments)} does not open there ({reason});"
                " put its files there as torchvision lays them out, or say download=true"
            ) from None

    def _parts(self, arguments: Arguments, part_items: int) -> Iterator[Part]:
        name = files.digest([dict(arguments), self.options.arguments])
        if name not in self.found:
            self.found[name] = self._find(arguments, self.scratch / f"pixels-{name}.npy")
        images, labels = self.found[name]
        if isinstance(images, Listing):
            chosen = np.stack([np.arange(len(labels)), labels], axis=1)
            yield from file_parts(partial(FilePart, Path(self.options.path), 0), images, chosen, part_items)
            return
        split = arguments.get("split", "train" if arguments.get("train", True) else "test")
        for i in range(0, len(labels), part_items):
            yield PixelPart(images, i, labels[i : i + part_items].copy(), split)

    def _find(self, arguments: Arguments, pixels: Path) -> tuple[Listing | Path, NDArray[np.int64]]:
        """(the files, or `pixels` with the images written to it for all workers to map; classes)."""
        dataset = self._open(arguments)
        if self.set.classes(dataset) != self.classes:
            raise UserError(
                f"path={self.options.path}: {self.options.dataset} with {dict(arguments)} has other classes than"
                " its other splits; fetch it again"
            )
        if "loader" in signature(type(dataset)).parameters:
            pairs = [dataset[i] for i in range(len(dataset))]
        elif self.set.paths:
            pairs = self.set.paths(dataset)
        else:
            return pixels, _write_pixels(dataset, pixels)
        root = Path(self.options.path)
        listing = list_files(root, (os.path.relpath(path, root) for path, _ in pairs))
        return listing, np.array([-1 if label is None else label for _, label in pairs], np.int64)


def _write_pixels(dataset: Any, path: Path) -> NDArray[np.int64]:
    """All images of a dataset to a uint8 (n, H, W, 3) .npy file; their classes."""
    shape = (len(dataset), *np.asarray(dataset[0][0].convert("RGB")).shape)
    labels = np.full(len(dataset), -1)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(len(dataset)):
            image, label = dataset[i]
            pixels = np.asarray(image.convert("RGB"))
            if pixels.shape != shape[1:]:
                raise UserError(f"{path}: image {i} has another size than the first; fetch the set again")
            file.write(as_bytes(pixels, np.uint8))  # not into a map: on a full disk that is a SIGBUS
            labels[i] = -1 if label is None else label
    return labels


@dataclass(frozen=True, eq=False)
class PixelPart:
    """Images `start`, ... of a uint8 (n, H, W, 3) .npy file."""

    path: Path
    start: int
    labels: NDArray[np.int64]
    split: str

    def _rows(self) -> NDArray[np.uint8]:
        pixels = np.load(self.path, mmap_mode="r")
        rows: NDArray[np.uint8] = pixels[self.start : self.start + len(self.labels)]
        return rows

    def key(self) -> Any:
        content = blake2b(self._rows().tobytes() + self.labels.tobytes(), digest_size=16)
        return [self.split, self.start, content.hexdigest()]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Item]:
        for i, (pixels, label) in enumerate(zip(self._rows(), self.labels.tolist(), strict=True), self.start):
            yield Item(f"{self.split}/{i:06d}", label, np.array(pixels))
