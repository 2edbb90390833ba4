"""Which images of the merged, sorted rows stay in a pool: splits, exact and near copies, exclusions.

An image's fate is decided over slices of rows; what is decided over all rows (equal after resizing, near copies)
is kept in files by the number of the *candidate*: a row that nothing else has dropped.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data import near
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.holdout import TestSplit, ranks_of
from ssl_diversity.data.runs import Runs
from ssl_diversity.data.table import Keys, Rows, Table, equal_to_previous, native
from ssl_diversity.data.writer import ShardWriter, file_digest
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

_PLACE = [("label", "<i4"), ("name_bytes", "<u4"), ("image_bytes", "<u4"), ("run", "<i4"), ("offset", "<i8")]
_LATE = [("fate", "u1"), ("kept", "<i8")]  # of a candidate; `kept`: the candidate that it is a copy of
_PAIR = [("resized", ">u8", (2,)), ("number", "<i8")]
_PAIR_BYTES = 120  # for each, while they are sorted
_AT_ONCE = 1 << 16  # candidates
_NEAR_BYTES = 32  # in memory for each image that is compared: its fate, its number, its copy


class Fate(IntEnum):
    KEPT = 0
    UNDECODABLE = 1
    HELD_OUT = 2
    EXCLUDED = 3
    DUPLICATE = 4
    DUPLICATE_AFTER_RESIZE = 5
    NEAR_DUPLICATE = 6
    OVER_MAX = 7


LISTED = (Fate.UNDECODABLE, Fate.EXCLUDED, Fate.DUPLICATE, Fate.DUPLICATE_AFTER_RESIZE, Fate.NEAR_DUPLICATE)
_COPIES = (Fate.DUPLICATE_AFTER_RESIZE, Fate.NEAR_DUPLICATE)
COUNTS = ("read", *(fate.name.lower() for fate in Fate if fate), "conflict")


class Selection:
    """Decides over the merged rows of `runs` which images stay, in `memory_bytes`, with files in `work`."""

    def __init__(
        self, spec: PrepareSpec, runs: Runs, work: Path, memory_bytes: int, runtime: Runtime
    ) -> None:
        self.spec, self.runs, self.work = spec, runs, work
        self.memory_bytes, self.runtime = memory_bytes, runtime
        self.counts = dict.fromkeys(COUNTS, 0)
        self.excluded: Keys | None = None
        self.test: TestSplit | None = None  # held out
        self.places = self._table("places", _PLACE)
        self.late = self._table("late", _LATE)

    def _table(self, name: str, dtype: Any) -> Table:
        path = self.work / f"selection-{name}"
        path.unlink(missing_ok=True)
        path.touch()
        return Table(path, dtype)

    def slices(self, memory_bytes: int) -> Iterator[Rows]:
        """All rows in order, never cut at equal keys."""
        for rows in self.runs.merged(memory_bytes):
            self._check()
            yield rows

    def _check(self) -> None:
        if self.runtime.stop():
            raise Interrupted("stopped while choosing the images of a pool; finished parts are kept")

    def distinct(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Label and rank (holdout.py) of every distinct image, in slices."""
        for rows in self.slices(self.memory_bytes // 4):
            first = rows[_first(rows) & rows["decoded"]]
            yield first["label"].astype(np.int64), ranks_of(first["content"])

    def early(self, rows: Rows) -> NDArray[np.uint8]:
        """Fates as far as the rows of equal key tell."""
        fate = np.zeros(len(rows), np.uint8)
        first = _first(rows)
        if self.spec.deduplicate:
            fate[~first] = Fate.DUPLICATE
        if self.excluded is not None:
            fate[self.excluded.have(rows["key"])] = Fate.EXCLUDED
        if self.test is not None:
            test = self.test.has(rows["label"][first], rows["content"][first])
            fate[(test != (self.spec.split == "test"))[np.cumsum(first) - 1]] = Fate.HELD_OUT
        fate[~rows["decoded"]] = Fate.UNDECODABLE
        return fate

    def compare(self, excluded: near.Described | None) -> None:
        """Find the candidates that equal an earlier one after resizing, or are near copies of one."""
        spec = self.spec
        by_pixels = spec.deduplicate and spec.resize != "none"
        if not by_pixels and not (spec.near_duplicates and (spec.deduplicate or excluded is not None)):
            return
        self.runtime.note("finding copies")
        pairs = self._table("pairs", _PAIR)
        with (
            (self.work / "signature").open("wb") as signatures,
            (self.work / "thumbnail").open("wb") as thumbs,
        ):
            for rows in self.slices(self.memory_bytes // 4):
                chosen = rows[self.early(rows) == Fate.KEPT]
                place = np.empty(len(chosen), self.places.dtype)
                for name in place.dtype.names or ():
                    place[name] = chosen[name]
                pair = np.empty(len(chosen), pairs.dtype)
                pair["resized"] = chosen["resized"]
                pair["number"] = np.arange(len(self.places), len(self.places) + len(chosen))
                self.places.append(place)
                pairs.append(pair)
                self.late.append(np.zeros(len(chosen), self.late.dtype))
                if spec.near_duplicates:
                    signatures.write(np.ascontiguousarray(chosen["signature"]).data)
                    thumbs.write(np.ascontiguousarray(chosen["thumbnail"]).data)
        if by_pixels:
            self._equal_after_resize(pairs)
        pairs.path.unlink()
        if spec.near_duplicates and len(self.places):
            self._near(excluded)

    def _equal_after_resize(self, pairs: Table) -> None:
        """Deal the candidates to bins by the hash after resizing; equal ones meet in a bin, in pool order."""
        bins = max(1, math.ceil(len(pairs) * _PAIR_BYTES / max(1, self.memory_bytes // 4)))
        if bins == 1:
            self._drop_equal(pairs.read(0, len(pairs)))
            return
        tables = [self._table(f"bin-{number}", _PAIR) for number in range(bins)]
        for part in pairs.slices(_AT_ONCE):
            pair = pairs.read(part.start, part.stop)
            bin_of = pair["resized"][:, 0].astype(np.uint64) % np.uint64(bins)
            for number in np.unique(bin_of).tolist():
                tables[number].append(pair[bin_of == number])
        for table in tables:
            self._drop_equal(table.read(0, len(table)))
            table.path.unlink()

    def _drop_equal(self, pair: Rows) -> None:
        head, tail = native(pair["resized"])
        pair = pair[np.lexsort((pair["number"], tail, head))]
        head, tail = native(pair["resized"])
        equal = equal_to_previous(head, tail)
        first = np.maximum.accumulate(np.where(equal, 0, np.arange(len(pair))))
        self._drop(pair["number"][equal], Fate.DUPLICATE_AFTER_RESIZE, pair["number"][first[equal]])

    def _drop(self, numbers: Rows, fate: Fate, kept: Rows | int) -> None:
        late = np.empty(len(numbers), self.late.dtype)
        late["fate"], late["kept"] = fate, kept
        self.late.put(numbers, late)

    def _near(self, excluded: near.Described | None) -> None:
        """First those near an excluded image, then those near an earlier one of the rest."""
        n = len(self.places)
        if (held_bytes := n * _NEAR_BYTES) > self.memory_bytes // 2:
            raise UserError(
                f"near_duplicates among {n:,} images needs {2 * held_bytes / 2**30:.1f} GiB of memory besides an"
                " interpreter's; allow more and run it again: finished parts are kept"
            )
        options = {"memory_bytes": (self.memory_bytes - held_bytes) // 2, "runtime": self.runtime}
        described = self._described(n)
        fate = np.concatenate([self.late.read(s.start, s.stop)["fate"] for s in self.late.slices(_AT_ONCE)])
        if excluded is not None and len(excluded):
            hit = near.matched(
                described.signatures,
                described.thumbnails,
                excluded.signatures,
                excluded.thumbnails,
                scratch=self._scratch(excluded.signatures, excluded.thumbnails),
                **options,  # type: ignore[arg-type]
            )
            numbers = np.flatnonzero(hit & (fate == Fate.KEPT))
            self._drop(numbers, Fate.EXCLUDED, -1)
            fate[numbers] = Fate.EXCLUDED
        if not self.spec.deduplicate:
            return
        left = np.flatnonzero(fate == Fate.KEPT)
        if len(left) < n:
            self._keep_described(described, left)
            described = self._described(len(left))
        copies = near.near_copies(
            described.signatures,
            described.thumbnails,
            scratch=self._scratch(),
            **options,  # type: ignore[arg-type]
        )
        gone = np.flatnonzero(copies >= 0)
        self._drop(left[gone], Fate.NEAR_DUPLICATE, left[copies[gone]])

    def _described(self, n: int) -> near.Described:
        if n == 0:
            empty = (
                np.zeros((0, near.SIGNATURE_BYTES), np.uint8),
                np.zeros((0, near.THUMBNAIL_BYTES), np.uint8),
            )
            return near.Described(*empty)
        return near.Described(
            np.memmap(self.work / "signature", np.uint8, "r", shape=(n, near.SIGNATURE_BYTES)),
            np.memmap(self.work / "thumbnail", np.uint8, "r", shape=(n, near.THUMBNAIL_BYTES)),
        )

    def _keep_described(self, described: near.Described, left: NDArray[np.int64]) -> None:
        for name in ("signature", "thumbnail"):
            source = getattr(described, f"{name}s")
            with (self.work / f"{name}-kept").open("wb") as file:
                for low in range(0, len(left), _AT_ONCE):
                    file.write(np.ascontiguousarray(source[left[low : low + _AT_ONCE]]).data)
            (self.work / f"{name}-kept").replace(self.work / name)

    def _scratch(self, *others: NDArray[np.uint8]) -> Path:
        """A folder for this comparison alone: what a killed one of other images left there must not be met."""
        state = hashlib.blake2b(digest_size=16)
        for name in ("signature", "thumbnail"):
            state.update(file_digest(self.work / name).encode())
        for other in others:
            state.update(np.ascontiguousarray(other).data)
        folder = self.work / f"near-{state.hexdigest()}"
        folder.mkdir(exist_ok=True)
        return folder

    def write(self, writer: ShardWriter, total: int) -> None:
        """Kept images to `writer`, in order, and what was dropped to its list.

        Progress goes from `total` to twice that.
        """
        started, done = time.monotonic(), 0
        for rows, fate, kept in self._fates():
            for each, amount in zip(*np.unique(fate, return_counts=True), strict=True):
                if each != Fate.KEPT:
                    self.counts[Fate(each).name.lower()] += int(amount)
            self._list(writer, rows, fate, kept)
            for count in self._add(writer, rows, fate):
                done += count
                rate = done / max(time.monotonic() - started, 1e-9)
                dropped = [f"{name} {n:,}" for name, n in self.counts.items() if n]
                self.runtime.note(
                    ", ".join([f"writing {rate:,.0f} images/s", f"kept {writer.rows:,}", *dropped])
                )
                self.runtime.progress(total + done, max(2 * total, total + done))
        self.counts["read"] = done

    def _fates(self) -> Iterator[tuple[Rows, NDArray[np.uint8], NDArray[np.int64]]]:
        """(rows, fates, candidate that each dropped copy gave way to or -1) of slice after slice.

        What a copy gave way to is an image of the pool, not a copy of another.
        """
        room = self.spec.max_images
        candidates, over_from = 0, len(self.places)  # the first candidate for which there was no room
        for rows in self.slices(self.memory_bytes // 16):
            fate = self.early(rows)
            kept = np.full(len(rows), -1)
            mine = np.flatnonzero(fate == Fate.KEPT)
            if len(self.places):
                fate[mine], kept[mine] = self._compared(candidates, candidates + len(mine))
            if room is not None:
                over = np.flatnonzero(fate == Fate.KEPT)[room:]
                room = max(0, room - int(np.sum(fate == Fate.KEPT)))
                fate[over] = Fate.OVER_MAX
                if over.size:
                    over_from = min(over_from, candidates + int(np.searchsorted(mine, over[0])))
            fate[kept >= over_from] = Fate.OVER_MAX
            candidates += len(mine)
            copies = np.flatnonzero(fate == Fate.DUPLICATE)
            first = _first_of(rows)[copies]
            gone = np.isin(fate[first], (Fate.EXCLUDED, Fate.OVER_MAX))
            fate[copies[gone]] = fate[first[gone]]
            kept[copies] = kept[first]
            yield rows, fate, kept

    def _compared(self, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Of candidates: their fates, and the one that stays at the end of each one's chain of copies, or -1."""
        late = self.late.read(start, stop)
        fate = late["fate"].copy()
        kept = np.where(np.isin(fate, _COPIES), late["kept"], -1)
        waiting = np.flatnonzero(kept >= 0)
        while waiting.size:
            before = self.late.take(kept[waiting])
            gone = waiting[before["fate"] == Fate.EXCLUDED]
            fate[gone], kept[gone] = Fate.EXCLUDED, -1
            further = np.isin(before["fate"], _COPIES)
            waiting = waiting[further]
            kept[waiting] = before["kept"][further]
        return fate, kept

    def _add(self, writer: ShardWriter, rows: Rows, fate: NDArray[np.uint8]) -> Iterator[int]:
        """The kept images of a slice, read a stretch of bounded size at a time; yields the rows of each."""
        ends = np.cumsum(rows["image_bytes"].astype(np.int64) + rows["name_bytes"])
        start = 0
        while start < len(rows):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + self.memory_bytes // 4, "right")))
            stretch = rows[start:stop]
            chosen = np.flatnonzero(fate[start:stop] == Fate.KEPT)
            if chosen.size:
                images = self.runs.stretch(stretch)
                writer.add_all(stretch[chosen], [images[i] for i in chosen.tolist()])
            yield stop - start
            self._check()
            start = stop

    def _list(self, writer: ShardWriter, rows: Rows, fate: NDArray[np.uint8], kept: Rows) -> None:
        """A line for each image that was dropped for a reason of its own."""
        which = np.flatnonzero(np.isin(fate, LISTED))
        for low in range(0, len(which), _AT_ONCE):
            self._list_some(writer, rows, fate, kept, which[low : low + _AT_ONCE])

    def _list_some(
        self, writer: ShardWriter, rows: Rows, fate: NDArray[np.uint8], kept: Rows, which: Rows
    ) -> None:
        undecodable = which[fate[which] == Fate.UNDECODABLE]
        reasons = dict(zip(undecodable.tolist(), self.runs.images(rows[undecodable]), strict=True))
        far = which[kept[which] >= 0]
        beside = which[(kept[which] < 0) & (fate[which] == Fate.DUPLICATE)]
        originals: dict[int, tuple[bytes, int]] = {}
        for chosen, origin in ((beside, rows[_first_of(rows)[beside]]), (far, self.places.take(kept[far]))):
            places = zip(self.runs.names(origin), origin["label"].tolist(), strict=True)
            originals |= dict(zip(chosen.tolist(), places, strict=True))
        for i, name in zip(which.tolist(), self.runs.names(rows[which]), strict=True):
            details: dict[str, Any] = {}
            if i in reasons:
                details["reason"] = reasons[i].decode()
            if i in originals:
                original, label = originals[i]
                details["kept"] = _text(original)
                if label != rows["label"][i]:
                    self.counts["conflict"] += 1
                    details |= {"label": int(rows["label"][i]), "kept_label": label}
            writer.drop(Fate(fate[i]).name.lower(), _text(name), **details)


def _first(rows: Rows) -> NDArray[np.bool_]:
    """Whether a row is the first of its key."""
    return ~equal_to_previous(*native(rows["key"]))


def _first_of(rows: Rows) -> NDArray[np.int64]:
    """The number of the first row that has the key of each."""
    return np.maximum.accumulate(np.where(_first(rows), np.arange(len(rows)), 0))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
