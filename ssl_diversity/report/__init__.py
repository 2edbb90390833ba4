"""The report of a sweep: results table, figures, page, Weights & Biases. Imports no torch."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_diversity.files import digest, write_atomic

if TYPE_CHECKING:
    from ssl_diversity.report.records import Collected
    from ssl_diversity.sweep.config import SweepConfig

STAMP = ".report"  # digest of what the report in its folder was made from


def write_report(sweep: "SweepConfig") -> Path:
    """Bring `runs/<sweep>/` up to date and return its report.html.

    Writes results.csv, results.parquet, figures/ and report.html, each whole or not at all, and logs to Weights
    & Biases. Where nothing has changed since the last time, nothing is written.
    """
    from ssl_diversity.report import tracking
    from ssl_diversity.report.collect import collect, history

    collected = collect(sweep)
    page = write(collected, sweep.folder)
    tracking.track(collected, sweep.folder, history)
    return page


def write(collected: "Collected", folder: Path) -> Path:
    """The report of what was collected, in `folder`; returns report.html."""
    page, stamp = folder / "report.html", folder / STAMP
    state = digest({"collected": asdict(collected), "code": _code()})
    wanted = (page, folder / "results.csv", folder / "results.parquet")
    if stamp.exists() and stamp.read_text() == state and all(path.exists() for path in wanted):
        return page
    from ssl_diversity.report.page import render
    from ssl_diversity.report.table import build_table, write_table

    began = time.time()
    table = build_table(collected.records)
    write_table(table, folder)
    write_atomic(page, render(collected, table, folder))
    for path in (folder / "figures").glob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # another process may tidy up, too
            if path.stat().st_mtime < began - 1:  # of an earlier report
                path.unlink(missing_ok=True)
    write_atomic(stamp, state)
    return page


def _code() -> str:
    """Digest of the code that makes a report of records, so that new code writes it anew."""
    package = Path(__file__).parent.parent
    paths = sorted([*(package / "report").glob("*.*"), *(package / "analysis").glob("*.*")])
    return digest([path.read_text() for path in paths])
