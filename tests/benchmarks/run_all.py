"""The table of ratios: runs its benchmarks one after another, prints their rows, and keeps them in docs/benchmarks.md.

    make bench                                                         on the CPU
    make bench DEVICE=cuda
    python tests/benchmarks/run_all.py --only step accuracy --images cifar10.tar
    python tests/benchmarks/run_all.py --quick                         a smoke run: tiny sizes, nothing written

Each is a process of its own. As soon as one has finished, its rows replace those that the device's section holds of it;
those of the others stay, with the date, machine, versions and command that they were measured with. Exits with 1 if one
has failed.
"""

import argparse
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ratios

from ssl_diversity.files import write_atomic
from ssl_diversity.runtime import cores, processor

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs" / "benchmarks.md"
SMALL = "--backbone conv-tiny --size 16"
PACKAGES = ("torch", "lightly", "pytorch-lightning")


@dataclass(frozen=True)
class Benchmark:
    """bench_<name>.py, its heading in the docs, and its arguments where they are not its defaults, a CPU's."""

    title: str
    cuda: str = ""
    quick: str = ""


BENCHMARKS = {
    "training": Benchmark(
        "Against a plain lightly loop",
        cuda="--steps 200",
        quick=f"{SMALL} --batch 32 --steps 2 --rounds 1",
    ),
    "step": Benchmark(
        "Share of the bare step",
        cuda="--steps 60",
        quick=f"{SMALL} --vit vit-micro --recipe quick --batch 32 --steps 2 --rounds 1",
    ),
    "compile": Benchmark(
        "torch.compile, in cells of C >= 4e6",
        cuda="--steps 100",
        quick=f"{SMALL} --recipe quick --batch 32 --steps 2 --rounds 1",
    ),
    "small_n": Benchmark(
        "Small N costs what large N costs",
        quick="--steps 8 --small 64 --batch 32 --pairs 2",
    ),
    "accuracy": Benchmark(
        "Accuracy, optimised less plain float32",
        quick="--budget 256 --unique 256 --bank 200 --seeds 2",
    ),
    "evaluation": Benchmark(
        "Evaluation, in a cell of C = 5e6",
        cuda="--steps 200 --embedded 20000 --share 1",
        quick=f"{SMALL} --recipe quick --batch 32 --train 1000 --test 200",
    ),
    "estimate": Benchmark(
        "What `plan` says, to what it takes",
        quick="--budget 1024 --methods simclr --sources digits",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--images", metavar="PATH", help="labelled images for `accuracy`")
    parser.add_argument("--docs", type=Path, help="default: docs/benchmarks.md; with --quick none")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    docs: Path | None = args.docs or (None if args.quick else DOCS)
    try:
        if docs:
            ratios.section(docs.read_text(), args.device)
    except (OSError, ValueError) as error:
        parser.error(f"{docs}: {error}")
    measured_on = setting(args.device)
    printed, failed = [], []
    for name in (name for name in BENCHMARKS if name in args.only):
        command = [f"bench_{name}.py", *arguments(name, args)]
        print(f"\n== {shlex.join(command)}", flush=True)
        rows = run(command)
        if rows is None:
            print(f"== {name} failed: its rows stay as they were", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        body = f"{datetime.date.today()}, {measured_on}:\n`{shown(command)}`\n\n{ratios.table(rows)}"
        printed.append(f"#### {BENCHMARKS[name].title}\n\n{body}\n")
        if docs:
            titles = [benchmark.title for benchmark in BENCHMARKS.values()]
            text = docs.read_text()
            write_atomic(docs, ratios.replaced(text, args.device, BENCHMARKS[name].title, body, titles))
    print("\n" + "\n".join(printed))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def arguments(name: str, args: argparse.Namespace) -> list[str]:
    benchmark = BENCHMARKS[name]
    sizes = benchmark.quick if args.quick else benchmark.cuda if args.device == "cuda" else ""
    images = ["--images", args.images] if args.images and name == "accuracy" else []
    return ["--device", args.device, *sizes.split(), *images]


def run(command: list[str]) -> list[ratios.Row] | None:
    """Its rows, its output having gone to the terminal; None if it failed."""
    script, *options = command
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        ended = subprocess.run(
            [sys.executable, "-u", FOLDER / script, *options, "--json", rows], check=False
        ).returncode
        return ratios.read(rows) if ended == 0 and rows.exists() else None


def shown(command: list[str]) -> str:
    """The command as one types it, files of this machine by their names alone."""
    script, *options = command
    names = [Path(option).name if "/" in option else option for option in options]
    return shlex.join(["python", f"tests/benchmarks/{script}", *names])


def setting(device: str) -> str:
    """Machine and versions."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"{machine(device)}; Python {platform.python_version()}, {', '.join(versions)}"


def machine(device: str) -> str:
    cpu = f"{processor() or platform.machine()}, {cores()} cores"
    if device == "cpu":
        return cpu
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here")
    return f"{torch.cuda.get_device_name()}; {cpu}"


if __name__ == "__main__":
    sys.exit(main())
