"""Share of the bare step: samples/s of a cell's training against those of its model alone, same run, interleaved.

    python tests/benchmarks/bench_step.py                                             ResNet-18, 32 px, batch 256
    python tests/benchmarks/bench_step.py --backbone conv-tiny --vit vit-micro --recipe quick --size 16 --batch 64 --steps 60

A cell's training is `loop.fit` (reading, views, schedules, teachers, Lightning). The bare step of the same module is
forward, criterion, backward and optimiser on fixed views already made, in the same precision, memory format and use of
memory (`loop.memory_kept`).
Then, of one step: the bare step, views, reading (which a thread does beside it), the teachers' update, and the rest.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ratios
import torch
import training_cells
from training_cells import Setting, autocast, photo_pool, prefix

from ssl_diversity import loop
from ssl_diversity.data.batches import Batches
from ssl_diversity.data.pool import Pool
from ssl_diversity.methods.base import Method
from ssl_diversity.methods.recipe import METHODS
from ssl_diversity.views.augment import make_views

WARM_STEPS = 2


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    training_cells.add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    ratios.add_option(parser)
    return parser


def bare_step(setting: Setting, module: Method) -> Callable[[], None]:
    """One step of `module` on views that are there already."""
    module.to(setting.device)
    optimizer = module.configure_optimizers()
    images = torch.randint(0, 256, (setting.batch, 3, setting.size, setting.size), dtype=torch.uint8)
    positions = torch.arange(setting.batch, device=setting.device)
    views = make_views(images.to(setting.device), module.recipe.views, 0, positions)

    def step() -> None:
        with autocast(setting):
            loss = module.loss_of(views, positions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def parts(setting: Setting, pool: Pool, method: str, steps: int) -> dict[str, float]:
    """Seconds per step of what a cell does beside the bare step, each alone."""
    module = setting.module(method, steps).to(setting.device)
    order = setting.order(unique(setting, pool, steps), steps)
    batch = torch.randint(0, 256, (setting.batch, 3, setting.size, setting.size), dtype=torch.uint8)
    batch, positions = batch.to(setting.device), torch.arange(setting.batch, device=setting.device)
    reader = prefix(pool, order.unique_samples)
    return {
        "views": setting.seconds(
            lambda: make_views(batch, module.recipe.views, 0, positions), min(steps, 20)
        ),
        "teachers": setting.seconds(module.update_teachers, min(steps, 20)),
        "reading": setting.seconds(lambda: list(Batches(order, reader)), 1) / steps,
    }


def unique(setting: Setting, pool: Pool, steps: int) -> int:
    return setting.batch * min(pool.size // setting.batch, steps)


def measure(setting: Setting, pool: Pool, method: str, steps: int, rounds: int) -> float:
    """The share; prints its line."""
    order = setting.order(unique(setting, pool, steps), steps + WARM_STEPS)
    reader = prefix(pool, order.unique_samples)
    bare = bare_step(setting, setting.module(method, steps))
    setting.seconds(bare, WARM_STEPS)
    pairs = []
    for _ in range(rounds):
        with loop.memory_kept():
            bare()
            alone = setting.seconds(bare, steps)
        whole = setting.fit(setting.module(method, order.steps), order, reader, WARM_STEPS)
        pairs.append((alone, whole / steps))
    model, cell = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(alone / whole for alone, whole in pairs)
    beside = parts(setting, pool, method, steps)
    rest = cell - model - beside["views"] - beside["teachers"]
    columns = (cell, model, beside["views"], beside["teachers"], rest, beside["reading"])
    print(
        f"{method:12} {setting.batch / cell:9.1f} {setting.batch / model:9.1f} {100 * share:6.1f} %  "
        + " ".join(f"{1e3 * value:9.2f}" for value in columns),
        flush=True,
    )
    return share


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting.of(args)
    print(
        f"{args.backbone} (MAE: {args.vit}), {args.size} px, batch {args.batch}, {args.recipe} recipes, {args.precision}, "
        f"{args.device}, {args.threads} threads, {args.rounds} rounds of {args.steps} steps, torch {torch.__version__}"
    )
    print(" " * 12 + "   samples/s             share of   ms per step, of which" + " " * 33 + "beside it")
    print(
        " " * 12
        + "      cell      bare the bare       cell      bare     views  teachers      rest   reading"
    )
    with tempfile.TemporaryDirectory() as home:
        os.environ["SSL_DIVERSITY_HOME"] = home
        pool = photo_pool(args.size)
        shares = {method: measure(setting, pool, method, args.steps, args.rounds) for method in args.methods}
    rows = [ratios.Row(method, 100 * share, "%", at_least=90) for method, share in shares.items()]
    ratios.write(args.json, rows)


if __name__ == "__main__":
    main()
