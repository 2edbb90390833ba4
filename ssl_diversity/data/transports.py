"""How bytes come from where no http is spoken: paths, `pipe:`, s3://, gs:// and whatever else fsspec knows."""

import importlib.util
import os
import re
import select
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from ssl_diversity.errors import Interrupted, UserError

CHUNK_BYTES = 1 << 18
_POLL_S = 0.2
_DRIVERS = {"s3": ("s3fs", "aws"), "gs": ("gcsfs", "gsutil")}  # scheme -> fsspec's driver, command-line tool
_COMMANDS = {"s3": "aws s3 cp {url} -", "gs": "gsutil cat {url}"}


def scheme(url: str) -> str:
    """`http`, `s3`, `pipe`, ...; "" for a path."""
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", url)
    name = found[1].lower() if found else ""
    return "" if name == "file" else name


def local_path(url: str) -> Path | None:
    """The path that a URL means on this machine; None: it lies elsewhere."""
    if scheme(url):
        return None
    return Path(unquote(urlsplit(url).path) if url.startswith("file:") else url).expanduser()


def has_ranges(url: str) -> bool:
    """Whether a part of an object can be had without the rest: not so through a pipe."""
    driver, _ = _DRIVERS.get(scheme(url), ("", ""))
    return scheme(url) != "pipe" and not (driver and not importlib.util.find_spec(driver))


def join(base: str, name: str) -> str:
    """The address of `name` under `base`: `pipe:` bases have `{}` where the name goes."""
    if base.startswith("pipe:"):
        return base.replace("{}", name)
    parts = urlsplit(base)
    if scheme(base) in ("http", "https"):
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    return f"{base.rstrip('/')}/{name}"


def shown(url: str) -> str:
    """A URL without the credentials in it."""
    if scheme(url) not in ("http", "https"):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def read_path(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    """Bytes [start, stop) of a file."""
    with path.open("rb") as file:
        file.seek(start)
        left = None if stop is None else stop - start
        while left is None or left > 0:
            chunk = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk


def read_elsewhere(url: str, start: int, stop: int | None, timeout_s: float) -> Iterator[bytes]:
    """Bytes [start, stop) of an object in a store, by fsspec where its driver is installed, else by its command.

    A pipe has no ranges: it is read from its beginning. Raises UserError for a scheme that nothing here can read.
    """
    kind = scheme(url)
    driver, tool = _DRIVERS.get(kind, ("", ""))
    if kind == "pipe":
        yield from _read_pipe(url, start, stop, timeout_s)
    elif driver and not importlib.util.find_spec(driver):
        if not shutil.which(tool):
            raise UserError(f"{url}: to read {kind}:// install {driver} (pip) or the command {tool}")
        command = _COMMANDS[kind].format(url=shlex.quote(url))
        yield from _read_pipe(f"pipe:{command}", start, stop, timeout_s)
    else:
        yield from _read_fsspec(url, start, stop)


def _read_pipe(url: str, start: int, stop: int | None, timeout_s: float) -> Iterator[bytes]:
    """What a command writes, by webdataset's gopen; what comes before `start` is thrown away.

    OSError where it fails, TimeoutError where it is silent for `timeout_s`.
    """
    from webdataset.gopen import gopen

    pipe = gopen(url)
    position = 0
    try:
        while stop is None or position < stop:
            if not select.select([pipe.stream], [], [], timeout_s)[0]:
                raise TimeoutError
            wanted = start if position < start else stop
            chunk = os.read(pipe.stream.fileno(), min(CHUNK_BYTES, (wanted or 1 << 62) - position))
            if not chunk:
                pipe.close()  # OSError where the command failed
                return
            position += len(chunk)
            if position > start:
                yield chunk
    finally:
        pipe.ignore_errors = True  # it is ended where no more is wanted
        pipe.proc.terminate()
        pipe.close()


def _read_fsspec(url: str, start: int, stop: int | None) -> Iterator[bytes]:
    import fsspec  # type: ignore[import-untyped]

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: cannot be read ({error})") from None
    with filesystem.open(path, "rb", block_size=1 << 22) as file:
        file.seek(start)
        position = start
        while stop is None or position < stop:
            chunk = file.read(CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - position))
            if not chunk:
                return
            position += len(chunk)
            yield chunk


class Pace:
    """At most `per_s` units a second on average, whoever asks; None: no bound. Safe for threads."""

    def __init__(self, per_s: float | None, stop: Callable[[], bool]) -> None:
        self.per_s, self.stop = per_s, stop
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, amount: float) -> None:
        if self.per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._free_at)
            self._free_at = at + amount / self.per_s
        sleep(at - now, self.stop)


def sleep(seconds: float, stop: Callable[[], bool]) -> None:
    """Sleep, but wake with Interrupted soon after `stop()` turns true."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stop():
            raise Interrupted("stopped while waiting for a server")
        time.sleep(min(left, _POLL_S))
