"""A pool that lies elsewhere: its index comes here once, checked; its shards stay there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_server import Fault, FaultServer

from ssl_diversity import files
from ssl_diversity.data.attach import attach
from ssl_diversity.data.pool import Pool, find
from ssl_diversity.data.remote import Client
from ssl_diversity.data.verify import verify
from ssl_diversity.data.writer import write_pool
from ssl_diversity.errors import UserError

ROWS = 30


def make(path: Path, seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(0, 256, (8, 8, 3), np.uint8), i % 3, None) for i in range(ROWS)]
    info = {"name": "far", "source": "test", "image_size": 8, "classes": ["a", "b", "c"], "real_images": ROWS}
    return write_pool(path, info, rows, shard_bytes=20_000)


@pytest.fixture
def far(tmp_path: Path) -> Pool:
    return make(tmp_path / "far")


def client() -> Client:
    return Client(backoff_s=0.01, timeout_s=30, retries=2)


def edit(pool: Pool, change: Callable[[dict[str, Any]], object]) -> None:
    values = files.read_json(pool.path / "pool.json")
    change(values)
    (pool.path / "pool.json").write_text(json.dumps(values))


def test_an_attached_pool_is_the_pool(far: Pool) -> None:
    faults = {"pool.json": [Fault("500")], "index/crc.npy": [Fault("cut", after=100)]}
    with FaultServer(far.path, faults=faults) as server:
        pool = attach(server.url, client=client())
        assert pool.path.parent == files.pools_dir()
        assert (pool.digest, pool.remote) == (far.digest, server.url)
        assert find("far").path == pool.path
        assert not (pool.path / "shards").exists()
        assert server.total("bytes") < sum(shard.bytes for shard in far.info.shards)
        np.testing.assert_array_equal(pool.images(np.arange(ROWS)), far.images(np.arange(ROWS)))


def test_verify_fetches_the_shards_of_an_attached_pool(far: Pool) -> None:
    with FaultServer(far.path) as server:
        pool = attach(server.url, client=client())
        assert verify(pool) == []
        shard = far.path / far.info.shards[0].file
        data = bytearray(shard.read_bytes())
        data[600] ^= 1
        shard.write_bytes(data)
        assert verify(pool) == [f"{server.url}/{far.info.shards[0].file}: checksum differs"]
    near = attach(str(far.path), name="near", client=client())
    assert verify(near) == [f"{shard}: checksum differs"]


def test_attaching_again_fetches_nothing_and_goes_on_where_it_stopped(far: Pool) -> None:
    with FaultServer(far.path, faults={"index/length.npy": [Fault("404")]}) as server:
        with pytest.raises(UserError, match=r"length\.npy: 404"):
            attach(server.url, client=client())
        assert not list(files.pools_dir().glob("*/pool.json"))
        before = attach(server.url, client=client())
        assert server.counts["index/content.npy", "requests"] == 1
        fetched = {path for path, what in server.counts if what == "requests"}
        requests = server.total("requests")
        assert attach(server.url, client=client()).path == before.path
        assert server.total("requests") == requests + 1  # pool.json
        assert fetched == {"pool.json", *far.info.files}


def test_a_damaged_index_and_another_pool_are_refused(far: Pool, tmp_path: Path) -> None:
    with FaultServer(far.path) as server:
        attach(server.url, client=client())
        other = make(tmp_path / "other", seed=1)
        with FaultServer(other.path) as another, pytest.raises(UserError, match=r"is not what http.* is now"):
            attach(another.url, client=client())
        label = far.path / "index/label.npy"
        label.write_bytes(label.read_bytes()[:-1] + b"\x07")
        with pytest.raises(UserError, match=r"label\.npy: checksum"):
            attach(server.url, name="anew", client=client())


def test_what_is_no_pool_is_refused(far: Pool, tmp_path: Path) -> None:
    with FaultServer(far.path) as server:
        with pytest.raises(UserError, match=r"no pool there .*404"):
            attach(f"{server.url}/wrong", client=client())
        with pytest.raises(UserError, match="use letters"):
            attach(server.url, name="../out", client=client())
        (far.path / "pool.json").write_text("<html>")
        with pytest.raises(UserError, match=r"is no pool\.json"):
            attach(server.url, client=client())


@pytest.mark.parametrize("name", ["../../out.npy", "/out.npy", "index/../../out.npy", "index/.."])
def test_a_pool_cannot_write_outside_its_folder(far: Pool, tmp_path: Path, name: str) -> None:
    edit(far, lambda values: values["files"].update({name: "0" * 32}))
    with FaultServer(far.path) as server, pytest.raises(UserError, match="no file of a pool"):
        attach(server.url, client=client())
    assert not list(tmp_path.rglob("out.npy"))


def test_neither_by_its_name_nor_from_a_newer_format(far: Pool, tmp_path: Path) -> None:
    with FaultServer(far.path) as server:
        edit(far, lambda values: values.update(name="../out"))
        with pytest.raises(UserError, match="use letters"):
            attach(server.url, client=client())
        edit(far, lambda values: values.update(format=99))
        with pytest.raises(UserError, match="newer ssl-diversity"):
            attach(server.url, client=client())


def test_paths_and_pipes(far: Pool) -> None:
    images = far.images(np.arange(ROWS))
    for name, url in {"path": str(far.path), "pipe": f"pipe:cat {far.path}/{{}}"}.items():
        pool = attach(url, name=name)
        np.testing.assert_array_equal(pool.images(np.arange(ROWS)), images)
