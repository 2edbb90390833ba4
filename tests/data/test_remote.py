"""Bytes from afar arrive exactly, or one error says why not."""

import base64
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from fault_server import Fault, FaultServer

from ssl_diversity.data.remote import Client, FetchError
from ssl_diversity.data.transports import join, shown
from ssl_diversity.errors import Interrupted, UserError

SIZE = 300_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(np.random.default_rng(0).bytes(SIZE))
    return folder


def client(**options: object) -> Client:
    return Client(**{"backoff_s": 0.01, "timeout_s": 30, "retries": 3, "max_wait_s": 0.1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault("500"), "500"),
        (Fault("503"), "503"),
        (Fault("429", retry_after="1"), "429"),
        (Fault("cut", after=100_000), "cut"),
        (Fault("cut"), "cut"),
        (Fault("stall", after=70_000, seconds=30), "timeout"),
        (Fault("length"), "length"),
    ],
)
def test_what_helps_is_tried_again_and_counted(folder: Path, fault: Fault, cause: str) -> None:
    data = (folder / "a.tar").read_bytes()
    with FaultServer(folder, faults={"a.tar": [fault]}) as server:
        fetching = client(timeout_s=5 if fault.kind == "stall" else 30)
        assert fetching.get(f"{server.url}/a.tar", expected_bytes=SIZE) == data
        assert fetching.retried() == {cause: 1}


def test_a_cut_transfer_goes_on_where_it_stopped(folder: Path) -> None:
    with FaultServer(folder, faults={"a.tar": [Fault("cut", after=200_000)]}) as server:
        client().get(f"{server.url}/a.tar")
        wanted = {(0, 200_000), (200_000, SIZE)}
        assert set(server.served["a.tar"]) == wanted


def test_a_range_is_just_that_range_with_and_without_the_servers_help(folder: Path) -> None:
    data = (folder / "a.tar").read_bytes()
    for ranges in (True, False):
        with FaultServer(folder, ranges=ranges, faults={"a.tar": [Fault("cut", after=50_000)]}) as server:
            got = client().get(f"{server.url}/a.tar", start=1000, stop=290_000, expected_bytes=SIZE)
            assert got == data[1000:290_000]


@pytest.mark.parametrize("status", ["404", "403", "410"])
def test_what_does_not_help_is_an_error_at_once(folder: Path, status: str) -> None:
    with FaultServer(folder, faults={"a.tar": [Fault(status)] * 9}) as server:
        with pytest.raises(FetchError, match=f"{status}.*given up after 1 try"):
            client().get(f"{server.url}/a.tar")
        assert server.counts["a.tar", "requests"] == 1


def test_it_gives_up_after_its_retries_and_says_so(folder: Path) -> None:
    with (
        FaultServer(folder, faults={"a.tar": [Fault("500")] * 9}) as server,
        pytest.raises(UserError, match=r"a\.tar: 500.*given up after 4 tries"),
    ):
        client().get(f"{server.url}/a.tar")


def test_an_object_replaced_in_the_middle_is_read_anew(folder: Path) -> None:
    new = b"x" * SIZE
    with FaultServer(folder, faults={"a.tar": [Fault("cut", after=100_000)]}) as server:
        fetching = client()
        chunks = fetching.chunks(f"{server.url}/a.tar")
        first = next(chunks)
        assert first
        (folder / "a.tar").write_bytes(new)
        os.utime(folder / "a.tar", ns=(0, 1))  # times of change may be as coarse as 10 ms
        parts: list[bytes] = [first]
        for chunk in chunks:
            parts = [] if chunk is None else [*parts, chunk]
        assert b"".join(parts) == new
        assert fetching.retried()["changed"] == 1


def test_a_wrong_size_or_checksum_is_never_taken(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder) as server:
        url = f"{server.url}/a.tar"
        with pytest.raises(FetchError, match=f"{SIZE} bytes instead of 5"):
            client().get(url, expected_bytes=5)
        target = tmp_path / "copy.tar"
        with pytest.raises(FetchError, match="checksum"):
            client().download(url, target, blake2b="0" * 32)
        assert {path.name for path in tmp_path.iterdir()} == {"home", "served"}


def test_a_flipped_bit_is_fetched_once_more(folder: Path, tmp_path: Path) -> None:
    from ssl_diversity.data.writer import file_digest

    digest = file_digest(folder / "a.tar")
    with FaultServer(folder, faults={"a.tar": [Fault("flip", after=777)]}) as server:
        fetching = client()
        fetching.download(f"{server.url}/a.tar", tmp_path / "copy.tar", blake2b=digest)
        assert fetching.retried() == {"checksum": 1}
    assert file_digest(tmp_path / "copy.tar") == digest


def test_a_server_that_is_not_there(folder: Path) -> None:
    with FaultServer(folder) as server:
        url = f"{server.url}/a.tar"
    with pytest.raises(FetchError, match="connection"):
        client(retries=1).get(url)


def test_waiting_ends_when_asked_to_stop(folder: Path) -> None:
    stop = threading.Event()
    with FaultServer(folder, faults={"a.tar": [Fault("429", retry_after="50")] * 3}) as server:
        waiting = client(stop=stop.is_set, max_wait_s=60)
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Interrupted):
            waiting.get(f"{server.url}/a.tar")


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "pipe:cat {path}", "local://{path}"])
def test_other_schemes_give_the_same_bytes(folder: Path, form: str) -> None:
    url = form.format(path=folder / "a.tar")
    data = (folder / "a.tar").read_bytes()
    assert client().get(url) == data
    assert client().get(url, start=70_000, stop=80_000) == data[70_000:80_000]


def test_a_store_without_its_driver_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install s3fs"):
        client().get("s3://bucket/a.tar")


def test_credentials_of_an_address_are_sent() -> None:
    asked: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        place = f"127.0.0.1:{server.server_address[1]}/a"
        try:
            assert client().get(f"http://me:se%40cret@{place}") == b"ok"
            assert client().get(f"http://{place}") == b"ok"
        finally:
            server.shutdown()
    assert asked == ["Basic " + base64.b64encode(b"me:se@cret").decode(), None]


def test_addresses() -> None:
    assert join("http://h/pool?sig=1", "shards/0.tar") == "http://h/pool/shards/0.tar?sig=1"
    assert join("pipe:ssh h cat /p/{}", "a") == "pipe:ssh h cat /p/a"
    assert join("s3://b/p/", "a") == "s3://b/p/a"
    assert shown("https://me:secret@h/a?token=1") == "https://h/a"
