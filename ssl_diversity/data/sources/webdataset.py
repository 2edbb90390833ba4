"""Existing WebDataset shards: tars in which the members of one sample follow one another and share a key."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.data.sources import paths
from ssl_diversity.data.sources.base import Item, Source
from ssl_diversity.data.sources.layout import is_image
from ssl_diversity.data.sources.paths import File, Labels, Value
from ssl_diversity.data.sources.tars import Archive, Member, members
from ssl_diversity.errors import UserError

_KEY = re.compile(
    r"((?:.*/)?[^/.]+)\.([^/]+)"
)  # up to the first dot of the last component, and what follows it
Sample = dict[str, Member]  # by suffix, lower case
Read = Callable[[int, int], bytes]  # offset, size


class WebDatasetShards(Source):
    """Local shards are read in place; those at an address are fetched by the worker that reads them, then removed.

    img2dataset's shards are such, unlabelled. A shard is a part: it is listed where it is read.
    """

    class Options(paths.Options):
        image: str | None = None  # suffix of the images, several by ";", preferred first; None: any image's
        label_key: str | None = None  # of each sample's .json, or a member: ".txt"; None: .cls if there

    def __init__(self, options: Any, scratch: Path) -> None:
        self.scratch = scratch
        self.images = tuple(options.image.lower().split(";")) if options.image else ()
        label = options.label_key or ".cls"
        where = f"path={options.path}"
        found = paths.find(options.path, ".tar")
        self.files = paths.by_split(found, where, lambda part: self._look(part[0], label)[1])
        self.splits = frozenset(self.files) - {"all"}
        first = self.files["train" if self.splits else "all"]
        looks = (self._look(file, label) for file in first)
        self.count, has_labels = next((look for look in looks if look[0]), (0, False))
        asked = options.label_key is not None or options.classes is not None
        labelled = (asked or has_labels) if options.labelled is None else options.labelled
        if labelled and not has_labels:
            raise UserError(
                f"{where}: the first image has no label ({label}); say label_key=KEY for another key of its"
                " .json, label_key=.txt for another member, or labelled=false"
            )
        self.rules = Rules(self.images, label, None, refuse_labels=options.labelled is None)
        self.classes = []
        if labelled:
            names = paths.class_names(options.classes, found)
            labels = Labels(names) if names else self._scan(first, label, where)
            self.classes = labels.classes
            self.rules = Rules(self.images, label, labels)

    def parts(self, split: str, part_items: int) -> Iterator["ShardPart"]:
        for name in [split] if split in self.files else sorted(self.files):
            for file in self.files[name]:
                yield ShardPart(file, self.scratch, self.rules, self.count)

    def _look(self, file: File, label: str) -> tuple[int, bool]:
        """How many samples a shard has, and whether its first image has a label."""

        def look() -> list[Any]:
            count, labelled = 0, None
            with _local(file, self.scratch, keep=True) as archive:
                for key, sample in _samples(archive, file.where):
                    where = f"{file.where}: sample {key!r}"
                    image = _image(sample, self.images, where)
                    if image and labelled is None:
                        labelled = _label(sample, label, archive.read, where) is not None
                    count += image is not None
            return [count, bool(labelled)]

        count, labelled = paths.remembered(self.scratch, [file.state(), label, self.images], look)
        return count, labelled

    def _scan(self, found: list[File], label: str, where: str) -> Labels:
        """The classes from the labels that occur: reads the headers of all shards, and their labels."""
        if found[0].remote:
            raise UserError(
                f"{where}: how many classes are there? Say classes=NUMBER, a list or a text file, or labelled=false"
                " (finding out would take fetching every shard)"
            )

        def scan() -> list[Value]:
            values: set[Value] = set()
            for file in found:
                with _local(file, self.scratch) as archive:
                    for key, sample in _samples(archive, file.where):
                        value = _label(sample, label, archive.read, f"{file.where}: sample {key!r}")
                        if value is not None and value != -1:
                            values.add(value)
            return list(values)

        state = ["classes", [file.state() for file in found], label]
        return Labels.of(set(paths.remembered(self.scratch, state, scan)), where)


@dataclass(frozen=True)
class Rules:
    """Which members of a sample are its image and its label."""

    images: tuple[str, ...]  # suffixes, preferred first; (): any image's
    label: str  # a suffix with its dot, or a key of the .json
    labels: Labels | None  # None: unlabelled
    refuse_labels: bool = False  # whether a label is then an error

    @cached_property
    def digest(self) -> str:
        labels = self.labels.digest() if self.labels else None
        return files.digest([self.images, self.label, labels, self.refuse_labels])


@dataclass(frozen=True)
class ShardPart:
    file: File
    scratch: Path
    rules: Rules
    count: int  # of the first shard's images

    def key(self) -> Any:
        return [self.file.state(), self.rules.digest]

    def __len__(self) -> int:
        """An estimate: counting means reading the shard."""
        return max(1, self.count)

    def __iter__(self) -> Iterator[Item]:
        samples = images = absent = 0
        with _local(self.file, self.scratch) as archive:
            for key, sample in _samples(archive, self.file.where):
                where = f"{self.file.where}: sample {key!r}"
                samples += 1
                if _failed(sample, archive.read):
                    absent += 1
                    continue
                suffix = _image(sample, self.rules.images, where)
                if suffix is None:
                    if (
                        self.rules.labels
                        and _label(sample, self.rules.label, archive.read, where) is not None
                    ):
                        raise UserError(f"{where} has a label, but no image; make the shard anew")
                    continue
                images += 1
                label = self._class(sample, archive.read, where)
                data = archive.read(sample[suffix].offset, sample[suffix].size)
                yield Item(f"{self.file.name}:{key}.{suffix}", label, data)
        if samples and images + absent == 0:
            looked = ", ".join(self.rules.images) or "jpg, png, webp, ..."
            raise UserError(
                f"{self.file.where}: none of its {samples} samples has an image (looked for {looked}); name the"
                " suffix by image=SUFFIX, or give a tar of images without keys to source=folder"
            )

    def _class(self, sample: Sample, read: Read, where: str) -> int:
        labels = self.rules.labels
        if labels is None:
            if self.rules.refuse_labels and self.rules.label[1:] in sample:
                raise UserError(
                    f"{where} has a label, but the first has none; say labelled=false, or mend it"
                )
            return -1
        return labels.number(_label(sample, self.rules.label, read, where), where)


@contextmanager
def _local(file: File, scratch: Path, *, keep: bool = False) -> Iterator[Archive]:
    """A shard, opened; one at an address is fetched, and removed afterwards unless it is to be kept."""
    if not file.remote:
        with Archive(Path(file.place), file.stamp) as archive:
            yield archive
        return
    from ssl_diversity.data.remote import Client

    path = scratch / f"fetched-{files.digest(file.place)}.tar"
    kept = False
    try:
        if not path.exists():
            Client().download(file.place, path)
        with Archive(path) as archive:
            yield archive
        kept = keep
    finally:
        if not kept:
            path.unlink(missing_ok=True)


def _samples(archive: Archive, where: str) -> Iterator[tuple[str, Sample]]:
    """(key, members) in the shard's order; UserError for a key that comes twice, or an image that is a link."""
    seen: set[str] = set()
    current, sample = "", Sample()
    for member in members(archive.path, where=where):
        match = _KEY.fullmatch(member.name)
        if member.kind == "folder" or not match:
            continue
        key, suffix = match[1], match[2].lower()
        if member.kind == "other":
            raise UserError(f"{where}: member {member.name!r} is a link; make the shard anew, with the files")
        if key != current:
            if sample:
                yield current, sample
            if key in seen:
                raise UserError(f"{where}: key {key!r} comes twice, apart; give each sample a key of its own")
            seen.add(key)
            current, sample = key, Sample()
        if suffix in sample:
            raise UserError(f"{where}: member {member.name!r} comes twice; give each sample a key of its own")
        sample[suffix] = member
    if sample:
        yield current, sample


