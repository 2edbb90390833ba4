"""The results table: complete, sorted, the same in both files, never half-written."""

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ssl_diversity.errors import UserError
from ssl_diversity.report.table import COLUMNS, ORDER, build_table, read_table, write_table

PROMISED = """sweep cell method backbone recipe source pool_digest source_real_images unique_samples budget batch_size
epochs diversity seed replicate overlap precision downstream probe accuracy accuracy_low accuracy_high n_test chance
leaked extractor distance_n frechet visual_dna vendi effective_rank flops train_seconds peak_memory_bytes""".split()


def test_the_promised_columns_are_there_and_documented() -> None:
    assert set(PROMISED) <= set(COLUMNS)
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text().split("| column |")[1]
    documented = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert documented == list(COLUMNS)
    assert list(build_table([]).columns) == list(COLUMNS)


def test_one_row_per_record_in_an_order_of_its_own(records: Callable[..., list[dict]]) -> None:
    made = records()
    shuffled = random.Random(0).sample(made, len(made))
    table = build_table(made)
    pd.testing.assert_frame_equal(table, build_table(shuffled))
    assert len(table) == len(made)
    assert not table.duplicated(["cell", "downstream", "probe"]).any()
    pd.testing.assert_frame_equal(table, table.sort_values(ORDER, kind="stable", na_position="first"))


def test_epochs_and_diversity_follow_from_n_and_c(records: Callable[..., list[dict]]) -> None:
    cells = build_table(records()).query("source != ''")
    assert (cells["epochs"] * cells["unique_samples"] == cells["budget"]).all()
    assert (cells["diversity"] * cells["budget"] == cells["unique_samples"]).all()
    assert cells["diversity"].between(0, 1).all()


def test_baselines_are_rows_without_a_source(records: Callable[..., list[dict]]) -> None:
    baselines = build_table(records()).query("source == ''")
    assert set(baselines["method"]) == {"random", "pixels"}
    assert baselines[["unique_samples", "epochs", "leaked", "frechet"]].isna().all().all()
    assert (baselines["pool_digest"] == "").all()


def test_both_files_hold_the_same(records: Callable[..., list[dict]], tmp_path: Path) -> None:
    table = build_table(records())
    write_table(table, tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path), table)
    text = {name: dtype for name, dtype in COLUMNS.items() if dtype == "str"}
    csv = pd.read_csv(
        tmp_path / "results.csv",
        dtype=COLUMNS,
        keep_default_na=False,
        na_values={c: [""] for c in COLUMNS if c not in text},
    )
    pd.testing.assert_frame_equal(csv, table)
    assert {path.name for path in tmp_path.glob("*.*")} == {"results.csv", "results.parquet"}


def test_a_failed_cell_has_a_row_without_numbers(records: Callable[..., list[dict]]) -> None:
    failed = build_table(records()).query("status == 'failed'")
    assert len(failed) == 2
    assert failed[["accuracy", "effective_rank", "collapsed", "train_seconds"]].isna().all().all()
    assert failed[["frechet", "unique_samples"]].notna().all().all()


def test_a_record_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="acuracy"):
        build_table([{"acuracy": 0.5}])


def test_a_full_disk_leaves_the_table_of_before(
    records: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(build_table(records()), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}

    def full(self: pd.DataFrame, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match="disk full while writing"):
        write_table(build_table(records(seeds=1)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
