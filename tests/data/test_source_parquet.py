"""Parquet files as a source: Hugging Face's layout and plain columns, labels, splits, and what can be wrong."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from form_helpers import Picture, write_parquet

from ssl_diversity.data import recipes
from ssl_diversity.data.sources.base import Item
from ssl_diversity.data.sources.parquet import Parquet
from ssl_diversity.errors import UserError

IMAGES = [b"%d" % i for i in range(6)]


def opened(path: Path, scratch: Path, **options: Any) -> Parquet:
    return Parquet(Parquet.Options(path=str(path), **options), scratch)


def items(path: Path, scratch: Path, split: str = "all", part_items: int = 2, **options: Any) -> list[Item]:
    source = opened(path, scratch, **options)
    return [item for part in source.parts(split, part_items) for item in part]


def labels(path: Path, scratch: Path, split: str = "all", **options: Any) -> list[str]:
    """The names of the classes of all images, in order."""
    source = opened(path, scratch, **options)
    found = [item.label for part in source.parts(split, 2) for item in part]
    return [source.classes[number] if number >= 0 else "" for number in found]


def table(
    path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, group: int = 3
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table({"image": IMAGES, **columns} if "image" not in columns else columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path, row_group_size=group)
    return path


def test_the_hugging_face_layout_by_any_form_of_path(tmp_path: Path) -> None:
    pictures = [
        Picture(split, i % 2, f"{i % 3}.png", f"{split}{i}".encode())
        for split in ("train", "validation")
        for i in range(11)
    ]
    folder = write_parquet(tmp_path / "hub", pictures, ["cat", "dog"], 6, 2)
    data = folder / "data"
    assert {path.name for path in data.iterdir()} == {
        f"{split}-0000{i}-of-00002.parquet" for split in ("train", "validation") for i in range(2)
    }
    for form in (folder, data, data / "*.parquet", data / "{train,validation}-0000{0..1}-of-00002.parquet"):
        source = opened(form, tmp_path)
        assert (source.classes, source.splits) == (["cat", "dog"], {"train", "test"})
        for split, name in (("train", "train"), ("test", "validation")):
            assert items(form, tmp_path, split) == [
                (f"{name}-0000{i // 6}-of-00002.parquet:{i % 6}", p.label, p.data)
                for i, p in enumerate(p for p in pictures if p.split == name)
            ]
        assert len(items(form, tmp_path, "all")) == 22
    one = data / "train-00001-of-00002.parquet"
    assert (opened(one, tmp_path).splits, len(items(one, tmp_path, "train"))) == (frozenset(), 5)


@pytest.mark.parametrize(
    ("part_items", "lengths"), [(1, [2, 2, 2, 1]), (3, [2, 2, 3]), (4, [4, 3]), (100, [7])]
)
def test_parts_are_whole_row_groups_of_about_the_size_asked_for(
    part_items: int, lengths: list[int], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "p", [Picture("", 0, f"{i}.png", b"%d" % i) for i in range(7)], ["c"], 7, 2)
    parts = list(opened(tmp_path / "p", tmp_path).parts("train", part_items))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts] == lengths
    assert [item.image for part in parts for item in part] == [b"%d" % i for i in range(7)]
    assert len({json.dumps(part.key()) for part in parts}) == len(parts)
    assert len(pickle.dumps(parts)) < 2000


def test_big_row_groups_are_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    images = [draw.bytes(300_000) for _ in range(64)]
    path = table(tmp_path / "big.parquet", {"image": images}, group=64)
    batches = []
    original = pq.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        for batch in original(self, *args, **options):
            batches.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert [item.image for item in items(path, tmp_path)] == images
    assert max(batches) < 5 << 20
    assert sum(batches) >= 64 * 300_000


def test_columns_are_found_by_type_or_by_name(tmp_path: Path) -> None:
    nested = [{"bytes": image, "path": None} for image in IMAGES]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"jpg": pa.array(IMAGES, pa.large_binary()), "image": ["a", "b", "c"] * 2}, {}),
        ({"picture": nested, "image": [0] * 6}, {}),
        ({"image": IMAGES, "mask": nested}, {}),
        ({"x": IMAGES, "y": IMAGES[::-1], "image": [0] * 6}, {"image": "x"}),
    ]
    for i, (columns, options) in enumerate(cases):
        path = table(tmp_path / f"{i}.parquet", columns)
        assert [item.image for item in items(path, tmp_path, **options)] == IMAGES
    path = table(
        tmp_path / "hf.parquet",
        {"blob": IMAGES[::-1], "photo": nested, "image": [0] * 6},
        {"photo": {"_type": "Image"}},
    )
    assert [item.image for item in items(path, tmp_path)] == IMAGES
    path = table(tmp_path / "nulls.parquet", {"image": [b"0", None, {"bytes": None}][:2], "label": [0, 0]})
    assert [item.image for item in items(path, tmp_path)] == [b"0", b""]  # counted as undecodable by prepare


def test_where_labels_and_names_come_from(tmp_path: Path) -> None:
    numbers, words = [7, 10, 7, 9, 9, 10], ["pug", "cat", "pug", "ox", "ox", "cat"]
    columns = {
        "label": pa.array(numbers, pa.int8()),
        "word": words,
        "coded": pa.array(words).dictionary_encode(),
        "flag": [True, False] * 3,
    }
    path = table(tmp_path / "a" / "0.parquet", columns)
    assert labels(path, tmp_path) == list(map(str, numbers))
    assert opened(path, tmp_path).classes == ["7", "9", "10"]
    assert labels(path, tmp_path, label="word") == labels(path, tmp_path, label="coded") == words
    assert labels(path, tmp_path, label="flag") == ["1", "0"] * 3
    assert opened(path, tmp_path, label="coded").classes == ["cat", "ox", "pug"]
    assert labels(path, tmp_path, classes=11) == list(map(str, numbers))
    assert labels(path, tmp_path, label="word", classes=["pug", "ox", "cat"]) == words
    twelve = [f"class {i}" for i in range(12)]
    (tmp_path / "a" / "classes.txt").write_text("\n".join(twelve))
    assert labels(path, tmp_path) == [twelve[number] for number in numbers]
    assert labels(path, tmp_path, labelled=False) == [""] * 6
    written = {"label": {"_type": "ClassLabel", "names": twelve[::-1]}}
    path = table(
        tmp_path / "a" / "1.parquet", columns, written
    )  # the schema's names are nearer than a file's
    assert labels(path, tmp_path) == [twelve[::-1][number] for number in numbers]
    assert labels(path, tmp_path, classes=twelve) == [twelve[number] for number in numbers]


def test_the_only_class_label_is_the_label_and_of_several_one_is_asked_for(tmp_path: Path) -> None:
    fine = {"_type": "ClassLabel", "names": ["a", "b"]}
    columns = {"fine_label": [0, 1] * 3, "coarse_label": [0] * 6, "id": list(range(6))}
    path = table(tmp_path / "one.parquet", columns, {"fine_label": fine})
    assert labels(path, tmp_path) == ["a", "b"] * 3
    path = table(tmp_path / "two.parquet", columns, {"fine_label": fine, "coarse_label": fine})
    with pytest.raises(UserError, match=r"several label columns .* say label=fine_label"):
        opened(path, tmp_path)
    assert labels(path, tmp_path, label="fine_label") == ["a", "b"] * 3
    assert labels(path, tmp_path, labelled=False) == [""] * 6
    assert labels(table(tmp_path / "none.parquet", columns), tmp_path) == [""] * 6


def test_classes_are_those_of_train_and_a_test_split_without_labels_is_passed_over(tmp_path: Path) -> None:
    table(tmp_path / "h" / "train-0.parquet", {"label": ["x", "y", "x", "y", "x", "y"]})
    table(tmp_path / "h" / "validation-0.parquet", {"label": ["y"] * 6})
    table(tmp_path / "h" / "test-0.parquet", {"label": pa.array([None] * 6, pa.string())})
    assert labels(tmp_path / "h", tmp_path, "test") == ["y"] * 6
    table(tmp_path / "h" / "test-0.parquet", {"label": ["x"] * 5 + ["z"]})
    assert opened(tmp_path / "h", tmp_path).classes == ["x", "y"]
    with pytest.raises(UserError, match=r"test-0.parquet: row 5: label 'z' is none of the 2 classes"):
        labels(tmp_path / "h", tmp_path, "test")


def test_a_downstream_set_by_its_path_alone(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "h", [Picture("train", 0, "0.png", b""), Picture("test", 0, "0.png", b"")], ["c"], 9, 9
    )
    train, test = recipes.downstream(str(tmp_path / "h"))
    assert (train.source, train.split, test.split) == ("parquet", "train", "test")
    assert (train.name, test.name) == ("h-train", "h-test")


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"image": ["a"], "b": [1]}, {}, r"no image column .*: image \(string\), b \(int64\); name it by image="),
    ({"x": [b""], "y": [b""], "image": [0]}, {}, r"several image columns: x, y; name it by image=COLUMN"),
    ({"image": [b""]}, {"image": "imagf"}, "image=imagf is no column of images; did you mean 'image'"),
    ({"image": [b""], "label": [[0, 1]]}, {}, "column 'label' is multi-label, no single class"),
    ({"image": [b""], "label": [0.5]}, {}, "column 'label' is double, no single class"),
    ({"image": [b""], "kind": [0]}, {"label": "kinds"}, "no column 'kinds'; did you mean 'kind'"),
    ({"image": [b""], "kind": [0]}, {"labelled": True}, "there is no label column; name it by label=COLUMN"),
    ({"image": [b""], "kind": [0]}, {"classes": 2}, "there is no label column; name it by label=COLUMN"),
    ({"image": [b"", b""], "label": [0, None]}, {}, "row 1: has no label, but others have"),
    ({"image": [b"", b""], "label": [0, -1]}, {}, "row 1: has no label, but others have"),
    ({"image": [b"", b""], "label": [0, 2]}, {"classes": 2}, "row 1: label 2 is none of the 2 classes"),
    ({"image": [b""], "label": [None]}, {}, "column 'label' is null, no single class"),
    ({"image": [b""], "label": [-1]}, {}, "no labels in it; say labelled=false"),
    ({"image": [{"bytes": None, "path": "a/0.jpg"}]}, {"image": "image"}, "no column of images"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_each_fault_is_one_line_that_names_the_file(case: int, tmp_path: Path) -> None:
    columns, options, message = WRONG[case]
    path = table(tmp_path / "t.parquet", columns)
    with pytest.raises(UserError, match=message) as error:
        items(path, tmp_path, **options)
    assert "t.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_that_are_only_referred_to_are_refused(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    path = table(tmp_path / "t.parquet", {"image": pa.array([{"bytes": None, "path": "a/0.jpg"}], kind)})
    with pytest.raises(UserError, match=r"row 0: holds only the path 'a/0.jpg' of its image"):
        items(path, tmp_path)


def test_damaged_changed_and_odd_files_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "p" / "0.parquet", {})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"no parquet at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"p/0.parquet: not readable as parquet .*fetch it again"):
            items(path, tmp_path)
    path.write_bytes(whole)
    part = next(iter(opened(path, tmp_path).parts("all", 9)))
    table(path, {"label": [0] * 6})
    os.utime(path, ns=(0, 1))  # times of change may be as coarse as 10 ms
    with pytest.raises(UserError, match=r"0.parquet: changed since it was listed"):
        list(part)
    table(tmp_path / "p" / "1.parquet", {"image": [0], "other": IMAGES[:1]})
    with pytest.raises(UserError, match=r"1.parquet: no column 'label', but other files have it"):
        items(tmp_path / "p", tmp_path)
    with pytest.raises(
        UserError, match=r"1.parquet: column 'image' is int64 here, but images in other files"
    ):
        items(tmp_path / "p", tmp_path, labelled=False)
    with pytest.raises(UserError, match="read from a local disk; download them first"):
        Parquet(Parquet.Options(path="https://host.example/{0..3}.parquet"), tmp_path)


def test_a_flipped_byte_is_seen_where_pages_have_checksums(tmp_path: Path) -> None:
    path, buffer = tmp_path / "0.parquet", io.BytesIO()
    image = b"needle" * 1000
    pq.write_table(pa.table({"image": [image]}), buffer, compression="none", write_page_checksum=True)
    data = bytearray(buffer.getvalue())
    data[data.index(b"needle") + 3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"0.parquet: not readable as parquet \(.*checksum"):
        items(path, tmp_path)
