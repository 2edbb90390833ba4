"""Weights & Biases: one run per cell and one per report.

A cell's run has the cell's key as its id, its sweeps as tags, its coordinates as config, its loss history, and
probes and distances in its summary. Without an account everything is kept offline under `wandb/` in the home,
for `wandb sync` later. `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_API_KEY` and the like mean what they always mean.
"""

import netrc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from ssl_diversity.files import digest, home, read_json, write_json
from ssl_diversity.report.records import Collected

History = Callable[[str], Sequence[tuple[int, float]]]  # (samples seen, loss) of a finished cell
Record = Mapping[str, Any]

COORDINATES = (
    "method", "backbone", "recipe", "source", "source_kind", "pool_digest", "source_real_images", "source_cost_flops", "unique_samples",
    "budget", "budget_asked", "batch_size", "seed", "replicate", "precision",
)  # fmt: skip
PER_CELL = ("effective_rank", "collapsed", "flops", "train_seconds", "peak_memory_bytes")
PER_DOWNSTREAM = (
    "leaked",
    "leaked_near",
    "frechet",
    "visual_dna",
    "frechet_subset",
    "visual_dna_subset",
    "vendi",
)
PER_PROBE = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_clean")


def track(collected: Collected, folder: Path, history: History) -> None:
    """Log every trained cell, and the report in `folder`, unless logged before with the same content.

    Whatever goes wrong here costs one line of warning, never a report.
    """
    if mode() == "disabled":
        return
    try:
        for key, records in _cells(collected).items():
            _log_once(
                key,
                collected.sweep,
                records,
                lambda run, k=key, r=records, **kw: _cell(run, k, r, history, **kw),
            )
        _log_once(
            f"report-{collected.sweep}",
            collected.sweep,
            [dict(record) for record in collected.records],
            lambda run, **_: _report(run, folder),
        )
    except Exception as error:
        print(
            f"warning: not logged to Weights & Biases: {' '.join(str(error).split())[:300]}", file=sys.stderr
        )


def mode() -> str:
    """`WANDB_MODE` where it is set; else online with an account, offline without one."""
    return os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _cells(collected: Collected) -> dict[str, list[Record]]:
    """The records of each trained cell, by its key."""
    cells: dict[str, list[Record]] = {}
    for record in collected.records:
        if record.get("source") and record.get("train_seconds") is not None:
            cells.setdefault(record["cell"], []).append(record)
    return cells


def _log_once(name: str, sweep: str, content: Sequence[Record], log: Callable[..., None]) -> None:
    """Open the run `name` and `log(run, first=...)` into it, unless this sweep's `content` is there already."""
    path = home() / "wandb" / "logged" / f"{name}.json"
    logged: dict[str, str] = read_json(path) if path.exists() else {}  # sweep -> digest of what was logged
    now = digest([dict(record) for record in content])
    if logged.get(sweep) == now:
        return
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ssl-diversity"),
        id=name,
        name=name[:12] if len(name) == 32 else name,
        dir=home(),
        mode=cast(Any, mode()),
        tags=sorted({*logged, sweep}),
        resume="allow",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=120,
        ),
    )
    try:
        log(run, first=not logged)
    finally:
        run.finish()
    write_json(path, {**logged, sweep: now})


def _cell(run: Any, key: str, records: Sequence[Record], history: History, *, first: bool) -> None:
    cell = records[0]
    run.config.update({name: cell.get(name) for name in COORDINATES}, allow_val_change=True)
    if first:
        run.define_metric("loss", step_metric="samples_seen")
        for samples_seen, loss in history(key):
            run.log({"samples_seen": samples_seen, "loss": loss})
    summary = {name: cell.get(name) for name in PER_CELL}
    for record in records:
        downstream = record["downstream"]
        summary |= {f"{downstream}/{name}": record.get(name) for name in PER_DOWNSTREAM}
        summary |= {f"{downstream}/{record['probe']}/{name}": record.get(name) for name in PER_PROBE}
    run.summary.update({name: value for name, value in summary.items() if value is not None})


def _report(run: Any, folder: Path) -> None:
    import wandb

    from ssl_diversity.report.table import read_table

    table = read_table(folder).astype(object)
    images = {
        f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "figures").glob("*.png"))
    }
    run.log({"results": wandb.Table(dataframe=table.where(table.notna(), None)), **images})
