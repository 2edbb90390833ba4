"""The same images as a tar, a folder, WebDataset shards and parquet files, written by plain code."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset


class Picture(NamedTuple):
    split: str  # "train" or "val"; "" where there are none
    label: int
    name: str  # unique in its split, with one dot
    data: bytes


def write_tar(path: Path, pictures: Iterable[Picture], classes: Sequence[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for picture in pictures:
            member = tarfile.TarInfo(_tree_name(picture, classes))
            member.size = len(picture.data)
            tar.addfile(member, io.BytesIO(picture.data))
    return path


def write_folder(path: Path, pictures: Iterable[Picture], classes: Sequence[str]) -> Path:
    for picture in pictures:
        target = path / _tree_name(picture, classes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture.data)
    return path


def _tree_name(picture: Picture, classes: Sequence[str]) -> str:
    return "/".join(filter(None, ("set", picture.split, classes[picture.label], picture.name)))


def write_shards(path: Path, pictures: Iterable[Picture], classes: Sequence[str], per_shard: int) -> Path:
    """`<split>-000000.tar`, ... as the library's own writer makes them, and classes.txt."""
    path.mkdir(parents=True)
    (path / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, chosen in _by_split(pictures):
        pattern = str(path / f"{split or 'shard'}-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as sink:
            for picture in chosen:
                key, _, suffix = picture.name.partition(".")
                sink.write({"__key__": key, suffix: picture.data, "cls": picture.label})
    return path


def write_parquet(
    path: Path, pictures: Iterable[Picture], classes: Sequence[str], per_file: int, per_group: int
) -> Path:
    """`data/<split>-00000-of-0000N.parquet` with the columns and metadata of Hugging Face's `datasets`."""
    (path / "data").mkdir(parents=True)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for split, chosen in _by_split(pictures):
        files = [chosen[i : i + per_file] for i in range(0, len(chosen), per_file)]
        for number, rows in enumerate(files):
            table = pa.table(
                {
                    "image": [{"bytes": row.data, "path": row.name} for row in rows],
                    "label": [row.label for row in rows],
                },
                schema,
            )
            name = f"{split or 'rows'}-{number:05d}-of-{len(files):05d}.parquet"
            pq.write_table(table, path / "data" / name, row_group_size=per_group)
    return path


def _by_split(pictures: Iterable[Picture]) -> Iterator[tuple[str, list[Picture]]]:
    found: dict[str, list[Picture]] = {}
    for picture in pictures:
        found.setdefault(picture.split, []).append(picture)
    yield from found.items()
