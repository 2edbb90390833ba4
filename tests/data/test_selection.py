"""What becomes of every image, against plain loops over all of them."""

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data import image, near, recipes, selection
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.holdout import TestSplit, ranks_of
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.table import Keys
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

Tree = dict[str, bytes]
SIZE = 6
CLASSES = "abc"
EXCLUDED = (2, 3)  # greys of the other set's test images


def flat(grey: int, side: int) -> bytes:
    """Of one colour, so that all sides are equal after resizing."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (grey, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def set_of_copies() -> Tree:
    """150 images of 12 greys and 3 sides under labels at random, and five that do not decode."""
    rng = np.random.default_rng(0)
    images = [
        (CLASSES[rng.integers(3)], int(rng.integers(12)), SIZE + int(rng.integers(3))) for _ in range(150)
    ]
    tree = {f"set/{label}/{i:03d}.png": flat(grey, side) for i, (label, grey, side) in enumerate(images)}
    return tree | {f"set/{CLASSES[i % 3]}/broken-{i}.png": b"%d" % i for i in range(5)}


@dataclass
class Row:
    """An image on its way through the definitions."""

    key: bytes
    label: int
    name: str
    pixels: image.Pixels | None
    cause: str = "kept"
    kept: "Row | None" = None

    @property
    def grey(self) -> int:
        assert self.pixels is not None
        return int(self.pixels[0, 0, 0])

    def drop(self, cause: str, kept: "Row | None" = None) -> None:
        self.cause, self.kept = cause, kept


def decide(tree: Tree, spec: PrepareSpec, excluded: set[bytes]) -> list[Row]:
    """Every image and its fate, in the pool's order. Near copies are greys that differ by 1."""
    rows = []
    for path, data in tree.items():
        label, name = CLASSES.index(path[4]), path[4:]
        try:
            pixels = image.decode_source(data)
            rows.append(Row(image.keyed_hash(spec.seed, image.content_hash(pixels)), label, name, pixels))
        except Exception:
            rows.append(Row(image.keyed_hash(spec.seed, b"undecodable" + name.encode()), label, name, None))
    rows.sort(key=lambda row: (row.key, row.label, row.name))

    def left() -> list[Row]:
        return [row for row in rows if row.cause == "kept"]

    def drop_equal(cause: str, value_of: Callable[[Row], bytes]) -> None:
        first: dict[bytes, Row] = {}
        for row in left():
            if first.setdefault(value_of(row), row) is not row:
                row.drop(cause, first[value_of(row)])

    for row in rows:
        if row.pixels is None:
            row.drop("undecodable")
        elif image.content_hash(row.pixels) in excluded:
            row.drop("excluded")
    if spec.deduplicate:
        drop_equal("duplicate", lambda row: row.key)
    if spec.deduplicate and spec.resize != "none":
        drop_equal(
            "duplicate_after_resize",
            lambda row: image.content_hash(image.fit(row.pixels, SIZE, spec.filter)),  # type: ignore[arg-type]
        )
    if spec.near_duplicates and excluded:
        for row in left():
            if any(abs(row.grey - grey) <= 1 for grey in EXCLUDED):
                row.drop("excluded")
    if spec.near_duplicates and spec.deduplicate:
        compared = left()
        for i, row in enumerate(compared):
            copies = [earlier for earlier in compared[:i] if abs(earlier.grey - row.grey) <= 1]
            if copies:
                row.drop("near_duplicate", copies[0])
    for row in rows:  # what a copy gave way to is in the pool, or both are not
        while row.kept and row.kept.kept:
            row.kept = row.kept.kept
        if row.kept and row.kept.cause == "excluded":
            row.drop("excluded")
    for row in left()[spec.max_images or len(rows) :]:
        row.drop("over_max")
    for row in rows:
        if row.kept and row.kept.cause == "over_max":
            row.drop("over_max")
    return rows


