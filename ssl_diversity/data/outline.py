"""What `prepare` would make of a source, said without making it."""

import contextlib
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.decoding import as_stored, pixels_of
from ssl_diversity.data.sources import open_source
from ssl_diversity.data.sources.base import Item, Source
from ssl_diversity.data.sources.paths import is_address

_COUNT_S = 10.0  # seconds that counting may take
_PART_ITEMS = 2000
_SAMPLED_PARTS, _SAMPLED = 16, 4  # so many images of each of so many parts say how large all are


def outline(spec: PrepareSpec) -> dict[str, Any]:
    """Folder, splits, classes, number of images and about how many bytes, by what is shown to a user.

    Images are counted where that takes seconds; their bytes are those of a sample, made as the pool's.
    Raises UserError for what is wrong with the source.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(spec, Path(scratch))
        there = (spec.directory / "pool.json").exists()
        count, sample = _look(source, spec)
        found = {
            "folder": str(spec.directory),
            "state": "is there" if there else "would be made",
            "source": spec.source,
            "options": {key: value for key, value in spec.options.items() if value is not None},
            "splits": ", ".join(sorted(source.splits)) or "none",
            "split": spec.split,
            "classes": str(len(source.classes) or "none"),
            "images": "not counted" if count is None else f"{count:,} before copies go",
        }
        sizes = []
        for item in sample:
            with contextlib.suppress(
                Exception
            ):  # an image that cannot be decoded, which `prepare` counts and lists
                sizes.append(_row_bytes(item, spec, bool(source.classes)))
        if count and sizes:
            average = sum(sizes) / len(sizes)
            found["disk"] = f"about {count * average / 2**20:,.4g} MiB, and as much again while it is made"
        return found


def _look(source: Source, spec: PrepareSpec) -> tuple[int | None, list[Item]]:
    """How many images there are, if that is soon known, and a sample of them, if they are at hand."""
    if not source.at_hand or is_address(str(spec.options.get("path"))):
        return source.asked, []
    started, count, parts = time.monotonic(), 0, []
    for part in source.parts(spec.split if source.splits else "all", _PART_ITEMS):
        count += len(part)
        parts.append(part)
        if time.monotonic() - started > _COUNT_S:
            return None, []
    sampled = parts[:: -(-len(parts) // _SAMPLED_PARTS)] if parts else []
    return count, [item for part in sampled for item in islice(part, _SAMPLED)]


def _row_bytes(item: Item, spec: PrepareSpec, labelled: bool) -> int:
    """What an image takes: its header and padding in the tar, its label's member, its row of the index."""
    encoded = as_stored(item, pixels_of(item), spec)[1]
    return len(encoded) + 512 + 256 + 1024 * labelled + 40 + 274 * spec.near_duplicates
