"""An epoch streamed from a server that fails, by several processes that share one cache: complete, exact, how fast?

    python tests/benchmarks/bench_streaming.py --data FOLDER [--ranks 2] [--workers 2] [--kill] [--no-faults]

FOLDER holds cifar10.tar, whose train images become a pool of about 50 shards; without it, --images random ones. A
loopback server gives the shards out and answers a part of the requests with 429, 500, a cut connection, slow bytes,
silence, a wrong length or a flipped bit. Each rank x worker is a process that reads its batches of the order and
notes a hash of every image's pixels. These must be what the order and the local pool say: each image floor or ceil of
C/N times. --kill ends all processes by kill -9 in the middle; others, one worker a rank more, go on with the same cache.
Prints one JSON object; exit status 1 where anything is missing, wrong or twice.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import numpy as np

from ssl_diversity.data.attach import attach
from ssl_diversity.data.batches import Batches
from ssl_diversity.data.order import GlobalOrder, Order, slots
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.reading import RandomReader
from ssl_diversity.data.recipes import resolve
from ssl_diversity.data.remote import Client
from ssl_diversity.data.streaming import StreamingReader
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.windowed import WindowedOrder
from ssl_diversity.data.writer import write_pool
from ssl_diversity.runtime import Runtime

SHARDS = 50
FAULT_RATE = 0.03  # of each kind
DEADLINE_S = 1800


def make_pool(args: argparse.Namespace) -> Pool:
    if args.data:
        from ssl_diversity.data.prepare import prepare

        spec = resolve("cifar10", {"path": f"{args.data}/cifar10.tar", "shard_bytes": 4_500_000})
        return prepare(spec, processes=2)
    rng = np.random.default_rng(0)
    rows = ((rng.integers(0, 256, (8, 8, 3), np.uint8), -1, None) for _ in range(args.images))
    info = {"name": "random", "source": "random", "image_size": 8, "real_images": 0}
    path = Path(os.environ["SSL_DIVERSITY_HOME"]) / "pools" / "random"
    return write_pool(path, info, rows, shard_bytes=args.images * 1100 // SHARDS)


def make_order(args: argparse.Namespace, subset: Subset) -> Order:
    budget = args.epochs * len(subset)
    if args.order == "global":
        return GlobalOrder(len(subset), args.batch, 1, budget)
    return WindowedOrder(subset.pieces, args.batch, 1, budget, shards=1, lanes=args.lanes)


def whole(pool: Pool) -> Subset:
    return Subset(((pool, pool.rows(pool.size)),))


def hashes(images: np.ndarray) -> np.ndarray:
    """uint64 (n,) of uint8 (n, 3, S, S)."""
    return np.frombuffer(b"".join(blake2b(i.tobytes(), digest_size=8).digest() for i in images), np.uint64)


def work(args: argparse.Namespace) -> None:
    """One process: steps as rows of uint64 (1 + share,) in a file: the step, and what its images are."""
    pool = Pool.open(args.pool)
    order = make_order(args, whole(pool))
    reader = StreamingReader(
        whole(pool),
        image_size=pool.image_size,
        order=order,
        runtime=Runtime(cache_bytes=int(args.cache_gb * 2**30), cache_dir=args.cache),
        client=Client(backoff_s=0.05, timeout_s=2),
        block_bytes=args.block_bytes,
    )
    out = Path(args.out) / f"{args.start}-{args.rank}-{args.worker}"
    batches = Batches(order, reader, args.start, args.rank, args.ranks, args.worker, args.workers)
    with out.with_suffix(".steps").open("wb", buffering=0) as file:
        for batch in batches:
            step = np.array([batch["positions"][0] // order.batch_size], np.uint64)
            file.write(np.concatenate([step, hashes(batch["images"])]).tobytes())
    out.with_suffix(".json").write_text(json.dumps(reader.counts))


class Run:
    """All ranks and workers of a run from one step on."""

    def __init__(self, args: argparse.Namespace, pool: Pool, start: int, workers: int) -> None:
        given = {**vars(args), "pool": str(pool.path), "start": start, "workers": workers}
        self.out, self.start, self.workers, self.ranks = Path(args.out), start, workers, args.ranks
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", json.dumps({**given, "rank": rank, "worker": worker})],
                start_new_session=True,
            )
            for rank in range(args.ranks)
            for worker in range(workers)
        ]

    def delivered(self, rank: int, share: int) -> dict[int, np.ndarray]:
        """Hashes by step, of what one rank has delivered in full."""
        found = {}
        for path in self.out.glob(f"{self.start}-{rank}-*.steps"):
            data = path.read_bytes()
            rows = np.frombuffer(data[: len(data) // (8 * (1 + share)) * 8 * (1 + share)], np.uint64)
            found.update({int(row[0]): row[1:] for row in rows.reshape(-1, 1 + share)})
        return found

    def steps(self, share: int) -> int:
        """The first step that some rank has not delivered yet."""
        done = [self.delivered(rank, share) for rank in range(self.ranks)]
        step = self.start
        while all(step in rank for rank in done):
            step += 1
        return step

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def finish(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            self.refuse_failures()
            time.sleep(0.05)
        self.refuse_failures(unfinished=True)

    def refuse_failures(self, *, unfinished: bool = False) -> None:
        """End the benchmark if a process failed, or if one has not come to its end."""
        statuses = [process.poll() for process in self.processes]
        if any(statuses) or (unfinished and None in statuses):
            self.kill()
            raise SystemExit(f"a process failed or was too slow; exit statuses: {statuses}")


def check(order: Order, wanted: np.ndarray, runs: list[Run], ends: list[int]) -> dict[str, Any]:
    """Compare what was delivered, run after run, with the order and the pixels of the local pool."""
    seen, wrong, missing = Counter[int](), 0, 0
    for run, end in zip(runs, ends, strict=True):
        for rank in range(run.ranks):
            mine = slots(order, rank, run.ranks)
            got = run.delivered(rank, mine.stop - mine.start)
            for step in range(run.start, end):
                indices = order.batch(step)[mine]
                if step not in got:
                    missing += len(indices)
                    continue
                wrong += int((got[step] != wanted[indices]).sum())
                seen.update(indices.tolist())
    times = Counter(seen[i] for i in range(len(wanted)))
    return {
        "delivered": seen.total(),
        "wrong": wrong,
        "missing": missing,
        "images_by_times_seen": dict(times),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from fault_server import Fault, FaultServer

    near = make_pool(args)
    kinds = [Fault("429", retry_after="0"), Fault("500"), Fault("cut", after=10_000), Fault("length")]
    kinds += [Fault("slow", after=100_000)]
    rates = dict.fromkeys(kinds, FAULT_RATE)
    rates |= dict.fromkeys(
        [Fault("flip", after=5_000), Fault("stall", after=5_000, seconds=4)], FAULT_RATE / 3
    )
    with FaultServer(near.path, seed=1) as server:
        far = attach(server.url, name="far")
        server.rates = {} if args.no_faults else rates
        server.counts.clear()
        subset = whole(near)
        order = make_order(args, subset)
        pixels = RandomReader(subset, image_size=near.image_size)
        wanted = [hashes(pixels.read(rows)) for rows in np.array_split(np.arange(len(subset)), 50)]
        share = order.batch_size // args.ranks
        begun = time.perf_counter()
        runs, ends = [Run(args, far, 0, args.workers)], [order.steps]
        if args.kill:
            while runs[0].steps(share) < order.steps // 2:
                runs[0].refuse_failures()
                time.sleep(0.05)
            runs[0].kill()
            ends = [runs[0].steps(share), order.steps]
            runs.append(Run(args, far, ends[0], args.workers + 1))
        runs[-1].finish()
        seconds = time.perf_counter() - begun
        faults = Counter[str]()
        for (_, what), number in server.counts.items():
            faults[what] += number
    result = check(order, np.concatenate(wanted), runs, ends)
    counts = Counter[str]()
    for path in Path(args.out).glob("*.json"):
        counts.update(json.loads(path.read_text()))
    lengths = [shard.bytes for shard in near.info.shards]
    return {
        "images": near.size,
        "shards": len(lengths),
        "pool_bytes": sum(lengths),
        "processes": [run.ranks * run.workers for run in runs],
        "killed_at_step": ends[0] if args.kill else None,
        "steps": order.steps,
        **result,
        "images_per_second": round(result["delivered"] / seconds),
        "server": dict(sorted(faults.items())),
        "clients": dict(sorted(counts.items())),  # of the processes that were not killed
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("SSL_DIVERSITY_TEST_DATA"))
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--order", choices=["windowed", "global"], default="windowed")
    parser.add_argument("--lanes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache-gb", type=float, default=1.0)
    parser.add_argument("--block-bytes", type=int, default=1 << 18)
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(argparse.Namespace(**json.loads(args.work)))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory() as home:
        os.environ["SSL_DIVERSITY_HOME"] = home
        args.out, args.cache = f"{home}/out", f"{home}/cache"
        Path(args.out).mkdir()
        result = measure(args)
    print(json.dumps(result, indent=1))
    floor = args.epochs * (result["steps"] * args.batch) // (args.epochs * result["images"])
    times = {int(t) for t in result["images_by_times_seen"]}
    if result["wrong"] or result["missing"] or not times <= {floor, floor + 1}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
