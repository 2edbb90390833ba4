"""Planning and looking at the store touch as many files for a thousand cells as for a hundred."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data.prepare import prepare
from ssl_diversity.sweep import config, status
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.store import store_dir

SETS = 10
EVENTS = frozenset({"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.utime"})
counter: list[str] | None = None
sys.addaudithook(lambda event, _: counter.append(event) if counter is not None and event in EVENTS else None)


@pytest.fixture
def sweep(home: Path) -> SweepConfig:
    random = np.random.default_rng(0)
    sets = {}
    for number in range(SETS):
        for split, count in (("train", 4), ("test", 1)):
            for label in "ab":
                folder = home / f"set{number}" / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        sets[f"set{number}"] = {"recipe": "folder", "path": str(home / f"set{number}")}
    choices = ["sources=[digits]", "unique_samples=[64,128,256,512,1024]", "budget=[1024,2048]", "seeds=2"]
    sweep = config.load("quickstart", choices).model_copy(update={"downstream": sets})
    for task in expand(sweep).tasks:
        prepare(task.spec)  # type: ignore[arg-type]
    return sweep


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, int]]:
    """Runs a function and says how many file-system operations it made: audited ones, stat and lstat."""
    stats: list[Any] = []
    for name in ("stat", "lstat", "readlink"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _real=real, **k: stats.append(a) or _real(*a, **k))

    def count(run: Callable[[], Any]) -> tuple[Any, int]:
        global counter
        stats.clear()
        counter = seen = []
        try:
            return run(), len(stats) + len(seen)
        finally:
            counter = None

    return count


def mark_done(plan: Plan, share: int) -> None:
    for task in plan.tasks[::share]:
        if task.output is None:
            path = store_dir() / "done" / task.kind / task.key[:2] / task.key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_files_touched_do_not_grow_with_the_cells(sweep: SweepConfig, counted: Any) -> None:
    expand(sweep)  # imports what it needs
    few, operations = counted(lambda: expand(sweep))
    many, more = counted(lambda: expand(sweep.model_copy(update={"seeds": tuple(range(10))})))
    assert (len(few.cells), len(many.cells)) == (140, 700)
    assert len(many.tasks) > 700 * (1 + SETS)
    assert more <= operations + 20 < 200  # one index is opened for draws not seen before
    watch = status.Watch()
    empty, looking = counted(lambda: watch.look(many))
    assert (empty.done, looking < 100) == (1 + 2 * SETS, True)
    for share in (2, 1):
        mark_done(many, share)
        shown, looking = counted(lambda: status.snapshot(many))
        assert looking <= 256 * len(shown.done_by_kind) + 100
    assert shown.complete
    assert watch.look(many) == shown
