"""What a tree of image files means: its splits, its classes, which image belongs to which.

Works on names alone ('/'-separated, relative to the folder or archive), so that a folder and a tar of it
cannot be read differently.
"""

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.errors import UserError

TRAIN_WORDS = ("train", "training")
TEST_WORDS = ("test", "testing", "val", "valid", "validation")  # the first that fits is the test split
_SUFFIXES = {"jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "pbm"}
_OUTSIDE = -2  # what stands for the class of an image that is not in the split
_HIDDEN = re.compile(r"(^|/)(\.|__MACOSX(/|$))")


def is_image(name: str) -> bool:
    """By suffix; files that begin with a dot, or lie in such a folder, are a system's own."""
    stem, _, suffix = name.rpartition(".")
    return suffix.lower() in _SUFFIXES and bool(stem) and not _HIDDEN.search(name)


@dataclass(frozen=True, eq=False)
class Layout:
    """`base` is the prefix that names lose; `chosen` has the keys "train" and "test", or "all" alone where there
    are no splits.
    """

    base: str
    classes: list[str]
    chosen: dict[str, NDArray[np.int64]]  # (n, 2): index into names, class number or -1


class _Tree:
    def __init__(self, names: Iterable[str], folders: Iterable[str]) -> None:
        numbers: dict[str, int] = {}  # of the folders that hold images
        folder_of = array("q", (numbers.setdefault(n.rpartition("/")[0], len(numbers)) for n in names))
        self.numbers = numbers
        self.folder_of = np.array(folder_of, dtype=np.int64)  # (n,) number of each image's folder
        self.children: dict[str, set[str]] = defaultdict(set)  # folder -> folders directly in it
        seen: set[str] = {""}
        waiting = [*numbers, *folders]
        while waiting:
            folder = waiting.pop()
            if folder in seen:
                continue
            seen.add(folder)
            parent, _, last = folder.rpartition("/")
            waiting.append(parent)
            if not last.startswith(".") and last != "__MACOSX":
                self.children[parent].add(last)

    def holds_images(self, folder: str) -> bool:
        return folder in self.numbers

    def under(self, folder: str) -> list[int]:
        """Numbers of the folders with images in `folder`, itself included."""
        found = [self.numbers[folder]] if folder in self.numbers else []
        for child in self.children.get(folder, ()):
            found += self.under(join(folder, child))
        return found

    def labelled(self, folder: str, asked: bool | None, where: str) -> bool:
        classes, direct = self.children.get(folder), self.holds_images(folder)
        place = f"{where}/{folder}" if folder else where
        if asked is None and classes and direct:
            raise UserError(
                f"{place}: holds both class folders and images of no class; remove one or say labelled=false"
            )
        if asked and (direct or not classes):
            raise UserError(f"{place}: labelled=true, but not every image lies in a class folder")
        return bool(classes) if asked is None else asked


def join(folder: str, child: str) -> str:
    return f"{folder}/{child}" if folder else child


def read_layout(names: Iterable[str], folders: Iterable[str], labelled: bool | None, where: str) -> Layout:
    """Recognise train/ beside test/ or val/, at the top or below single root folders, and class folders.

    `names` are of images only, `folders` all folders (an empty one is an empty class). `labelled=None`
    means: labelled if images lie in class folders. Raises UserError for no image, an empty class, a class of
    the test split that train lacks.
    """
    tree = _Tree(names, folders)
    if not tree.numbers:
        raise UserError(f"{where}: no images in it (looked for .{', .'.join(sorted(_SUFFIXES))})")
    base = ""
    while not tree.holds_images(base) and len(tree.children[base]) == 1:
        base = join(base, next(iter(tree.children[base])))
    by_name = {child.lower(): child for child in sorted(tree.children[base])}
    train = next((by_name[name] for name in TRAIN_WORDS if name in by_name), None)
    tests = [by_name[name] for name in TEST_WORDS if name in by_name]
    if train is None or not tests or tree.holds_images(base):
        classes = _classes(tree, base, labelled, where)
        return Layout(base, classes, {"all": _label(tree, base, classes, where)})
    root = join(base, train)
    classes = _classes(tree, root, labelled, where)
    test = join(base, next((t for t in tests if _fits(tree, join(base, t), classes)), tests[0]))
    chosen = {
        split: _label(tree, folder, classes, where) for split, folder in (("train", root), ("test", test))
    }
    return Layout(base, classes, chosen)


def _classes(tree: _Tree, root: str, labelled: bool | None, where: str) -> list[str]:
    return sorted(tree.children[root]) if tree.labelled(root, labelled, where) else []


def _fits(tree: _Tree, folder: str, classes: list[str]) -> bool:
    return not classes or (tree.children[folder] <= set(classes) and not tree.holds_images(folder))


def _label(tree: _Tree, root: str, classes: list[str], where: str) -> NDArray[np.int64]:
    label_of = np.full(len(tree.numbers), _OUTSIDE)  # folder -> class
    if not classes:
        label_of[tree.under(root)] = -1
    elif not _fits(tree, root, classes):
        odd = next(iter(sorted(tree.children[root] - set(classes))), "an image of no class")
        raise UserError(
            f"{where}/{root}: {odd} is not among the {len(classes)} classes of the train folder; sort the images"
            " into folders of those names, or say labelled=false"
        )
    for number, name in enumerate(classes):
        if name in tree.children[root]:
            folders = tree.under(join(root, name))
            if not folders:
                raise UserError(
                    f"{where}/{join(root, name)}: empty class (no images in the folder); fill or remove it"
                )
            label_of[folders] = number
    labels = label_of[tree.folder_of]
    indices = np.flatnonzero(labels != _OUTSIDE)
    return np.stack([indices, labels[indices]], axis=1)
