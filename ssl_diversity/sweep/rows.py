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
    return digest_of([_rows_digest(str(pool.path), pool.digest, rows) for pool, rows in subset.parts])


@cache
def _rows_digest(path: str, pool_digest: str, rows: Rows) -> str:
    key = {"digest of": pool_digest, "rows": [rows.start, rows.count, rows.ring]}
    return str(_kept(key, rows.count, lambda: Pool.open(path).rows_digest(rows)))


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
