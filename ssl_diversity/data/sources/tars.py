"""What lies where in an uncompressed tar, or in one inside another: listed quickly, read by offset, not unpacked."""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Literal, NamedTuple, Self

from ssl_diversity.data.pool import padded
from ssl_diversity.errors import UserError

_BLOCK = 512
Kind = Literal["file", "folder", "other"]  # other: links, devices, sparse files
_TIMES = re.compile(rb"(\d+ [acm]time=-?[\d.]+\n)+")  # what Python's tarfile says of every member
_PLAIN: dict[bytes, Kind] = {tarfile.REGTYPE: "file", tarfile.AREGTYPE: "file", tarfile.DIRTYPE: "folder"}


class Member(NamedTuple):
    name: str  # '/'-separated, without './' in front or '/' behind; "" for the root folder
    offset: int  # of its data in the archive's file, bytes
    size: int  # bytes
    kind: Kind


def members(
    archive: Path, *, where: Path | str | None = None, start: int = 0, stop: int | None = None
) -> Iterator[Member]:
    """The members of the tar in bytes [start, stop) of a file (default: all of it), in order, one at a time.

    Errors call the archive `where` (default: its path). Raises UserError for a truncated archive (cut in a
    member, or without its end mark), a name that leaves the folder, and a file that is no plain tar.
    """
    where = where or archive
    try:
        with archive.open("rb") as file:
            stop = file.seek(0, os.SEEK_END) if stop is None else stop
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _members(tar, file.fileno(), where, start, stop)
    except tarfile.TarError as error:
        if "unexpected end of data" in str(error) or (stop is not None and (stop - start) % _BLOCK):
            raise truncated(where) from None
        raise UserError(
            f"{where}: not a readable tar ({error}); give a folder, a .tar or a .tar.gz"
        ) from None
    except OSError as error:
        raise unreadable(archive, error) from None


def _members(
    tar: tarfile.TarFile, descriptor: int, where: Path | str, start: int, stop: int
) -> Iterator[Member]:
    """Plain headers are read here, in a fifth of the time; the others, and the end, are tarfile's affair."""
    position = start
    while True:
        member = _plain(descriptor, position)
        if member:
            after = member.offset + padded(member.size)
        else:
            if position != start:  # else tarfile has read it when it was opened
                tar.firstmember, tar.offset, tar.members = None, position, []  # type: ignore[attr-defined]
            info = tar.next()
            if info is None:
                break
            kind: Kind = "folder" if info.isdir() else "file" if info.isreg() else "other"
            member = Member(info.name, info.offset_data, info.size, "other" if info.issparse() else kind)
            after = tar.offset
        if not position < after <= stop:
            raise truncated(where)
        position = after
        yield member._replace(name=_inside(member.name, where))
    if position >= stop or os.pread(descriptor, _BLOCK, position) != bytes(_BLOCK):
        raise truncated(where)  # a whole tar ends with a block of zeros


def _plain(descriptor: int, position: int, *, timed: bool = False) -> Member | None:
    """The member of a header with no extensions but times and with the right checksum; None for all else."""
    header = os.pread(descriptor, _BLOCK, position)
    kind = _PLAIN.get(header[156:157])
    try:
        if header[156:157] == tarfile.XHDTYPE and not timed:
            size = int(header[124:136].strip(b" \0"), 8)
            if _TIMES.fullmatch(os.pread(descriptor, size, position + _BLOCK)):
                return _plain(descriptor, position + _BLOCK + padded(size), timed=True)
        name = header[:100].partition(b"\0")[0].decode()
        size = int(header[124:136].strip(b" \0"), 8)
        checksum = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum or header[345:346] != b"\0" or not kind:
        return None
    if kind == "folder":
        return Member(name, position + _BLOCK, 0, kind)
    return None if name.endswith("/") else Member(name, position + _BLOCK, size, kind)


def _inside(name: str, where: Path | str) -> str:
    """`name` without './' and '//' in it."""
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise UserError(f"{where}: member {name!r} leaves the target folder; refused, make the archive anew")
    if "./" in name or "//" in name or name[-1:] in ("/", "."):
        path = str(PurePosixPath(name))
        return "" if path == "." else path
    return name


class Archive:
    """An open file that is read by offset. Raises UserError where it ends too early, or has changed."""

    def __init__(self, path: Path, stamp: int | None = None) -> None:
        """`stamp`: its modification time (ns) when it was listed."""
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, error) from None
        if stamp is not None and os.fstat(self.descriptor).st_mtime_ns != stamp:
            os.close(self.descriptor)
            raise changed(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        if len(data) != size:
            raise truncated(self.path)
        return data


def truncated(path: Path | str) -> UserError:
    return UserError(
        f"{path}: truncated tar (it ends in the middle of a member or without its end mark); fetch it again"
    )


def changed(path: Path) -> UserError:
    return UserError(f"{path}: changed since it was listed; run it again when nothing writes to it")


def unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: vanished since it was listed; put it back or run it again")
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable or remove it")
