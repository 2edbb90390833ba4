"""Files that hold many images each: which ones a path stands for, and what is the same for shards and tables."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import braceexpand
from pydantic import Field, field_validator

from ssl_diversity import files
from ssl_diversity.config import Config
from ssl_diversity.data.sources.layout import TEST_WORDS, TRAIN_WORDS
from ssl_diversity.errors import UserError

Value = int | str  # what a file gives as a label
ClassNames = (
    Annotated[int, Field(gt=0)] | str | list[str] | None
)  # how many, a text file, the names; None: not said

_CLASS_FILES = ("classes.txt", "_classes.txt")


class Options(Config):
    path: str  # a folder, a file, a pattern ({000..127}, {a,b}, *), or addresses by such braces
    classes: ClassNames = None  # None: a classes.txt beside the files, else the labels that occur
    labelled: bool | None = None  # None: as the files are

    @field_validator("path")
    @classmethod
    def _path(cls, path: str) -> str:
        return absolute(path)

    @field_validator("classes")
    @classmethod
    def _classes(cls, classes: ClassNames) -> ClassNames:
        return absolute(classes) if isinstance(classes, str) else classes


@dataclass(frozen=True)
class File:
    place: str  # absolute path, or address
    name: str  # relative to the folder that holds all of them
    size: int = 0  # bytes; 0 for an address
    stamp: int = 0  # modification time, ns; 0 for an address

    @property
    def remote(self) -> bool:
        return is_address(self.place)

    @property
    def where(self) -> str:
        """What errors call it."""
        return _public(self.place)

    def state(self) -> list[Any]:
        """What changes when the file does."""
        return [self.place, self.size, self.stamp]


def is_address(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def is_pattern(text: str) -> bool:
    """Whether a path is to be expanded: braces or wildcards, and no file of that very name."""
    return re.search(r"[*?\[{]", text) is not None and (is_address(text) or not os.path.lexists(text))


def absolute(text: str) -> str:
    """An address as it is, any other path or pattern independent of the working folder."""
    return text if is_address(text) else os.path.abspath(os.path.expanduser(text))


def expand(text: str) -> Iterator[str]:
    """The paths or addresses that `text` stands for: `{000..127}` and `{a,b}` all, wildcards those that are there."""
    if not is_pattern(text):
        yield text
        return
    try:
        for path in braceexpand.braceexpand(text):
            if is_address(path) or not glob.has_magic(path):
                yield path
            else:
                yield from sorted(glob.glob(path, recursive=True))
    except ValueError:
        raise UserError(f"path={text}: a brace is not closed; write {{000..127}} or {{a,b}}") from None


def find(text: str, suffix: str) -> list[File]:
    """The files `text` stands for: one, those below a folder that end with `suffix`, a pattern, addresses.

    Raises UserError for a missing file, naming it, and where there is none at all.
    """
    folder = not is_address(text) and os.path.isdir(text)
    places = _below(text, suffix) if folder else list(expand(text))
    if not places:
        raise UserError(f"path={text}: no {suffix} files there")
    if len(set(places)) < len(places):
        twice = next(place for i, place in enumerate(places) if place in places[:i])
        raise UserError(f"path={text}: names {twice} twice; write each once")
    base = len(_common_folder(places)) + 1
    return [_file(place, _public(place)[base:], text) for place in places]


def _below(folder: str, suffix: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    found = []
    for root, children, names in os.walk(folder, followlinks=True, onerror=refuse):
        children[:] = sorted(child for child in children if not child.startswith("."))
        found += [f"{root}/{name}" for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted(found)


def _common_folder(places: list[str]) -> str:
    folders = [_public(place).split("/")[:-1] for place in places]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in same)


def _public(place: str) -> str:
    """An address without its query, which may be a key."""
    return place.partition("?")[0] if is_address(place) else place


def _file(place: str, name: str, text: str) -> File:
    if is_address(place):
        return File(place, name)
    try:
        status = os.stat(place)
    except OSError as error:
        of = f" (of path={text})" if place != text else ""
        raise UserError(f"{place}: {error.strerror}{of}; put it back or correct the path") from None
    return File(place, name, status.st_size, status.st_mtime_ns)


def by_split(found: list[File], where: str, labelled: Callable[[list[File]], bool]) -> dict[str, list[File]]:
    """`train` and `test` by the words in folder and file names (`train/`, `x-validation-00.tar`), else `all`.

    Where there are both test and validation files, test is the test split, unless `labelled` says that
    validation alone has labels. Raises UserError where some files name no split.
    """
    words: dict[str | None, list[File]] = {}
    for file in found:
        words.setdefault(_split_word(file.name), []).append(file)
    train = [file for word in TRAIN_WORDS for file in words.get(word, [])]
    tests = [words[word] for word in TEST_WORDS if word in words]
    if not train or not tests:
        return {"all": found}
    if None in words:
        raise UserError(
            f"{where}: {words[None][0].name} names no split, but others are train and test; give a path that"
            " stands for what you want"
        )
    test = tests[0] if len(tests) == 1 else next(filter(labelled, tests), tests[0])
    return {"train": train, "test": test}


def _split_word(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in words if word in TRAIN_WORDS or word in TEST_WORDS), None)


def class_names(given: ClassNames, found: list[File]) -> list[str] | None:
    """The classes that the option `given` or a classes.txt beside the files names; None where neither does."""
    if isinstance(given, list):
        return _checked(given, "classes")
    if isinstance(given, int):
        return [str(number) for number in range(given)]
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise UserError(
                f"classes={given}: no such file; give a text file of one name a line, or a number"
            )
        return _checked(path.read_text().splitlines(), str(path))
    folder = Path(_common_folder([file.place for file in found]))
    beside = next((folder / name for name in _CLASS_FILES if (folder / name).is_file()), None)
    return _checked(beside.read_text().splitlines(), str(beside)) if beside else None


def _checked(names: list[str], where: str) -> list[str]:
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{where}: class names must be neither empty nor twice the same")
    return names


class Labels:
    """The classes of a set, and what its files call them."""

    def __init__(self, classes: list[str], values: Iterable[Value] | None = None) -> None:
        """`values`: what stands for the classes, in their order; by default both their numbers and their names."""
        self.classes = classes
        self._number: dict[Value, int] = {}
        for names in (range(len(classes)), classes) if values is None else (values,):
            self._number.update({value: number for number, value in enumerate(names)})

    @classmethod
    def of(cls, values: set[Value], where: str) -> "Labels":
        """Where no names are given: one class per value, numbers in their order, else by name."""
        if any(isinstance(value, int) for value in values) and any(isinstance(v, str) for v in values):
            raise UserError(
                f"{where}: labels are numbers and names mixed; say classes=FILE or labelled=false"
            )
        if not values:
            raise UserError(f"{where}: no labels in it; say labelled=false")
        ordered: list[Value] = sorted(values)
        return cls([str(value) for value in ordered], ordered)

    def number(self, value: Any, where: str) -> int:
        """The class of a label; UserError where it is none or another."""
        if value is None or value == -1:
            raise UserError(f"{where}: has no label, but others have; mend it, or say labelled=false")
        try:
            return self._number[value]
        except (KeyError, TypeError):
            raise UserError(
                f"{where}: label {value!r} is none of the {len(self.classes)} classes ({self.classes[0]!r}, ...);"
                " say classes=NUMBER, a list or a text file, or labelled=false"
            ) from None

    def digest(self) -> str:
        return files.digest([self.classes, [[value, number] for value, number in self._number.items()]])


def remembered(scratch: Path, state: Any, compute: Callable[[], Any]) -> Any:
    """`compute()`, a JSON value, kept in `scratch` for as long as `state` is the same."""
    path = scratch / f"scan-{files.digest(state)}.json"
    if path.exists():
        return json.loads(path.read_text())
    value = compute()
    files.write_json(path, value)
    return value