def like_by_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put greys that differ by 1 in the place of near copies."""

    def greys(signatures: Any) -> np.ndarray:
        return np.asarray(signatures)[:, 0].astype(int)

    def near_copies(signatures: Any, thumbnails: Any, **_: Any) -> np.ndarray:
        grey = greys(signatures)
        close = np.tril(abs(grey[:, None] - grey) <= 1, -1)
        return np.where(close.any(1), close.argmax(1), -1)

    def matched(a: Any, thumbnails_a: Any, b: Any, thumbnails_b: Any, **_: Any) -> np.ndarray:
        return np.asarray((abs(greys(a)[:, None] - greys(b)) <= 1).any(1))

    def describe(pixels: image.Pixels) -> tuple[bytes, bytes]:
        return bytes([pixels[0, 0, 0]]) * near.SIGNATURE_BYTES, bytes(near.THUMBNAIL_BYTES)

    for name, function in (("near_copies", near_copies), ("matched", matched), ("describe", describe)):
        monkeypatch.setattr(near, name, function)


def lines_of(pool: Pool) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (pool.path / "dropped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deduplicate": False},
        {"resize": "none"},
        {"max_images": 7},
        {"max_images": 9, "resize": "none"},
        {"max_images": 40, "deduplicate": False},
        {"exclude": True},
        {"exclude": True, "deduplicate": False, "max_images": 50},
        {"near_duplicates": True},
        {"near_duplicates": True, "exclude": True},
        {"near_duplicates": True, "exclude": True, "max_images": 2},
        {"near_duplicates": True, "exclude": True, "deduplicate": False},
        {"near_duplicates": True, "resize": "none"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_fate_is_that_of_plain_loops(
    options: dict[str, Any],
    set_of_copies: Tree,
    as_tar: Callable[..., Path],
    small_memory: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    like_by_grey(monkeypatch)
    excluded: set[bytes] = set()
    if options.get("exclude"):
        others = {f"t/{c}/{grey}.png": flat(grey, SIZE) for c, grey in zip("ab", EXCLUDED, strict=True)}
        both = {
            f"{path[:2]}{split}{path[1:]}": d for path, d in others.items() for split in ("train", "test")
        }
        options = {**options, "exclude": [str(as_tar(both, "others.tar"))]}
        excluded = {image.content_hash(image.decode_source(data)) for data in others.values()}
    spec = recipes.resolve(str(as_tar(set_of_copies)), {"size": SIZE, **options})
    whole = prepare(spec.model_copy(update={"name": "whole"}))
    small_memory(10_000)
    pool = prepare(spec)
    assert pool.info.files == whole.info.files
    assert [shard.blake2b for shard in pool.info.shards] == [shard.blake2b for shard in whole.info.shards]
    rows = decide(set_of_copies, spec, excluded)
    assert [
        (bytes(content), int(label)) for content, label in zip(pool.content, pool.label, strict=True)
    ] == [
        (image.content_hash(row.pixels), row.label)
        for row in rows
        if row.pixels is not None and row.cause == "kept"
    ]
    listed = [(line["cause"], line["name"], line.get("kept")) for line in lines_of(pool)]
    assert listed == [
        (row.cause, row.name, row.kept and row.kept.name)
        for row in rows
        if row.cause not in ("kept", "over_max")
    ]
    causes = Counter(row.cause for row in rows)
    conflicts = sum(row.kept is not None and row.kept.label != row.label for row in rows)
    assert pool.info.counts == dict.fromkeys(pool.info.counts, 0) | causes | {
        "read": 155,
        "conflict": conflicts,
    }
    assert sum("kept_label" in line for line in lines_of(pool)) == conflicts
    if spec.near_duplicates:
        assert pool.signature[:, 0].tolist() == [row.grey for row in rows if row.cause == "kept"]
    assert verify(pool) == []


def test_near_copies_of_more_images_than_memory_carries_are_refused(
    set_of_copies: Tree, as_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_NEAR_BYTES", 1 << 25)
    with pytest.raises(UserError, match=r"near_duplicates among 36 images needs 2.2 GiB of memory besides"):
        prepare(recipes.resolve(str(as_tar(set_of_copies)), {"size": SIZE, "near_duplicates": True}))


def test_a_comparison_of_other_images_begins_anew(
    set_of_copies: Tree,
    as_tar: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scratch folder of near copies, which outlives a kill, is that of the same images alone."""
    found: list[Path] = []

    def killed(*_: Any, scratch: Path, **__: Any) -> np.ndarray:
        found.append(scratch)
        raise KeyboardInterrupt

    options = {"size": SIZE, "near_duplicates": True}
    with monkeypatch.context() as patched:
        patched.setattr(near, "near_copies", killed)
        for tree in (set_of_copies, set_of_copies, dict(list(set_of_copies.items())[:9])):
            with pytest.raises(KeyboardInterrupt):
                prepare(recipes.resolve(str(as_tar(tree)), options))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("classes", [0, 1, 3, 300_000])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.99])
def test_a_split_takes_its_share_of_each_class_by_rank(classes: int, share: float) -> None:
    rng = np.random.default_rng(classes)
    content = rng.integers(0, 256, (400, 16), np.uint8)
    label = rng.choice(np.array([-1, *range(min(classes, 9))]), 400)
    rank = ranks_of(content)
    split = TestSplit(share, classes, lambda: [(label[:150], rank[:150]), (label[150:], rank[150:])])
    test = split.has(label, content)
    for each in np.unique(label):
        mine = label == each
        count = max(round(share * mine.sum()), min(1, mine.sum() - 1))
        assert test[mine].sum() == count
        assert count == 0 or rank[mine & test].max() == np.sort(rank[mine])[count - 1]


def test_an_only_image_of_a_class_is_for_training() -> None:
    content = np.arange(48, dtype=np.uint8).reshape(3, 16)
    label = np.array([0, 1, 1])
    split = TestSplit(0.2, 2, lambda: [(label, ranks_of(content))])
    assert split.has(label, content).tolist().count(True) == 1
    assert not split.has(label, content)[0]


def test_keys_are_found_where_only_half_of_them_is_equal() -> None:
    keys = np.array([[1, 2], [1, 5], [1, 9], [7, 0], [2**64 - 1, 2**64 - 1]], np.uint64)
    asked = np.array(
        [[1, 5], [1, 6], [1, 9], [7, 1], [7, 0], [0, 2], [8, 8], [2**64 - 1, 2**64 - 1]], np.uint64
    )
    found = Keys(keys[::-1]).have(asked.astype(">u8"))
    assert found.tolist() == [True, False, True, False, True, False, False, True]
    assert not Keys(keys[:0]).have(asked.astype(">u8")).any()


def test_a_stop_while_choosing_is_heeded(set_of_copies: Tree, as_tar: Callable[..., Path]) -> None:
    writing: list[str] = []
    spec = recipes.resolve(str(as_tar(set_of_copies)), {"size": SIZE})
    runtime = Runtime(note=writing.append, stop=lambda: any(text.startswith("writing") for text in writing))
    with pytest.raises(Interrupted):
        prepare(spec, runtime=runtime)
    assert not spec.directory.exists()
    assert not list(spec.directory.parent.glob(".*.build"))
    assert prepare(spec).size == 12
