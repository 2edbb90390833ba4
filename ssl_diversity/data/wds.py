"""The `webdataset` library over our client: its pipelines read http(s) with retries, and never a short shard."""

import io
from collections.abc import Iterator
from typing import Any

from ssl_diversity.data.remote import Client, FetchError
from ssl_diversity.data.transports import CHUNK_BYTES


def open_stream(client: Client, url: str) -> io.BufferedReader:
    """The whole object as a readable stream, which raises where it would end too early."""
    return io.BufferedReader(_Stream(url, client.chunks(url)), CHUNK_BYTES)


class _Stream(io.RawIOBase):
    """The chunks of one object as a file; it has been given on already, so it cannot begin again."""

    def __init__(self, url: str, chunks: Iterator[bytes | None]) -> None:
        self._url, self._chunks, self._rest = url, chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, b"")
            if chunk is None:
                raise FetchError(self._url, "changed", 1)
            if not chunk:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def register(client: Client) -> None:
    """Let `webdataset` open http(s) through `client`: plain pipelines get its retries, too."""
    from webdataset.gopen import gopen_schemes

    def opened(url: str, mode: str = "rb", bufsize: int = 8192) -> io.BufferedReader:
        if mode[:1] != "r":
            raise ValueError(f"{url}: can only be read")
        return open_stream(client, url)

    gopen_schemes.update(http=opened, https=opened)
