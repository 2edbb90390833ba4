"""What bench_reading.py compares: our readers and their peers, each in a process of its own.

    python reading_contenders.py contend JSON | optimize FOLDER SHARD_BYTES

Runs in litdata's environment too, so it imports nothing but numpy before a contender is chosen.
"""

import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", WDS_VERBOSE_CACHE="0")

import numpy as np

Epoch = Callable[[], Iterator[Any]]
Decode = Callable[[bytes], Any]  # to uint8 (S, S, 3)


@dataclass(frozen=True)
class Images:
    """One of the two sets, in all its forms below `work`."""

    work: str
    name: str
    count: int
    size: int
    batch: int
    url: str = ""  # of the server

    @property
    def root(self) -> Path:
        return Path(self.work) / self.name

    @property
    def folder(self) -> Path:
        return self.root / "folder"

    @property
    def pool(self) -> Path:
        return next((self.root / "pools").glob("*/pool.json")).parent

    @property
    def shards(self) -> list[str]:
        return [str(path.relative_to(self.work)) for path in sorted((self.pool / "shards").glob("*.tar"))]


# Decoding, as a peer's user would write it


def by_pil(size: int) -> Decode:
    from PIL import Image

    return lambda data: fitted(Image.open(io.BytesIO(data)), size)


def fitted(opened: Any, size: int) -> Any:
    from PIL import Image

    picture = opened.convert("RGB")
    side = min(picture.size)
    if picture.size != (size, size):
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
    return np.array(picture)


def by_simplejpeg(size: int) -> Decode:
    import simplejpeg
    import torch

    return lambda data: cut(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1), size)


def by_torchvision(size: int) -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: cut(
        decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB), size
    )


def cut(planes: Any, size: int) -> Any:
    from torch.nn.functional import interpolate

    height, width = planes.shape[1:]
    side = min(height, width)
    if (height, width) != (size, size):
        left, top = (width - side) // 2, (height - side) // 2
        square = planes[None, :, top : top + side, left : left + side]
        planes = interpolate(square, (size, size), mode="bicubic", antialias=True)[0]
    return planes.permute(1, 2, 0).numpy()


DECODE: dict[str, Callable[[int], Decode]] = {
    "PIL": by_pil,
    "simplejpeg": by_simplejpeg,
    "torchvision": by_torchvision,
}


def planar(pixels: Any) -> Any:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


# Contenders: each makes the epochs of its own, without end


def ours(images: Images, tier: str, decode: str) -> Epoch:
    from ssl_diversity.data.order import GlobalOrder
    from ssl_diversity.data.pool import Pool
    from ssl_diversity.data.reading import open_reader
    from ssl_diversity.data.subset import Subset

    pool = Pool.open(images.pool)
    subset = Subset(((pool, pool.rows(images.count)),))
    reader = open_reader(subset, image_size=images.size, tier=tier, decode=decode)  # type: ignore[arg-type]
    seeds = iter(range(1 << 30))

    def epoch() -> Iterator[Any]:
        order = GlobalOrder(images.count, images.batch, next(seeds), images.count)
        for step in range(order.steps):
            yield reader.read(order.batch(step))

    return epoch


def ours_streaming(images: Images, remote: str, decode: str) -> Epoch:
    from ssl_diversity.data.attach import attach
    from ssl_diversity.data.pool import Pool
    from ssl_diversity.data.reading import open_reader
    from ssl_diversity.data.subset import Subset
    from ssl_diversity.data.windowed import WindowedOrder
    from ssl_diversity.runtime import Runtime

    where = images.root / f"far-{decode}"
    os.environ["SSL_DIVERSITY_HOME"] = str(where)
    relative = images.pool.relative_to(images.work)
    pool = attach(f"{images.url}/{relative}") if remote == "http" else Pool.open(images.pool)
    subset = Subset(((pool, pool.rows(images.count)),))
    seeds = iter(range(1 << 30))

    def epoch() -> Iterator[Any]:
        shutil.rmtree(where / "cache", ignore_errors=True)
        runtime = Runtime(cache_bytes=1 << 36, cache_dir=str(where / "cache"))
        order = WindowedOrder(
            subset.pieces, images.batch, next(seeds), images.count, shards=2, lanes=min(8, images.batch)
        )
        reader: Any = open_reader(
            subset,
            image_size=images.size,
            tier="streaming",
            decode=decode,  # type: ignore[arg-type]
            order=order,
            runtime=runtime,
        )
        for step in range(order.steps):
            yield reader.read(order.batch(step))
        reader.close()

    return epoch


