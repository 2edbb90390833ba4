"""Images that show nothing: of one colour, or burnt out."""

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.generation.sampling import FilterName, GenerateSpec
from ssl_diversity.generation.stream import Rows

MEASURE = {
    "blank": "spread",
    "saturated": "saturated",
    "safety": "unsafe",
}  # the row's field that each looks at


def spread(pixels: NDArray[np.uint8]) -> float:
    """Standard deviation about the mean colour, grey levels, of uint8 (H, W, 3): 0 for an image of one colour."""
    return float(np.sqrt(pixels.reshape(-1, 3).var(0, dtype=np.float64).mean()))


def saturated(pixels: NDArray[np.uint8]) -> float:
    """Share of values at 0 or 255, of uint8 (H, W, 3)."""
    return float(np.mean((pixels == 0) | (pixels == 255)))


def caught(name: FilterName, rows: Rows, spec: GenerateSpec) -> NDArray[np.bool_]:
    """bool (n,): the rows that a filter drops."""
    measured = rows[MEASURE[name]]
    if name == "blank":
        return np.asarray(measured <= spec.blank_spread)
    return np.asarray(measured >= spec.saturated_share if name == "saturated" else measured)
