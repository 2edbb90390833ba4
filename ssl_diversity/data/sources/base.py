"""What a source of images is to `prepare`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from ssl_diversity.config import Config
from ssl_diversity.data.image import Pixels


class Item(NamedTuple):
    """One image: a name that is unique in its source and the same in every form of it."""

    name: str
    label: int  # number in `Source.classes`, -1: unlabelled
    image: bytes | Pixels  # encoded, or uint8 (H, W, 3)


class Part(Protocol):
    """A share of a source that one worker process reads: small when pickled, and quick to make."""

    def key(self) -> Any:
        """A JSON value that changes whenever what the part would yield may have changed."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class Source(ABC):
    """An opened source. Opening it may list files but decodes nothing."""

    class Options(Config):
        """The kind's options; unknown ones are refused."""

    holdout: ClassVar[float] = 0.0  # test share where it has no splits of its own and the spec names none
    splits: frozenset[str] = frozenset()  # those it declares: "train", "test"
    classes: list[str]  # empty: unlabelled

    @abstractmethod
    def __init__(self, options: Any, scratch: Path) -> None:
        """`options` is an `Options`; `scratch` a folder for intermediate files that outlives a kill."""

    @abstractmethod
    def parts(self, split: str, part_items: int) -> Iterable[Part]:
        """The images of a declared split or of "all", in parts of at most about `part_items`."""


class ArrayPart:
    """Images in memory as one part, for small packaged sets."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items

    def key(self) -> Any:
        state = blake2b(digest_size=16)
        for item in self.items:
            state.update(f"{item.name}:{item.label}:".encode() + bytes(item.image))
        return state.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def array_parts(items: list[Item], part_items: int) -> list[ArrayPart]:
    return [ArrayPart(items[i : i + part_items]) for i in range(0, len(items), part_items)]
