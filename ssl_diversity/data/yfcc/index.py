"""The photos of YFCC100M in random order: one file, made once, whose first n entries are the selection of n.

The order is ascending keyed_hash(draw, photo hash), so a selection is uniformly random, depends on the draw and on the
photos alone (not on the order or number of the files that list them), and holds every smaller one. An external sort
makes it: sorted runs in bounded memory, kept when their file is read, and a merge by ranges of the key.
"""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data.table import as_bytes
from ssl_diversity.data.writer import locked, reporting_full_disk
from ssl_diversity.data.yfcc.metadata import Tally, read
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime, cores

_FORMAT = 1  # of the index; part of its folder's name
_PHOTOS = "photos.bin"
_DTYPE = np.dtype("S32")  # a photo's hash
_KEY = np.dtype("<u8")
_RUN_PHOTOS = 1 << 18  # sorted in memory at once, by each of the threads: about 60 MB
_BANDS = 256  # ranges of the key that are merged one after the other


@dataclass(frozen=True)
class Index:
    folder: Path
    digest: str  # of the photos and their order
    counts: dict[str, int]  # lines = photos + videos + malformed; `repeated`: photos listed before
    malformed: dict[str, list[str]]  # by metadata file: where and why, of the first ones

    @classmethod
    def load(cls, folder: Path) -> "Index":
        return cls(folder, **files.read_json(folder / "index.json"))

    def __len__(self) -> int:
        """Photos, each counted once."""
        return (self.folder / _PHOTOS).stat().st_size // _DTYPE.itemsize

    def read(self, start: int, stop: int) -> list[bytes]:
        """The hashes of photos `start`, ... of the random order."""
        found: list[bytes] = _read(self.folder / _PHOTOS, _DTYPE, start, stop).tolist()
        return found

    @property
    def downloads(self) -> Path:
        """Where photos lie that were fetched without saying where to."""
        return self.folder / "downloads"

    def selected(self, n: int | None) -> int:
        """The size of the selection of `n` photos; None: all. Raises UserError for more than there are."""
        if n is not None and n > len(self):
            raise UserError(f"n={n:,}: the metadata lists {len(self):,} photos; ask for that many or fewer")
        return len(self) if n is None else n


def metadata_files(names: Sequence[str]) -> list[Path]:
    """The files that `names` mean: paths, patterns, or folders of yfcc100m_dataset*. UserError where there is none."""
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser().absolute()
        paths = (
            sorted(path.glob("yfcc100m_dataset*")) if path.is_dir() else sorted(map(Path, glob(str(path))))
        )
        if not paths:
            raise UserError(
                f"metadata={path}: {'no yfcc100m_dataset* in this folder' if path.is_dir() else 'no such file'};"
                " see docs/data.md for where to get it"
            )
        found += paths
    return found


def open_index(paths: Sequence[Path], draw: int, runtime: Runtime = Runtime()) -> Index:  # noqa: B008
    """The index of the photos that metadata files list; made now if it is not there.

    It lies in `home()/cache/yfcc100m/`, 32 bytes a photo. As many files are read at once as there are cores.
    Killed and called again, it reads only the files that were not finished. `runtime.progress` counts photos.
    Raises UserError for files that are no such metadata.
    """
    stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    folder = files.home() / "cache" / "yfcc100m" / files.digest([_FORMAT, stamps, draw])
    with reporting_full_disk(folder), locked(folder, runtime):
        if not (folder / "index.json").exists():
            work = folder / "work"
            work.mkdir(parents=True, exist_ok=True)
            reading = _Reading(work, draw, runtime, list(paths))
            with ThreadPoolExecutor(min(len(paths), cores())) as threads:  # bz2 holds no lock
                tallies = list(threads.map(reading.sort_file, range(len(paths))))
            digest = _merge(sorted(work.glob("*.keys")), folder / _PHOTOS, runtime)
            counts = sum((Counter(tally["counts"]) for tally in tallies), Counter())
            counts["repeated"] = counts["photos"] - (folder / _PHOTOS).stat().st_size // _DTYPE.itemsize
            malformed = {str(p): tally["malformed"] for p, tally in zip(paths, tallies, strict=True)}
            files.write_json(
                folder / "index.json", {"digest": digest, "counts": counts, "malformed": malformed}
            )
        shutil.rmtree(folder / "work", ignore_errors=True)  # of now, or of a run that was killed doing so
        return Index.load(folder)


