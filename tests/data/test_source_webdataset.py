"""WebDataset shards as a source: forms of paths, labels, splits, img2dataset's layout, and what can be wrong."""

import functools
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from form_helpers import Picture, write_shards

from ssl_diversity.config import parse_overrides
from ssl_diversity.data.sources.base import Item
from ssl_diversity.data.sources.webdataset import WebDatasetShards
from ssl_diversity.errors import UserError

Members = list[tuple[str, bytes]]


def opened(path: Path | str, scratch: Path, **options: Any) -> WebDatasetShards:
    return WebDatasetShards(WebDatasetShards.Options(path=str(path), **options), scratch)


def items(path: Path | str, scratch: Path, split: str = "all", **options: Any) -> list[Item]:
    return [item for part in opened(path, scratch, **options).parts(split, 2) for item in part]


def labels(path: Path | str, scratch: Path, split: str = "all", **options: Any) -> list[str]:
    """The names of the classes of all images, in order."""
    source = opened(path, scratch, **options)
    found = [item.label for part in source.parts(split, 2) for item in part]
    return [source.classes[number] if number >= 0 else "" for number in found]


def shard(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, label: object = None, suffix: str = "jpg") -> Members:
    """An image whose bytes are its key, and its .cls."""
    cls = [] if label is None else [(f"{key}.cls", str(label).encode())]
    return [(f"{key}.{suffix}", key.encode()), *cls]


def test_what_the_librarys_writer_wrote_by_any_form_of_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [Picture("", i % 2, f"{i:03d}.png", b"%d" % i) for i in range(7)]
    folder = write_shards(tmp_path / "shards", pictures, ["cat", "dog"], 3)
    names = [f"shard-{i // 3:06d}.tar:{p.name}" for i, p in enumerate(pictures)]
    expected = [(name, p.label, p.data) for name, p in zip(names, pictures, strict=True)]
    forms = [
        folder,
        f"{folder}/shard-{{000000..000002}}.tar",
        f"{folder}/*.tar",
        f"{folder}/s*-{{00..02}}*.tar",
    ]
    for form in [*forms[:3], f"{folder}/shard-00000[012].tar"]:
        source = opened(form, tmp_path)
        assert (source.classes, source.splits) == (["cat", "dog"], frozenset())
        parts = list(source.parts("train", 2))
        assert [len(list(part)) for part in parts] == [3, 3, 1]
        assert [item for part in parts for item in part] == expected
        assert len(pickle.dumps(parts[0])) < 2000
    assert items(folder / "shard-000001.tar", tmp_path) == expected[3:6]
    monkeypatch.chdir(tmp_path)
    path = parse_overrides(["path=shards/{shard-000000,shard-000002}.tar"])["path"]
    assert items(path, tmp_path) == expected[:3] + expected[6:]


def test_keys_end_at_the_first_dot_and_long_names_are_read(tmp_path: Path) -> None:
    long = "deep/" * 30 + "x" * 120
    members = [("./a/1.seg.png", b"mask"), ("./a/1.JPG", b"1"), ("a/1.cls", b"0\n"), (f"{long}.webp", b"2")]
    members += [(f"{long}.cls", b"1"), (".hidden.jpg", b""), ("README", b""), ("ümläut.jpg", b"3")]
    members += [("ümläut.cls", b"1")]
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = shard(tmp_path / f"{format}.tar", members, format)
        assert items(path, tmp_path) == [
            (f"{format}.tar:a/1.jpg", 0, b"1"),
            (f"{format}.tar:{long}.webp", 1, b"2"),
            (f"{format}.tar:ümläut.jpg", 1, b"3"),
        ]
    path = shard(tmp_path / "two.tar", [("1.png", b"p"), ("1.jpg", b"j"), ("2.png", b"q")])
    assert [item.image for item in items(path, tmp_path, image="jpg;png")] == [b"j", b"q"]
    assert [item.image for item in items(path, tmp_path, image="png")] == [b"p", b"q"]


