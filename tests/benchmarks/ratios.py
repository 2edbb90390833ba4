"""Rows of the table that `make bench` prints, and their place in docs/benchmarks.md: a section for each device."""

import argparse
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy import stats

from ssl_diversity.files import read_json, write_json

FORMATS = {"": ".3f", "%": ".2f", "points": "+.2f"}
HEADER = "| | measured | 95 % interval | target | met |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """A ratio (unit ""), a share ("%") or a difference ("points"); `low` and `high` are its 95 % interval, if it has one.

    The target, if there is one: the interval, or else the value, is `at_least` so much and `below` so much.
    """

    what: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    below: float | None = None

    @property
    def target(self) -> str:
        unit = f" {self.unit}".rstrip()
        if self.at_least is not None and self.below is not None:
            return f"{self.at_least:g} to {self.below:g}{unit}"
        if self.at_least is not None:
            return f">= {self.at_least:g}{unit}"
        return f"< {self.below:g}{unit}" if self.below is not None else ""

    @property
    def met(self) -> bool | None:
        """None: there is no target."""
        if not self.target:
            return None
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        return (self.at_least is None or low >= self.at_least) and (self.below is None or high < self.below)

    def as_markdown(self) -> str:
        numeric, unit = FORMATS[self.unit], f" {self.unit}".rstrip()
        between = "" if self.low is None else f"{self.low:{numeric}} to {self.high:{numeric}}{unit}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return f"| {self.what} | {self.value:{numeric}}{unit} | {between} | {self.target} | {met} |"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired values, and its 95 % t-interval."""
    mean = statistics.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows of `make bench` there")


def write(path: Path | None, rows: Iterable[Row]) -> None:
    """Nothing, where no path was asked for."""
    if path:
        write_json(path, [asdict(row) for row in rows])


def read(path: Path) -> list[Row]:
    return [Row(**values) for values in read_json(path)]


def table(rows: Iterable[Row]) -> str:
    return "\n".join([HEADER, *(row.as_markdown() for row in rows)])


def replaced(text: str, device: str, title: str, body: str, titles: Sequence[str]) -> str:
    """`text` with `body` below `title` in the device's section: in the order of `titles`, all else as it was.

    Raises ValueError where `text` has no such section.
    """
    start, inside, end = section(text, device)
    _, *parts = re.split(r"^#### (.*)\n", inside, flags=re.MULTILINE)
    groups = dict(zip(parts[::2], parts[1::2], strict=True)) | {title: f"\n{body}\n\n"}
    ordered = sorted(groups, key=lambda name: titles.index(name) if name in titles else len(titles))
    return start + "\n" + "".join(f"#### {name}\n{groups[name]}" for name in ordered) + end


def section(text: str, device: str) -> tuple[str, str, str]:
    """The text up to and with a device's marker, what is between, and from the end marker on; else ValueError."""
    first, last = f"<!-- make bench: {device} -->", f"<!-- end: {device} -->"
    found = re.fullmatch(rf"(.*^{first}\n)(.*)(^{last}$.*)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"it has no lines {first} and {last}")
    return found[1], found[2], found[3]
