"""Small image trees for the tests of pools."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data import prepare as preparing

Tree = dict[str, bytes]


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A random RGB image, different for each seed; `size` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def tree() -> Tree:
    """60 images in three classes below flowers/, with two copies (one in another class) and a broken file."""
    files = {f"flowers/{'abc'[i % 3]}/{i:03d}.png": png(i, (8 + i % 3, 8)) for i in range(60)}
    files["flowers/b/copy.png"] = files["flowers/a/003.png"]
    files["flowers/a/copy.png"] = files["flowers/a/003.png"]
    files["flowers/c/broken.png"] = b"no image"
    files["flowers/notes.txt"] = b"not looked at"
    return files


@pytest.fixture
def as_folder(tmp_path: Path) -> Callable[[Tree, str], Path]:
    """Write a tree as files; the folder that holds it."""

    def write(files: Tree, name: str = "folder") -> Path:
        for path, data in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return tmp_path / name

    return write


@pytest.fixture
def as_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write a tree as an archive, in the given order."""

    def write(files: Tree, name: str = "set.tar", mode: str = "w") -> Path:
        with tarfile.open(tmp_path / name, mode) as tar:
            for path, data in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return tmp_path / name

    return write


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make `prepare` believe that it may hold so many bytes of images: many runs a part, many ranges of keys."""

    def limit(memory_bytes: int) -> None:
        monkeypatch.setattr(preparing, "share", lambda processes, *_: (processes, memory_bytes))
        monkeypatch.setattr(preparing, "resident_bytes", lambda: 0)
        monkeypatch.setattr(preparing, "INTERPRETER_BYTES", (1 << 30) - memory_bytes)

    return limit