@pytest.mark.parametrize("form", ["{}/0.tar", "set-{}-000.tar", "{}-0.tar", "data/1k-{}-512.tar"])
def test_splits_by_folder_or_file_name(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for split in ("train", "validation"):
        shard(folder / form.format(split), sample(split, 0 if split == "train" else 1) + sample("b", 1))
    (folder / "classes.txt").write_text("x\ny\n")
    source = opened(folder, tmp_path)
    assert source.splits == {"train", "test"}
    assert [item.image for item in items(folder, tmp_path, "train")] == [b"train", b"b"]
    assert [item.image for item in items(folder, tmp_path, "test")] == [b"validation", b"b"]
    assert len(items(folder, tmp_path, "all")) == 4
    shard(folder / form.format("test"), sample("unlabelled"))
    assert [item.image for item in items(folder, tmp_path, "test")] == [b"validation", b"b"]
    shard(folder / form.format("test"), sample("labelled", 1))
    assert [item.image for item in items(folder, tmp_path, "test")] == [b"labelled"]
    shard(folder / "extra/0.tar", sample("a", 0))
    with pytest.raises(UserError, match=r"extra/0.tar names no split"):
        opened(folder, tmp_path)


def test_one_split_alone_is_no_split(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", sample("a"))
    assert opened(tmp_path, tmp_path).splits == frozenset()
    assert len(items(tmp_path, tmp_path, "train")) == 1


def test_where_labels_and_names_come_from(tmp_path: Path) -> None:
    rows = [("a", 7, "pug"), ("b", 10, "cat"), ("c", 7, "pug"), ("d", 9, "ox")]
    members: Members = []
    for key, number, name in rows:
        text = json.dumps({"label": number, "kind": name, "tags": [1, 2]}).encode()
        members += [*sample(key, number), (f"{key}.json", text), (f"{key}.txt", name.encode())]
    path = shard(tmp_path / "a" / "0.tar", members)
    names = ["pug", "cat", "pug", "ox"]
    assert labels(path, tmp_path) == ["7", "10", "7", "9"]
    assert opened(path, tmp_path).classes == ["7", "9", "10"]  # no empty classes, numbers as numbers
    assert labels(path, tmp_path, label_key="label") == ["7", "10", "7", "9"]
    assert labels(path, tmp_path, label_key="kind") == labels(path, tmp_path, label_key=".txt") == names
    assert opened(path, tmp_path, label_key="kind").classes == ["cat", "ox", "pug"]
    assert labels(path, tmp_path, classes=11) == ["7", "10", "7", "9"]
    assert len(opened(path, tmp_path, classes=11).classes) == 11
    assert labels(path, tmp_path, label_key="kind", classes=["pug", "ox", "cat"]) == names
    twelve = [f"class {i}" for i in range(12)]
    (tmp_path / "names.txt").write_text("\n".join(twelve) + "\n")
    by_file = labels(path, tmp_path, classes=str(tmp_path / "names.txt"))
    assert by_file == labels(path, tmp_path, classes=twelve) == [twelve[number] for _, number, _ in rows]
    (tmp_path / "a" / "_classes.txt").write_text("\n".join(twelve))
    assert labels(path, tmp_path) == by_file
    assert labels(path, tmp_path, labelled=False) == [""] * 4
    assert opened(path, tmp_path, labelled=False).classes == []
    with pytest.raises(UserError, match=r"sample 'a': tags=\[1, 2\] is no single class"):
        labels(path, tmp_path, label_key="tags")


def test_img2dataset_shards_are_an_unlabelled_set(tmp_path: Path) -> None:
    """jpg, json and txt for each that was fetched; a table with the failed ones, too, and a count beside."""
    folder = tmp_path / "out"
    for number in range(2):
        members: Members = []
        meta = []
        for i in range(4):
            key, status = f"{number:05d}{i:04d}", "failed_to_download" if i == 2 else "success"
            line = {"url": f"u{i}", "key": key, "status": status, "error_message": None, "width": 8}
            meta.append({"url": f"u{i}", "key": key, "status": status})
            if status == "success":
                members += [(f"{key}.jpg", key.encode()), (f"{key}.txt", b"a caption")]
                members += [(f"{key}.json", json.dumps(line, indent=4).encode())]
            elif number == 1:  # some versions keep the record of a failure
                members += [(f"{key}.json", json.dumps(line).encode()), (f"{key}.txt", b"a caption")]
        shard(folder / f"{number:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(meta), folder / f"{number:05d}.parquet")
        (folder / f"{number:05d}_stats.json").write_text("{}")
    shard(folder / "00002.tar", [])  # nothing of it could be fetched
    source = opened(folder, tmp_path)
    assert (source.classes, source.splits) == ([], frozenset())
    found = items(folder, tmp_path)
    assert [item.label for item in found] == [-1] * 6
    assert [item.name for item in found] == [
        f"{n:05d}.tar:{n:05d}{i:04d}.jpg" for n in range(2) for i in (0, 1, 3)
    ]


def test_an_empty_shard_says_nothing_of_labels(tmp_path: Path) -> None:
    shard(tmp_path / "s" / "0.tar", [])
    shard(tmp_path / "s" / "1.tar", sample("a", 1) + sample("b", 0))
    assert labels(tmp_path / "s", tmp_path) == ["1", "0"]


def test_a_part_is_another_when_its_shard_or_labels_are(tmp_path: Path) -> None:
    def keys(**options: Any) -> list[str]:
        return [
            json.dumps(part.key()) for part in opened(tmp_path / "s", tmp_path, **options).parts("all", 2)
        ]

    shard(tmp_path / "s" / "0.tar", sample("a", 0))
    shard(tmp_path / "s" / "1.tar", sample("b", 1))
    first = keys()
    assert first == keys()
    assert len({*first, *keys(classes=2), *keys(labelled=False), *keys(classes=["x", "y"])}) == 8
    shard(tmp_path / "s" / "0.tar", sample("c", 0))
    os.utime(tmp_path / "s" / "0.tar", ns=(0, 0))
    assert [a == b for a, b in zip(first, keys(), strict=True)] == [False, True]
    part = next(iter(opened(tmp_path / "s", tmp_path).parts("all", 2)))
    shard(tmp_path / "s" / "0.tar", sample("d", 0) + sample("e", 0))
    os.utime(tmp_path / "s" / "0.tar", ns=(0, 1))  # times of change may be as coarse as 10 ms
    with pytest.raises(UserError, match=r"0.tar: changed since it was listed"):
        list(part)


WRONG: dict[str, tuple[Members, dict[str, Any], str]] = {
    "key twice": (sample("a", 0) + sample("b", 1) + sample("a", 1), {}, "key 'a' comes twice"),
    "member twice": ([*sample("b", 0), ("b.jpg", b"")], {}, "member 'b.jpg' comes twice"),
    "leaves": (sample("a", 0) + sample("../b", 1), {}, r"'../b.jpg' leaves the target folder"),
    "absolute": (sample("a", 0) + sample("/b", 1), {}, r"'/b.jpg' leaves the target folder"),
    "no label": (sample("a", 0) + sample("b"), {}, "sample 'b': has no label, but others have"),
    "late label": (sample("a") + sample("b", 0), {}, "sample 'b' has a label, but the first has none"),
    "no image": (sample("a", 0) + sample("b", 0)[1:], {}, "sample 'b' has a label, but no image"),
    "beyond": (
        sample("a", 0) + sample("b", 2),
        {"classes": 2},
        "sample 'b': label 2 is none of the 2 classes",
    ),
    "negative": (sample("a", 0) + sample("b", -1), {}, "sample 'b': has no label, but others have"),
    "mixed": (sample("a", 0) + sample("b", "pug"), {}, "numbers and names mixed"),
    "two images": ([*sample("a"), ("a.png", b"")], {}, "sample 'a' has several images; .* image=jpg"),
    "no images": ([("a.npy", b""), ("b.npy", b"")], {}, "none of its 2 samples has an image"),
    "other suffix": (sample("a"), {"image": "webp"}, "none of its 1 samples has an image .looked for webp"),
    "no json": (sample("a"), {"label_key": "label"}, "the first image has no label .label.; say label_key="),
    "none at all": (sample("a"), {"classes": 2}, "the first image has no label ..cls.; say label_key="),
    "bad json": ([*sample("a"), ("a.json", b"{")], {"label_key": "label"}, ".json is not readable"),
    "names twice": (sample("a", 0), {"classes": ["x", "x"]}, "class names must be neither empty nor twice"),
    "no such names": (sample("a", 0), {"classes": "/nowhere"}, "classes=/nowhere: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_fault_is_named_with_its_shard(case: str, tmp_path: Path) -> None:
    members, options, message = WRONG[case]
    path = shard(tmp_path / "s" / "000.tar", members)
    with pytest.raises(UserError, match=message) as error:
        items(path, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert case in ("names twice", "no such names") or "000.tar" in str(error.value)


@pytest.mark.parametrize("cut", [1, 512, 513, 1024, 1536])
def test_a_truncated_shard_is_named(cut: int, tmp_path: Path) -> None:
    shard(tmp_path / "s" / "0.tar", sample("a", 0))
    path = shard(tmp_path / "s" / "1.tar", sample("b", 0) + sample("c", 0))
    data = path.read_bytes()
    path.write_bytes(data[: 9 * 512 - cut])  # four headers, four bodies, a block of zeros
    with pytest.raises(UserError, match=r"s/1.tar: truncated tar"):
        items(tmp_path / "s", tmp_path)


def test_missing_shards_links_and_empty_places_are_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "s" / "0.tar", sample("a", 0))
    with pytest.raises(UserError, match=r"s/1.tar: No such file .*of path=.*0\.\.2"):
        opened(tmp_path / "s" / "{0..2}.tar", tmp_path)
    with pytest.raises(UserError, match=r"names .*0.tar twice"):
        opened(f"{path.parent}/{{0,0}}.tar", tmp_path)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("b.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match=r"0.tar: member 'b.jpg' is a link"):
        items(path, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .tar files there"):
        opened(tmp_path / "empty", tmp_path)


class Flaky(http.server.BaseHTTPRequestHandler):
    """Refuses the first request for each file, and cuts the second answer short; knows no ranges."""

    asked: ClassVar[Counter[str]] = Counter()

    def __init__(self, folder: Path, *args: Any) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        path = self.folder / self.path[1:]
        if self.asked[self.path] == 1 or not path.exists():
            self.send_error(503 if self.asked[self.path] == 1 else 404)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.asked[self.path] == 2 else data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    Flaky.asked.clear()
    handler = functools.partial(Flaky, tmp_path / "s")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_shards_at_an_address_are_fetched_with_retries_and_removed(tmp_path: Path, server: str) -> None:
    for number in range(3):
        shard(tmp_path / "s" / f"{number:03d}.tar", sample(f"a{number}", 0) + sample(f"b{number}", 1))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    source = opened(f"{server}/{{000..002}}.tar", scratch, classes=["x", "y"])
    got = [item for part in source.parts("train", 2) for item in part]
    assert got == items(tmp_path / "s", tmp_path, classes=["x", "y"])
    assert set(Flaky.asked.values()) == {3}  # refused, cut, whole: each fetched once
    assert not list(scratch.glob("*.tar*"))
    with pytest.raises(UserError, match=r"how many classes are there\? Say classes=NUMBER"):
        opened(f"{server}/{{000..002}}.tar", scratch)
    with pytest.raises(UserError, match=r"003.tar: 404"):
        list(next(iter(opened(f"{server}/003.tar", scratch, classes=2).parts("train", 2))))
    assert not list(scratch.glob("fetched-*"))[1:]  # what was looked at waits for its part
