"""prepare: the same pool whatever the form, the processes, the memory or the kills."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_diversity import files
from ssl_diversity.data import decoding, image, recipes, writer
from ssl_diversity.data import prepare as preparing
from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.leaks import leaked
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

Tree = dict[str, bytes]


def spec_of(path: Path, **options: Any) -> PrepareSpec:
    return recipes.resolve(str(path), {"size": 6, **options})


def slow_pool(tree: Tree, seed: int = 0) -> list[tuple[bytes, int]]:
    """(content hash, label) in pool order by the definition: sort by keyed hash, label, name; drop the copies."""
    rows = []
    for name, data in tree.items():
        if name.endswith(".png") and "broken" not in name:
            content = image.content_hash(image.decode_source(data))
            rows.append((image.keyed_hash(seed, content), "abc".index(name[8]), name, content))
    kept: dict[bytes, tuple[bytes, int]] = {}
    for key, label, _, content in sorted(rows):
        kept.setdefault(key, (content, label))
    return list(kept.values())


def rows_of(pool: Pool) -> list[tuple[bytes, int]]:
    return [(bytes(content), int(label)) for content, label in zip(pool.content, pool.label, strict=True)]


def test_order_and_deduplication_are_as_defined(tree: Tree, as_tar: Callable[..., Path]) -> None:
    pool = prepare(spec_of(as_tar(tree), seed=3))
    assert rows_of(pool) == slow_pool(tree, seed=3)
    assert (
        pool.info.counts | {"read": 63, "undecodable": 1, "duplicate": 2, "conflict": 1, "kept": 60}
        == pool.info.counts
    )
    dropped = [json.loads(line) for line in (pool.path / "dropped.jsonl").read_text().splitlines()]
    assert sorted((d["cause"], d["name"], d.get("kept")) for d in dropped) == [
        ("duplicate", "a/copy.png", "a/003.png"),
        ("duplicate", "b/copy.png", "a/003.png"),
        ("undecodable", "c/broken.png", None),
    ]
    conflict = next(d for d in dropped if d["name"] == "b/copy.png")
    assert (conflict["label"], conflict["kept_label"]) == (1, 0)
    by_content = {
        image.content_hash(image.decode_source(d)): d
        for n, d in tree.items()
        if n.endswith("png") and "broken" not in n
    }
    for row, pixels in enumerate(pool.images(np.arange(pool.size))):
        original = image.decode_source(by_content[bytes(pool.content[row])])
        np.testing.assert_array_equal(pixels, image.fit(original, 6, "bicubic"))
    assert verify(pool) == []


def test_same_pool_from_every_form_part_size_pass_count_and_process_count(
    tree: Tree,
    as_tar: Callable[..., Path],
    as_folder: Callable[..., Path],
    small_memory: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparing, "_PART_ITEMS", 5)  # 13 parts
    backwards = dict(reversed(tree.items()))
    forms = [
        (as_tar(tree), 1, 1 << 20),
        (as_tar(backwards, "backwards.tar"), 1, 1),  # many runs a part, many ranges of keys
        (as_tar(tree, "set.tar.gz", "w:gz"), 1, 3000),
        (as_folder(tree) / "flowers", 2, 1 << 20),
    ]
    pools = []
    for path, processes, memory_bytes in forms:
        small_memory(memory_bytes)
        pools.append(prepare(spec_of(path, name=f"{path.stem}-{memory_bytes}"), processes=processes))
    assert len({pool.path for pool in pools}) == len(forms)
    assert (
        len({(pool.digest, pool.info.source_digest, pool.rows_digest(pool.rows(60))) for pool in pools}) == 1
    )
    assert len({(pool.path / "dropped.jsonl").read_text() for pool in pools}) == 1
    assert len({tuple(shard.blake2b for shard in pool.info.shards) for pool in pools}) == 1
    assert not list(files.pools_dir().glob(".*.work")) + list(files.pools_dir().glob(".*.build"))


def test_digests_change_with_what_decides_the_pixels_and_not_with_shards(
    tree: Tree, as_tar: Callable[..., Path]
) -> None:
    path = as_tar(tree)
    base = prepare(spec_of(path))
    many = prepare(spec_of(path, name="many", shard_bytes=4000))
    assert len(many.info.shards) > 5
    assert many.digest == base.digest
    for options in ({"size": 5}, {"filter": "box"}, {"codec": "jpeg"}, {"seed": 1}, {"max_images": 10}):
        other = prepare(spec_of(path, **options))
        assert other.path != base.path
        assert other.rows_digest(other.rows(10)) != base.rows_digest(base.rows(10)) or "max_images" in options
        assert other.digest != base.digest
    assert prepare(spec_of(path, max_images=10)).rows_digest(base.rows(10)) == base.rows_digest(base.rows(10))


def test_images_equal_after_resizing_are_dropped(as_tar: Callable[..., Path]) -> None:
    import io

    from PIL import Image

    def flat(value: int, side: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), (value, 0, 0)).save(buffer, "png")
        return buffer.getvalue()

    tree = {f"{value}-{side}.png": flat(value, side) for value in range(5) for side in (8, 9, 10)}
    pool = prepare(spec_of(as_tar(tree)))
    assert (pool.size, pool.info.counts["duplicate_after_resize"]) == (5, 10)
    assert len({image.content_hash(pixels) for pixels in pool.images(np.arange(5))}) == 5
    keyed = {
        name: image.keyed_hash(0, image.content_hash(image.decode_source(data)))
        for name, data in tree.items()
    }
    for line in map(json.loads, (pool.path / "dropped.jsonl").read_text().splitlines()):
        assert line["name"][0] == line["kept"][0]
        assert keyed[line["kept"]] < keyed[line["name"]]
    every = prepare(spec_of(as_tar(tree), name="every", deduplicate=False))
    assert every.size == 15


def test_an_unsplit_set_is_split_by_content_within_classes(
    tree: Tree, as_tar: Callable[..., Path], as_folder: Callable[..., Path]
) -> None:
    contents = []
    for path in (as_tar(tree), as_folder(tree)):
        for seed in (0, 1):
            train, test = (prepare(s) for s in recipes.downstream(str(path), {"size": 6, "seed": seed}))
            assert (train.size, test.size) == (50, 12) or (train.size, test.size) == (
                48,
                14,
            )  # copies stay together
            assert np.bincount(
                test.label[np.unique(test.content, axis=0, return_index=True)[1]]
            ).tolist() == [4, 4, 4]
            assert leaked(test, train, train.rows(train.size)) == 0
            assert train.info.counts["held_out"] == test.size
            contents.append({bytes(row) for row in test.content})
    assert all(content == contents[0] for content in contents)
    whole = prepare(spec_of(path, name="whole"))
    assert whole.size == 60
    with pytest.raises(UserError, match="has no test split"):
        prepare(spec_of(path, split="test"))


def test_a_declared_split_is_taken_alone(tree: Tree, as_tar: Callable[..., Path]) -> None:
    data = list(tree.values())
    path = as_tar({f"s/{'train' if i < 40 else 'val'}/{'ab'[i % 2]}/{i}.png": data[i] for i in range(60)})
    sizes = {
        split: prepare(spec_of(path, name=split, split=split)).size for split in ("train", "test", "all")
    }
    assert sizes == {"train": 40, "test": 20, "all": 60}


def test_digits_declare_their_splits() -> None:
    pool = prepare(recipes.resolve("digits"))
    train, test = (prepare(spec) for spec in recipes.downstream("digits"))
    assert (pool.size, train.size, test.size) == (1437, 1437, 360)
    assert np.bincount(test.label).min() > 20
    assert leaked(test, pool, pool.rows(pool.size)) == 0
    assert pool.image_size == 16


def test_exclude_drops_copies_of_test_images(tree: Tree, as_tar: Callable[..., Path]) -> None:
    data = [d for n, d in tree.items() if "copy" not in n and n.endswith("png")]
    test_set = as_tar(
        {f"{split}/a/{i}.png": data[i] for i in range(8) for split in (["train"] if i < 4 else ["test"])},
        "other.tar",
    )
    everything = as_tar({f"{i}.png": data[i] for i in range(20)})
    pool = prepare(spec_of(everything, name="clean", exclude=[str(test_set)]))
    dirty = prepare(spec_of(everything, name="dirty"))
    test = prepare(recipes.downstream(str(test_set), {"size": 6})[1])
    assert (pool.size, pool.info.counts["excluded"], dirty.size) == (16, 4, 20)
    assert leaked(test, pool, pool.rows(pool.size)) == 0
    assert leaked(test, dirty, dirty.rows(20)) == 4
    for n in (1, 5, 13):
        direct = sum(bytes(t) in {bytes(c) for c in dirty.content[:n]} for t in test.content)
        assert leaked(test, dirty, dirty.rows(n)) == direct


@pytest.mark.slow
def test_known_duplicates_across_labels_and_splits(tree: Tree, as_tar: Callable[..., Path]) -> None:
    """A pair with conflicting labels inside train, and one across train and val: in a replica everywhere, in
    Tiny ImageNet (20,000 + 5,000) where its tar is."""
    data = list(tree.values())
    replica = {f"t/{'train' if i < 40 else 'val'}/{'ab'[i % 2]}/{i}.png": data[i] for i in range(60)}
    replica["t/train/b/copy.png"] = replica["t/train/a/2.png"]
    replica["t/val/b/copy.png"] = replica["t/train/a/4.png"]
    cases = [(as_tar(replica), 40, 21)]
    if folder := os.environ.get("SSL_DIVERSITY_TEST_DATA"):
        cases.append((Path(folder) / "tiny-imagenet-20k.tar", 19_999, 5_000))
    for path, kept, tests in cases:
        pool = prepare(spec_of(path))
        test = prepare(recipes.downstream(str(path), {"size": 6})[1])
        assert (pool.size, pool.info.counts["duplicate"], pool.info.counts["conflict"]) == (kept, 1, 1)
        assert test.size == tests
        assert leaked(test, pool, pool.rows(pool.size)) == 1


def test_finished_parts_outlive_an_interruption_and_a_pool_is_made_once(
    tree: Tree, as_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_PART_ITEMS", 10)  # 7 parts
    path = as_tar(tree)
    expected = prepare(spec_of(path, name="undisturbed"))
    directory = spec_of(path).directory
    with pytest.raises(Interrupted):
        work = directory.with_name(f".{directory.name}.work")
        prepare(spec_of(path), runtime=Runtime(stop=lambda: len(list(work.glob("*.json"))) == 3))
    assert not directory.exists()
    decoded = []
    monkeypatch.setattr(
        image, "decode_source", lambda data, f=image.decode_source: decoded.append(1) or f(data)
    )
    seen: list[tuple[int, int]] = []
    pool = prepare(spec_of(path), runtime=Runtime(progress=lambda done, total: seen.append((done, total))))
    assert len(decoded) == 33  # 63 less the three parts that were finished
    assert seen == [(n, 126) for n in (10, 20, 30, 40, 50, 60, 63, 126)]
    assert pool.digest == expected.digest
    decoded.clear()
    assert prepare(spec_of(path)).digest == expected.digest
    path.unlink()  # a finished pool needs its source no more
    assert prepare(spec_of(path)).digest == expected.digest
    assert not decoded


def test_a_changed_source_does_not_meet_old_parts(tree: Tree, as_tar: Callable[..., Path]) -> None:
    path = as_tar(tree)
    with pytest.raises(Interrupted):  # all parts are finished, the pool is not
        stops = iter([False, True])
        prepare(spec_of(path), runtime=Runtime(stop=lambda: next(stops)))
    del tree["flowers/a/000.png"]
    path = as_tar(tree)
    assert rows_of(prepare(spec_of(path))) == slow_pool(tree)


def test_two_at_once_make_one_pool(
    tree: Tree, as_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_tar(tree)
    sorted_parts = []
    original = decoding.Decoder.__call__
    monkeypatch.setattr(
        decoding.Decoder, "__call__", lambda *a: sorted_parts.append(1) or time.sleep(0.3) or original(*a)
    )
    pools: list[Pool] = []
    threads = [threading.Thread(target=lambda: pools.append(prepare(spec_of(path)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sorted_parts) == 1
    assert len({pool.digest for pool in pools}) == 1
    assert len(pools) == 3


@pytest.mark.parametrize("where", ["run", "shard", "index", "pool.json"])
def test_a_full_disk_leaves_nothing_half_written(
    where: str, tree: Tree, as_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_at_the_end(path: Path, value: Any, original: Any = files.write_json) -> None:
        full() if path.name == "pool.json" else original(path, value)

    target = {
        "run": (decoding.RunWriter, "flush", full),
        "shard": (writer.ShardWriter, "_write", full),
        "index": (writer, "_close_synced", full),
        "pool.json": (files, "write_json", full_at_the_end),
    }[where]
    spec = spec_of(as_tar(tree))
    with monkeypatch.context() as patched:
        patched.setattr(*target)
        with pytest.raises(UserError, match="disk full while writing"):
            prepare(spec)
    assert not spec.directory.exists()
    assert not list(files.pools_dir().glob(".*.build"))
    assert verify(prepare(spec)) == []


def test_nothing_left_is_an_error(as_tar: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="not one image is left"):
        prepare(spec_of(as_tar({"a/0.png": b"broken", "b/1.png": b""})))
    with pytest.raises(UserError, match="has no labels"):
        prepare(recipes.downstream("photo_patches")[0])


def test_too_little_memory_is_an_error_and_a_little_means_fewer_processes() -> None:
    with pytest.raises(UserError, match=r"0\.05 GiB of memory is too little"):
        decoding.share(1, 50 << 20)
    assert decoding.share(2, 300 << 20)[0] == 1
    for held in (0, 500 << 20):  # by the source's listing
        processes, run_bytes = decoding.share(2, 2 << 30, held)
        assert processes == 2
        assert held + 3 * decoding.INTERPRETER_BYTES + 2 * 2 * run_bytes <= 2 << 30
    with pytest.raises(UserError, match=r"allow 1\.\d+ or more"):
        decoding.share(8, 1 << 30, 1 << 30)


@pytest.mark.parametrize("codec", ["png", "jpeg", "original"])
@pytest.mark.parametrize("resize", ["square", "short", "none"])
def test_resize_policies_and_codecs(codec: str, resize: str, as_tar: Callable[..., Path]) -> None:
    import io

    from PIL import Image

    if codec == "original" and resize != "none":
        with pytest.raises(UserError, match="resize=none"):
            spec_of(as_tar({"a.png": b""}), codec=codec, resize=resize)
        return
    smooth = np.add.outer(np.arange(40), np.arange(60))[..., None] + np.array([0, 40, 80])
    tree = {}
    for i, kind in enumerate(["png", "jpeg", "webp", "bmp"]):
        buffer = io.BytesIO()
        Image.fromarray((smooth + i).astype(np.uint8)).save(buffer, kind)
        tree[f"{i}.{kind}"] = buffer.getvalue()
    pool = prepare(spec_of(as_tar(tree), codec=codec, resize=resize, size=20))
    assert verify(pool) == []
    shape = {"square": (20, 20, 3), "short": (20, 30, 3), "none": (40, 60, 3)}[resize]
    stored = pool.read_bytes(np.arange(4))
    assert {image.decode_source(data).shape for data in stored} == {shape}
    assert pool.images(np.arange(4), size=16).shape == (4, 16, 16, 3)
    if codec == "original":
        assert set(stored) == set(tree.values())


def test_near_copies_go_after_an_earlier_row_and_beside_an_excluded_one(
    as_tar: Callable[..., Path], as_folder: Callable[..., Path]
) -> None:
    import io

    from PIL import Image

    def jpeg(seed: int, quality: int) -> bytes:
        small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC).save(
            buffer, "jpeg", quality=quality
        )
        return buffer.getvalue()

    tree = {f"a/{seed}.jpg": jpeg(seed, 95) for seed in range(20)}
    tree |= {f"b/{seed}.jpg": jpeg(seed, 60) for seed in range(5)}  # near copies, of another class
    test = as_folder(
        {
            f"{split}/{c}/{i}.jpg": jpeg(n, 80)
            for n, (split, c, i) in enumerate(
                [("test", "a", 0), ("test", "b", 1), ("train", "a", 2), ("train", "b", 3)], 8
            )
        },
        "t",
    )
    options = {"size": 32, "near_duplicates": True}
    pool = prepare(spec_of(as_tar(tree), **options))
    assert pool.info.counts["near_duplicate"] == pool.info.counts["conflict"] == 5
    assert pool.size == 20
    assert pool.signature.shape[0] == pool.thumbnail.shape[0] == 20
    assert verify(pool) == []
    lines = [json.loads(line) for line in (pool.path / "dropped.jsonl").read_text().splitlines()]
    assert {Path(line["name"]).stem for line in lines} == {str(i) for i in range(5)}
    assert all(Path(line["kept"]).stem == Path(line["name"]).stem for line in lines)
    without = prepare(spec_of(as_tar(tree), exclude=[str(test)], name="without", **options))
    assert without.info.counts["excluded"] == 2
    assert without.size == 18
