"""Bytes from afar: http(s) with retries and resume; paths, `pipe:`, s3://, gs:// through the same door."""

import contextlib
import io
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import urllib3

from ssl_diversity import files
from ssl_diversity.data.transports import (
    CHUNK_BYTES,
    Pace,
    local_path,
    read_elsewhere,
    read_path,
    scheme,
    shown,
    sleep,
)
from ssl_diversity.errors import UserError

_WRONG_ANSWERS = 3  # times that a wrong length, checksum or a changed object is asked for before giving up
_PROGRESS_BYTES = 1 << 20  # an attempt that brings these, or half of what is left, starts the count again
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_REMEDIES = {
    "404": "check the address, and that the file was not moved",
    "410": "check the address, and that the file was not moved",
    "401": "check the credentials in the address or the environment",
    "403": "check the credentials in the address or the environment",
    "length": "it is not the file that the index speaks of: it was replaced or cut; put the right one back",
    "range": "it is not the file that the index speaks of: it was replaced or cut; put the right one back",
    "changed": "it was replaced while it was read; run again once it is at rest",
    "checksum": "it was replaced or damaged; put the right one back, or make the pool anew from it",
    "missing": "check the address, and that the file was not moved",
    "denied": "check the permissions, and the credentials in the environment",
}


class FetchError(UserError):
    """A transfer given up: `url`, `cause` ("404", "timeout", "checksum", ...) and the number of `tries`."""

    def __init__(self, url: str, cause: str, tries: int, detail: str = "") -> None:
        self.url, self.cause, self.tries = url, cause, tries
        said = f"{cause} ({detail})" if detail else cause
        remedy = _REMEDIES.get(cause, "try again later")
        self.message = (
            f"{shown(url)}: {said}, given up after {tries} {'try' if tries == 1 else 'tries'}; {remedy}"
        )
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message  # webdataset appends to an exception's args

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_error, (self.url, self.cause, self.tries, self.message)


def _same_error(url: str, cause: str, tries: int, message: str) -> FetchError:
    error = FetchError(url, cause, tries)
    error.message = message
    return error


class _Failure(Exception):
    """One attempt that failed. `most` tries are worth it; `wait_s` is what the server asked for."""

    def __init__(self, cause: str, detail: str = "", *, most: int | None = None, wait_s: float = 0) -> None:
        super().__init__(cause)
        self.cause, self.detail, self.most, self.wait_s = cause, detail, most, wait_s


class _Changed(Exception):
    """The object is another one than at the last attempt: begin again from the start."""


@dataclass
class _Object:
    """What the attempts at one transfer have in common."""

    url: str
    start: int
    stop: int | None  # of the bytes wanted; None: to the end
    size: int | None  # of the whole object, as the caller expects it
    validator: str | None = None  # ETag, else date: what a Range is valid for
    total: int | None = None  # size as the server said first
    got: int = 0

    def check_total(self, total: int | None, validator: str | None) -> None:
        """Refuse an answer about another object than the one expected, or than the one begun."""
        if self.size is not None and total is not None and total != self.size:
            raise _Failure("length", f"{total} bytes instead of {self.size}", most=_WRONG_ANSWERS)
        if self.got and (validator != self.validator or total != self.total):
            raise _Changed
        self.validator, self.total = validator, total

    def check_arrived(self) -> None:
        stop = self.size if self.stop is None else self.stop
        if stop is not None and self.start + self.got != stop:
            raise _Failure("length", f"{self.got} bytes instead of {stop - self.start}", most=_WRONG_ANSWERS)


