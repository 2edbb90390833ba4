"""Training samples per second: this code against a plain lightly loop, same images, same run, interleaved.

    python tests/benchmarks/bench_training.py [--images FOLDER_OR_TAR] [--backbone resnet18] [--steps 12] [--rounds 3]
    python tests/benchmarks/bench_training.py --device cuda --steps 200 [--workers 8 16]

The peer is what one writes from lightly's documentation: its SimCLRTransform, a torchvision ImageFolder and a
DataLoader with persistent workers (two; on a GPU eight, and one for each core), SimCLRProjectionHead, NTXentLoss, and
Lightning's Trainer; the backbone, the optimiser (LARS) and the batch size are ours. Both run at float32, the peer's
default, and at bf16, ours. Without --images, patches of scikit-learn's two photographs are used.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytorch_lightning as pl
import ratios
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from training_cells import Setting, photo_pool, prefix

from ssl_diversity.backbones import build_backbone
from ssl_diversity.data.pool import Pool
from ssl_diversity.methods.optim import LARS
from ssl_diversity.runtime import cores

PRECISIONS = ("32-true", "bf16-mixed")
WARM_STEPS = 3
OUR_PRECISION = "bf16-mixed"
Who = tuple[str, int | None]  # precision; the peer's workers, None: ours
TARGETS = {"32-true": 2.3, "bf16-mixed": 1.1}  # of ours to the peer at these, on a CPU


class LightlySimCLR(pl.LightningModule):
    def __init__(self, backbone: str, size: int) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, size)
        self.head = SimCLRProjectionHead(self.backbone.dim, 2048, 256)
        self.criterion = NTXentLoss(temperature=0.2)

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        (x0, x1), _ = batch
        return self.criterion(self.head(self.backbone(x0)), self.head(self.backbone(x1)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        group = {"params": list(self.parameters()), "weight_decay": 1e-4, "eta": 0.02, "clip": True}
        return LARS([group], lr=0.4, momentum=0.9)


class Clock(pl.Callback):
    """Seconds of all steps but the first `skip` (warm-up)."""

    def __init__(self, skip: int, wait: Callable[[], None]) -> None:
        self.skip, self.wait, self.start = skip, wait, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.skip:
            self.wait()
            self.start = time.perf_counter()
        elif trainer.global_step == trainer.max_steps:
            self.wait()
            self.seconds = time.perf_counter() - self.start


def lightly_rate(folder: Path, args: argparse.Namespace, precision: str, workers: int) -> float:
    dataset = ImageFolder(str(folder), transform=SimCLRTransform(input_size=args.size))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    clock = Clock(warm_up(workers), Setting(device=args.device).wait)
    trainer = pl.Trainer(
        max_steps=args.steps + clock.skip, accelerator="cpu" if args.device == "cpu" else "gpu", devices=1,
        precision=precision, callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LightlySimCLR(args.backbone, args.size), loader)
    return args.steps * args.batch / clock.seconds


def warm_up(workers: int) -> int:
    """Steps. All workers start at once: their first batches come together, after a long wait for the first."""
    return max(WARM_STEPS, workers)


def our_rate(pool: Pool, args: argparse.Namespace, precision: str) -> float:
    setting = Setting(
        args.backbone, size=args.size, batch=args.batch, precision=precision, device=args.device
    )

    steps, warm = args.steps + WARM_STEPS, WARM_STEPS
    order = setting.order(args.batch * min(2048 // args.batch, pool.size // args.batch), steps)
    seconds = setting.fit(setting.module("simclr", steps), order, prefix(pool, order.unique_samples), warm)
    return args.steps * args.batch / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="a folder or tar of images (default: scikit-learn's photographs)")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, nargs="+", help="of the peer")
    ratios.add_option(parser)
    args = parser.parse_args()
    workers = args.workers or ([2] if args.device == "cpu" else sorted({8, cores()}))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SSL_DIVERSITY_HOME"] = temporary
        pool = photo_pool(args.size, args.images)
        folder = Path(temporary) / "files" / "all"
        folder.mkdir(parents=True)
        wanted = (args.steps + warm_up(max(workers))) * args.batch  # an epoch's end stops all workers
        for row, image in enumerate(pool.images(np.arange(max(2048, wanted)) % pool.size)):
            Image.fromarray(image).save(folder / f"{row}.png")
        rates: dict[Who, list[float]] = defaultdict(list)
        for _ in range(args.rounds):
            for precision in PRECISIONS:
                for n in workers:
                    rates[precision, n].append(lightly_rate(folder.parent, args, precision, n))
                rates[precision, None].append(our_rate(pool, args, precision))
    print(
        f"SimCLR, {args.backbone}, {args.size} px, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    peers = [key for key in rates if key[1] is not None]
    for key, values in rates.items():
        ratios_to = " ".join(f"{ratio(values, rates[peer]):.2f} ({label(*peer)})" for peer in peers)
        print(f"{label(*key):30} {statistics.median(values):8.1f} samples/s   to {ratios_to}")
    ours = rates[OUR_PRECISION, None]
    rows = [
        ratios.Row(
            f"ours ({OUR_PRECISION}) to {label(*peer)}",
            ratio(ours, rates[peer]),
            at_least=TARGETS[peer[0]] if args.device == "cpu" else None,
        )
        for peer in peers
    ]
    ratios.write(args.json, rows)


def label(precision: str, workers: int | None) -> str:
    return f"lightly, {precision}, {workers} workers" if workers else f"ours, {precision}"


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
