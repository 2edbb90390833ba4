"""Small N costs what large N costs: seconds of training with N = 512 over those with N = C, same C, interleaved pairs.

    python tests/benchmarks/bench_small_n.py

A small backbone (conv-tiny, 16 px), on which whatever reading costs shows most; N counts 4 px patches of
scikit-learn's photographs. Prints the mean ratio with its 95 % t-interval; within a pair either goes first in turns.
"""

import argparse
import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ratios
import torch
from training_cells import Setting, photo_pool, prefix


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--small", type=int, default=512)
    parser.add_argument("--steps", type=int, default=960, help="C over the batch size")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    ratios.add_option(parser)
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting("conv-tiny", "vit-micro", "quick", 16, args.batch, device=args.device)
    with tempfile.TemporaryDirectory() as home:
        os.environ["SSL_DIVERSITY_HOME"] = home
        pool = photo_pool(setting.size, patch=2)
        samples = args.steps * args.batch
        readers = {n: prefix(pool, n) for n in (args.small, samples)}

        def seconds(unique: int, steps: int = args.steps) -> float:
            module = setting.module(args.method, steps)
            return setting.fit(module, setting.order(unique, steps), readers[unique])

        seconds(args.small, steps=args.small // args.batch)
        pairs = []
        for pair in range(args.pairs):
            first, second = (args.small, samples) if pair % 2 else (samples, args.small)
            taken = {first: seconds(first), second: seconds(second)}
            pairs.append(taken[args.small] / taken[samples])
            print(
                f"N = {args.small}: {taken[args.small]:.2f} s   N = C = {samples}: {taken[samples]:.2f} s",
                flush=True,
            )
    mean, low, high = ratios.interval(pairs)
    print(f"ratio {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    what = f"seconds at N = {args.small} to those at N = C = {samples}, {args.method}"
    ratios.write(args.json, [ratios.Row(what, mean, low=low, high=high, below=1.03)])


if __name__ == "__main__":
    main()
