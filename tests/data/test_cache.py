"""The cache of shards: each block fetched once for all, bounded, whole or not there."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_server import Fault, FaultServer, wait_until

from ssl_diversity.data.cache import Key, Origin, ShardCache
from ssl_diversity.data.remote import Client, FetchError
from ssl_diversity.data.writer import file_digest
from ssl_diversity.errors import UserError

SIZE, BLOCK = 100_000, 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "0.tar").write_bytes(np.random.default_rng(0).bytes(SIZE))
    return folder


def client() -> Client:
    return Client(backoff_s=0.01, timeout_s=30, retries=2)


def key(number: int) -> Key:
    return Key("pool", 0, number * BLOCK, (number + 1) * BLOCK)


def origin(folder: Path, server: FaultServer) -> Origin:
    return Origin(f"{server.url}/0.tar", SIZE, file_digest(folder / "0.tar"))


def content(cache: ShardCache, which: Key, where: Origin) -> bytes:
    block = cache.block(which, where)
    assert block is not None
    return block.read(0, which.stop - which.start)


def test_many_caches_and_threads_fetch_each_block_once(folder: Path, tmp_path: Path) -> None:
    data = (folder / "0.tar").read_bytes()
    wrong = []

    def read(cache: ShardCache, seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 10, 50).tolist():
            if content(cache, key(number), where) != data[number * BLOCK : (number + 1) * BLOCK]:
                wrong.append(number)

    with FaultServer(folder, rates={Fault("cut", after=3000): 0.2}) as server:
        where = origin(folder, server)
        caches = [ShardCache(tmp_path / "cache", SIZE, client()) for _ in range(3)]
        threads = [threading.Thread(target=read, args=(caches[i % 3], i)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert server.total("bytes") == SIZE
        assert sum(cache.counts["fetches"] for cache in caches) == 10
        assert caches[0].used_bytes() == SIZE


def test_what_was_used_longest_ago_goes_first_and_the_bound_holds(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder) as server:
        where = origin(folder, server)
        cache = ShardCache(tmp_path / "cache", 4 * BLOCK, client())
        for number in range(4):
            content(cache, key(number), where)
            age = (10 - number) * 10**9
            path = tmp_path / "cache" / key(number).name
            os.utime(path, ns=(path.stat().st_mtime_ns - age,) * 2)
        ShardCache(tmp_path / "cache", 4 * BLOCK, client()).block(key(0), where)  # used again
        first = cache.block(key(1), where)
        assert first is not None
        os.utime(tmp_path / "cache" / key(1).name, ns=(0, 0))
        content(cache, key(5), where)
        assert cache.used_bytes() <= 4 * BLOCK
        kept = {number for number in range(10) if (tmp_path / "cache" / key(number).name).exists()}
        assert kept >= {0, 5}
        assert 1 not in kept
        assert first.read(0, 5) == (folder / "0.tar").read_bytes()[BLOCK : BLOCK + 5]  # who has it keeps it
        for number in range(10):
            content(cache, key(number), where)
            assert cache.used_bytes() <= 4 * BLOCK


def test_a_failure_leaves_nothing_and_takes_no_room(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder) as server:
        where = origin(folder, server)
        cache = ShardCache(tmp_path / "cache", 3 * BLOCK, client())
        content(cache, key(0), where)
        content(cache, key(1), where)
        for _ in range(5):
            server.inject("0.tar", Fault("404"))
            with pytest.raises(FetchError, match=r"0\.tar: 404"):
                cache.block(key(2), where)
        assert cache.used_bytes() == 2 * BLOCK
        assert content(cache, key(2), where)
        assert cache.counts["evicted"] == 0


def test_a_whole_shard_is_checked_as_it_comes(folder: Path, tmp_path: Path) -> None:
    whole = Key("pool", 0, 0, SIZE)
    with FaultServer(folder, faults={"0.tar": [Fault("flip", after=500)]}) as server:
        where = origin(folder, server)
        cache = ShardCache(tmp_path / "cache", SIZE, client())
        assert content(cache, whole, where) == (folder / "0.tar").read_bytes()
        assert cache.client.retried() == {"checksum": 1}
        cache.forget(whole)
        with pytest.raises(FetchError, match=r"0\.tar: checksum.*replaced or damaged"):
            cache.block(whole, where._replace(blake2b="0" * 32))


def test_a_block_of_another_size_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder) as server:
        where = origin(folder, server)
        content(ShardCache(tmp_path / "cache", SIZE, client()), key(3), where)
        os.truncate(tmp_path / "cache" / key(3).name, 100)
        again = ShardCache(tmp_path / "cache", SIZE, client())
        assert content(again, key(3), where) == (folder / "0.tar").read_bytes()[3 * BLOCK : 4 * BLOCK]
        assert again.counts["damaged"] == 1


def test_what_a_killed_process_left_is_cleared_but_not_what_is_on_its_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer(folder) as server:
        where = origin(folder, server)
        cache = ShardCache(tmp_path / "cache", SIZE, client())
        copy, arrives = cache.client.copy, threading.Event()
        monkeypatch.setattr(cache.client, "copy", lambda *a, **k: arrives.wait(600) and copy(*a, **k))
        path = tmp_path / "cache" / key(1).name
        left = path.with_name(f".{path.name}.tmp")
        left.parent.mkdir()
        left.write_bytes(bytes(5000))
        fetching = threading.Thread(target=cache.block, args=(key(0), where))
        fetching.start()
        on_its_way = left.with_name(f".{Path(key(0).name).name}.tmp")
        wait_until(on_its_way.exists)
        ShardCache(tmp_path / "cache", SIZE, client())
        assert on_its_way.exists()
        assert not left.exists()
        assert cache.block(key(0), where, wait=False) is None
        arrives.set()
        fetching.join()
        assert content(cache, key(0), where) == (folder / "0.tar").read_bytes()[:BLOCK]


def test_a_full_disk_is_one_clear_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with FaultServer(folder) as server:
        cache = ShardCache(tmp_path / "cache", SIZE, client())
        monkeypatch.setattr(cache.client, "copy", full)
        with pytest.raises(UserError, match=r"disk full in the shard cache .*lower `cache_gb`"):
            cache.block(key(0), origin(folder, server))
        assert cache.used_bytes() == 0
