"""What the training benchmarks share: a pool that needs no download, a cell's module, `loop.fit` on so many steps."""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from ssl_diversity import loop, methods
from ssl_diversity.data import recipes
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.reading import Reader, open_reader
from ssl_diversity.data.subset import Subset
from ssl_diversity.methods.base import Method
from ssl_diversity.methods.recipe import load_recipe
from ssl_diversity.runtime import Runtime


@dataclass(frozen=True)
class Setting:
    """Everything about a cell but its method, its N and its number of steps."""

    backbone: str = "resnet18"
    vit: str = "vit-s"
    recipe: str = "small"
    size: int = 32
    batch: int = 256
    precision: str = "bf16-mixed"
    device: str = "cpu"

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """As `add_options` was answered."""
        return cls(args.backbone, args.vit, args.recipe, args.size, args.batch, args.precision, args.device)

    def module(self, method: str, steps: int, seed: int = 0) -> Method:
        budget = steps * self.batch
        return methods.build(
            method,
            backbone=self.vit if method == "mae" else self.backbone,
            image_size=self.size,
            recipe=load_recipe(method, self.recipe, budget_samples=budget, image_size=self.size),
            budget=budget,
            batch_size=self.batch,
            seed=seed,
        ).train()

    def order(self, unique: int, steps: int, seed: int = 0) -> GlobalOrder:
        order = GlobalOrder(unique, self.batch, seed, max(unique, steps * self.batch))
        order.steps = steps
        return order

    def fit(self, module: Method, order: GlobalOrder, reader: Reader, warm_up: int = 0) -> float:
        """Seconds of `module`'s training on the steps of `order`, as a cell is trained, the first `warm_up` left out."""
        ends = [time.perf_counter()]

        def stop() -> bool:  # asked after every step
            if len(ends) in (warm_up, order.steps):
                self.wait()
            ends.append(time.perf_counter())
            return False

        with tempfile.TemporaryDirectory() as out:
            whole = loop.fit(
                module,
                order=order,
                reader=reader,
                out=Path(out),
                runtime=Runtime(device=self.device, threads=torch.get_num_threads(), stop=stop),
                precision=self.precision,
                checkpoint_samples=10**12,
            )
        return ends[-1] - ends[warm_up] if warm_up else whole.seconds

    def seconds(self, function: Callable[[], object], repeats: int = 1) -> float:
        """Per call."""
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What benchmarks of single steps are asked for."""
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--vit", default="vit-s", help="MAE's backbone")
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=3, help="per round")


def photo_pool(size: int, path: str | None = None, patch: int = 16) -> Pool:
    """Patches of scikit-learn's photographs, or the images of a folder or tar, in the current home."""
    source, options = ("folder", {"path": path}) if path else ("photo_patches", {"patch": patch})
    return prepare(recipes.resolve(source, options, defaults={"size": size}), processes=2)


def prefix(pool: Pool, unique: int) -> Reader:
    """A resident reader of the first `unique` images."""
    return open_reader(Subset(((pool, pool.rows(unique)),)), tier="resident")


def autocast(setting: Setting) -> contextlib.AbstractContextManager[None]:
    """Mixed precision as Lightning sets it."""
    if setting.precision == "32-true":
        return contextlib.nullcontext()
    return torch.autocast(setting.device.split(":")[0], torch.bfloat16, cache_enabled=False)  # type: ignore[return-value]
