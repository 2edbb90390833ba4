"""An index of 10^8 rows: open it, take a prefix, evaluate both orders at random positions, read rows.

    python tests/benchmarks/bench_index.py [--rows 1e8] [--positions 4e6] [--reads 200000] [--rounds 3] [--folder DIR]

The index is real (all columns, about 4.1 GB at 10^8 rows); the shards are sparse files, so that reading a row is one
look-up in three columns, one pread and one checksum, without a disk behind it. Each part runs in a process of its
own, on one core, and tells the most RssAnon that it had. The orders are timed beside a plain Feistel network in numpy, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssl_diversity.data.config import FORMAT, PoolInfo
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import COLUMNS, Pool
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.windowed import WindowedOrder

ROWS_PER_SHARD = 10_000
IMAGE_BYTES = 2_000
STRIDE = 3_072  # of an image in its shard: header, content, padding
BATCH = 4096
CHUNK = 1 << 17  # positions asked for at once
TARGETS = {"open": 50.0, "order": 5.0, "memory": 300.0}  # ms, million positions/s, MB


def make(folder: Path, rows: int) -> None:
    """A pool of `rows` unlabelled images, as `prepare` leaves it, but for what is in the images."""
    index, shards = folder / "index", folder / "shards"
    index.mkdir(parents=True)
    shards.mkdir()
    crc = zlib.crc32(bytes(IMAGE_BYTES))
    generator = np.random.default_rng(0)
    fill: dict[str, Callable[[np.ndarray], Any]] = {
        "label": lambda row: -1,
        "content": lambda row: generator.integers(0, 256, (len(row), 16), np.uint8),
        "shard": lambda row: row // ROWS_PER_SHARD,
        "offset": lambda row: row % ROWS_PER_SHARD * STRIDE + 512,
        "length": lambda row: IMAGE_BYTES,
        "crc": lambda row: crc,
    }
    for name, (dtype, shape) in COLUMNS.items():
        column = np.lib.format.open_memmap(
            index / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(rows, *shape)
        )
        for start in range(0, rows, 1 << 22):
            row = np.arange(start, min(start + (1 << 22), rows))
            column[row[0] : row[-1] + 1] = fill[name](row)
        column.flush()
    count = -(-rows // ROWS_PER_SHARD)
    listed = []
    for number in range(count):
        held = min(ROWS_PER_SHARD, rows - number * ROWS_PER_SHARD)
        size = held * STRIDE + 1024
        with (folder / f"shards/{number:06d}.tar").open("wb") as file:
            file.truncate(size)
        digest = f"{number:032x}"
        listed.append(
            {
                "file": f"shards/{number:06d}.tar",
                "blake2b": digest,
                "bytes": size,
                "rows": held,
                "chained": digest,
            }
        )
    info = PoolInfo(
        name="synthetic", source="synthetic", spec={}, spec_digest="", size=rows, first_size=rows,
        counts={"read": rows, "kept": rows}, classes=[], image_size=32, filter="bicubic", codec="png", quality=95,
        seed=0, source_digest="", shards=listed, files={}, real_images=rows, format=FORMAT,
    )  # fmt: skip
    (folder / "pool.json").write_text(json.dumps(info.model_dump(mode="json"), indent=1))


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


class Memory:
    """The largest RssAnon seen, looked at every ten milliseconds."""

    def __init__(self) -> None:
        self.peak_mb, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            text = Path("/proc/self/status").read_text()
            self.peak_mb = max(self.peak_mb, int(text.partition("RssAnon:")[2].split()[0]) / 1e3)

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        return self.peak_mb


class PlainFeistel:
    """What one would write first: four rounds, one multiplication each, cycle walking, a key per epoch."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.half = np.uint64(-(-(n - 1).bit_length() // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)

    def at(self, positions: np.ndarray) -> np.ndarray:
        epoch, place = np.divmod(positions, self.n)
        key = (epoch + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        out = self._once(place.astype(np.uint64), key)
        while (outside := np.flatnonzero(out >= self.n)).size:
            out[outside] = self._once(out[outside], key[outside])
        return out.astype(np.int64)

    def _once(self, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = x >> self.half, x & self.mask
        for number in range(4):
            word = (right + key + np.uint64(number)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (word >> np.uint64(40) & self.mask)
        return (left << self.half) | right


def part_open(pool: Path, args: argparse.Namespace) -> dict[str, float]:
    """Open, and what planning a cell needs beside: a prefix, its pieces, both orders."""
    opened = Pool.open(pool)
    n = int(opened.size * 0.9)
    first = Pool.open(pool)
    started = time.perf_counter()
    first.label[0], first.content[0], first.shard[0], first.offset[0], first.length[0]
    columns = 1e3 * (time.perf_counter() - started)
    subset = Subset(((opened, opened.rows(n, 3)),))
    started = time.perf_counter()
    pieces = subset.pieces
    cut = 1e3 * (time.perf_counter() - started)
    return {
        "open_ms": milliseconds(lambda: Pool.open(pool), 5 * args.rounds),
        "columns_ms": columns,
        "prefix_ms": milliseconds(lambda: opened.rows(n, 3)[np.arange(BATCH)], 5 * args.rounds),
        "pieces": len(pieces),
        "pieces_ms": cut,
        "windowed_first_batch_ms": milliseconds(
            lambda: WindowedOrder(pieces, BATCH, 0, n, shards=4).batch(0), args.rounds
        ),
    }


def part_order(pool: Path, args: argparse.Namespace) -> dict[str, float]:
    """Million positions/s at random positions of two epochs, each round one after the other."""
    opened = Pool.open(pool)
    n = opened.size
    subset = Subset(((opened, opened.rows(n)),))
    orders: dict[str, Any] = {
        "plain": PlainFeistel(n),
        "global": GlobalOrder(n, BATCH, 0, 2 * n),
        "windowed": WindowedOrder(subset.pieces, BATCH, 0, 2 * n, shards=4),
    }
    total, generator = orders["global"].total, np.random.default_rng(1)
    rates: dict[str, list[float]] = {name: [] for name in orders}
    for _ in range(args.rounds):
        for name, order in orders.items():
            seconds = 0.0
            for _ in range(-(-int(args.positions) // CHUNK)):
                positions = generator.integers(0, total, CHUNK)
                started = time.thread_time()
                order.at(positions)
                seconds += time.thread_time() - started
            rates[name].append(-(-int(args.positions) // CHUNK) * CHUNK / seconds / 1e6)
    middle = {f"{name}_m_per_s": statistics.median(values) for name, values in rates.items()}
    pairs = {
        f"{name}_ratio": statistics.median(a / b for a, b in zip(rates[name], rates["plain"], strict=True))
        for name in ("global", "windowed")
    }
    steps = iter(range(5, 5 + 10 * args.rounds * 2))
    batch = {
        f"{name}_batch_ms": milliseconds(lambda o=orders[name]: o.batch(next(steps)), 10 * args.rounds)  # type: ignore[misc]
        for name in ("global", "windowed")
    }
    return {**middle, **pairs, **batch}


def part_read(pool: Path, args: argparse.Namespace) -> dict[str, float]:
    """Rows at random positions: their places in the index alone; and their bytes, checked."""
    opened = Pool.open(pool)
    order = GlobalOrder(opened.size, BATCH, 0, opened.size)
    steps = -(-int(args.reads) // BATCH)
    batches = [order.batch(step * (order.steps // (2 * steps) or 1)) for step in range(steps)]
    again = [order.batch(order.steps - 1 - step) for step in range(steps)]
    started = time.perf_counter()
    for rows in batches:
        opened.shard[rows], opened.offset[rows], opened.length[rows]
    looked_up = time.perf_counter() - started
    started = time.perf_counter()
    for rows in again:
        opened.read_bytes(rows)
    read = time.perf_counter() - started
    count = steps * BATCH
    return {"index_rows_per_s": count / looked_up, "rows_read_per_s": count / read}


PARTS = {"open": part_open, "order": part_order, "read": part_read}


def in_own_process(part: str, pool: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", part, "--folder", str(pool)]
    command += ["--positions", str(args.positions), "--reads", str(args.reads), "--rounds", str(args.rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=1e8)
    parser.add_argument("--positions", type=float, default=4e6, help="per order and round")
    parser.add_argument("--reads", type=float, default=2e5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the index is made, and kept (default: temporary)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        memory = Memory()
        found = PARTS[args.part](args.folder, args)
        print(json.dumps({**found, "rss_anon_peak_mb": memory.end()}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        pool = args.folder or Path(temporary) / "pool"
        if not (pool / "pool.json").exists():
            started = time.perf_counter()
            make(pool, int(args.rows))
            print(f"index of {int(args.rows):,} rows made in {time.perf_counter() - started:.0f} s")
        results = {part: in_own_process(part, pool, args) for part in PARTS}
    for part, found in results.items():
        for name, value in found.items():
            print(f"{part:6} {name:24} {value:14,.2f}")
    memory = max(found["rss_anon_peak_mb"] for found in results.values())
    slowest = min(results["order"][f"{name}_m_per_s"] for name in ("global", "windowed"))
    for name, value, better in (
        ("open", results["open"]["open_ms"], "<"),
        ("order", slowest, ">"),
        ("memory", memory, "<"),
    ):
        met = value < TARGETS[name] if better == "<" else value > TARGETS[name]
        print(f"target {name}: {value:.1f} {better} {TARGETS[name]:g}: {'met' if met else 'NOT MET'}")


if __name__ == "__main__":
    main()
