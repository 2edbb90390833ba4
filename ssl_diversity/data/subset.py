"""What a cell may see: consecutive rows of one pool, or of several in given proportions (a mixture)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from ssl_diversity import files
from ssl_diversity.config import Config
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.errors import UserError


def digest_of(parts: Sequence[str]) -> str:
    """Of several parts a digest of theirs; of one part its own."""
    return parts[0] if len(parts) == 1 else files.digest(list(parts))


class Piece(NamedTuple):
    """Rows `first_row` to `first_row + count` of a pool, all in one shard: what a reader fetches at once."""

    part: int  # number of the pool in the subset
    shard: int
    first_row: int  # of the pool
    first_index: int  # of the subset
    count: int  # type: ignore[assignment]  # a tuple's method of that name is not missed


class PartSpec(Config):
    """Rows of a pool as a task is told of them: where they are. What they are is `Subset.digest`."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"pool", "rows_start", "rows_count", "rows_ring"})

    pool: str  # directory name under `pools_dir()`, or a path
    rows_start: int = Field(ge=0)
    rows_count: int = Field(ge=1)
    rows_ring: int | None = Field(None, ge=1)  # rows that the draw wraps in; None: the pool's first size


@dataclass(frozen=True)
class Subset:
    """N unique images: the rows of each part in turn. Index i in [0, N) is what orders speak of."""

    parts: tuple[tuple[Pool, Rows], ...]

    @classmethod
    def open(cls, parts: Sequence[PartSpec], digest: str, what: str) -> Self:
        """The rows that a task was told of; UserError where they are no longer those of `digest`.

        `what` says for which task ("cell").
        """
        opened = [(spec, Pool.open(spec.pool)) for spec in parts]
        rings = [spec.rows_ring or pool.info.first_size for spec, pool in opened]
        subset = cls(
            tuple(
                (pool, Rows(spec.rows_start, spec.rows_count, ring))
                for (spec, pool), ring in zip(opened, rings, strict=True)
            )
        )
        small = any(
            spec.rows_count > pool.size or not spec.rows_start < ring <= pool.info.first_size
            for (spec, pool), ring in zip(opened, rings, strict=True)
        )
        if small or subset.digest != digest:
            where = " or ".join(str(pool.path) for _, pool in opened)
            raise UserError(f"pool {where} has changed since this {what} was planned; plan again")
        return subset

    @property
    def specs(self) -> tuple[PartSpec, ...]:
        """What to tell a task."""
        return tuple(
            PartSpec(
                pool=pool.place,
                rows_start=rows.start,
                rows_count=rows.count,
                rows_ring=None if rows.ring == pool.info.first_size else rows.ring,
            )
            for pool, rows in self.parts
        )

    def __len__(self) -> int:
        return sum(rows.count for _, rows in self.parts)

    @cached_property
    def digest(self) -> str:
        """Of the pixels, in order: encodings and content hashes."""
        return digest_of([pool.rows_digest(rows) for pool, rows in self.parts])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([rows.count for _, rows in self.parts])

    def locate(self, indices: ArrayLike) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """(part, where in `indices`, row numbers of its pool) for each part that `indices` touch."""
        i = np.asarray(indices, dtype=np.int64)
        if i.size and (i.min() < 0 or i.max() >= len(self)):
            raise IndexError(f"index outside the {len(self)} rows of the subset")
        if len(self.parts) == 1:
            yield 0, np.arange(i.size), self.parts[0][1][i]
            return
        part_of = np.searchsorted(self._ends, i, side="right")
        for part in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == part)
            rows = self.parts[part][1]
            yield part, places, rows[i[places] - (self._ends[part] - rows.count)]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The subset cut at shard boundaries, in order of index."""
        found: list[Piece] = []
        index = 0
        for part, (pool, rows) in enumerate(self.parts):
            ends = np.cumsum([shard.rows for shard in pool.info.shards])
            for start, stop in rows.spans:
                first = np.array([start, *ends[(ends > start) & (ends < stop)].tolist()])
                counts = np.diff(first, append=stop)
                shards = np.searchsorted(ends, first, side="right")
                columns = (shards, first, index + first - start, counts)
                found += [Piece(part, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]
                index += stop - start
        return tuple(found)
