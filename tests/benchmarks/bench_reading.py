"""Images per second on one core: our reading tiers, and what else there is, over the same images.

    python tests/benchmarks/bench_reading.py --data FOLDER --litdata-python ENV/bin/python

FOLDER holds cifar10.tar and photos.tar. Two sets are made of them: CIFAR-10's JPEGs at 32 px, and JPEGs of 500 x 375
px to be read at 224 px, each a mosaic of the photographs as they are (so they have more detail than a photograph of
that size). Every contender delivers uint8 (B, 3, S, S) of the same images in a random order: centre square,
bicubic, antialiased. Each is a process of its own with one thread, held to one core; they take turns, epoch by epoch.
A server on another core gives the shards out over HTTP; every epoch fetches them anew.

Peers decode as their documentation shows ("PIL", litdata: "torchvision"), and once more as we do
("simplejpeg": libjpeg-turbo without PIL, torch's integer resize). litdata runs in an environment of its own:
see peers.txt.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from reading_contenders import Images, by_pil

CONTENDERS = str(Path(__file__).parent / "reading_contenders.py")


@dataclass(frozen=True)
class Contender:
    loader: str
    how: str  # tier, or where the shards are
    decode: str

    @property
    def title(self) -> str:
        return f"{self.loader}, {self.how}" if self.how else self.loader

    @property
    def ours(self) -> bool:
        return self.loader.startswith("ours")

    @property
    def far(self) -> bool:
        return self.how == "http"


def contenders(size: int, http: bool, litdata_decodes: list[str]) -> list[Contender]:
    places = ["local", "http"] if http else ["local"]
    modes = ["exact", "scaled"] if size > 32 else ["exact"]
    found = [Contender("ours", tier, mode) for mode in modes for tier in ("resident", "random")]
    found += [Contender("ours, streaming", place, mode) for mode in modes for place in places]
    for decode in ("PIL", "simplejpeg"):
        found.append(Contender("ImageFolder + DataLoader", "", decode))
        found += [Contender("webdataset", place, decode) for place in places]
    return found + [Contender("litdata", place, decode) for decode in litdata_decodes for place in places]


class Running:
    """A contender in its own process, waiting for its turn."""

    def __init__(self, contender: Contender, images: Images, python: str, core: int, cpu_time: bool) -> None:
        self.contender = contender
        self.rates: list[float] = []
        command = [
            python,
            CONTENDERS,
            "contend",
            json.dumps([asdict(contender), asdict(images), core, cpu_time]),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.checked = self.turn()

    def turn(self) -> dict[str, float]:
        """One epoch: images, seconds, and of the first one, which is not timed, the mean pixel."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.contender.title} ({self.contender.decode}) failed")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(folder: str) -> None:
    """In the server's process, until its input ends."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from fault_server import FaultServer

    with FaultServer(Path(folder)) as server:
        print(server.url, flush=True)
        sys.stdin.read()


# The images


def small_images(data: Path, count: int) -> Iterator[bytes]:
    with tarfile.open(data / "cifar10.tar") as tar:
        for member in tar:
            if count and member.name.endswith(".jpg"):
                count -= 1
                yield tar.extractfile(member).read()  # type: ignore[union-attr]


def large_images(data: Path, count: int) -> Iterator[bytes]:
    """Mosaics of 4 x 4 photographs of 144 x 96 px, cut to 500 x 375 px; JPEG of quality 90."""
    from PIL import Image

    with tarfile.open(data / "photos.tar") as tar:
        members = [member for member in tar if member.isfile() and "/web-crops/" not in f"/{member.name}"]
        opened = [Image.open(tar.extractfile(member)).convert("RGB") for member in members]  # type: ignore[arg-type]
    photos = [
        np.asarray(photo if photo.width > photo.height else photo.rotate(90, expand=True)) for photo in opened
    ]
    rng = np.random.default_rng(0)
    for _ in range(count):
        rows = [np.concatenate([photos[i] for i in rng.integers(0, len(photos), 4)], 1) for _ in range(4)]
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate(rows)[:375, :500]).save(buffer, "jpeg", quality=90)
        yield buffer.getvalue()


def make(images: Images, encoded: Iterator[bytes], litdata_python: str | None) -> None:
    """The folder; the pool, whose shards webdataset reads; litdata's chunks."""
    paths = []
    for number, data in enumerate(encoded):
        path = images.folder / f"c{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(str(path))
    from ssl_diversity.data import recipes
    from ssl_diversity.data.prepare import prepare

    os.environ["SSL_DIVERSITY_HOME"] = str(images.root)
    shard_bytes = max(1 << 20, sum(os.path.getsize(path) for path in paths) // 16)
    options = {"name": images.name, "resize": "none", "codec": "original", "deduplicate": False}
    pool = prepare(recipes.resolve(str(images.folder), {**options, "shard_bytes": shard_bytes}))
    assert len(pool) == images.count
    if litdata_python:
        (images.root / "paths.json").write_text(json.dumps(paths))
        subprocess.run(
            [litdata_python, CONTENDERS, "optimize", str(images.root), str(shard_bytes)],
            check=True,
            stdout=sys.stderr,
        )


def differences(images: Images) -> str:
    """Mean absolute difference of pixels, over some of the images."""
    from ssl_diversity.data import image

    encoded = [path.read_bytes() for path in sorted(images.folder.rglob("*.jpg"))[:200]]
    reads = {
        "exact": image.decoder("original", images.size, "bicubic"),
        "scaled": image.decoder("original", images.size, "bicubic", scaled=True),
        "PIL": by_pil(images.size),
    }
    pixels = {name: np.stack([read(data) for data in encoded]).astype(int) for name, read in reads.items()}
    return ", ".join(
        f"{a} to {b} {np.abs(pixels[a] - pixels[b]).mean():.3f}"
        for a, b in (("exact", "PIL"), ("scaled", "exact"))
    )


# The table


def litdata_decodes(python: str | None) -> list[str]:
    """How litdata's environment can decode."""
    found = []
    for decode, module in (("torchvision", "torchvision.io"), ("simplejpeg", "simplejpeg"), ("PIL", "PIL")):
        command = [str(python), "-c", f"import torch, litdata, {module}"]
        if python and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            found.append(decode)
    return found if len(found) < 3 else found[:2]


def compare(images: Images, args: argparse.Namespace, cores: tuple[int, int]) -> None:
    field = contenders(images.size, bool(images.url), litdata_decodes(args.litdata_python))
    running: list[Running] = []
    try:
        for contender in field:
            python = args.litdata_python if contender.loader == "litdata" else sys.executable
            running.append(Running(contender, images, python, cores[1], args.cpu_time))
        means = [r.checked["mean"] for r in running if r.contender.decode != "scaled"]
        assert max(means) - min(means) < 1, f"not the same images: {means}"
        assert {r.checked["images"] for r in running} == {images.count}
        for _ in range(args.rounds):
            for r in running:
                found = r.turn()
                r.rates.append(found["images"] / found["seconds"])
    finally:
        for r in running:
            r.close()
    print(
        f"\n{images.name}: {images.count:,} JPEGs to {images.size} px, batches of {images.batch}, one core\n"
    )
    print(
        "| loader | decoding | images/s | x fastest peer as documented | x fastest peer decoding as we do |"
    )
    print("|---|---|---|---|---|")
    for r in running:
        peers = [p for p in running if not p.contender.ours and p.contender.far == r.contender.far]
        asked = [
            [p for p in peers if (p.contender.decode == "simplejpeg") == tuned] for tuned in (False, True)
        ]
        best = [max((median(p.rates) for p in some), default=None) for some in asked]
        ratios = [f"{median(r.rates) / rate:.2f}" if rate and r.contender.ours else "" for rate in best]
        print(
            f"| {r.contender.title} | {r.contender.decode} | {median(r.rates):,.0f} | {' | '.join(ratios)} |"
        )
    print(f"\nMean pixel difference (of 255): {differences(images)}.", flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of cifar10.tar and photos.tar")
    parser.add_argument("--small", type=int, default=20_480, help="images of 32 px; 0: none")
    parser.add_argument("--large", type=int, default=1_536, help="images of 500 x 375 px; 0: none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--litdata-python", help="interpreter of an environment with peers.txt; none: no litdata"
    )
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a machine with other work"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.serve:
        serve(args.serve)
        return
    allowed = sorted(os.sched_getaffinity(0))
    cores = allowed[0], allowed[-1]
    with tempfile.TemporaryDirectory() as work:
        sets = [Images(work, "cifar10", args.small, 32, 256), Images(work, "mosaics", args.large, 224, 64)]
        for images, source in zip(sets, (small_images, large_images), strict=True):
            if images.count:
                make(images, source(args.data, images.count), args.litdata_python)
        command = ["taskset", "-c", str(cores[0]), sys.executable, __file__, "--serve", work]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for images in sets:
                if images.count:
                    served = Images(**{**asdict(images), "url": "" if args.no_http else url})
                    compare(served, args, cores)
            server.communicate()


if __name__ == "__main__":
    main()
