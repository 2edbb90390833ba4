"""The images of a pipeline, a seed and conditions as they are made, in the store, until pools have taken them.

store/images/<kk>/<digest>/FIRST-COUNT.npz    what is known of the images of blocks FIRST to FIRST + COUNT - 1
store/images/<kk>/<digest>/FIRST-COUNT.bin    the images, encoded as pools keep them; gone once a pool has them

Such a pair is a piece. A block is one when it is made; those of a chunk are then made into one. All who need a
block look here first, whichever task or pool made it: no block is made twice, however work is cut, but for one whose images
a pool has taken and another wants.
"""

import contextlib
import io
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data.near import SIGNATURE_BYTES, THUMBNAIL_BYTES
from ssl_diversity.errors import UserError

ROW = np.dtype(
    [
        ("index", "<i8"),
        ("label", "<i4"),
        ("seed", "<i8"),
        ("content", "u1", (16,)),  # hash of the pixels as the model gives them
        ("fitted", "u1", (16,)),  # and as the pool has them
        ("offset", "<i8"),  # of the encoded image in the piece's .bin, bytes
        ("length", "<i4"),
        ("crc", "<u4"),  # zlib.crc32 of it
        ("spread", "<f4"),  # standard deviation of the pixels about their mean colour, grey levels
        ("saturated", "<f4"),  # share of values at 0 or 255
        ("unsafe", "?"),  # says the pipeline's own filter
    ]
)
NEAR = {"signature": SIGNATURE_BYTES, "thumbnail": THUMBNAIL_BYTES}
Rows = NDArray[np.void]
_TRIES, _WAIT_S = 10, 0.05


class Gone(Exception):
    """Images that were there when somebody looked are not any more: look again."""


@dataclass(frozen=True)
class Block:
    """A block's rows and images. `about` says by what, on what device and at what cost it was made."""

    number: int
    rows: Rows  # of dtype ROW; (block,)
    near: dict[str, NDArray[np.uint8]]  # by the names of NEAR, (block, bytes)
    about: dict[str, Any]
    images: tuple[bytes, ...] | None  # None: gone


@dataclass(frozen=True, order=True)
class _Piece:
    has_images: bool  # first: of two pieces with a block that which has its images is better
    count: int
    first: int

    @property
    def name(self) -> str:
        return f"{self.first:08d}-{self.count}"


