"""A real HTTP server over a folder, on loopback, that fails in the ways servers fail.

    with FaultServer(folder, faults={"shards/000001.tar": [Fault("500"), Fault("cut", after=1000)]}) as server:
        Client().download(server.url + "/shards/000001.tar", path)

Faults of a path are used up in order, one a request. `rates` gives each request a fault at random (seeded), so that
a whole epoch meets all kinds. Ranges, If-Range and ETags are served as RFC 9110 has them.
"""

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """`kind`: a status ("404", "429", "500", ...), "cut" (the connection, after `after` bytes), "slow" (`after` bytes
    in small pieces with pauses), "stall" (silence of `seconds` after `after` bytes), "length" (a Content-Length of ten
    bytes too few, and as many bytes), "long" (one of ten bytes too many), "flip" (one wrong bit at byte `after`).
    """

    kind: str
    after: int = 0
    seconds: float = 0.0
    retry_after: str = ""


class FaultServer:
    """Serves `folder` at `url` until the end of the `with`; `counts` by (path, "requests" | "bytes" | kind of fault)."""

    def __init__(
        self,
        folder: Path,
        *,
        faults: Mapping[str, Iterable[Fault]] | None = None,
        rates: Mapping[Fault, float] | None = None,
        seed: int = 0,
        ranges: bool = True,
    ) -> None:
        self.folder = folder
        self.ranges = ranges
        self.rates = dict(rates or {})
        self.served: dict[str, list[tuple[int, int]]] = defaultdict(list)  # byte ranges sent, by path
        self.counts: Counter[tuple[str, str]] = Counter()
        self._faults = {path: list(which) for path, which in (faults or {}).items()}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.ending = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "FaultServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def inject(self, path: str, *faults: Fault) -> None:
        with self._lock:
            self._faults.setdefault(path, []).extend(faults)

    def next_fault(self, path: str) -> Fault | None:
        with self._lock:
            if self._faults.get(path):
                return self._faults[path].pop(0)
            draw = self._random.random()
            for fault, rate in self.rates.items():
                if draw < rate:
                    return fault
                draw -= rate
            return None

    def count(self, path: str, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[path, what] += amount

    def answer(self, path: str, first: int) -> int:
        """The number, among the answers to `path`, of one that begins at byte `first`."""
        with self._lock:
            self.served[path].append((first, first))
            return len(self.served[path]) - 1

    def send(self, path: str, answer: int, amount: int) -> None:
        """Called before they are written: what a client has read is counted, whenever it looks."""
        with self._lock:
            first, last = self.served[path][answer]
            self.served[path][answer] = first, last + amount
            self.counts[path, "bytes"] += amount

    def total(self, what: str) -> int:
        """Over all paths."""
        with self._lock:
            return sum(number for (_, name), number in self.counts.items() if name == what)


class _Server(ThreadingHTTPServer):
    """Its threads end with it: connections that clients keep open are shut."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.owner
        name = unquote(urlsplit(self.path).path).lstrip("/")
        owner.count(name, "requests")
        fault = owner.next_fault(name)
        if fault is not None:
            owner.count(name, fault.kind)
        if fault is not None and fault.kind.isdigit():
            self._refuse(int(fault.kind), fault.retry_after)
            return
        path = owner.folder / name
        if ".." in Path(name).parts or not path.is_file():
            self._refuse(404)
            return
        with path.open("rb") as file:
            self._send(name, file, fault)

    def _refuse(self, status: int, retry_after: str = "") -> None:
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, name: str, file: Any, fault: Fault | None) -> None:
        status = os.fstat(file.fileno())
        size, etag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.owner.ranges and self.headers.get("If-Range", etag) == etag:
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            if first >= size:
                self._refuse(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            first, last = 0, size - 1
            self.send_response(200)
        length = last + 1 - first
        promised = length
        if fault is not None and fault.kind in ("length", "long"):
            promised += 10 if fault.kind == "long" else -10
            length = min(length, promised)
            self.close_connection = True
        self.send_header("Content-Length", str(promised))
        self.send_header("ETag", etag)
        self.end_headers()
        file.seek(first)
        self._body(name, file, length, fault, self.owner.answer(name, first))

    def _body(self, name: str, file: Any, length: int, fault: Fault | None, answer: int) -> None:
        kind, after = (fault.kind, fault.after) if fault is not None else ("", 0)
        sent = 0
        try:
            while sent < length:
                piece = CHUNK
                if kind == "slow" and sent < after:
                    piece = 1 << 10
                    self.owner.ending.wait(0.02)
                if kind in ("cut", "stall", "flip") and sent <= after:
                    piece = min(CHUNK, max(1, after - sent + (kind == "flip")))
                if kind == "cut" and sent >= min(after, length - 1):
                    self.close_connection = True
                    return
                if kind == "stall" and sent >= min(after, length - 1):
                    self.owner.ending.wait(fault.seconds if fault is not None else 0)
                    self.close_connection = True
                    return
                data = file.read(min(piece, length - sent))
                if not data:  # the file was cut meanwhile
                    self.close_connection = True
                    return
                if kind == "flip" and sent + len(data) == after + 1:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self.owner.send(name, answer, len(data))
                self.wfile.write(data)
                sent += len(data)
        except OSError:
            self.close_connection = True


def wait_until(condition: Any, seconds: float = 600.0) -> None:
    """Until `condition()`, or an AssertionError."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