class _Reading:
    """Reads metadata files into sorted runs, several at once, and tells how far all of them are."""

    def __init__(self, work: Path, draw: int, runtime: Runtime, paths: list[Path]) -> None:
        self.work, self.draw, self.runtime, self.paths = work, draw, runtime, paths
        self.lock = threading.Lock()
        self.failed = False  # one file is wrong: the others need not be read
        self.sizes = [path.stat().st_size for path in paths]
        self.shares = [0.0] * len(paths)  # of each file, read so far
        self.photos = 0

    def sort_file(self, number: int) -> dict[str, Any]:
        """The tally of a file; its photos are in runs then."""
        summary = self.work / f"{number:03d}.json"
        if not summary.exists():
            try:
                tally = self._sort_file(number)
            except BaseException:
                self.failed = True
                raise
            files.write_json(summary, {"counts": tally.counts, "malformed": tally.malformed})
        found: dict[str, Any] = files.read_json(summary)
        return found

    def _sort_file(self, number: int) -> Tally:
        tally, run, photos = Tally(), 0, list[bytes]()
        for found, share in read(self.paths[number], tally):
            self._tell(number, share, len(found))
            photos += found
            if len(photos) >= _RUN_PHOTOS:
                self._write_run(f"{number:03d}-{run:05d}", photos)
                run, photos = run + 1, []
        self._write_run(f"{number:03d}-{run:05d}", photos)
        return tally

    def _write_run(self, name: str, photos: list[bytes]) -> None:
        key = self.draw.to_bytes(8, "little")
        digests = b"".join(blake2b(photo, digest_size=8, key=key).digest() for photo in photos)
        keys = np.frombuffer(digests, ">u8").astype(_KEY)
        order = np.argsort(keys)
        (self.work / f"{name}.photos").write_bytes(as_bytes(np.array(photos, _DTYPE)[order], _DTYPE))
        (self.work / f"{name}.keys").write_bytes(as_bytes(keys[order], _KEY))

    def _tell(self, number: int, share: float, photos: int) -> None:
        with self.lock:
            self.shares[number] = share
            if self.runtime.stop() or self.failed:
                raise Interrupted("stopped while reading the metadata; files that were read are kept")
            self.photos += photos
            read_bytes = sum(x * size for x, size in zip(self.shares, self.sizes, strict=True))
            total = (
                self.photos * sum(self.sizes) / max(1.0, read_bytes)
            )  # if photos are as frequent in the rest
            self.runtime.note("reading the metadata")
            self.runtime.progress(self.photos, round(total))


def _merge(runs: Sequence[Path], target: Path, runtime: Runtime) -> str:
    """Write the photos of all runs in ascending key, each once; their digest."""
    state = blake2b(digest_size=16)
    with files.replacing(target) as temporary, temporary.open("wb") as file:
        for band in _bands(runs):
            if runtime.stop():
                raise Interrupted("stopped while sorting the photos; files that were read are kept")
            file.write(band.tobytes())
            state.update(band.tobytes())
    return state.hexdigest()


def _bands(runs: Sequence[Path]) -> Iterator[NDArray[np.bytes_]]:
    """The photos of each range of the key: sorted by (key, hash), equal ones once."""
    limits = np.arange(1, _BANDS, dtype=_KEY) * np.uint64(2**64 // _BANDS)
    edges = []
    for run in runs:
        keys = np.fromfile(run, _KEY)
        edges.append([0, *np.searchsorted(keys, limits).tolist(), len(keys)])
    for band in range(_BANDS):
        cuts = [(run, edge[band], edge[band + 1]) for run, edge in zip(runs, edges, strict=True)]
        keys = np.concatenate([_read(run, _KEY, *cut) for run, *cut in cuts])
        photos = np.concatenate([_read(run.with_suffix(".photos"), _DTYPE, *cut) for run, *cut in cuts])
        photos = photos[np.lexsort((photos, keys))]
        yield photos[np.concatenate([[True], photos[1:] != photos[:-1]])] if len(photos) else photos


def _read(path: Path, dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
    """Not a memory map: its pages would count as memory of this process."""
    return np.fromfile(path, dtype, stop - start, offset=start * dtype.itemsize)