class Client:
    """Fetches bytes from a URL or path, exactly or with one clear error. Safe for threads.

    A transfer that is refused (429, 5xx), cut, silent for `timeout_s` or slower than `floor_bytes_per_s` over
    that time is tried again where it stopped, by Range and If-Range, after an exponential back-off with jitter
    or the server's Retry-After (at most `max_wait_s`); `retries` in a row without progress end it with a
    `FetchError`. Other 4xx end it at once. If the object changes meanwhile, it begins again from the start.
    `bytes_per_s` and `requests_per_s` bound the rates, `connections` the transfers at a time (None: no
    bound), `stop()` true ends any waiting with `Interrupted`. `counts` has requests, bytes and retry:CAUSE.
    """

    def __init__(
        self,
        *,
        retries: int = 8,
        timeout_s: float = 30,
        floor_bytes_per_s: float = 1 << 10,
        backoff_s: float = 0.5,
        max_wait_s: float = 60,
        connections: int | None = 16,
        bytes_per_s: float | None = None,
        requests_per_s: float | None = None,
        headers: dict[str, str] | None = None,
        stop: Callable[[], bool] = bool,
    ) -> None:
        self.retries = retries
        self.timeout_s = timeout_s
        self.floor_bytes_per_s = floor_bytes_per_s
        self.backoff_s = backoff_s
        self.max_wait_s = max_wait_s
        self.headers = {"User-Agent": "ssl-diversity", "Accept-Encoding": "identity", **(headers or {})}
        self.stop = stop
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(connections) if connections else contextlib.nullcontext()
        self._bytes_pace = Pace(bytes_per_s, stop)
        self._requests_pace = Pace(requests_per_s, stop)
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._connections = connections or 16

    def get(
        self, url: str, *, start: int = 0, stop: int | None = None, expected_bytes: int | None = None
    ) -> bytes:
        """Bytes [start, stop) of an object, to its end by default; `expected_bytes` is the size of all of it."""
        buffer = io.BytesIO()
        self.copy(url, buffer, start=start, stop=stop, expected_bytes=expected_bytes)
        return buffer.getvalue()

    def copy(
        self,
        url: str,
        file: BinaryIO,
        *,
        start: int = 0,
        stop: int | None = None,
        expected_bytes: int | None = None,
        blake2b: str | None = None,
    ) -> None:
        """Write bytes [start, stop) into an empty file open for update; `blake2b` (128 bits, hex) is theirs.

        A wrong checksum is counted, and they are fetched once more or twice, before it is an error.
        """
        for _ in range(_WRONG_ANSWERS):
            file.seek(0)
            for chunk in self.chunks(url, start=start, stop=stop, expected_bytes=expected_bytes):
                if chunk is None:
                    file.seek(0)
                else:
                    file.write(chunk)
            file.truncate()
            file.flush()
            file.seek(0)
            if blake2b is None or files.content_digest(file) == blake2b:
                return
            self.count("retry:checksum")
        raise FetchError(url, "checksum", _WRONG_ANSWERS, f"not {blake2b}")

    def download(
        self,
        url: str,
        path: Path,
        *,
        start: int = 0,
        stop: int | None = None,
        expected_bytes: int | None = None,
        blake2b: str | None = None,
    ) -> None:
        """`copy` into `path`, which appears whole or not at all; UserError where the disk is full."""
        with files.replacing(path) as temporary, temporary.open("rb+") as file:
            self.copy(url, file, start=start, stop=stop, expected_bytes=expected_bytes, blake2b=blake2b)

    def chunks(
        self, url: str, *, start: int = 0, stop: int | None = None, expected_bytes: int | None = None
    ) -> Generator[bytes | None]:
        """Bytes [start, stop) as they arrive; None: what was given so far is void, it begins again."""
        thing = _Object(url, start, stop, expected_bytes)
        read = (
            self._http
            if scheme(url) in ("http", "https")
            else partial(_other, local_path(url), self.timeout_s)
        )
        tries = changes = 0
        while True:
            before = thing.got
            try:
                with self._slots:
                    for chunk in read(thing):
                        thing.got += len(chunk)
                        yield chunk
                thing.check_arrived()
                return
            except _Changed:
                changes += 1
                self.count("retry:changed")
                if changes >= _WRONG_ANSWERS:
                    raise FetchError(url, "changed", changes) from None
                thing = _Object(url, start, stop, expected_bytes)
                yield None
            except _Failure as failure:
                end = thing.total if stop is None else stop
                enough = min(_PROGRESS_BYTES, ((end or 1 << 62) - start - before + 1) // 2)
                tries = 1 if thing.got - before >= enough and not changes else tries + 1
                most = self.retries + 1 if failure.most is None else min(failure.most, self.retries + 1)
                if tries >= most:
                    raise FetchError(url, failure.cause, tries, failure.detail) from None
                self.count(f"retry:{failure.cause}")
                if failure.cause == "length" and thing.got:
                    thing = _Object(url, start, stop, expected_bytes)
                    yield None
                backoff = self.backoff_s * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
                sleep(min(max(backoff, failure.wait_s), self.max_wait_s), self.stop)

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[what] += amount

    def retried(self) -> dict[str, int]:
        """Number of retries by cause."""
        with self._lock:
            return {k.removeprefix("retry:"): n for k, n in self.counts.items() if k.startswith("retry:")}

    def _manager(self, url: str) -> urllib3.PoolManager:
        """Connections, kept open, to the host itself or to the proxy that the environment names for it."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        local = host == "localhost" or host.startswith("127.")
        bypass = local or urllib.request.proxy_bypass(host)
        proxy = "" if bypass else urllib.request.getproxies().get(parts.scheme, "")
        with self._lock:
            if proxy not in self._managers:
                options: dict[str, Any] = {"num_pools": 32, "maxsize": self._connections}
                manager = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
                self._managers[proxy] = manager
            return self._managers[proxy]

    def _http(self, thing: _Object) -> Iterator[bytes]:
        begin = thing.start + thing.got
        headers = dict(self.headers)
        if begin or thing.stop is not None:
            headers["Range"] = f"bytes={begin}-{'' if thing.stop is None else thing.stop - 1}"
        if thing.got and thing.validator:
            headers["If-Range"] = thing.validator
        address = urlsplit(thing.url)
        if address.username is not None:
            who = f"{unquote(address.username)}:{unquote(address.password or '')}"
            headers |= urllib3.make_headers(basic_auth=who)
        self._requests_pace.wait(1)
        self.count("requests")
        try:
            response = self._manager(thing.url).request(
                "GET",
                thing.url,
                headers=headers,
                preload_content=False,
                decode_content=False,
                timeout=urllib3.Timeout(self.timeout_s),
                retries=urllib3.Retry(None, connect=0, read=0, redirect=5, status=0, other=0),
            )
        except urllib3.exceptions.HTTPError as error:
            raise _failure(error) from None
        try:
            yield from self._body(thing, response, begin)
        finally:
            response.close()  # a body read to its end has given its connection back already

    def _body(self, thing: _Object, response: Any, begin: int) -> Iterator[bytes]:
        skip, left = _check_answer(thing, response, begin)
        spent, arrived = 0.0, 0
        while left is None or left > 0:
            started = time.monotonic()
            try:
                chunk = response.read1(CHUNK_BYTES)
            except urllib3.exceptions.HTTPError as error:
                raise _failure(error) from None
            if not chunk:
                break
            spent += time.monotonic() - started
            arrived += len(chunk)
            self.count("bytes", len(chunk))
            self._bytes_pace.wait(len(chunk))
            if skip:
                skip, chunk = skip - min(skip, len(chunk)), chunk[skip:]
            chunk = chunk if left is None else chunk[:left]
            left = None if left is None else left - len(chunk)
            if chunk:
                yield chunk
            if spent > self.timeout_s:
                if arrived < self.floor_bytes_per_s * spent and left != 0:
                    raise _Failure("slow", f"{arrived / spent:.0f} bytes/s")
                spent, arrived = 0.0, 0
        if left:
            raise _Failure("cut", f"{left} bytes short")


def _check_answer(thing: _Object, response: Any, begin: int) -> tuple[int, int | None]:
    """(bytes to skip, bytes wanted then) of an answer's body; raises where it is not what was asked for."""
    status, headers = response.status, response.headers
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if status == 206:
        span, _, whole = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        if not (first.isdigit() and last.isdigit()) or int(first) != begin:
            raise _Failure("range", f"asked from byte {begin}, got {span!r}", most=_WRONG_ANSWERS)
        thing.check_total(int(whole) if whole.isdigit() else None, validator)
        return 0, int(last) + 1 - begin
    if status == 200:  # all of it: the server knows no ranges, or the object has changed
        length = headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        thing.check_total(total, validator)
        stop = total if thing.stop is None else thing.stop
        return begin, None if stop is None else stop - begin
    if status == 416:
        if thing.got:
            raise _Changed
        raise _Failure("range", f"has no byte {begin}", most=_WRONG_ANSWERS)
    asked = headers.get("Retry-After", "")
    wait_s = float(asked) if asked.isdigit() else 0.0
    raise _Failure(
        str(status), response.reason or "", most=None if status in _RETRIED_STATUS else 1, wait_s=wait_s
    )


def _failure(error: Exception) -> _Failure:
    """One of urllib3's errors by its cause."""
    reason = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
    detail = str(reason).rpartition(": ")[2]
    if isinstance(reason, urllib3.exceptions.NewConnectionError):  # urllib3 has it as a kind of time-out
        return _Failure("connection", detail)
    if isinstance(reason, urllib3.exceptions.TimeoutError):
        return _Failure("timeout")
    if isinstance(reason, urllib3.exceptions.ProtocolError | urllib3.exceptions.IncompleteRead):
        return _Failure("cut")
    if isinstance(reason, urllib3.exceptions.LocationValueError | urllib3.exceptions.LocationParseError):
        return _Failure("address", detail, most=1)
    return _Failure("connection", detail)


def _other(path: Path | None, timeout_s: float, thing: _Object) -> Iterator[bytes]:
    """One attempt at what is no http: from where it stopped."""
    begin = thing.start + thing.got
    try:
        if path is None:
            yield from read_elsewhere(thing.url, begin, thing.stop, timeout_s)
        else:
            thing.check_total(path.stat().st_size, str(path.stat().st_mtime_ns))
            yield from read_path(path, begin, thing.stop)
    except (_Failure, _Changed, UserError):
        raise
    except FileNotFoundError:
        raise _Failure("missing", most=1) from None
    except PermissionError:
        raise _Failure("denied", most=1) from None
    except TimeoutError:
        raise _Failure("timeout") from None
    except Exception as error:  # every driver of fsspec has its own
        raise _Failure("cut", str(error) or type(error).__name__) from None
