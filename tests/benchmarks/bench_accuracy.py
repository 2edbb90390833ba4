"""Does the default path (bf16, and all that makes training fast) cost accuracy? Against plain float32, seeds paired.

    python tests/benchmarks/bench_accuracy.py [--images cifar10.tar] [--budget 131072] [--seeds 5]

Both cells of a pair share the method, the images, C, N and the seed: they differ in precision alone. Frozen features are
probed by kNN and linearly, trained on the first --bank training images, tested on all test images. Prints, per method and
probe, both means and the mean difference in points with its 95 % t-interval over seeds. Without --images: handwritten digits.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import ratios
import torch

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import Subset
from ssl_diversity.evaluation.config import ProbeSettings
from ssl_diversity.evaluation.knn import knn
from ssl_diversity.evaluation.labels import Labelled
from ssl_diversity.evaluation.linear import linear
from ssl_diversity.features import embed_images, load_weights
from ssl_diversity.methods.recipe import load_recipe
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, pretrain

PATHS = {"optimised": "bf16-mixed", "plain": "32-true"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="a tree or tar with train/ and test/, a folder for each class")
    parser.add_argument("--methods", nargs="+", default=["simclr", "barlow_twins"])
    parser.add_argument("--backbone", default="conv-tiny")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budget", type=int, default=131072, help="C")
    parser.add_argument("--unique", type=int, default=32768, help="N, at most what there is")
    parser.add_argument("--bank", type=int, default=10000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    ratios.add_option(parser)
    return parser


def accuracies(
    method: str, precision: str, seed: int, pools: tuple[Pool, Pool], args: argparse.Namespace
) -> tuple[float, float]:
    """(kNN, linear), in percent."""
    train, test = pools
    subset = Subset(((train, train.rows(min(args.unique, train.size))),))
    spec = CellSpec(
        method=method,
        backbone=args.backbone,
        recipe=load_recipe(method, budget_samples=args.budget, image_size=args.size),
        image_size=args.size,
        parts=subset.specs,
        rows_digest=subset.digest,
        unique_samples=len(subset),
        budget=args.budget,
        batch_size=args.batch,
        seed=seed,
        precision=precision,
    )
    with tempfile.TemporaryDirectory() as out:
        pretrain(spec, Path(out), Runtime(device=args.device, threads=args.threads))
        network = load_weights(Path(out) / "weights.pt")
    features, labels = [], []
    for pool, rows in ((train, min(args.bank, train.size)), (test, test.size)):
        embedded = embed_images(pool.images(np.arange(rows)), network, device=args.device)
        features.append(torch.from_numpy(embedded))
        labels.append(torch.tensor(np.asarray(pool.label[:rows]), dtype=torch.int64))
    data = Labelled(features[0], labels[0], features[1], labels[1], names=tuple(train.info.classes))
    settings = ProbeSettings()
    return 100 * knn(data, settings).accuracy, 100 * linear(data, settings, 0).accuracy


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as home:
        os.environ["SSL_DIVERSITY_HOME"] = home
        source = ("folder", {"path": args.images}) if args.images else ("digits", {})
        train, test = (
            prepare(
                recipes.resolve(source[0], {**source[1], "split": split}, defaults={"size": args.size}),
                processes=2,
            )
            for split in ("train", "test")
        )
        print(
            f"{train.name}, {args.backbone}, {args.size} px, C = {args.budget}, N = {min(args.unique, train.size)}, "
            f"batch {args.batch}, {args.seeds} seeds, {test.size} test images"
        )
        rows = []
        for method in args.methods:
            found = {
                path: [accuracies(method, precision, seed, (train, test), args) for seed in range(args.seeds)]
                for path, precision in PATHS.items()
            }
            for index, probe in enumerate(("knn", "linear")):
                optimised, plain = ([values[index] for values in found[path]] for path in PATHS)
                differences = [a - b for a, b in zip(optimised, plain, strict=True)]
                mean, low, high = ratios.interval(differences)
                rows.append(ratios.Row(f"{method}, {probe}", mean, "points", low, high, at_least=-1, below=1))
                print(
                    f"{method:12} {probe:6} optimised {statistics.mean(optimised):.2f} plain {statistics.mean(plain):.2f} "
                    f"difference {mean:+.2f} ({low:+.2f} to {high:+.2f}) points; "
                    f"by seed {' '.join(f'{d:+.2f}' for d in differences)}",
                    flush=True,
                )
    ratios.write(args.json, rows)


if __name__ == "__main__":
    main()
