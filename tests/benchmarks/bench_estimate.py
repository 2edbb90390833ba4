"""How well `plan` tells the time: a small quickstart is run once, then larger ones are planned and run.

    python tests/benchmarks/bench_estimate.py [--budget 2048] [--methods simclr,mae]

In a home of its own. Printed: what the plan said, what it took, their ratio, by the clock and in worker seconds.
"""

import argparse
import io
import os
import tempfile
import time
from math import nan

import ratios
from rich.console import Console

from ssl_diversity.sweep import config, launch
from ssl_diversity.sweep.forecast import Forecast
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import Profile, load_profile
from ssl_diversity.sweep.store import result
from ssl_diversity.sweep.task import Task

FIRST = "first run"  # measures what the others are planned from


def run(texts: list[str], profile: Profile) -> tuple[float, float]:
    """(seconds by the clock, seconds of all tasks)"""
    asked = config.load("quickstart", texts)
    before = {task.id for task in expand(asked).tasks if has_result(task)}
    quiet, start = Console(file=io.StringIO()), time.monotonic()
    code = launch.run(asked, profile, console=quiet)
    took = time.monotonic() - start
    if code:
        raise SystemExit(quiet.file.getvalue())  # type: ignore[attr-defined]
    tasks = [task for task in expand(asked).tasks if task.id not in before]
    return took, sum(result(task)["run"]["seconds"] for task in tasks if has_result(task))  # type: ignore[index]


def has_result(task: Task) -> bool:
    return (task.folder / "result.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--methods", default="simclr,mae")
    parser.add_argument("--sources", default="digits,photo_patches,generated-digits")
    parser.add_argument("--profile", default="local")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    ratios.add_option(parser)
    args = parser.parse_args()
    profile = load_profile(args.profile)
    if args.device != "auto":
        profile = profile.model_copy(update={"device": args.device})
    common = [f"methods=[{args.methods}]", f"sources=[{args.sources}]"]
    asked = {
        FIRST: (args.budget, [64, 1024]),
        "budget x2, more N": (2 * args.budget, [64, 256, 1024]),
        "budget x8": (8 * args.budget, [64, 1024]),
    }
    rows = []
    print(f"{'':20} {'planned':>10} {'took':>10} {'ratio':>7}   {'work':>10} {'took':>10} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as home:
        os.environ["SSL_DIVERSITY_HOME"] = home
        for name, (budget, unique) in asked.items():
            texts = [*common, f"budget={budget}", f"unique_samples={unique}".replace(" ", "")]
            said = Forecast(expand(config.load("quickstart", texts)), profile)
            planned = (said.wall_s, sum(said.worker_s.values())) if not said.left.unknown else (nan, nan)
            pairs = list(zip(planned, run(texts, profile), strict=True))
            print(
                f"{name:20}",
                *(f"{p:8.1f} s {took:8.1f} s {p / took:7.2f}  " for p, took in pairs),
                flush=True,
            )
            if name != FIRST:
                rows += [
                    ratios.Row(f"{name}, {what}", p / took, at_least=0.8, below=1.2)
                    for what, (p, took) in zip(("by the clock", "in worker seconds"), pairs, strict=True)
                ]
    ratios.write(args.json, rows)


if __name__ == "__main__":
    main()
