"""A selection's photos over HTTP into tars of 1,000, each of which appears whole; a second call fetches what is missing.

A folder of them holds `blocks/000000.tar` (the first 1,000 of the random order, as `<hash>.jpg`), `000000.json` (how
many were asked for; which failed, and why), `selection.json` and `report.json`. A larger n adds blocks.
"""

import io
import itertools
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.data.remote import Client, FetchError
from ssl_diversity.data.sources.tars import Archive, members
from ssl_diversity.data.writer import locked, reporting_full_disk
from ssl_diversity.data.yfcc.index import Index
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com"  # of the Multimedia Commons, public
BLOCK = 1000  # photos of a tar
_BLOCKS_AT_ONCE = 4  # so that the connections have work while the last photos of a block are waited for
_LOCKS = 4093  # files for the locks of all blocks; a prime, so that those of a `share` have different ones
_HOPELESS = 200  # failures without one success, after which it is the address that is wrong
_IMAGE_HEADS = (b"\xff\xd8", b"\x89PNG", b"GIF8")
LATE = "not fetched yet"


def photo_path(name: str) -> str:
    """Where the public bucket has the photo of that hash."""
    return f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"


@dataclass(frozen=True)
class Report:
    """asked = got + all that are missing, by cause."""

    asked: int
    got: int
    missing: dict[str, int]

    def __str__(self) -> str:
        causes = "".join(f", {count:,} {cause}" for cause, count in sorted(self.missing.items()))
        return f"{self.got:,} of {self.asked:,} photos{causes}"


