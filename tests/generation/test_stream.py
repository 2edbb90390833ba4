"""Pieces of made images: found again however they were packed, in any order; damage is told."""

import random

import numpy as np
import pytest

from ssl_diversity.errors import UserError
from ssl_diversity.generation.stream import NEAR, ROW, Block, Stream

SIZE = 3


def block(number: int, version: int = 0) -> Block:
    rows = np.zeros(SIZE, ROW)
    rows["index"] = np.arange(SIZE) + number * SIZE
    rows["seed"] = version
    near = {name: np.full((SIZE, length), number, np.uint8) for name, length in NEAR.items()}
    images = tuple(f"image {index} of {version}".encode() * (1 + number) for index in rows["index"])
    return Block(number, rows, near, {"seconds": number, "device": "cpu"}, images)


def same(found: Block, made: Block) -> None:
    assert (found.number, found.about, found.images) == (made.number, made.about, made.images)
    assert found.rows["index"].tolist() == made.rows["index"].tolist()
    assert all((found.near[name] == made.near[name]).all() for name in NEAR)


def test_found_again_however_packed(tmp_path):
    order = list(range(10))
    random.Random(0).shuffle(order)
    stream = Stream(tmp_path / "s")
    for number in order:
        stream.add(block(number))
    for numbers in (range(3), range(2, 6), range(6, 9), range(10)):  # some lie across others
        for view in (stream, Stream(tmp_path / "s")):
            for found in view.blocks(order, near=True, images=True):
                same(found, block(found.number))
            assert [found.number for found in view.blocks(order)] == order
        stream.gather(numbers)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"00000000-10.npz", "00000000-10.bin"}
    assert 10 not in stream


def test_who_comes_second_leaves_what_others_may_be_reading(tmp_path):
    Stream(tmp_path / "s").add(block(0))
    before = {path.name: path.stat().st_ino for path in (tmp_path / "s").iterdir()}
    second = Stream(tmp_path / "s")
    second.add(block(0))
    assert {path.name: path.stat().st_ino for path in (tmp_path / "s").iterdir()} == before
    same(next(second.blocks([0], near=True, images=True)), block(0))


def test_what_pools_have_taken(tmp_path):
    stream = Stream(tmp_path / "s")
    for number in range(6):
        stream.add(block(number))
    stream.gather(range(2))
    stream.gather(range(2, 6))
    stream.release(3)  # within the second piece: it stays whole
    assert [stream.has_images(number) for number in range(6)] == [False] * 2 + [True] * 4
    assert [found.number for found in stream.blocks(range(6))] == list(range(6))
    stream.add(block(1, version=1))  # made again
    again = next(Stream(tmp_path / "s").blocks([1], near=True, images=True))
    same(again, block(1, version=1))
    assert not Stream(tmp_path / "s").has_images(0)


def test_an_interrupted_write_is_none(tmp_path):
    """Images without their table: as if there were none, and then as if nothing had happened."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "00000000-1.bin").write_bytes(b"half")
    stream = Stream(tmp_path / "s")
    assert 0 not in stream
    stream.add(block(0))
    same(next(Stream(tmp_path / "s").blocks([0], near=True, images=True)), block(0))


def test_damage_is_told(tmp_path):
    stream = Stream(tmp_path / "s")
    stream.add(block(0))
    path = tmp_path / "s" / "00000000-1.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00000000-1.bin: damaged; remove it"):
        next(stream.blocks([0], images=True))
    path.unlink()
    assert not Stream(tmp_path / "s").has_images(0)
