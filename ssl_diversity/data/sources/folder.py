"""A folder of images, or a tar of one: class folders or flat, with train/ and test/ (or val/) or without."""

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import field_validator

from ssl_diversity import files
from ssl_diversity.config import Config
from ssl_diversity.data.sources.base import Item, Source
from ssl_diversity.data.sources.layout import is_image, read_layout
from ssl_diversity.errors import UserError


@dataclass(frozen=True)
class Entry:
    """Where one image's bytes are: in a file of its own, or `size` bytes from `offset` of an archive."""

    name: str  # relative to the folder or archive
    size: int
    stamp: int  # modification time (ns) of a file; offset in an archive


@dataclass(frozen=True)
class FilePart:
    root: Path  # folder, or uncompressed archive
    stamp: int  # the archive's modification time (ns); 0 for a folder
    strip: int  # characters of the names that are the base folder
    entries: tuple[tuple[Entry, int], ...]  # with class numbers

    def key(self) -> Any:
        return [
            str(self.root),
            self.stamp,
            self.strip,
            [[e.name, e.size, e.stamp, n] for e, n in self.entries],
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Item]:
        read = self._read_files() if self.root.is_dir() else self._read_archive()
        for (entry, label), data in zip(self.entries, read, strict=True):
            yield Item(entry.name[self.strip :], label, data)

    def _read_files(self) -> Iterator[bytes]:
        for entry, _ in self.entries:
            path = self.root / entry.name
            try:
                yield path.read_bytes()
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}); make it readable or remove it"
                ) from None

    def _read_archive(self) -> Iterator[bytes]:
        with self.root.open("rb", buffering=0) as archive:
            for entry, _ in self.entries:
                data = os.pread(archive.fileno(), entry.size, entry.stamp)
                if len(data) != entry.size:
                    raise truncated(self.root)
                yield data


class Folder(Source):
    """ImageFolder tree, flat folder, or a .tar or .tar.gz of either."""

    class Options(Config):
        path: str  # of the folder or archive
        labelled: bool | None = None  # None: labelled if all images lie in class folders

        @field_validator("path")
        @classmethod
        def _absolute(cls, path: str) -> str:
            return os.path.abspath(os.path.expanduser(path))

    def __init__(self, options: Any, scratch: Path) -> None:
        path = Path(options.path)
        if not path.exists():
            raise UserError(f"path={path}: no such folder or archive")
        if path.is_dir():
            self.root, self.stamp = path, 0
            entries, folders = list_folder(path)
        else:
            self.root = unpacked(path, scratch)
            self.stamp = self.root.stat().st_mtime_ns
            entries, folders = list_archive(self.root, path)
        layout = read_layout([e.name for e in entries], folders, options.labelled, str(path))
        self.classes = layout.classes
        self.splits = frozenset(layout.chosen) - {"all"}
        self.strip = len(layout.base) + 1 if layout.base else 0
        self.entries = {
            split: [(entries[index], label) for index, label in chosen]
            for split, chosen in layout.chosen.items()
        }

    def parts(self, split: str, part_items: int) -> Iterator[FilePart]:
        chosen = [split] if split in self.entries else sorted(self.entries)
        entries = [entry for name in chosen for entry in self.entries[name]]
        for i in range(0, len(entries), part_items):
            yield FilePart(self.root, self.stamp, self.strip, tuple(entries[i : i + part_items]))


def list_folder(root: Path) -> tuple[list[Entry], list[str]]:
    """Images and folders below `root`, sorted; links are followed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    entries, folders = [], []
    for folder, children, names in os.walk(root, followlinks=True, onerror=refuse):
        children.sort()
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        folders += [prefix + child for child in children]
        for name in sorted(names):
            if is_image(prefix + name):
                status = (Path(folder) / name).stat()
                entries.append(Entry(prefix + name, status.st_size, status.st_mtime_ns))
    return entries, folders


def list_archive(archive: Path, where: Path) -> tuple[list[Entry], list[str]]:
    """Images and folders in a plain tar, in its order; of a name that comes twice the later one counts.

    Raises UserError for a truncated archive, a name that leaves the folder, an image that is a link.
    """
    entries: dict[str, Entry] = {}
    folders: list[str] = []
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every member in memory
                name = _inside(member.name, where)
                if member.isdir():
                    folders.append(name)
                elif is_image(name) and not member.isreg():
                    raise UserError(
                        f"{where}: member {member.name!r} is a link; extract the archive and give its folder"
                    )
                elif is_image(name):
                    entries[name] = Entry(name, member.size, member.offset_data)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise truncated(where)  # a whole tar ends with a block of zeros
    except tarfile.TarError as error:
        if "unexpected end of data" in str(error) or archive.stat().st_size % 512:
            raise truncated(where) from None
        raise UserError(
            f"{where}: not a readable tar ({error}); give a folder, a .tar or a .tar.gz"
        ) from None
    return list(entries.values()), folders


def truncated(path: Path) -> UserError:
    return UserError(
        f"{path}: truncated tar (it ends in the middle of a member or without its end mark); fetch it again"
    )


def _inside(name: str, where: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: member {name!r} leaves the target folder; refused, make the archive anew")
    return "" if str(path) == "." else str(path)


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
