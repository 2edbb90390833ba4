"""What torch.compile, which trains large cells, brings: a model's step compiled and as it is, same run, interleaved.

    python tests/benchmarks/bench_compile.py [--methods simclr] [--backbone resnet18]

Steps are those of `bench_step.bare_step`. Printed, too: what the compilation takes, and the samples after which it is paid.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ratios
import torch
import training_cells
from bench_step import WARM_STEPS, bare_step
from training_cells import Setting

from ssl_diversity import loop
from ssl_diversity.methods.compiling import compile_networks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["simclr"])
    training_cells.add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    ratios.add_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting.of(args)
    rows = []
    for method in args.methods:
        modules = [setting.module(method, args.steps) for _ in range(2)]
        if why := compile_networks(modules[1], args.device, args.threads):
            raise SystemExit(f"torch cannot compile here: {why}")
        steps = [bare_step(setting, module) for module in modules]
        with loop.memory_kept():
            setting.seconds(steps[0], WARM_STEPS)
            start = time.perf_counter()
            setting.seconds(steps[1], 1)
            compiling = time.perf_counter() - start
            setting.seconds(steps[1], WARM_STEPS)
            pairs = [[setting.seconds(step, args.steps) for step in steps] for _ in range(args.rounds)]
        eager, compiled = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        paid = compiling / (eager - compiled) * args.batch if compiled < eager else float("inf")
        print(
            f"{method}, {args.backbone}, {args.size} px, batch {args.batch}, {args.device}, {args.threads} threads: "
            f"{1e3 * eager:.1f} ms as it is, {1e3 * compiled:.1f} ms compiled, {ratio:.3f} times as fast; "
            f"first step {compiling:.1f} s, paid after {paid:,.0f} samples",
            flush=True,
        )
        rows.append(ratios.Row(f"{method}, {args.backbone}: samples/s compiled to as it is", ratio))
    ratios.write(args.json, rows)


if __name__ == "__main__":
    main()
