"""What a source of images is to `prepare`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from ssl_diversity.config import Config
from ssl_diversity.data.image import Pixels
from ssl_diversity.runtime import Runtime


class Item(NamedTuple):
    """One image, with a name that is unique in its source and tells people where it is."""

    name: str
    label: int  # number in `Source.classes`, -1: unlabelled
    image: bytes | Pixels  # encoded, or uint8 (H, W, 3)


class Part(Protocol):
    """A share of a source that one worker process reads: small when pickled, and quick to make.

    It may be listed by the worker alone (a shard, a class tar): the process that hands out parts sees no image.
    """

    def key(self) -> Any:
        """A JSON value that changes whenever what the part would yield may have changed."""

    def __len__(self) -> int:
        """How many images, where that is known; else an estimate, at least 1, for progress."""

    def __iter__(self) -> Iterator[Item]: ...


class Source(ABC):
    """An opened source. Opening it may list files but decodes nothing."""

    class Options(Config):
        """The kind's options; unknown ones are refused."""

    at_hand: ClassVar[bool] = True  # False: before it gives parts there may be much to read or to download
    runtime = Runtime()  # prepare's: for the progress and the stopping of that
    asked: int | None = None  # images that the user asked for, if in so many words
    holdout: ClassVar[float] = 0.0  # test share where it has no splits of its own and the spec names none
    splits: frozenset[str] = frozenset()  # those it declares: "train", "test"
    classes: list[str]  # empty: unlabelled

    @abstractmethod
    def __init__(self, options: Any, scratch: Path) -> None:
        """`options` is an `Options`; `scratch` a folder for intermediate files that outlives a kill."""

    @property
    def counts(self) -> dict[str, int]:
        """What a pool's counts have beside prepare's own, once the parts were given: asked for, missing by cause."""
        return {}

    @abstractmethod
    def parts(self, split: str, part_items: int) -> Iterable[Part]:
        """The images of a declared split or of "all", in parts made one by one, of about `part_items` at most
        where the source's form allows it.
        """


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