def _image(sample: Sample, wanted: tuple[str, ...], where: str) -> str | None:
    """The suffix of the image; UserError where there are several and none is `wanted`."""
    if wanted:
        return next((suffix for suffix in wanted if suffix in sample), None)
    found = [suffix for suffix in sample if "." not in suffix and is_image(f"x.{suffix}")]
    if len(found) > 1:
        raise UserError(f"{where} has several images; say which one counts: image={found[0]}")
    return found[0] if found else None


def _failed(sample: Sample, read: Read) -> bool:
    """Whether img2dataset could not fetch it."""
    if "json" not in sample:
        return False
    text = read(sample["json"].offset, sample["json"].size)
    if b'"status"' not in text:
        return False
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("status") not in (None, "success")


def _label(sample: Sample, label: str, read: Read, where: str) -> Value | None:
    """What a sample says of its class: an integer or a name; None where it says nothing."""
    suffix = label[1:] if label.startswith(".") else "json"
    if suffix not in sample:
        return None
    text = read(sample[suffix].offset, sample[suffix].size)
    try:
        value = text.decode().strip() if label.startswith(".") else json.loads(text).get(label)
    except (ValueError, AttributeError):
        raise UserError(f"{where}: its .{suffix} is not readable; mend it, or say labelled=false") from None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d+", value) and label.startswith(".") else value or None
    if value is None or isinstance(value, int):
        return None if value is None else int(value)
    raise UserError(f"{where}: {label}={value!r} is no single class (a number or a name); say labelled=false")
