"""Sorted files of records and their merge: the external sort that shuffles and deduplicates a pool.

A run is a file of records in ascending (key, name), each framed by its lengths. Runs appear whole or not
at all (`files.replacing`), so that finished ones survive a kill.
"""

import heapq
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ssl_diversity import files

_FRAME = struct.Struct("<16sII")  # key, bytes of name, bytes of data
_FAN_IN = 128  # runs merged at once: open files, and buffers in memory


class Record(NamedTuple):
    key: bytes  # 16
    name: bytes
    data: bytes


def write_run(path: Path, records: Iterable[Record]) -> None:
    """Write sorted `records`."""
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        for key, name, data in records:
            file.write(_FRAME.pack(key, len(name), len(data)) + name + data)


def read_run(path: Path, buffer_bytes: int) -> Iterator[Record]:
    with path.open("rb", buffering=buffer_bytes) as file:
        while frame := file.read(_FRAME.size):
            key, name_bytes, data_bytes = _FRAME.unpack(frame)
            yield Record(key, file.read(name_bytes), file.read(data_bytes))


def merge(runs: Sequence[Path], scratch: Path, memory_bytes: int) -> Iterator[Record]:
    """All records of `runs` in ascending (key, name); more runs than may be open take several passes.

    Intermediate runs go to `scratch`, named by what they hold: a second call finds them finished.
    """
    buffer_bytes = max(1 << 13, min(1 << 20, memory_bytes // (4 * _FAN_IN)))
    while len(runs) > _FAN_IN:
        groups = iter(runs)
        merged = []
        while group := list(islice(groups, _FAN_IN)):
            path = scratch / f"merged-{files.digest([run.name for run in group])}.run"
            if not path.exists():
                write_run(path, heapq.merge(*(read_run(run, buffer_bytes) for run in group)))
            merged.append(path)
        runs = merged
    yield from heapq.merge(*(read_run(run, buffer_bytes) for run in runs))
