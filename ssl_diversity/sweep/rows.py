"""What a plan must know of rows and costs a pass over them: computed once, then read from store/cache/rows/."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ssl_diversity import files
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.subset import Subset, digest_of
from ssl_diversity.data.table import Keys, as_keys

_LARGE_ROWS = 1 << 18  # fewer are looked at again by each process
_SORTED_ROWS = 1 << 23  # of the smaller pool, sorted at a time: below 512 MiB


def digest(subset: Subset) -> str:
    """`subset.digest`."""
    return digest_of([_rows_digest(pool, rows) for pool, rows in subset.parts])


_digests: dict[tuple[str, Rows], str] = {}  # by pool digest


def _rows_digest(pool: Pool, rows: Rows) -> str:
    name = (pool.digest, rows)
    if name not in _digests:
        key = {"digest of": pool.digest, "rows": [rows.start, rows.count, rows.ring]}
        _digests[name] = str(_kept(key, rows.count, lambda: pool.rows_digest(rows)))
    return _digests[name]


def shared_images(a: Pool, b: Pool) -> int:
    """How many images of `a` have an exact copy (equal source pixels) in `b`."""
    small, large = sorted((a, b), key=lambda pool: pool.size)
    return _shared(str(small.path), str(large.path), small.digest, large.digest)


@cache
def _shared(small: str, large: str, small_digest: str, large_digest: str) -> int:
    key = {"shared by": [small_digest, large_digest]}
    a, b = Pool.open(small), Pool.open(large)
    return int(_kept(key, b.size, lambda: _count_shared(a, b)))


def _count_shared(small: Pool, large: Pool) -> int:
    """Rows of `small` found in `large`."""
    found = 0
    for start in range(0, small.size, _SORTED_ROWS):
        mine = as_keys(small.content[start : start + _SORTED_ROWS])
        wanted = Keys(mine)
        copies = [mine[:0]]
        for part in Rows(0, large.size, large.size).chunks():
            theirs = as_keys(large.content[part])
            copies.append(theirs[wanted.have(theirs)])
        found += int(Keys(np.concatenate(copies)).have(mine).sum())
    return found


def _kept(key: dict[str, Any], rows: int, compute: Callable[[], Any]) -> Any:
    if rows < _LARGE_ROWS:
        return compute()
    path: Path = files.home() / "store" / "cache" / "rows" / f"{files.digest(key)}.json"
    try:
        return files.read_json(path)["value"]
    except (OSError, ValueError, KeyError):
        value = compute()
    files.write_json(path, {**key, "value": value})
    return value
