"""Parquet files with one image a row: the layout of Hugging Face's datasets, or any binary column."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl_diversity.config import hint
from ssl_diversity.data.sources import paths
from ssl_diversity.data.sources.base import Item, Source
from ssl_diversity.data.sources.paths import File, Labels, Value
from ssl_diversity.data.sources.tars import changed
from ssl_diversity.errors import UserError

_BATCH_BYTES = 4 << 20  # of images decoded from parquet at a time
_PAGE_BYTES = 1 << 20  # read from disk at a time, for each column
_IMAGE_NAMES = ("image", "img", "jpg", "png")  # which of several image columns is meant


class Parquet(Source):
    """A part is some consecutive row groups of one file; a big one is read in small batches."""

    class Options(paths.Options):
        image: str | None = None  # column; None: found by its type
        label: str | None = None  # column; None: `label`, or the only one that the schema calls a class label

    def __init__(self, options: Any, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        where = f"path={options.path}"
        found = paths.find(options.path, ".parquet")
        if found[0].remote:
            raise UserError(f"{where}: parquet files are read from a local disk; download them first")
        schema = _schema(found[0])
        features = _features(schema)
        self.image = _image_column(schema, features, options.image, found[0].where)
        self.label = (
            None if options.labelled is False else self._label_column(schema, features, found[0].where)
        )
        if self.label is None and (options.labelled or (options.classes and options.labelled is None)):
            raise UserError(
                f"{where}: there is no label column; name it by label=COLUMN, or say labelled=false"
            )
        self.files = paths.by_split(found, where, self._has_labels)
        self.splits = frozenset(self.files) - {"all"}
        self.labels = None
        if self.label is not None:
            written = features.get(self.label, {}).get("names") if options.classes is None else None
            names = written or paths.class_names(options.classes, found)
            self.labels = Labels(names) if names else self._scan(where)
        self.classes = self.labels.classes if self.labels else []

    def parts(self, split: str, part_items: int) -> Iterator["RowGroups"]:
        for name in [split] if split in self.files else sorted(self.files):
            for file in self.files[name]:
                for groups, first, count in _grouped(file, self.image, self.label, part_items):
                    yield self.part(file, groups, first, count)

    def part(self, file: File, groups: tuple[int, ...], first: int, count: int) -> "RowGroups":
        return RowGroups(file, groups, first, count, self.image, self.label, self.labels)

    def _label_column(self, schema: pa.Schema, features: dict[str, Any], where: str) -> str | None:
        name = self.options.label
        if name is None and "label" in schema.names:
            name = "label"
        if name is None:
            named = [key for key, feature in features.items() if feature.get("_type") == "ClassLabel"]
            if len(named) > 1:
                raise UserError(
                    f"{where}: several label columns ({', '.join(named)}); say label={named[0]}, or labelled=false"
                )
            name = named[0] if named else None
        if name is not None:
            _check_label(schema, name, where)
        return name

    def _has_labels(self, found: list[File]) -> bool:
        """Whether the first file has labels at all: a split whose labels are kept back says -1, or nothing."""
        return self.label is None or bool(self._values(found[:1]) - {-1})

    def _scan(self, where: str) -> Labels:
        """The classes from the labels that occur: reads that column alone."""
        found = self.files["train" if self.splits else "all"]
        state = ["classes", [file.state() for file in found], self.label]
        values = paths.remembered(self.scratch, state, lambda: list(self._values(found)))
        return Labels.of(set(values) - {-1}, where)

    def _values(self, found: list[File]) -> set[Value]:
        values: set[Value | None] = set()
        for file in found:
            with opened(file, self.label) as table:
                for batch in table.iter_batches(1 << 16, columns=[self.label]):
                    values.update(map(_value, pc.unique(batch.column(0)).to_pylist()))
        return {value for value in values if value is not None}


@dataclass(frozen=True)
class RowGroups:
    """Rows [first, first + count) of a file, which are its row groups `groups`."""

    file: File
    groups: tuple[int, ...]
    first: int
    count: int
    image: str
    label: str | None
    labels: Labels | None

    def key(self) -> Any:
        labels = self.labels.digest() if self.labels else None
        return [self.file.state(), self.groups, self.image, self.label, labels]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        columns = [self.image, *([self.label] if self.label else [])]
        row = self.first
        with opened(self.file) as table:
            rows = _batch_rows(table.metadata, self.groups)
            for batch in table.iter_batches(rows, row_groups=self.groups, columns=columns):
                labels = batch.column(self.label).to_pylist() if self.label else [None] * len(batch)
                for image, value in zip(batch.column(self.image), labels, strict=True):
                    where = f"{self.file.where}: row {row}"
                    label = self.labels.number(_value(value), where) if self.labels else -1
                    data, path = _bytes(image, where)
                    yield Item(self.name(row, path, label), label, data)
                    row += 1

    def name(self, row: int, path: str | None, label: int) -> str:
        """What a row is called in the pool; `path` is the image column's own, which need not be unique."""
        return f"{self.file.name}:{row}"


