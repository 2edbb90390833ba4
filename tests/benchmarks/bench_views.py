"""Views per second of SimCLR's recipe: `make_views` against lightly's `SimCLRTransform` (PIL, image by image).

    python tests/benchmarks/bench_views.py --threads 1

Both make two views of the same images with the same parameters, in turns; each figure is a median over rounds.
"""

import argparse
import os
from collections.abc import Callable
from statistics import median
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from lightly.transforms import SimCLRTransform
from PIL import Image

from ssl_diversity.views import ViewSpec
from ssl_diversity.views.augment import make_views

SIMCLR = ViewSpec(
    count=2,
    crop_scale=(0.08, 1.0),
    flip=0.5,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32], help="image sides, in pixels")
    parser.add_argument("--batch", type=int, default=256, help="images per batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    return parser


def views_per_second(size: int, batch: int, rounds: int) -> tuple[float, float]:
    """(ours, lightly's)."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    positions = torch.arange(batch)
    pil = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]
    transform = SimCLRTransform(input_size=size)

    def ours() -> None:
        make_views(images, [SIMCLR], 0, positions)

    def theirs() -> None:
        views = [transform(image) for image in pil]
        for view in range(2):
            torch.stack([pair[view] for pair in views])

    ours()
    theirs()
    times = [(seconds(ours, repeats=10), seconds(theirs, repeats=1)) for _ in range(rounds)]
    mine, reference = (2 * batch / median(column) for column in zip(*times, strict=True))
    return mine, reference


def seconds(function: Callable[[], None], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        function()
    return (perf_counter() - start) / repeats


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    print(f"SimCLR's views, batch {args.batch}, threads {args.threads}, torch {torch.__version__}")
    for size in args.sizes:
        ours, theirs = views_per_second(size, args.batch, args.rounds)
        print(
            f"{size} px: make_views {ours:,.0f} views/s, lightly {theirs:,.0f} views/s, ratio {ours / theirs:.1f}"
        )


if __name__ == "__main__":
    main()