class Stream:
    """The pieces in a folder. Any number of processes may add to it: files appear whole, and are equal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.look()

    def look(self) -> None:
        """See what there is now."""
        names = {path.name for path in self.folder.glob("*")}
        self._pieces: set[_Piece] = set()
        self._of: dict[int, _Piece] = {}
        for name in names:
            if name.endswith(".npz") and not name.startswith("."):
                first, count = map(int, name.removesuffix(".npz").split("-"))
                self._note(_Piece(name.replace(".npz", ".bin") in names, count, first))

    def _note(self, piece: _Piece) -> None:
        self._pieces.add(piece)
        for block in range(piece.first, piece.first + piece.count):
            self._of[block] = max(piece, self._of.get(block, piece))

    def __contains__(self, block: int) -> bool:
        return block in self._of

    def appeared(self, block: int) -> bool:
        """Whether it is there with its images, somebody else having made it, too."""
        if (self.folder / f"{_Piece(True, 1, block).name}.npz").exists():
            self.look()
        return self.has_images(block)

    def has_images(self, block: int) -> bool:
        return block in self._of and self._of[block].has_images

    def add(self, block: Block) -> None:
        """Keep a block that was just made."""
        self._write([block])

    def _write(self, blocks: Sequence[Block]) -> _Piece:
        piece = _Piece(True, len(blocks), blocks[0].number)
        images_there, known = (self.folder / f"{piece.name}{suffix}" for suffix in (".bin", ".npz"))
        if images_there.exists() and known.exists():  # somebody was faster, and others may be reading it
            self._note(piece)
            return piece
        assert all(block.images is not None for block in blocks)
        images = [image for block in blocks for image in block.images or ()]
        rows = np.concatenate([block.rows for block in blocks])
        rows["length"] = [len(image) for image in images]
        rows["crc"] = [zlib.crc32(image) for image in images]
        rows["offset"] = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
        buffer = io.BytesIO()
        about = json.dumps([block.about for block in blocks])
        near = {name: np.concatenate([block.near[name] for block in blocks]) for name in NEAR}
        np.savez(buffer, rows=rows, about=np.frombuffer(about.encode(), np.uint8), **near)  # type: ignore[arg-type]
        known.unlink(missing_ok=True)  # it tells of images that are gone
        files.write_atomic(images_there, b"".join(images))
        files.write_atomic(known, buffer.getvalue())
        self._note(piece)
        return piece

    def blocks(self, numbers: Iterable[int], *, near: bool = False, images: bool = False) -> Iterator[Block]:
        """Blocks that there are, in the order asked for; a piece is read once where its blocks follow each other.

        Near columns and images are left out unless asked for. UserError where an image is damaged.
        """
        piece: _Piece | None = None
        table: dict[str, Any] = {}
        for number in numbers:
            if piece is None or piece != self._of.get(number):
                piece, table = self._opened(number, NEAR if near else ())
            size = len(table["rows"]) // piece.count
            part = slice((number - piece.first) * size, (number - piece.first + 1) * size)
            yield Block(
                number,
                table["rows"][part],
                {name: table[name][part] for name in NEAR if near},
                table["about"][number - piece.first],
                self._images(piece, table["rows"][part]) if images else None,
            )

    def _opened(self, number: int, names: Iterable[str]) -> tuple[_Piece, dict[str, Any]]:
        """The piece with a block; another one where that has been gathered into a larger meanwhile."""
        names = tuple(names)
        for tries in range(_TRIES):  # while another process puts pieces together, a block may be in none
            piece = self._of.get(number)
            with contextlib.suppress(FileNotFoundError):
                if piece is not None:
                    return piece, self._table(piece, names)
            time.sleep(_WAIT_S * tries)
            self.look()
        raise Gone(f"{self.folder}: block {number} was removed meanwhile")

    def _table(self, piece: _Piece, names: Iterable[str]) -> dict[str, Any]:
        with np.load(self.folder / f"{piece.name}.npz") as found:
            table = {name: found[name] for name in ("rows", *names)}
            return {**table, "about": json.loads(found["about"].tobytes())}

    def _images(self, piece: _Piece, rows: Rows) -> tuple[bytes, ...]:
        path = self.folder / f"{piece.name}.bin"
        try:
            with path.open("rb") as file:
                file.seek(int(rows["offset"][0]))
                found = tuple(file.read(length) for length in rows["length"].tolist())
        except FileNotFoundError:
            raise Gone(f"{path}: was taken meanwhile") from None
        if [zlib.crc32(image) for image in found] != rows["crc"].tolist():
            raise UserError(f"{path}: damaged; remove it, and its images are made again")
        return found

    def gather(self, numbers: range) -> None:
        """Make one piece of consecutive blocks that all are there with their images, and drop what it is made of."""
        self.look()
        inside = [p for p in self._pieces if p.first in numbers and p.first + p.count <= numbers.stop]
        if (
            len(inside) < 2
            or any(p.has_images and p.count == len(numbers) for p in inside)
            or not all(self.has_images(number) for number in numbers)
        ):
            return
        whole = self._write(list(self.blocks(numbers, near=True, images=True)))
        for piece in inside:
            if piece != whole and piece.name != whole.name:
                self._drop(piece, ".npz", ".bin")
        self.look()

    def release(self, blocks: int) -> None:
        """Drop the images of pieces that lie wholly within the first `blocks` blocks; what is known of them stays."""
        for piece in self._pieces:
            if piece.first + piece.count <= blocks:
                self._drop(piece, ".bin")
        self.look()

    def _drop(self, piece: _Piece, *suffixes: str) -> None:
        for suffix in suffixes:  # .npz first: without it a .bin is nothing
            (self.folder / f"{piece.name}{suffix}").unlink(missing_ok=True)