def _grouped(
    file: File, image: str, label: str | None, part_items: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(row groups, first row, rows) of each part of a file."""
    with opened(file, image, label) as table:
        kind = table.schema_arrow.field(image).type
        if not _is_image(kind):
            raise UserError(
                f"{file.where}: column {image!r} is {kind} here, but images in other files; give them apart"
            )
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    groups: list[int] = []
    first = count = 0
    for group, size in enumerate(sizes):
        if groups and count + size > part_items:
            yield tuple(groups), first, count
            groups, first, count = [], first + count, 0
        groups.append(group)
        count += size
    if count:
        yield tuple(groups), first, count


@contextmanager
def opened(file: File, *columns: str | None) -> Iterator[pq.ParquetFile]:
    """UserError for a file that is cut, damaged, of another kind, changed since listed, or without the columns."""
    options = {"pre_buffer": False, "buffer_size": _PAGE_BYTES, "page_checksum_verification": True}
    try:
        with pq.ParquetFile(file.place, **options) as table:
            if os.stat(file.place).st_mtime_ns != file.stamp:
                raise changed(Path(file.place))
            lacking = [name for name in columns if name is not None and name not in table.schema_arrow.names]
            if lacking:
                raise UserError(
                    f"{file.where}: no column {lacking[0]!r}, but other files have it; give them apart"
                )
            yield table
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file.where}: not readable as parquet ({reason}); fetch it again") from None


def _schema(file: File) -> pa.Schema:
    with opened(file) as table:
        return table.schema_arrow


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` says of the columns; {} where it did not write the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {key: feature for key, feature in features.items() if isinstance(feature, dict)}


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(schema: pa.Schema, features: dict[str, Any], asked: str | None, where: str) -> str:
    found = [field.name for field in schema if _is_image(field.type)]
    if asked is not None and asked not in found:
        raise UserError(
            f"{where}: image={asked} is no column of images; {hint(asked, found, 'such columns')}"
        )
    written = [name for name in found if features.get(name, {}).get("_type") == "Image"] or found
    found = [asked] if asked else [name for name in _IMAGE_NAMES if name in written][:1] or written
    if len(found) != 1:
        columns = ", ".join(found or [f"{field.name} ({field.type})" for field in schema])
        problem = "several image columns" if found else "no image column (bytes, or a struct with bytes)"
        raise UserError(f"{where}: {problem}: {columns}; name it by image=COLUMN")
    return found[0]


def _check_label(schema: pa.Schema, name: str, where: str) -> None:
    if name not in schema.names:
        raise UserError(f"{where}: no column {name!r}; {hint(name, schema.names, 'columns')}")
    kind = schema.field(name).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    one_of = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(plain) for is_kind in one_of):
        what = "multi-label" if pa.types.is_list(plain) or pa.types.is_large_list(plain) else str(plain)
        raise UserError(
            f"{where}: column {name!r} is {what}, no single class (a number or a name); say label=COLUMN for"
            " another, or labelled=false"
        )


def _value(value: Any) -> Value | None:
    return int(value) if isinstance(value, bool) else value


def _batch_rows(metadata: Any, groups: tuple[int, ...]) -> int:
    """Rows that take about `_BATCH_BYTES`."""
    rows = sum(metadata.row_group(group).num_rows for group in groups)
    size = sum(metadata.row_group(group).total_byte_size for group in groups)
    return max(1, min(1024, _BATCH_BYTES * rows // max(1, size)))


def _bytes(image: Any, where: str) -> tuple[bytes, str | None]:
    """(encoded image, its path) of a row; of an empty row no bytes, which then do not decode."""
    value = image.as_py()
    if value is None or isinstance(value, bytes):
        return value or b"", None
    data, path = value["bytes"], value.get("path")
    if data is None and path:
        raise UserError(
            f"{where}: holds only the path {path!r} of its image; write the table with the images embedded"
        )
    return data or b"", path
