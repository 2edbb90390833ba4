"""Which images there are and where their bytes lie, in arrays: millions of files take megabytes, not gigabytes."""

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data.sources.base import Item
from ssl_diversity.data.sources.tars import Archive, changed, unreadable


@dataclass(frozen=True, eq=False)
class Listing:
    """Image i is a file of `size[i]` bytes, last written at `place[i]` (ns), or so many bytes from offset
    `place[i]` of an archive.
    """

    text: bytes  # all names, one after the other
    ends: NDArray[np.int64]  # (n,) of each name in `text`
    size: NDArray[np.int64]  # (n,)
    place: NDArray[np.int64]  # (n,)

    def __len__(self) -> int:
        return len(self.ends)

    def names(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield os.fsdecode(self.text[start:end])
            start = end

    def take(self, indices: NDArray[np.int64]) -> "Listing":
        starts = np.concatenate([[0], self.ends])[indices]
        names = [self.text[a:b] for a, b in zip(starts.tolist(), self.ends[indices].tolist(), strict=True)]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Listing(b"".join(names), ends, self.size[indices], self.place[indices])


class Lister:
    """Collects a `Listing`."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._numbers = array("q")  # end, size, place of each

    def add(self, name: str, size: int, place: int) -> None:
        self._text += os.fsencode(name)
        self._numbers.extend((len(self._text), size, place))

    def add_file(self, root: Path, name: str) -> None:
        """The file `name` below `root`; OSError where it cannot be looked at."""
        status = os.stat(os.path.join(root, name))
        self.add(name, status.st_size, status.st_mtime_ns)

    def finish(self) -> Listing:
        ends, size, place = np.array(self._numbers, dtype=np.int64).reshape(-1, 3).T
        return Listing(bytes(self._text), ends, size, place)


def list_files(root: Path, names: Iterator[str]) -> Listing:
    """The files `names` below `root`. Raises UserError for one that is not there."""
    lister = Lister()
    for name in names:
        try:
            lister.add_file(root, name)
        except OSError as error:
            raise unreadable(root / name, error) from None
    return lister.finish()


@dataclass(frozen=True, eq=False)
class FilePart:
    """Images of a folder or of an uncompressed archive. Raises UserError for one that changed since listed."""

    root: Path
    stamp: int  # the archive's modification time (ns); 0 for a folder
    listing: Listing
    labels: NDArray[np.int64]  # (n,)
    strip: int = 0  # characters that names lose in front

    def key(self) -> Any:
        listing = self.listing
        state = blake2b(listing.text, digest_size=16)
        for values in (listing.ends, listing.size, listing.place, self.labels):
            state.update(values.tobytes())
        return [str(self.root), self.stamp, self.strip, state.hexdigest()]

    def __len__(self) -> int:
        return len(self.listing)

    def __iter__(self) -> Iterator[Item]:
        read = self._read_archive() if self.stamp else self._read_files()
        for name, label, data in zip(self.listing.names(), self.labels.tolist(), read, strict=True):
            yield Item(self.name(name, label), label, data)

    def name(self, name: str, label: int) -> str:
        """What an image that is listed as `name` is called in the pool."""
        return name[self.strip :]

    def _read_files(self) -> Iterator[bytes]:
        listing = self.listing
        for name, size, stamp in zip(
            listing.names(), listing.size.tolist(), listing.place.tolist(), strict=True
        ):
            path = self.root / name
            try:
                with path.open("rb", buffering=0) as file:
                    data = file.read()
                    status = os.fstat(file.fileno())
            except OSError as error:
                raise unreadable(path, error) from None
            if (len(data), status.st_mtime_ns) != (size, stamp):
                raise changed(path)
            yield data

    def _read_archive(self) -> Iterator[bytes]:
        with Archive(self.root, self.stamp) as archive:
            for place, size in zip(self.listing.place.tolist(), self.listing.size.tolist(), strict=True):
                yield archive.read(place, size)


def file_parts(
    make: Callable[[Listing, NDArray[np.int64]], FilePart],
    listing: Listing,
    chosen: NDArray[np.int64],
    part_items: int,
) -> Iterator[FilePart]:
    """The images `chosen` (n, 2: number in `listing`, class) in parts, each made when it is asked for."""
    for i in range(0, len(chosen), part_items):
        indices, labels = chosen[i : i + part_items].T
        yield make(listing.take(indices), labels.copy())
