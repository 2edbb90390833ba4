"""The random order of YFCC100M's photos: exact, nested, uniform, the same from any form of the metadata."""

import bz2
import gzip
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare
from yfcc_replica import hash_at, line, write

from ssl_diversity.data.yfcc import index as module
from ssl_diversity.data.yfcc.index import metadata_files, open_index
from ssl_diversity.data.yfcc.metadata import hash_of
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime


def order(*paths: Path, draw: int = 0) -> list[bytes]:
    index = open_index(paths, draw)
    return index.read(0, len(index))


def mixed(count: int) -> list[list[str]]:
    return [line(i, video=i % 10 == 9) for i in range(count)]


def test_the_hash_of_a_photo_is_that_of_its_url() -> None:
    """The first line of the published metadata."""
    url = b"http://farm8.staticflickr.com/7205/6985418911_df7747990d.jpg"
    assert hash_of(url) == b"4e2f7a26a1dfbf165a7e30bdabf7e72a"
    assert min(len(hash_of(b"%d" % i)) for i in range(200)) < 32  # bytes below 16 take one digit


def test_photos_are_listed_once_and_videos_and_malformed_lines_counted(tmp_path: Path) -> None:
    lines = mixed(100)
    lines[3] = lines[3][:20]  # a photo
    lines[4][24] = "x"
    lines[5][2] = "no hash"
    lines.append(lines[0])
    index = open_index([write(tmp_path / "a.bz2", lines)], 0)
    assert index.counts == {"lines": 101, "photos": 88, "videos": 10, "malformed": 3, "repeated": 1}
    expected = {hash_at(i) for i in range(100) if i % 10 != 9 and i not in (3, 4, 5)}
    assert sorted(photo.decode() for photo in index.read(0, len(index))) == sorted(expected)
    notes = index.malformed[str(tmp_path / "a.bz2")]
    assert [note.partition(":")[0] for note in notes] == ["line 4", "line 5", "line 6"]
    assert "20 columns" in notes[0]


def test_the_order_is_that_of_the_draw_and_the_photos_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = mixed(300)
    whole = order(write(tmp_path / "whole.bz2", lines))
    halves = [write(tmp_path / f"yfcc100m_dataset-{i}.bz2", lines[i::2][::-1]) for i in range(2)]
    assert order(*halves) == whole
    monkeypatch.setattr(module, "_RUN_PHOTOS", 1)
    assert order(write(tmp_path / "again.bz2", lines)) == whole
    other = order(*halves, draw=1)
    assert other != whole
    assert sorted(other) == sorted(whole)


def test_every_form_of_the_metadata_gives_the_same_order(tmp_path: Path) -> None:
    lines = mixed(200)
    text = "".join("\t".join(fields) + "\n" for fields in lines).encode()
    (tmp_path / "plain.tsv").write_bytes(text)
    (tmp_path / "text.gz").write_bytes(gzip.compress(text))
    middle = text.index(b"\n", len(text) // 2) + 1
    streams = bz2.compress(text[:middle]) + bz2.compress(text[middle:])  # as parallel compressors write it
    (tmp_path / "streams.bz2").write_bytes(streams)
    first_release = [[fields[1], *fields[3:]] for fields in lines]
    photos = [fields[:3] for fields in lines if fields[24] == "0"]
    with sqlite3.connect(tmp_path / "base.sql") as base:
        base.execute("create table yfcc100m_dataset (photoid int, downloadurl text, marker int)")
        base.executemany(
            "insert into yfcc100m_dataset values (?, ?, ?)", [(f[1], f[16], int(f[24])) for f in lines]
        )
    base.close()
    expected = order(write(tmp_path / "official.bz2", lines))
    assert order(tmp_path / "plain.tsv") == expected
    assert order(tmp_path / "text.gz") == expected
    assert order(tmp_path / "streams.bz2") == expected
    assert order(write(tmp_path / "first.bz2", first_release)) == expected
    assert order(write(tmp_path / "list.bz2", photos)) == expected
    assert order(tmp_path / "base.sql") == expected


def test_a_selection_is_uniform(tmp_path: Path) -> None:
    """Neither the photos' own hashes nor their places in the file say anything about being selected."""
    lines = [line(i) for i in range(20_000)]
    place = {fields[2].encode(): i for i, fields in enumerate(lines)}
    chosen = open_index([write(tmp_path / "a.bz2", lines)], 0).read(0, 5_000)
    digits = np.bincount([int(photo[:1], 16) for photo in chosen], minlength=16)
    population = np.bincount([int(photo[:1], 16) for photo in place], minlength=16)
    assert chisquare(digits, population / 4).pvalue > 1e-4
    tenths = np.bincount([place[photo] // 2000 for photo in chosen], minlength=10)
    assert chisquare(tenths).pvalue > 1e-4


def test_more_photos_than_there_are_is_an_error(tmp_path: Path) -> None:
    index = open_index([write(tmp_path / "a.bz2", mixed(100))], 0)
    assert index.selected(None) == index.selected(90) == len(index) == 90
    with pytest.raises(UserError, match="n=91: the metadata lists 90 photos"):
        index.selected(91)


def test_files_that_were_read_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{i}.bz2", mixed(60)[i::2]) for i in range(2)]
    monkeypatch.setattr(module, "cores", lambda: 1)
    read: list[str] = []
    original = module.read

    def noted(path: Path, tally: object) -> object:
        read.append(path.name)
        return original(path, tally)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "read", noted)
    with pytest.raises(Interrupted):
        open_index(paths, 0, Runtime(stop=lambda: len(read) > 1))
    assert read == ["0.bz2", "1.bz2"]
    assert len(open_index(paths, 0)) == 54
    assert read == ["0.bz2", "1.bz2", "1.bz2"]
    open_index(paths, 0)
    assert len(read) == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bz2.compress(b"a\tb\n" * 9), "lines of 2 tab-separated columns"),
        (bz2.compress(("\t".join(line(0)) + "\n").encode() * 900)[:-20], "truncated"),
        (b"BZh9 no bzip2", "fetch it again"),
        (b"SQLite format 3\0 and no more", "truncated"),
    ],
)
def test_a_file_that_is_no_metadata_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "yfcc100m_dataset.bz2").write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        open_index(metadata_files([str(tmp_path)]), 0)
    assert "yfcc100m_dataset.bz2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_is_a_path_a_pattern_or_a_folder(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"yfcc100m_dataset-{i}.bz2", mixed(1)) for i in range(3)]
    assert metadata_files([str(tmp_path)]) == paths
    assert metadata_files([f"{tmp_path}/yfcc100m_dataset-[01].bz2"]) == paths[:2]
    assert metadata_files([str(paths[2]), str(paths[0])]) == [paths[2], paths[0]]
    for name in (str(tmp_path / "none"), str(tmp_path / "*.gz")):
        with pytest.raises(UserError, match="no such file"):
            metadata_files([name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no yfcc100m_dataset"):
        metadata_files([str(tmp_path / "empty")])
