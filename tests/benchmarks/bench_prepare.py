"""Preparing many small images within a bound of memory, and once more with a kill -9 in the middle.

    python tests/benchmarks/bench_prepare.py --images 2000000 --memory-gb 2 --kill

Makes synthetic images (noise tiles, PNG, one in a hundred an exact copy, one in a thousand broken) as WebDataset
shards in --work, prepares them in a process of its own while sampling the summed PSS of its whole tree, and prints
images/s, the peak and, with --kill, whether the pool after a kill and a resume is the same file by file.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

SHARD_ROWS = 10_000
SAMPLE_S = 0.25
_RUN = """
import json, sys, time
from ssl_diversity.data import prepare, recipes
from ssl_diversity.runtime import Runtime
if __name__ == "__main__":
    path, name, processes, memory_bytes, shard_bytes = sys.argv[1:]
    started, writing, decoding = time.monotonic(), [], []
    def note(text):
        if text.startswith("decoding"):
            decoding[:] = [text]
        elif not writing:
            writing.append(time.monotonic())
    spec = recipes.resolve("webdataset", {"path": path, "name": name, "size": 16, "shard_bytes": int(shard_bytes)})
    pool = prepare.prepare(
        spec, processes=int(processes), memory_bytes=int(memory_bytes), runtime=Runtime(note=note))
    ended = time.monotonic()
    times = {"decode_s": writing[0] - started, "write_s": ended - writing[0]}
    print(json.dumps({**times, "folder": str(pool.path), "note": decoding[0]}))
"""


@dataclass(frozen=True)
class Outcome:
    seconds: float
    peak_pss_bytes: int
    folder: Path
    decode_s: float
    write_s: float
    note: str  # prepare's last word on decoding


def png(pixels: np.ndarray) -> bytes:
    """A minimal PNG, made at 20 us an image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    height, width = pixels.shape[:2]
    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)
    data = zlib.compress(lines.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_images(folder: Path, images: int) -> None:
    """`images` tiles of 16 px in shards of 10,000; those of a finished shard are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, images, SHARD_ROWS):
        path = folder / f"{first // SHARD_ROWS:06d}.tar"
        if path.exists():
            continue
        rng = np.random.default_rng(first)
        count = min(SHARD_ROWS, images - first)
        tiles = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
        tiles[np.arange(50, count, 100)] = tiles[0]  # copies
        with tarfile.open(path.with_suffix(".tmp"), "w") as tar:
            for i, tile in enumerate(tiles):
                data = b"broken" if i % 1000 == 7 else png(tile)
                member = tarfile.TarInfo(f"{first + i:09d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        path.with_suffix(".tmp").rename(path)


def tree_pss_bytes(process: psutil.Process) -> int:
    """Summed PSS of a process and all below it."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
            continue
    return total


def run(
    images: Path,
    name: str,
    home: Path,
    *,
    processes: int,
    memory_bytes: int,
    kill_after: float | None = None,
    shard_bytes: int = 1 << 28,
) -> Outcome | None:
    """Prepare in a process of its own; None where it was killed, after that share of its parts."""
    script = home / "run_prepare.py"
    home.mkdir(parents=True, exist_ok=True)
    script.write_text(_RUN)
    parts = len(list(images.glob("*.tar")))
    command = [
        sys.executable,
        str(script),
        str(images),
        name,
        str(processes),
        str(memory_bytes),
        str(shard_bytes),
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, "SSL_DIVERSITY_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, tree_pss_bytes(psutil.Process(process.pid)))
        except psutil.NoSuchProcess:
            break
        if kill_after is not None and finished_parts(home, name) >= kill_after * parts:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _wait_for_group(process.pid)
            return None
        time.sleep(SAMPLE_S)
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"preparing failed with status {process.returncode}")
    found = json.loads(said.splitlines()[-1])
    seconds = time.monotonic() - started
    return Outcome(seconds, peak, Path(found["folder"]), found["decode_s"], found["write_s"], found["note"])


def _wait_for_group(group: int) -> None:
    """Until none of a killed group is left: one may be in the middle of a system call."""

    def alive(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    while any(map(alive, psutil.process_iter())):
        time.sleep(0.01)


def finished_parts(home: Path, name: str) -> int:
    """How many parts of an unfinished pool have their summary."""
    summaries = home.glob(f"pools/.{name}-*.work/*.json")
    return sum('"runs"' in path.read_text() for path in summaries)


def checksums(folder: Path) -> dict[str, object]:
    """What pool.json says of every file, and of the images, without the pool's own name."""
    info = json.loads((folder / "pool.json").read_text())
    return {key: info[key] for key in ("shards", "files", "counts", "source_digest", "size")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=lambda text: int(float(text)), default=20_000)
    parser.add_argument("--memory-gb", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="kill -9 in the middle, resume, compare")
    parser.add_argument("--work", type=Path, help="keeps the images; a temporary folder if not given")
    args = parser.parse_args()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        home = Path(temporary)
        images = (args.work or home) / f"images-{args.images}"
        make_images(images, args.images)
        memory_bytes = int(args.memory_gb * 2**30)
        options = {"processes": args.processes, "memory_bytes": memory_bytes}
        whole = run(images, "whole", home, **options)
        assert whole is not None
        size = checksums(whole.folder)["size"]
        print(f"{args.images:,} images, {args.processes} processes, bound {args.memory_gb} GiB")
        print(
            f"  all      {whole.seconds:8.1f} s  {args.images / whole.seconds:8,.0f} images/s  kept {size:,}"
        )
        print(f"  decoding {whole.decode_s:8.1f} s  {args.images / whole.decode_s:8,.0f} images/s")
        print(f"  writing  {whole.write_s:8.1f} s  {args.images / whole.write_s:8,.0f} images/s")
        print(f"  peak of the tree's summed PSS: {whole.peak_pss_bytes / 2**30:.2f} GiB")
        if args.kill:
            run(images, "killed", home, kill_after=0.5, **options)
            parts = finished_parts(home, "killed")
            resumed = run(images, "killed", home, **options)
            assert resumed is not None
            same = checksums(resumed.folder) == checksums(whole.folder)
            all_parts = len(list(images.glob("*.tar")))
            print(
                f"  killed after {parts} of {all_parts} parts, resumed in {resumed.seconds:.1f} s: {resumed.note}"
            )
            print(f"  {'identical' if same else 'DIFFERENT'} pool, file by file")
            print(f"  peak of the tree's summed PSS: {resumed.peak_pss_bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