class Folder:
    """What is downloaded of a selection. Raises UserError for a folder that holds another selection's photos."""

    def __init__(self, path: Path, index: Index, n: int | None) -> None:
        self.path = path
        self.index, self.photos = index, index.selected(n)
        identity = {"index": index.digest, "block": BLOCK}
        if not self.is_one(path):
            files.write_json(path / "selection.json", identity)
        elif files.read_json(path / "selection.json") != identity:
            raise UserError(
                f"{path}: holds photos of another selection (other metadata or another draw); give another folder"
            )

    @staticmethod
    def is_one(path: Path) -> bool:
        return (path / "selection.json").exists()

    @property
    def blocks(self) -> int:
        return -(-self.photos // BLOCK)

    def names(self, block: int) -> list[str]:
        """The photos of a block that are wanted."""
        stop = min((block + 1) * BLOCK, self.photos)
        return [photo.decode() for photo in self.index.read(block * BLOCK, stop)]

    def tar(self, block: int) -> Path:
        return self.path / "blocks" / f"{block:06d}.tar"

    def missing(self, block: int) -> dict[str, str]:
        """The wanted photos of a block that are not there, and why."""
        asked, failed = self._record(block)
        names = self.names(block)
        return {n: failed[n] for n in names if n in failed} | dict.fromkeys(names[asked:], LATE)

    def record(self, block: int, tried: dict[str, str], failed: dict[str, str]) -> None:
        """Note that photos were tried, and which of them failed."""
        asked, before = self._record(block)
        kept = {name: cause for name, cause in before.items() if name not in tried}
        value = {"asked": max(asked, len(self.names(block))), "failed": kept | failed}
        files.write_json(self.tar(block).with_suffix(".json"), value)

    def _record(self, block: int) -> tuple[int, dict[str, str]]:
        """How many of a block were tried, and which of them failed."""
        path = self.tar(block).with_suffix(".json")
        known: dict[str, Any] = files.read_json(path) if path.exists() else {"asked": 0, "failed": {}}
        return known["asked"], known["failed"]

    def report(self) -> Report:
        missing = Counter(cause for block in range(self.blocks) for cause in self.missing(block).values())
        return Report(self.photos, self.photos - missing.total(), dict(missing))


def download(
    folder: Folder,
    base_url: str = BUCKET,
    *,
    connections: int = 64,
    requests_per_s: float | None = None,
    timeout_s: float = 30.0,
    retries: int = 8,
    share: tuple[int, int] = (0, 1),
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Report:
    """Fetch what `folder` lacks, with what failed before; report what is there then.

    A photo that cannot be had after `retries` (data/remote.py) is recorded with its cause and leaves the others alone.
    `share` (i, k) is every k-th block from i on, for k machines with one file system. Raises UserError if not one
    of the first 200 can be had; Interrupted on `runtime.stop()`: finished blocks are kept.
    """
    numbers = range(share[0], folder.blocks, share[1])
    base_url = base_url.rstrip("/")
    _reach(base_url, next((name for block in numbers for name in folder.missing(block)), None))
    client = Client(
        retries=retries,
        timeout_s=timeout_s,
        connections=connections,
        requests_per_s=requests_per_s,
        stop=lambda: runtime.stop() or fetcher.stopped,
    )
    with (
        reporting_full_disk(folder.path),
        ThreadPoolExecutor(connections) as threads,
        ThreadPoolExecutor(_BLOCKS_AT_ONCE) as blocks,
    ):
        fetcher = _Fetcher(folder, base_url, client, threads, runtime)
        try:
            for _ in blocks.map(fetcher.fetch, numbers):
                pass
        except BaseException:
            fetcher.stopped = True
            blocks.shutdown(wait=False, cancel_futures=True)
            raise
    report = folder.report()
    files.write_json(folder.path / "report.json", {**asdict(report), "client": dict(client.counts)})
    return report


def _reach(base_url: str, name: str | None) -> None:
    """Raise UserError at once, not after minutes of patience, where there is no way to the server."""
    try:
        if name:
            Client(retries=2, timeout_s=10).get(f"{base_url}/{photo_path(name)}", start=0, stop=1)
    except FetchError as error:
        if error.cause in ("connection", "address"):
            raise UserError(f"{error}; on a machine without network, give images=FOLDER") from None


@dataclass
class _Fetcher:
    folder: Folder
    base_url: str
    client: Client
    threads: ThreadPoolExecutor
    runtime: Runtime
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False
    done: int = 0  # photos that are there or were tried
    got: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by cause

    def fetch(self, block: int) -> None:
        """Fetch what a block lacks, unless another process is about it. Its tar is written anew, then its record."""
        with locked(self.folder.path / "blocks" / f"{block % _LOCKS:04d}", self.runtime):
            self._fetch(block)

    def _fetch(self, block: int) -> None:
        lacks = self.folder.missing(block)
        self._count(len(self.folder.names(block)) - len(lacks))
        if not lacks:
            return
        failed: dict[str, str] = {}
        new = self._photos(list(lacks), failed)
        first = next(new, None)
        if first is not None:
            path, written = self.folder.tar(block), set[str]()
            with files.replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
                for name, data in itertools.chain(_photos(path), [first], new):
                    if name in written:
                        continue  # a kill came between a tar and its record
                    written.add(name)
                    member = tarfile.TarInfo(f"{name}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        self.folder.record(block, lacks, failed)

    def _photos(self, names: list[str], failed: dict[str, str]) -> Iterator[tuple[str, bytes]]:
        """Photos as they come; `failed` is told of the others."""
        futures = {self.threads.submit(self._get, name): name for name in names}
        for future in as_completed(list(futures)):
            name = futures.pop(future)  # and with it the photo's bytes, once they are written
            data, cause = future.result()
            if cause:
                failed[name] = cause
            else:
                yield name, data
            self._count(1, cause)

    def _get(self, name: str) -> tuple[bytes, str]:
        """A photo's bytes, or the cause of failure."""
        if self.stopped or self.runtime.stop():
            raise Interrupted("stopped while downloading; finished blocks are kept")
        url = f"{self.base_url}/{photo_path(name)}"
        try:
            data = self.client.get(url)
        except FetchError as error:
            if not self.got and self.failed.total() >= _HOPELESS:
                raise UserError(
                    f"not one of the first {_HOPELESS} photos could be had; the last: {error}"
                ) from None
            return b"", f"HTTP {error.cause}" if error.cause.isdigit() else error.cause
        return data, "" if data.startswith(_IMAGE_HEADS) else "not an image"

    def _count(self, photos: int, cause: str = "") -> None:
        with self.lock:
            self.done += photos
            self.got += photos if not cause else 0
            self.failed.update([cause] if cause else [])
            self.runtime.progress(self.done, self.folder.photos)
            self.runtime.note(", ".join(f"{count:,} {cause}" for cause, count in sorted(self.failed.items())))


def _photos(path: Path) -> Iterator[tuple[str, bytes]]:
    """What a block's tar holds; nothing if there is none."""
    if path.exists():
        with Archive(path) as archive:
            for member in members(path):
                yield member.name.removesuffix(".jpg"), archive.read(member.offset, member.size)
