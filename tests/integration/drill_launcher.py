"""Runs a sweep as the command does, its cells leaving a line for every step that they train.

python drill_launcher.py PROFILE [--fakes] [--detach] [KEY=VALUE]...

With --fakes, tasks cost nothing and leave a line for every execution (tests/sweep/sweep_fakes.py).
"""

import os
import sys
from pathlib import Path
from typing import Any

from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec


def steps_folder() -> Path:
    return Path(os.environ["SSL_DIVERSITY_HOME"]) / "steps"


def pretrain(spec: CellSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """`train.pretrain`; steps/<process>.log has a line of samples for every step of this life of the cell."""
    from ssl_diversity import loop, train

    trained = loop._Guard.on_train_batch_end
    steps_folder().mkdir(exist_ok=True)
    name = f"{os.environ.get('SLURM_JOB_ID', 'local')}-{os.getpid()}.log"
    with (steps_folder() / name).open("a", buffering=1) as log:

        def count(guard: Any, trainer: Any, *rest: Any) -> None:
            log.write(f"{out.name} {spec.batch_size}\n")
            trained(guard, trainer, *rest)

        loop._Guard.on_train_batch_end = count  # type: ignore[method-assign]
        try:
            return train.pretrain(spec, out, runtime)
        finally:
            loop._Guard.on_train_batch_end = trained  # type: ignore[method-assign]


def samples_trained(home: Path) -> int:
    """By all lives of all cells together."""
    lines = [line for path in (home / "steps").glob("*.log") for line in path.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if len(line.split()) == 2)


if __name__ == "__main__":
    from ssl_diversity.sweep import config, launch, task
    from ssl_diversity.sweep.profile import load_profile

    profile, *rest = sys.argv[1:]
    task.FUNCTIONS["pretrain"] = "drill_launcher:pretrain"
    if fakes := "--fakes" in rest:
        import sweep_fakes

        task.FUNCTIONS.update(sweep_fakes.FUNCTIONS)
    asked = config.load("quickstart", [text for text in rest if "=" in text])
    detach = "--detach" in rest
    sys.exit(launch.run(asked, load_profile(profile), detach=detach, with_report=not fakes))
