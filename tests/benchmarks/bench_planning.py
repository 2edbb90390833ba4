"""`plan` and `status` of a sweep of many thousands of cells, from process start to exit, in a home of its own.

    python tests/benchmarks/bench_planning.py [SEEDS]

420 cells per seed (7 methods, 10 N, 6 C), each with probes on 10 downstream sets; by default 48 seeds, about
20,000 cells. Nothing is trained: for `half` and `all` the store's index of results is filled. File-system calls
are those that strace counts with `trace=file`, apart for what Python itself does to import its modules.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from ssl_diversity.config import read_yaml
from ssl_diversity.data.prepare import prepare
from ssl_diversity.files import REPOSITORY
from ssl_diversity.sweep import config
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.remaining import Remaining
from ssl_diversity.sweep.store import Done, _Folder, store_dir
from ssl_diversity.sweep.task import Task

SETS, IMAGES = 10, {"train": 400, "test": 20}  # per class of two


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 48
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        os.environ["SSL_DIVERSITY_HOME"] = str(home)
        path = write_sweep(home, seeds)
        sweep = config.load(str(path))
        prepare_sets(sweep)
        command("plan", path)  # counts the FLOPs of the networks, once
        planned = expand(sweep)
        print(f"{len(planned.cells):,} cells, {len(planned.tasks):,} tasks")
        kept = [task for task in planned.tasks if task.output is None]
        fill(())
        for state, done in (("none done", []), ("half done", kept[::2]), ("all done", kept)):
            fill(done)
            for name in ("plan", "status"):
                wall_s, cpu_s, peak_mib = command(name, path)
                own, imports = calls(name, path, home)
                print(
                    f"{state:10} {name:6} {wall_s:5.2f} s, CPU {cpu_s:5.2f} s, {peak_mib:4.0f} MiB,"
                    f" {own:,} file-system calls and {imports:,} of imports"
                )
        fill(kept[::2])
        looks(sweep, kept)


def write_sweep(home: Path, seeds: int) -> Path:
    """The sweep's file, and the images of its downstream sets."""
    random = np.random.default_rng(0)
    for number in range(SETS):
        for split, count in IMAGES.items():
            for label in ("a", "b"):
                folder = home / "labelled" / f"set{number}" / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    sets = {
        path.name: {"recipe": "folder", "path": str(path)} for path in sorted((home / "labelled").iterdir())
    }
    values = read_yaml(REPOSITORY / "configs" / "sweeps" / "quickstart.yaml") | {
        "name": "large",
        "sources": ["digits"],
        "downstream": sets,
        "unique_samples": [64, 128, 192, 256, 320, 384, 448, 512, 640, 768],
        "budget": [1024, 2048, 4096, 8192, 16384, 32768],
        "seeds": seeds,
    }
    path = home / "large.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return path


def prepare_sets(sweep: SweepConfig) -> None:
    for task in expand(sweep.model_copy(update={"methods": ("simclr",), "seeds": (0,)})).tasks:
        if task.kind == "prepare":
            prepare(task.spec)  # type: ignore[arg-type]


def fill(tasks: "list[Task] | tuple[Task, ...]") -> None:
    """Mark tasks as done."""
    for task in tasks:
        path = store_dir() / "done" / task.kind / task.key[:2] / task.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def arguments(name: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "ssl_diversity", name, str(path)]


def command(name: str, path: Path) -> tuple[float, float, float]:
    """Seconds of wall time and of CPU, peak resident MiB."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments(name, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, code, used = os.wait4(process.pid, 0)
    assert code == 0, f"{name} failed"
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def calls(name: str, path: Path, home: Path) -> tuple[int, int]:
    """File-system calls on the home and on the repository's YAML files; all others."""
    log = home / "strace.log"
    trace = ["strace", "-f", "-y", "-e", "trace=file", "-o", str(log)]
    subprocess.run([*trace, *arguments(name, path)], check=True, capture_output=True)
    lines = [line for line in log.read_text().splitlines() if "(" in line]
    own = sum(str(home) in line or ".yaml" in line or '/datasets"' in line for line in lines)
    return own, len(lines) - own


def looks(sweep: SweepConfig, tasks: list[Task]) -> None:
    """What a worker pays to see what is left: at first, again, and after a task was done."""
    planned, done, remaining = expand(sweep), Done(), Remaining(since=0.0, max_attempts=1)
    times = []
    for number, task in enumerate(tasks[1:400:20]):
        if number < 3:  # what was listed a moment ago is listed again
            time.sleep(_Folder.GRANULARITY_S + 0.1)
        began = time.perf_counter()
        done.refresh()
        remaining.look(planned, done)
        times.append(time.perf_counter() - began)
        done.add(task.kind, task.key)
    print(f"a worker's looks: first {times[0]:.2f} s, later {1e3 * float(np.median(times[4:])):.0f} ms")


if __name__ == "__main__":
    main()
