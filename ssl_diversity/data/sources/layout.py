"""What a tree of image files means: its splits, its classes, which image belongs to which.

Works on names alone ('/'-separated, relative to the folder or archive), so that a folder and a tar of it
cannot be read differently.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ssl_diversity.errors import UserError

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")  # the first that fits is the test split
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


def is_image(name: str) -> bool:
    """By suffix; files that begin with a dot, or lie in such a folder, are a system's own."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and not hidden


@dataclass(frozen=True)
class Layout:
    """`chosen[split]` lists (index into names, class number or -1); `base` is the prefix names lose."""

    base: str
    classes: list[str]
    chosen: dict[
        str, list[tuple[int, int]]
    ]  # keys: "train" and "test", or "all" alone where there are no splits


class _Tree:
    def __init__(self, names: Sequence[str], folders: Iterable[str]) -> None:
        self.images: dict[str, list[int]] = defaultdict(list)  # folder -> indices of images directly in it
        self.children: dict[str, set[str]] = defaultdict(set)  # folder -> folders directly in it
        for index, name in enumerate(names):
            self.images[name.rpartition("/")[0]].append(index)
        seen: set[str] = {""}
        waiting = [*self.images, *folders]
        while waiting:
            folder = waiting.pop()
            if folder in seen:
                continue
            seen.add(folder)
            parent, _, last = folder.rpartition("/")
            waiting.append(parent)
            if not last.startswith(".") and last != "__MACOSX":
                self.children[parent].add(last)

    def under(self, folder: str) -> list[int]:
        found = list(self.images.get(folder, ()))
        for child in self.children.get(folder, ()):
            found += self.under(join(folder, child))
        return found

    def labelled(self, folder: str, asked: bool | None, where: str) -> bool:
        classes, direct = self.children.get(folder), self.images.get(folder)
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


def read_layout(names: Sequence[str], folders: Iterable[str], labelled: bool | None, where: str) -> Layout:
    """Recognise train/ beside test/ or val/, at the top or below single root folders, and class folders.

    `names` are of images only, `folders` all folders (an empty one is an empty class). `labelled=None`
    means: labelled if images lie in class folders. Raises UserError for no image, an empty class, a class of
    the test split that train lacks.
    """
    if not names:
        raise UserError(f"{where}: no images in it (looked for {', '.join(sorted(_SUFFIXES))})")
    tree = _Tree(names, folders)
    base = ""
    while not tree.images.get(base) and len(tree.children[base]) == 1:
        base = join(base, next(iter(tree.children[base])))
    by_name = {child.lower(): child for child in sorted(tree.children[base])}
    train = next((by_name[name] for name in _TRAIN if name in by_name), None)
    tests = [by_name[name] for name in _TEST if name in by_name]
    if train is None or not tests or tree.images.get(base):
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
    return not classes or (tree.children[folder] <= set(classes) and not tree.images.get(folder))


def _label(tree: _Tree, root: str, classes: list[str], where: str) -> list[tuple[int, int]]:
    if not classes:
        return [(index, -1) for index in sorted(tree.under(root))]
    if not _fits(tree, root, classes):
        odd = next(iter(sorted(tree.children[root] - set(classes))), "an image of no class")
        raise UserError(
            f"{where}/{root}: {odd} is not among the {len(classes)} classes of the train folder; sort the images"
            " into folders of those names, or say labelled=false"
        )
    labels = {name: number for number, name in enumerate(classes)}
    chosen = []
    for child in sorted(tree.children[root]):
        indices = tree.under(join(root, child))
        if not indices:
            raise UserError(
                f"{where}/{join(root, child)}: empty class (no images in the folder); fill or remove it"
            )
        chosen += [(index, labels[child]) for index in indices]
    return sorted(chosen)
