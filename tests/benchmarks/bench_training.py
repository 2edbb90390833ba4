"""Training samples per second: this code against a plain lightly loop, same images, same run, interleaved.

    python tests/benchmarks/bench_training.py [--images FOLDER_OR_TAR] [--backbone resnet18] [--steps 12] [--rounds 3]

The peer is what one writes from lightly's documentation: its SimCLRTransform, a torchvision ImageFolder and a
DataLoader with two persistent workers, SimCLRProjectionHead, NTXentLoss, and Lightning's Trainer; the backbone,
the optimiser (LARS) and the batch size are ours. Both run at float32, the peer's default, and at bf16, ours.
Without --images, patches of scikit-learn's two photographs are used.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
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

PRECISIONS = ("32-true", "bf16-mixed")


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
    """Seconds per step, the first ones (warm-up) left out."""

    def __init__(self, skip: int = 3) -> None:
        self.skip, self.steps, self.start = skip, 0, 0.0

    def on_train_batch_end(self, trainer, *args) -> None:  # type: ignore[no-untyped-def]
        self.steps += 1
        if self.steps == self.skip:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - self.start


def lightly_rate(folder: Path, args: argparse.Namespace, precision: str) -> float:
    dataset = ImageFolder(str(folder), transform=SimCLRTransform(input_size=args.size))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=args.steps + clock.skip, accelerator="cpu", precision=precision, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LightlySimCLR(args.backbone, args.size), loader)
    return args.steps * args.batch / clock.seconds


def our_rate(pool: Pool, args: argparse.Namespace, precision: str) -> float:
    setting = Setting(args.backbone, size=args.size, batch=args.batch, precision=precision)

    def seconds(steps: int) -> float:
        order = setting.order(args.batch * min(2048 // args.batch, pool.size // args.batch), steps)
        return setting.fit(setting.module("simclr", steps), order, prefix(pool, order.unique_samples)).seconds

    few, many = 3, args.steps + 3  # the difference leaves the warm-up out, as for the peer
    return args.steps * args.batch / (seconds(many) - seconds(few))


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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SSL_DIVERSITY_HOME"] = temporary
        pool = photo_pool(args.size, args.images)
        folder = Path(temporary) / "files" / "all"
        folder.mkdir(parents=True)
        for row, image in enumerate(pool.images(range(min(pool.size, 2048)))):
            Image.fromarray(image).save(folder / f"{row}.png")
        rates: dict[str, list[float]] = {f"{who}, {p}": [] for who in ("lightly", "ours") for p in PRECISIONS}
        for _ in range(args.rounds):
            for precision in PRECISIONS:
                rates[f"lightly, {precision}"].append(lightly_rate(folder.parent, args, precision))
                rates[f"ours, {precision}"].append(our_rate(pool, args, precision))
    print(
        f"SimCLR, {args.backbone}, {args.size} px, batch {args.batch}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name, values in rates.items():
        ratios = " ".join(
            f"{statistics.median(v / p for v, p in zip(values, rates[f'lightly, {precision}'], strict=True)):22.2f}"
            for precision in PRECISIONS
        )
        print(
            f"{name:20} {statistics.median(values):8.1f} samples/s   to lightly's at {' and '.join(PRECISIONS)}: {ratios}"
        )


if __name__ == "__main__":
    main()