def image_folder(images: Images, _: str, decode: str) -> Epoch:
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    if decode == "PIL":
        data = ImageFolder(
            str(images.folder), lambda picture: torch.from_numpy(planar(fitted(picture, images.size)))
        )
    else:
        read = DECODE[decode](images.size)
        data = ImageFolder(
            str(images.folder), torch.from_numpy, loader=lambda path: planar(read(Path(path).read_bytes()))
        )
    loader = DataLoader(data, images.batch, shuffle=True)
    return lambda: (batch for batch, _ in loader)


def webdataset(images: Images, remote: str, decode: str) -> Epoch:
    from webdataset import WebDataset

    base = images.url if remote == "http" else images.work
    urls = [f"{base}/{shard}" for shard in images.shards]
    data = WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    if decode == "PIL":
        data = data.decode("pil").map(lambda sample: planar(fitted(sample["jpg"], images.size)))
    else:
        read = DECODE[decode](images.size)
        data = data.map(lambda sample: planar(read(sample["jpg"])))
    return lambda: map(np.stack, batched(data, images.batch))


def batched(samples: Any, size: int) -> Iterator[list[Any]]:
    waiting = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def litdata(images: Images, remote: str, decode: str) -> Epoch:
    import torch
    import urllib3
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.downloader import Downloader, register_downloader
    from litdata.streaming.resolver import Dir

    http = urllib3.PoolManager()

    class OverHttp(Downloader):
        def download_file(self, remote_filepath: str, local_filepath: str) -> None:
            if not os.path.exists(local_filepath):
                temporary = self._temp_download_path(local_filepath)
                with (
                    http.request("GET", remote_filepath, preload_content=False) as answer,
                    open(temporary, "wb") as file,
                ):
                    shutil.copyfileobj(answer, file, 1 << 18)
                self._atomic_replace(temporary, local_filepath)

    register_downloader("http://", OverHttp, overwrite=True)
    read = DECODE[decode](images.size)
    cache = images.root / f"litdata-cache-{decode}"

    def epoch() -> Iterator[Any]:
        source: Any = str(images.root / "litdata")
        if remote == "http":
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()
            source = Dir(path=str(cache), url=f"{images.url}/{images.name}/litdata")
        data = StreamingDataset(
            source,
            shuffle=True,
            seed=time.time_ns() % 1000,
            transform=lambda x: torch.from_numpy(planar(read(x))),
        )
        return iter(StreamingDataLoader(data, batch_size=images.batch, num_workers=0))

    return epoch


LOADERS: dict[str, Callable[[Images, str, str], Epoch]] = {
    "ours": ours,
    "ours, streaming": ours_streaming,
    "ImageFolder + DataLoader": image_folder,
    "webdataset": webdataset,
    "litdata": litdata,
}


def contend(text: str) -> None:
    """In the process of a contender: an epoch for every line that comes in."""
    contender, described, core, cpu_time = json.loads(text)
    clock = cpu_seconds if cpu_time else time.perf_counter
    os.sched_setaffinity(0, {core})
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    import torch

    torch.set_num_threads(1)
    images = Images(**described)
    epoch = LOADERS[contender["loader"]](images, contender["how"], contender["decode"])
    total = 0.0
    for number, _ in enumerate(sys.stdin):
        count, started = 0, clock()
        for batch in epoch():
            assert tuple(batch.shape[1:]) == (3, images.size, images.size)
            assert str(batch.dtype).endswith("uint8")
            count += len(batch)
            total += float(np.asarray(batch).mean()) * len(batch) if number == 0 else 0
        answer = {"images": count, "seconds": clock() - started, "mean": total / count}
        print(json.dumps(answer), file=out, flush=True)


def cpu_seconds() -> float:
    """Of this process and its children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_path(path: str) -> bytes:
    return Path(path).read_bytes()


def optimize(root: str, shard_bytes: str) -> None:
    """In litdata's environment: its chunks of the same bytes."""
    from litdata import optimize as write

    paths = json.loads((Path(root) / "paths.json").read_text())
    write(
        read_path,
        paths,
        output_dir=f"{root}/litdata",
        chunk_bytes=int(shard_bytes),
        num_workers=1,
        verbose=False,
    )


if __name__ == "__main__":
    {"contend": contend, "optimize": optimize}[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
