"""Which images of the merged, sorted stream stay in a pool: splits, exact copies, exclusions."""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.runs import Record
from ssl_diversity.data.writer import ShardWriter
from ssl_diversity.errors import Interrupted
from ssl_diversity.runtime import Runtime

ENTRY = struct.Struct("<16s16si")  # a record's data: content hash, hash after resizing, label; then the image


@dataclass
class Selection:
    """Decides, over the merged stream, which images stay; keeps count and a list of the others."""

    spec: PrepareSpec
    excluded: set[bytes]
    counts: Counter[str] = field(default_factory=Counter)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    test: set[bytes] | None = None  # keyed hashes of a held-out test split
    equal_after_resize: dict[bytes, bytes] = field(default_factory=dict)  # keyed hash -> the earlier one's

    def hold_out(self, share: float, merged: Iterable[Record]) -> None:
        """Make a test split of `share` by a hash of the content, within classes; copies stay on one side."""
        classes: dict[int, list[tuple[bytes, bytes]]] = {}
        for key, copies in groupby(merged, attrgetter("key")):
            content, _, label = ENTRY.unpack_from(next(copies).data)
            rank = hashlib.blake2b(content, digest_size=16, key=b"split").digest()  # not the pool's seed
            classes.setdefault(label, []).append((rank, key))
        self.test = set()
        for members in classes.values():
            count = max(round(share * len(members)), min(1, len(members) - 1))
            self.test.update(key for _, key in sorted(members)[:count])

    def chosen(self, key: bytes) -> bool:
        return self.test is None or (key in self.test) == (self.spec.split == "test")

    def wanted(self, key: bytes) -> bool:
        return self.chosen(key) and key not in self.excluded

    def find_equal_after_resize(self, merged: Iterable[Record]) -> None:
        for _, group in groupby(merged, attrgetter("key")):
            kept = None  # the first of the pool's order; the others give way
            for key in (record.name for record in group):
                if kept is None and self.wanted(key):
                    kept = key
                elif kept is not None and key != kept and self.wanted(key):
                    self.equal_after_resize[key] = kept

    def undecodable(self, summaries: list[dict[str, Any]]) -> None:
        for name, reason in sorted(pair for summary in summaries for pair in summary["undecodable"]):
            self._drop("undecodable", name, reason=reason)
        self.counts["read"] = sum(summary["read"] for summary in summaries)

    def write(self, merged: Iterable[Record], writer: ShardWriter, runtime: Runtime) -> None:
        earlier_names: dict[bytes, str] = dict.fromkeys(self.equal_after_resize.values(), "")
        for key, copies in groupby(merged, attrgetter("key")):
            if runtime.stop():
                raise Interrupted("stopped while writing the pool; finished parts are kept")
            first: tuple[str, int] | None = None
            for record in copies:
                content, _, label = ENTRY.unpack_from(record.data)
                name = record.name.decode("utf-8", "surrogateescape")
                if not self.chosen(key):
                    self.counts["held_out"] += 1
                elif key in self.excluded:
                    self._drop("excluded", name)
                elif first and self.spec.deduplicate:
                    conflict = {"label": label, "kept_label": first[1]} if label != first[1] else {}
                    self.counts["conflict"] += bool(conflict)
                    self._drop("duplicate", name, kept=first[0], **conflict)
                elif key in self.equal_after_resize:
                    first = earlier_names[self.equal_after_resize[key]], label
                    self._drop("duplicate_after_resize", name, kept=first[0])
                elif self.spec.max_images is not None and writer.rows >= self.spec.max_images:
                    self.counts["over_max"] += 1
                else:
                    first = name, label
                    if key in earlier_names:
                        earlier_names[key] = name
                    writer.add(content, label, record.data[ENTRY.size :])
        self.counts["kept"] = writer.rows

    def _drop(self, cause: str, name: str, **details: Any) -> None:
        self.counts[cause] += 1
        self.dropped.append({"cause": cause, "name": name, **details})
