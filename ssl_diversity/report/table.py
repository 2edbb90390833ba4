"""The results table: one row per (cell, downstream set, probe); docs/results.md says what each column means."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ssl_diversity import budget
from ssl_diversity.files import replacing

_TEXT, _INTEGER, _REAL, _FLAG = "str", "Int64", "float64", "boolean"

COLUMNS = {
    "sweep": _TEXT,
    "cell": _TEXT,
    "status": _TEXT,
    "method": _TEXT,
    "backbone": _TEXT,
    "recipe": _TEXT,
    "source": _TEXT,
    "source_kind": _TEXT,
    "pool_digest": _TEXT,
    "source_real_images": _INTEGER,
    "source_cost_flops": _REAL,
    "unique_samples": _INTEGER,
    "budget": _INTEGER,
    "budget_asked": _TEXT,
    "batch_size": _INTEGER,
    "epochs": _REAL,
    "diversity": _REAL,
    "seed": _INTEGER,
    "replicate": _INTEGER,
    "overlap": _REAL,
    "precision": _TEXT,
    "downstream": _TEXT,
    "probe": _TEXT,
    "accuracy": _REAL,
    "accuracy_low": _REAL,
    "accuracy_high": _REAL,
    "accuracy_clean": _REAL,
    "n_test": _INTEGER,
    "chance": _REAL,
    "leaked": _INTEGER,
    "leaked_near": _INTEGER,
    "extractor": _TEXT,
    "distance_n": _INTEGER,
    "frechet": _REAL,
    "frechet_floor": _REAL,
    "frechet_noise": _REAL,
    "visual_dna": _REAL,
    "visual_dna_floor": _REAL,
    "floor_n": _INTEGER,
    "shared_images": _INTEGER,
    "subset_n": _INTEGER,
    "frechet_subset": _REAL,
    "frechet_subset_floor": _REAL,
    "visual_dna_subset": _REAL,
    "vendi": _REAL,
    "effective_rank": _REAL,
    "collapsed": _FLAG,
    "compiled": _FLAG,
    "flops": _INTEGER,
    "train_seconds": _REAL,
    "peak_memory_bytes": _INTEGER,
}

ORDER = [
    "downstream",
    "probe",
    "source",
    "budget",
    "method",
    "backbone",
    "recipe",
    "batch_size",
    "precision",
    "unique_samples",
    "seed",
    "replicate",
    "cell",
]


def build_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records (any subset of COLUMNS; None or absent = unknown) as the sorted results table.

    Baselines are the rows with an empty `source`. epochs and diversity are computed here, from N and C.
    Raises ValueError for a key that is not a column.
    """
    unknown = sorted({key for record in records for key in record} - set(COLUMNS))
    if unknown:
        raise ValueError(f"not columns of the results table: {', '.join(unknown)}")
    rows = [{**record, **_derived(record)} for record in records]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name, dtype in COLUMNS.items():
        column = table[name].astype(object).where(table[name].notna(), "" if dtype == _TEXT else None)
        table[name] = column.astype(dtype)
    return table.sort_values(ORDER, kind="stable", na_position="first", ignore_index=True)


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """`results.csv` and `results.parquet` in `folder`, each whole or not at all."""
    with replacing(folder / "results.csv") as path:
        table.to_csv(path, index=False)
    with replacing(folder / "results.parquet") as path:
        table.to_parquet(path, index=False)


def read_table(folder: Path) -> pd.DataFrame:
    """What `write_table` wrote."""
    return pd.read_parquet(folder / "results.parquet").astype(COLUMNS)


def _derived(record: Mapping[str, Any]) -> dict[str, float]:
    unique, samples = record.get("unique_samples"), record.get("budget")
    if not unique or not samples:
        return {}
    return {"epochs": budget.epochs(unique, samples), "diversity": budget.diversity(unique, samples)}
