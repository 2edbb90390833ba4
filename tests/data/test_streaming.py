"""Streaming delivers what reading on the spot does, through any fault that can be mended; else one error."""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_server import Fault, FaultServer, wait_until

from ssl_diversity.data import wds
from ssl_diversity.data.attach import attach
from ssl_diversity.data.batches import Batches
from ssl_diversity.data.order import GlobalOrder, Order
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.reading import RandomReader, open_reader
from ssl_diversity.data.remote import Client, FetchError
from ssl_diversity.data.streaming import StreamingReader
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.windowed import WindowedOrder
from ssl_diversity.data.writer import write_pool
from ssl_diversity.errors import UserError
from ssl_diversity.runtime import Runtime

ROWS, SIZE, BATCH, LANES, BLOCK = 256, 12, 16, 8, 4096
MENDED = {
    Fault("429", retry_after="0"): 0.05,
    Fault("500"): 0.05,
    Fault("cut", after=1000): 0.1,
    Fault("slow", after=2000): 0.05,
    Fault("length"): 0.05,
    Fault("long"): 0.05,
}


@pytest.fixture
def near(tmp_path: Path) -> Pool:
    """256 images in 16 shards or so."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8), i % 5, None) for i in range(ROWS)]
    info = {"name": "far", "source": "test", "image_size": SIZE, "classes": list("abcde"), "real_images": 0}
    pool = write_pool(tmp_path / "far", info, rows, shard_bytes=40_000)
    assert 10 < len(pool.info.shards) < 30
    return pool


@pytest.fixture
def serve(near: Pool) -> Iterator[Callable[..., tuple[FaultServer, Pool]]]:
    """The pool behind a server that fails as it is told, attached before it does."""
    servers = []

    def start(**faults: object) -> tuple[FaultServer, Pool]:
        servers.append(FaultServer(near.path, **faults))  # type: ignore[arg-type]
        server = servers[-1].__enter__()
        rates, server.rates = server.rates, {}
        pool = attach(server.url, name=f"far{len(servers)}", client=client())
        server.rates = rates
        server.counts.clear()
        server.served.clear()
        return server, pool

    yield start
    for server in servers:
        server.__exit__()


def client() -> Client:
    return Client(backoff_s=0.01, max_wait_s=0.1, timeout_s=30, retries=30)


def whole(*pools: Pool) -> Subset:
    return Subset(tuple((pool, pool.rows(pool.size)) for pool in pools))


def windowed(subset: Subset, epochs: int = 1, shards: int = 1, lanes: int = LANES) -> WindowedOrder:
    n = len(subset)
    return WindowedOrder(subset.pieces, BATCH, seed=1, budget=epochs * n, shards=shards, lanes=lanes)


def stream(
    pools: Pool | tuple[Pool, ...],
    order: Order | None,
    cache: Path,
    *,
    cache_bytes: int = 1 << 30,
    nodes: int = 1,
    threads: int = 1,
) -> StreamingReader:
    return StreamingReader(
        whole(*(pools if isinstance(pools, tuple) else (pools,))),
        image_size=SIZE,
        order=order,
        runtime=Runtime(cache_bytes=cache_bytes, cache_dir=str(cache)),
        client=client(),
        block_bytes=BLOCK,
        nodes=nodes,
        threads=threads,
    )


def pixels(pool: Pool) -> np.ndarray:
    return RandomReader(whole(pool), image_size=SIZE).read(np.arange(pool.size))


@pytest.mark.parametrize("kind", ["global", "windowed"])
def test_every_fault_that_can_be_mended_is(
    kind: str, near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    server, far = serve(rates=MENDED, seed=3)
    for number, shard in enumerate(far.info.shards):
        server.inject(shard.file, Fault("flip", after=600 + 10 * number))
    order = windowed(whole(near), 2) if kind == "windowed" else GlobalOrder(ROWS, BATCH, 1, 2 * ROWS)
    wanted = pixels(near)
    reader = stream(far, order, tmp_path / "cache", threads=2)
    seen: Counter[int] = Counter()
    for step, batch in enumerate(Batches(order, reader)):
        indices = order.batch(step)
        np.testing.assert_array_equal(batch["images"], wanted[indices])
        seen.update(indices.tolist())
    assert seen == dict.fromkeys(range(ROWS), 2)
    causes = {what for what, n in reader.counts.items() if what.startswith("retry:") and n}
    assert causes >= {"retry:429", "retry:500", "retry:cut"}
    assert reader.counts["cache:damaged"] > 0  # flipped bits
    assert server.total("flip") > 0


def test_each_node_fetches_its_own_lanes_and_each_block_once(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    server, far = serve()
    order = windowed(whole(near), epochs=3)
    wanted = pixels(near)
    readers = []
    for rank in range(4):
        readers.append(stream(far, order, tmp_path / f"node{rank // 2}", nodes=2))
        readers[-1].begin(0, rank, 4)
    share = BATCH // 4
    for step in range(order.steps):
        indices = order.batch(step)
        for rank, reader in enumerate(readers):
            mine = indices[rank * share : (rank + 1) * share]
            np.testing.assert_array_equal(reader.read(mine), wanted[mine])
    for reader in readers:
        reader.close()
    blocks = Counter((path, *span) for path, spans in server.served.items() for span in spans)
    twice = [block for block, times in blocks.items() if times > 1]
    assert order.drift == 0
    assert len(twice) <= 1  # the block on the cut between the nodes
    assert max(blocks.values()) <= 2
    members = sum(shard.bytes for shard in near.info.shards)
    assert members - 1024 * len(near.info.shards) - BLOCK <= server.total("bytes") <= members + BLOCK
    assert {path for path, _, _ in blocks} == {shard.file for shard in near.info.shards}


def test_a_subset_costs_its_own_bytes(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    server, far = serve()
    subset = Subset(((far, far.rows(64, replicate=1)),))
    order = windowed(subset)
    reader = StreamingReader(
        subset,
        image_size=SIZE,
        order=order,
        runtime=Runtime(cache_bytes=1 << 30, cache_dir=str(tmp_path / "cache")),
        client=client(),
        block_bytes=BLOCK,
    )
    for step in range(order.steps):
        reader.read(order.batch(step))
    reader.close()
    rows = far.rows(64, replicate=1).numbers()
    needed = int(far.length[rows].sum()) + 1024 * 64 + 1024
    assert server.total("bytes") <= needed + 512 * 64 + 2 * BLOCK * len(subset.pieces)
    assert server.total("bytes") < sum(shard.bytes for shard in far.info.shards) / 2


def test_a_small_cache_is_never_exceeded_and_no_window_is_fetched_twice(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    server, far = serve()
    order = windowed(whole(near), epochs=2, lanes=2)
    bound = 5 * 45_056  # four shards are needed at a time
    wanted = pixels(near)
    reader = stream(far, order, tmp_path / "cache", cache_bytes=bound)
    for step in range(order.steps):
        np.testing.assert_array_equal(reader.read(order.batch(step)), wanted[order.batch(step)])
        assert reader.cache.used_bytes() <= bound
    reader.close()
    assert reader.counts["cache:evicted"] > 0
    pool_bytes = sum(shard.bytes for shard in far.info.shards)
    assert server.total("bytes") <= 2 * pool_bytes + 2 * 2 * BLOCK


@pytest.mark.parametrize(("shards", "start"), [(1, 0), (2, 0), (2, 13)])
def test_what_comes_next_stays_when_the_last_use_of_what_was_read_is_known(
    serve: Callable[..., tuple[FaultServer, Pool]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    start: int,
) -> None:
    """As in windows of hours, with the smallest cache that is not refused."""
    monkeypatch.setattr("ssl_diversity.data.cache._USE_NOTED_S", -1.0)
    _, far = serve()
    order = WindowedOrder(whole(far).pieces, BATCH, 1, 3 * ROWS, shards=shards, lanes=2)
    needed = stream(far, order, tmp_path / "other")._far.needed_bytes(order)
    reader = stream(far, order, tmp_path / "cache", cache_bytes=needed)
    reader.begin(start)
    for step in range(start, order.steps):
        asked = itertools.takewhile(lambda need, step=step: need.soonest <= step, order.upcoming(start))
        due = [need.piece for need in asked if need.until >= step]
        keys = [key for piece in due for key, _ in reader._far.of_piece(piece)]
        # one that shares a lock with another in flight is left to reading
        wait_until(lambda keys=keys: sum(not (tmp_path / "cache" / key.name).exists() for key in keys) < 2)
        reader.read(order.batch(step))
        assert reader.cache.used_bytes() <= needed
    reader.close()
    assert reader.counts["cache:evicted"] > 0
    fetched = sum(len(list(reader._far.of_piece(need.piece))) for need in order.upcoming(start))
    assert reader.counts["cache:fetches"] <= fetched


@pytest.mark.parametrize("cache_bytes", [0, 100_000])
def test_too_small_a_cache_is_refused_with_what_it_needs(
    serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path, cache_bytes: int
) -> None:
    _, far = serve()
    order = GlobalOrder(ROWS, BATCH, 1, ROWS)
    with pytest.raises(UserError, match=r"needs .* GiB .*cache_gb.*windowed: \{shards: 1\}"):
        stream(far, order, tmp_path, cache_bytes=cache_bytes)
    with pytest.raises(UserError, match=r"needs .* GiB .*cache_gb.*fewer lanes"):
        stream(far, windowed(whole(far)), tmp_path, cache_bytes=cache_bytes)
    pool_bytes = sum(shard.bytes for shard in far.info.shards)
    assert stream(far, order, tmp_path, cache_bytes=pool_bytes).tier == "streaming"


def test_what_is_needed_next_comes_before_it_is_read_but_not_all(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    server, far = serve()
    order = windowed(whole(near), lanes=2)
    reader = stream(far, order, tmp_path / "cache")
    reader.begin()
    first = [key for key, _ in reader._far.of_piece(next(order.upcoming()).piece)]
    wait_until(lambda: all((tmp_path / "cache" / key.name).exists() for key in first))
    reader.close()
    assert server.total("bytes") <= 5 * 45_056  # two windows of two lanes, and what was on its way


def test_resumed_at_any_step_it_goes_on(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    _, far = serve()
    order = windowed(whole(near), epochs=2)
    wanted = pixels(near)
    for start in (0, 7, order.steps - 1):
        reader = stream(far, order, tmp_path / "cache")
        reader.begin(start)
        np.testing.assert_array_equal(reader.read(order.batch(start)), wanted[order.batch(start)])
        reader.close()


def test_damage_in_the_cache_is_fetched_again(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    server, far = serve()
    order = GlobalOrder(ROWS, BATCH, 1, ROWS)
    reader = stream(far, order, tmp_path / "cache")
    everything = np.arange(ROWS)
    reader.read(everything)
    requests = server.total("requests")
    damaged = sorted((tmp_path / "cache").glob("[!.]*/*"))[5]
    data = bytearray(damaged.read_bytes())
    for place in range(0, len(data), 300):
        data[place] ^= 1
    damaged.write_bytes(data)
    np.testing.assert_array_equal(reader.read(everything), pixels(near))
    assert server.total("requests") == requests + 1


def test_a_shard_replaced_under_a_running_job_is_one_error_that_names_it(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    _, far = serve()
    reader = stream(far, GlobalOrder(ROWS, BATCH, 1, ROWS), tmp_path / "cache")
    reader.close()
    reader.read(np.arange(3))
    file = near.path / near.info.shards[5].file
    row = np.array([int(np.flatnonzero(near.shard == 5)[0])])
    good = file.read_bytes()
    file.write_bytes(good[:-512])
    with pytest.raises(FetchError, match=r"000005\.tar: length .*replaced or cut"):
        stream(far, GlobalOrder(ROWS, BATCH, 1, ROWS), tmp_path / "other").read(row)
    file.write_bytes(bytes(len(good)))
    with pytest.raises(UserError, match=r"row \d+ of http.*000005\.tar .*damaged or replaced"):
        stream(far, GlobalOrder(ROWS, BATCH, 1, ROWS), tmp_path / "third").read(row)
    file.unlink()
    with pytest.raises(FetchError, match=r"000005\.tar: 404 .*given up after 1 try"):
        stream(far, GlobalOrder(ROWS, BATCH, 1, ROWS), tmp_path / "fourth").read(row)
    file.write_bytes(good)
    np.testing.assert_array_equal(reader.read(row), pixels(near)[row])


def test_open_reader_streams_what_is_remote_and_reads_paths_where_they_are(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    _, far = serve()
    rows = np.array([3, 250, 17])
    cache = tmp_path / "cache"
    runtime = Runtime(cache_bytes=1 << 30, cache_dir=str(cache))
    reader = open_reader(whole(far), runtime=runtime)
    assert reader.tier == "streaming"
    np.testing.assert_array_equal(reader.read(rows), pixels(near)[rows])
    beside = attach(str(near.path), name="beside")
    for pool in (near, beside):
        direct = open_reader(whole(pool), tier="streaming", order=GlobalOrder(ROWS, BATCH, 1, ROWS))
        np.testing.assert_array_equal(direct.read(rows), pixels(near)[rows])
    assert len(list(cache.iterdir())) == 2  # locks, and the blocks of the one at an address


def test_a_mixture_of_near_and_far(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]], tmp_path: Path
) -> None:
    _, far = serve(rates=MENDED, seed=5)
    order = windowed(whole(near, far))
    reader = stream((near, far), order, tmp_path / "cache")
    wanted = np.concatenate([pixels(near)] * 2)
    for step in range(order.steps):
        np.testing.assert_array_equal(reader.read(order.batch(step)), wanted[order.batch(step)])


def test_whole_shards_through_a_pipe(near: Pool, tmp_path: Path) -> None:
    pool = attach(f"pipe:cat {near.path}/{{}}", name="piped")
    order = windowed(whole(near))
    reader = stream(pool, order, tmp_path / "cache")
    for step in range(order.steps):
        np.testing.assert_array_equal(reader.read(order.batch(step)), pixels(near)[order.batch(step)])
    reader.close()
    assert reader.counts["cache:bytes"] == sum(shard.bytes for shard in near.info.shards)
    shutil.rmtree(near.path / "shards")
    with pytest.raises(UserError, match=r"pipe:cat .*given up after 31 tries"):
        stream(pool, order, tmp_path / "other").read(np.arange(2))


def test_plain_webdataset_reads_the_shards_with_our_retries(
    near: Pool, serve: Callable[..., tuple[FaultServer, Pool]]
) -> None:
    import webdataset

    _, far = serve(rates={Fault("500"): 0.2, Fault("cut", after=20_000): 0.3}, seed=1)
    fetching = client()
    wds.register(fetching)
    urls = [far.address(number) for number in range(len(far.info.shards))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(ROWS)]
    assert [sample["png"] for sample in samples] == near.read_bytes(np.arange(ROWS))
    assert sum(fetching.retried().values()) > 0
    (near.path / near.info.shards[3].file).unlink()
    with pytest.raises(FetchError, match=r"000003\.tar: 404"):
        list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
