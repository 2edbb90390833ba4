"""Evaluation keeps pace: features, linear probe and kNN of a large downstream set against a cell of C = 5e6, same device.

    python tests/benchmarks/bench_evaluation.py [--backbone resnet18 --size 32]

Rates are measured on what takes minutes and extrapolated linearly: training and embedding in images, the linear probe's
grid in training images, kNN in test images (each against the full training set). Images are noise: their content costs
nothing; features that are probed are classes that overlap (Gaussian, with correlated axes).
"""

import argparse
import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import ratios
import torch
from training_cells import Setting, photo_pool, prefix

from ssl_diversity.evaluation.config import ProbeSettings
from ssl_diversity.evaluation.knn import knn
from ssl_diversity.evaluation.labels import Labelled
from ssl_diversity.evaluation.linear import linear
from ssl_diversity.features import embed_images, random_network

WARM_STEPS = 2


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=5e6)
    parser.add_argument("--train", type=int, default=50_000, help="labelled images")
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--share", type=int, default=10, help="probes: measure on one in so many")
    parser.add_argument("--embedded", type=int, default=1024, help="features: measure on so many images")
    parser.add_argument("--steps", type=int, default=4, help="training: measure on so many steps")
    ratios.add_option(parser)
    return parser


def overlapping(train: int, test: int, classes: int, dim: int, device: str) -> Labelled:
    """About 80 % can be told apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (train + test,), generator=generator)
    axes = torch.randn(dim, dim, generator=generator) / dim**0.5
    means = torch.randn(classes, dim, generator=generator) * 1.5 / dim**0.25
    features = (torch.randn(train + test, dim, generator=generator) + means[labels]) @ axes
    features, labels = features.half().to(device), labels.to(device)
    names = tuple(map(str, range(classes)))
    return Labelled(features[:train], labels[:train], features[train:], labels[train:], names)


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(args.backbone, recipe=args.recipe, size=args.size, batch=args.batch, device=args.device)
    images = np.random.default_rng(0).integers(0, 256, (args.embedded, args.size, args.size, 3), np.uint8)
    network = random_network(args.backbone, 0, args.size, images[:256])
    dim = embed_images(images[:256], network, device=args.device).shape[1]
    few = overlapping(args.train // args.share, args.test, args.classes, dim, args.device)
    many = overlapping(args.train, args.test // args.share, args.classes, dim, args.device)
    with tempfile.TemporaryDirectory() as home:
        os.environ["SSL_DIVERSITY_HOME"] = home
        pool = photo_pool(args.size)
        reader = prefix(pool, args.batch * 2)

        steps = args.steps + WARM_STEPS
        order = setting.order(2 * args.batch, steps)
        trained = setting.fit(setting.module(args.method, steps), order, reader, WARM_STEPS)
        training = trained / (args.steps * args.batch) * args.budget
    whole = (args.train + args.test) / len(images)
    settings = ProbeSettings()
    costs = {
        "features": whole * setting.seconds(lambda: embed_images(images, network, device=args.device)),
        "linear probe": args.share * setting.seconds(lambda: linear(few, settings, 0)),
        "kNN": args.share * setting.seconds(lambda: knn(many, settings)),
    }
    print(
        f"{args.method}, {args.backbone}, {args.size} px, batch {args.batch}, {args.device}, {args.threads} threads; "
        f"{args.train} + {args.test} images, {args.classes} classes, {dim} features"
    )
    print(f"a cell of C = {args.budget:.0f}: {training:,.0f} s")
    costs["all"] = sum(costs.values())
    for name, cost in costs.items():
        print(f"{name:12} {cost:8.1f} s   {100 * cost / training:5.2f} % of the cell's")
    rows = [
        ratios.Row(name, 100 * cost / training, "%", below=10 if name == "all" else None)
        for name, cost in costs.items()
    ]
    ratios.write(args.json, rows)


if __name__ == "__main__":
    main()
