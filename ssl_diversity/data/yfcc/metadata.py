"""The files in which YFCC100M lists its 100 million photos and videos.

Columns are those of the README in the release (Thomee et al., "YFCC100M: The New Data in Multimedia Research",
CACM 2016). A photo is named by the hash in its line. It is the MD5 of its download URL, each byte written in
hexadecimal without a leading zero, so it has 16 to 32 digits.
"""

import bz2
import contextlib
import gzip
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import md5
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ssl_diversity.errors import UserError

_CHUNK_LINES = 20_000
_LISTED = 1000  # malformed lines of a file that are listed; all are counted
_HASH = re.compile(rb"[0-9a-f]{16,32}")
_SQLITE = b"SQLite format 3\0"


class Layout(NamedTuple):
    """Which columns of a kind of file, from 0, say what is needed."""

    name: int  # the photo's hash, or its download URL, of which the hash is made
    is_url: bool
    video: int | None  # "0" for a photo, "1" for a video; None: there are photos only


LAYOUTS = {  # by number of columns
    25: Layout(2, False, 24),  # yfcc100m_dataset.bz2: line number, identifier, hash, ..., marker
    23: Layout(14, True, 22),  # yfcc100m_dataset-0.bz2 to -9.bz2, the first release: no line number, no hash
    3: Layout(2, False, None),  # line number, identifier, hash: a list of photos, such as YFCC15M's
}


@dataclass
class Tally:
    """What was in a file: lines = photos + videos + malformed."""

    counts: Counter[str] = field(default_factory=Counter)
    malformed: list[str] = field(default_factory=list)  # where and why, of the first ones

    def reject(self, reason: str) -> None:
        self.counts["malformed"] += 1
        if len(self.malformed) < _LISTED:
            self.malformed.append(f"line {self.counts['lines']:,}: {reason}")


def hash_of(url: bytes) -> bytes:
    """The name of the photo with that download URL, as releases without a hash column imply it."""
    return b"".join(b"%x" % byte for byte in md5(url, usedforsecurity=False).digest())


def read(path: Path, tally: Tally) -> Iterator[tuple[list[bytes], float]]:
    """(hashes of photos, share of the file read so far) of a metadata file, a chunk of lines at a time.

    `path` is tab-separated text, plain or compressed (.bz2, .gz), in one of `LAYOUTS`, or the SQLite database of the
    public bucket (tools/etc/yfcc100m_dataset.sql). Raises UserError for another form, a truncated file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_SQLITE))
            file.seek(0)
            yield from _database(path, tally) if head == _SQLITE else _text(path, file, head, tally)
    except (EOFError, zlib.error, sqlite3.DatabaseError) as error:
        raise UserError(f"{path}: truncated ({error}); fetch it again") from None
    except OSError as error:  # bz2 and gzip raise it for bytes that are no such stream, too
        reason = error.strerror or f"not readable as {path.suffix}: {error}"
        raise UserError(f"{path}: {reason}; fetch it again") from None


def _opened(file: BinaryIO, head: bytes) -> Any:
    if head.startswith(b"BZh"):
        return bz2.open(file)
    return gzip.open(file) if head.startswith(b"\x1f\x8b") else contextlib.nullcontext(file)


def _text(path: Path, file: BinaryIO, head: bytes, tally: Tally) -> Iterator[tuple[list[bytes], float]]:
    size = path.stat().st_size
    columns = 0
    with _opened(file, head) as text:
        while lines := list(islice(text, _CHUNK_LINES)):
            columns = columns or _columns(path, lines)
            yield _photos(lines, columns, LAYOUTS[columns], tally), file.tell() / size


def _columns(path: Path, lines: list[bytes]) -> int:
    found = Counter(line.count(b"\t") + 1 for line in lines)
    known = max(LAYOUTS, key=lambda columns: found[columns])
    if not found[known]:
        raise UserError(
            f"{path}: has lines of {found.most_common(1)[0][0]} tab-separated columns; the metadata of YFCC100M has"
            f" 25 (or 23, first release); give yfcc100m_dataset.bz2"
        )
    return known


def _photos(lines: list[bytes], columns: int, layout: Layout, tally: Tally) -> list[bytes]:
    photos = []
    for line in lines:
        tally.counts["lines"] += 1
        try:
            photo = _photo(line.rstrip(b"\r\n").split(b"\t"), columns, layout)
        except ValueError as error:
            tally.reject(str(error))
        else:
            tally.counts["photos" if photo else "videos"] += 1
            if photo:
                photos.append(photo)
    return photos


def _photo(fields: list[bytes], columns: int, layout: Layout) -> bytes | None:
    """A photo's hash, None for a video. Raises ValueError that says what is malformed."""
    if len(fields) != columns:
        raise ValueError(f"{len(fields)} columns, not {columns}")
    marker = b"0" if layout.video is None else fields[layout.video]
    if marker not in (b"0", b"1"):
        raise ValueError(f"marker {marker.decode(errors='replace')!r}, not 0 or 1")
    if marker == b"1":
        return None
    name = fields[layout.name]
    if layout.is_url:
        if not name:
            raise ValueError("no download URL")
        return hash_of(name)
    if not _HASH.fullmatch(name):
        raise ValueError(f"hash {name.decode(errors='replace')!r}, not 16 to 32 hexadecimal digits")
    return name


def _database(path: Path, tally: Tally) -> Iterator[tuple[list[bytes], float]]:
    """The table as lines of the first release, whose columns it has."""
    layout = Layout(0, True, 1)
    with contextlib.closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    ) as base:
        total = base.execute("select max(rowid) from yfcc100m_dataset").fetchone()[0] or 1
        rows = base.execute("select downloadurl, marker from yfcc100m_dataset")
        while chunk := rows.fetchmany(_CHUNK_LINES):
            lines = [f"{url or ''}\t{marker}".encode() for url, marker in chunk]
            yield _photos(lines, 2, layout, tally), tally.counts["lines"] / total
