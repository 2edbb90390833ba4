"""Arrays that are costly to compute and safe to lose: written whole, made again when missing."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.files import home, replacing

Arrays = Mapping[str, NDArray[Any]]


def cached(room: str, key: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of `store/<room>/<key[:2]>/<key>.npz`, computed and written if the file is missing or broken."""
    path = home() / "store" / room / key[:2] / f"{key}.npz"
    try:
        return _read(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        arrays = compute()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return arrays


def _read(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)
