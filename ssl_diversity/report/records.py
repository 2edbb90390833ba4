"""What a report is made from: plain records that collect.py reads from a sweep, and tests write by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FailedTask:
    """A task that failed for good: its label, and the first line of its last traceback."""

    kind: str
    key: str
    label: str
    message: str
    attempts: int


@dataclass(frozen=True)
class Collected:
    """A sweep's results and how they came about.

    `records`: rows for `build_table`. `probes`: in the order asked for; headlines speak of the first.
    `tasks`: kind -> status -> number. `waiting`: why some cells are not planned yet. `run`: what to show under
    "how it was run", in order. `spec_text`: the resolved sweep as YAML.
    """

    sweep: str
    records: Sequence[Mapping[str, Any]]
    probes: Sequence[str]
    tasks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    failed: Sequence[FailedTask] = ()
    waiting: Sequence[str] = ()
    run: Mapping[str, str] = field(default_factory=dict)
    spec_text: str = ""
