"""How long tasks will take, from what earlier ones took: store/cache/rates.json."""

import contextlib
from typing import Any

from ssl_diversity.files import digest, read_json, write_json
from ssl_diversity.generation.sampling import SampleSpec
from ssl_diversity.generation.training import GeneratorSpec
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.plan import Cell
from ssl_diversity.sweep.store import cache_dir
from ssl_diversity.sweep.task import Task
from ssl_diversity.train import CellSpec

Rates = dict[str, float]  # what -> seconds per sample (trained or made) or per task (all other kinds)


_EACH = frozenset(
    {"samples", "seed", "rows_digest", "rows_count", "first_block", "blocks"}
)  # leave a rate as it is
_BY_SPEC = frozenset({"pretrain", "train-generator", "sample"})  # whose rate depends on their spec


def rates() -> Rates:
    with contextlib.suppress(OSError, ValueError):
        found: Rates = read_json(cache_dir() / "rates.json")
        return found
    return {}


def record(task: Task, result: dict[str, Any], seconds: float, device: str, threads: int) -> None:
    """Remember what a task took. Two workers at once may lose one measurement; the next one brings it back."""
    if result.get("samples_seen"):
        seconds = result.get("train_seconds", seconds)
    amount = result.get("made", task.units)  # of a sample task what it made itself
    if not amount:
        return
    seconds /= amount
    with contextlib.suppress(OSError):
        write_json(cache_dir() / "rates.json", {**rates(), _what(task, device, threads): seconds})


def seconds(task: Task, known: Rates, device: str, threads: int) -> float | None:
    """Estimated seconds of a task; None if nothing like it has been measured."""
    per = known.get(_what(task, device, threads))
    if per is None:
        return None
    return per * task.units


def cell_seconds(cell: Cell, sweep: SweepConfig, known: Rates, device: str, threads: int) -> float | None:
    """Estimated seconds of a cell's pretraining, also of one that has no task yet."""
    per = known.get(_cell(cell.method, cell.backbone, sweep.image_size, sweep.precision, device, threads))
    return None if per is None or cell.budget is None else per * cell.budget


def typical(known: Rates, device: str, threads: int) -> float | None:
    """Mean seconds per sample of the kinds of cells measured on such workers."""
    found = [
        value
        for what, value in known.items()
        if what.startswith("pretrain/") and what.endswith(f"/{device}/{threads}")
    ]
    return sum(found) / len(found) if found else None


def _what(task: Task, device: str, threads: int) -> str:
    spec = task.spec if task.kind in _BY_SPEC else None
    if isinstance(spec, CellSpec):
        return _cell(spec.method, spec.backbone, spec.image_size, spec.precision, device, threads)
    if isinstance(spec, GeneratorSpec | SampleSpec):
        own = {key: value for key, value in spec.identity().items() if key not in _EACH}
        return f"{task.kind}/{digest(own)[:16]}/{device}/{threads}threads"
    return f"{task.kind}/{device}/{threads}threads"


def _cell(*parts: object) -> str:
    """`parts`: method, backbone, image size, precision, device, threads."""
    return "/".join(["pretrain", *map(str, parts)])
