"""What an image looks like, in 274 bytes, and how far apart two images are.

`describe` reduces an image to a 256-bit hash and a thumbnail. For a `distance`, two thumbnails are laid over each
other (one, or both, cropped by up to MAX_CROP per side) and compared twice: as they are, and with amplitudes in
proportion to their frequency, as in a comparison of gradients; then the hashes are compared. The first comparison
keeps apart images that differ in colour, the second those that share little more than a horizon, the third those
that differ in details. Re-encoding, resizing, a slight crop and a little more light leave the distance below 1;
tests/benchmarks/bench_near_duplicates.py measures how often, and how often different images are as near.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE_BYTES = 32
LUMA, CHROMA = 12, 7  # sides of a thumbnail's planes
THUMBNAIL_BYTES = LUMA**2 + 2 * CHROMA**2
MAX_CROP = 0.06  # per side, of the width or height
PLAIN, WEIGHTED = 0.6, 1.1  # residuals that alone would make a distance of 1
MAX_BRIGHTER = 24.0  # grey levels, mean over the image
FAINT = 200.0  # weighted energy below which a thumbnail shows next to nothing: a copy of it is equal

_GRID = 32  # what images are reduced to
_FLAT = 0.1  # a coefficient below it is rounding: its bit is 0
_STEP = 0.005  # of the crops that are tried
_STEPS = round(MAX_CROP / _STEP)
_REFINEMENTS = 3
_USUAL_CROP, _NOISE = 0.03, 4.0  # prior of the fit: crop per side; grey levels

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


def frequencies(count: int) -> NDArray[np.int64]:
    """(2, count): the lowest two-dimensional frequencies but zero, lowest first."""
    i, j = np.divmod(np.arange(32 * 32), 32)
    return np.stack([i, j])[:, np.lexsort((i, i**2 + j**2))[1 : count + 1]]


def cosines(n: int) -> Reals:
    """(n, n): the orthonormal discrete cosine transform."""
    return _basis(n, (np.arange(n) + 0.5) / n).T


def _basis(n: int, places: Reals) -> Reals:
    """(len(places), n): each cosine at `places` in [0, 1]."""
    basis = np.cos(math.pi * places[:, None] * np.arange(n)) * math.sqrt(2 / n)
    basis[:, 0] /= math.sqrt(2)
    return np.asarray(basis)


def warp(n: int, start: float, end: float) -> Reals:
    """(n, n): n samples to n samples of what lies between `start` and 1 - `end`."""
    return _basis(n, start + (np.arange(n) + 0.5) / n * (1 - start - end)) @ cosines(n)


def whole(matrix: Reals, scale: int) -> Reals:
    """`matrix` times `scale` in whole numbers; rows that add up to 0 or 1 still do, so that flat stays flat.

    Products with whole numbers are exact in any order of summation: equal on all machines.
    """
    rounded, total = np.rint(matrix * scale), matrix.sum(1)
    missing = np.where(np.abs(total - np.rint(total)) < 1e-6, np.rint(total) * scale - rounded.sum(1), 0)
    rounded[np.arange(len(matrix)), np.abs(matrix).argmax(1)] += missing
    return rounded


def _triangle(n: int) -> Reals:
    """(n, _GRID): antialiased reduction to n samples, PIL's `bilinear`."""
    centre = (np.arange(n) + 0.5) * _GRID / n
    weight = np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(_GRID) - 0.5) * n / _GRID)
    return np.asarray(weight / weight.sum(1, keepdims=True))


_ORDER = frequencies(8 * SIGNATURE_BYTES)
_SIDE = int(_ORDER.max()) + 1
_SCALE = 1 << 12
_TO_LUMA = np.concatenate([whole(cosines(_GRID)[:_SIDE], _SCALE), whole(_triangle(LUMA), _SCALE)])
_TO_CHROMA = whole(_triangle(CHROMA), _SCALE)
_YCC = np.array([[77, 150, 29], [-43, -85, 128], [128, -107, -21]], np.float64)  # / 256


def describe(pixels: Bytes) -> tuple[bytes, bytes]:
    """Hash (SIGNATURE_BYTES) and thumbnail (THUMBNAIL_BYTES) of an image, uint8 (H, W, 3).

    The hash: signs of the 256 lowest frequencies of the luma's discrete cosine transform, lowest first. The
    thumbnail: luma (LUMA, LUMA), then both chroma planes (CHROMA, CHROMA), uint8.
    """
    y, *chroma = _YCC @ _reduced(pixels).reshape(-1, 3).T.astype(np.float64)
    both = _TO_LUMA @ y.reshape(_GRID, _GRID) @ _TO_LUMA.T / (256 * _SCALE**2)
    small = _TO_CHROMA @ np.stack(chroma).reshape(2, _GRID, _GRID) @ _TO_CHROMA.T / (256 * _SCALE**2) + 128
    signature = np.packbits(both[_ORDER[0], _ORDER[1]] > _FLAT, bitorder="little")
    thumbnail = np.concatenate([both[_SIDE:, _SIDE:].ravel(), small.ravel()])
    return signature.tobytes(), np.clip(thumbnail + 0.5, 0, 255).astype(np.uint8).tobytes()


def _reduced(pixels: Bytes) -> Bytes:
    """(_GRID, _GRID, 3), whatever the shape: by boxes to less than twice that much, then antialiased."""
    height, width, _ = pixels.shape
    if height == width == _GRID:
        return pixels
    image = Image.fromarray(pixels)
    factors = max(1, width // _GRID), max(1, height // _GRID)
    if max(factors) > 1:
        image = image.reduce(factors)
    return np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BILINEAR))


def _warps(n: int) -> Floats:
    """(2S + 1, 2S + 1, n, n): resample n samples to those of the part from i·_STEP to 1 - j·_STEP, for i and j
    from -S to S; negative ones count as 0."""
    part = np.maximum(np.arange(-_STEPS, _STEPS + 1), 0) * _STEP
    return np.array([[warp(n, a, b) for b in part] for a in part], np.float32)


def _weights(n: int) -> Floats:
    """(n, n): the frequency of each cosine, in half waves per image; 1 for the mean."""
    return np.maximum(np.hypot(*np.mgrid[:n, :n]), 1).astype(np.float32)


_WARP_LUMA, _WARP_CHROMA = _warps(LUMA), _warps(CHROMA)
_COSINES = {n: cosines(n).astype(np.float32) for n in (LUMA, CHROMA)}
_WEIGHTS = {n: _weights(n) for n in (LUMA, CHROMA)}
_PLACE = ((np.arange(LUMA) + 0.5) / LUMA).astype(np.float32)


def _planes(thumbnails: Bytes) -> tuple[Floats, Floats]:
    """Luma (m, LUMA, LUMA) and chroma (m, 2, CHROMA, CHROMA)."""
    luma, chroma = np.split(thumbnails.astype(np.float32), [LUMA**2], axis=1)
    return luma.reshape(-1, LUMA, LUMA), chroma.reshape(-1, 2, CHROMA, CHROMA) - 128


def _cropped(planes: Floats, crop: NDArray[np.int64], table: Floats) -> Floats:
    """(m, ..., n, n) cropped by (m, 4) steps: left, right, top, bottom."""
    across, down = table[crop[:, 0], crop[:, 1]], table[crop[:, 2], crop[:, 3]]
    if planes.ndim == 4:
        across, down = across[:, None], down[:, None]
    return np.asarray(down @ planes @ np.swapaxes(across, -1, -2))


def _overlay(a: Floats, b: Floats) -> NDArray[np.int64]:
    """(m, 4): steps by which `a` (or where negative `b`) is to be cropped to lie on the other, luma (m, n, n).

    Gauss-Newton on the squared difference, with a prior on the crop.
    """
    m, n, _ = a.shape
    crop = np.zeros((m, 4), np.int64)
    prior = np.float32((_NOISE / _USUAL_CROP) ** 2)
    for _ in range(_REFINEMENTS):
        x = _cropped(a, crop + _STEPS, _WARP_LUMA)
        y = _cropped(b, _STEPS - crop, _WARP_LUMA)
        difference = y - x
        difference -= difference.mean((1, 2), keepdims=True)
        middle = (x + y) / 2
        down, across = np.gradient(middle, axis=(1, 2))
        slopes = [
            across * (1 - _PLACE),
            -across * _PLACE,
            down * (1 - _PLACE)[:, None],
            -down * _PLACE[:, None],
        ]
        jacobian = n * np.stack(slopes, 1).reshape(m, 4, -1)
        normal = jacobian @ jacobian.transpose(0, 2, 1) + prior * np.eye(4, dtype=np.float32)
        wanted = jacobian @ difference.reshape(m, -1, 1) - prior * np.float32(_STEP) * crop[..., None]
        step = np.linalg.solve(normal, wanted)[..., 0] / _STEP
        crop = np.clip(np.rint(crop + step), -_STEPS, _STEPS).astype(np.int64)
    return crop


def _energies(planes: Floats, weighted: bool) -> Floats:
    """(m,): mean square of planes (m, ..., n, n), means left out; with frequencies weighted where asked."""
    n = planes.shape[-1]
    spectrum = _COSINES[n] @ planes @ _COSINES[n].T
    if weighted:
        spectrum = spectrum * _WEIGHTS[n]
    spectrum[..., 0, 0] = 0
    return np.asarray((spectrum**2).reshape(len(planes), -1).sum(1) / n**2)


def _mean_square(planes: Floats) -> Floats:
    return np.asarray((planes.mean((-1, -2)) ** 2).reshape(len(planes), -1).sum(1))


def faint(thumbnails: Bytes) -> Flags:
    """(n,): whether so little is to be seen that only an equal image counts as a copy."""
    luma, chroma = _planes(thumbnails)
    return np.asarray(_energies(luma, True) + _energies(chroma, True) < FAINT)


def residuals(a: Bytes, b: Bytes) -> tuple[Floats, Floats]:
    """Plain and weighted residual (m,) of thumbnails (m, THUMBNAIL_BYTES) laid over each other.

    Root mean squares, as parts of the contrast of that thumbnail which has less: 0 for equal ones, about 1.4 for
    unrelated ones, inf where one is faint or much brighter. The mean of luma is left out, that of chroma is not.
    """
    (luma_a, chroma_a), (luma_b, chroma_b) = _planes(a), _planes(b)
    crop = _overlay(luma_a, luma_b)
    x, y = _cropped(luma_a, crop + _STEPS, _WARP_LUMA), _cropped(luma_b, _STEPS - crop, _WARP_LUMA)
    u, v = _cropped(chroma_a, crop + _STEPS, _WARP_CHROMA), _cropped(chroma_b, _STEPS - crop, _WARP_CHROMA)
    undecided = (np.abs((x - y).mean((1, 2))) > MAX_BRIGHTER) | faint(a) | faint(b)
    out = []
    for weighted in (False, True):
        apart = _energies(x - y, weighted) + _energies(u - v, weighted) + _mean_square(u - v)
        contrast = np.minimum(*(_energies(p, weighted) + _energies(q, weighted) for p, q in ((x, u), (y, v))))
        out.append(np.where(undecided, np.float32(np.inf), np.sqrt(apart / np.maximum(contrast, 1e-6))))
    return out[0], out[1]


def distance(signatures_a: Bytes, thumbnails_a: Bytes, signatures_b: Bytes, thumbnails_b: Bytes) -> Floats:
    """(m,): how far apart images are, pair by pair; they are copies up to 1, and unrelated ones near 4.

    From hashes (m, SIGNATURE_BYTES) and thumbnails (m, THUMBNAIL_BYTES). Where one is faint: 0 for equal ones, else
    infinite.
    """
    bits = np.bitwise_count(signatures_a ^ signatures_b).sum(1, dtype=np.int64) / (8 * SIGNATURE_BYTES)
    plain, weighted = residuals(thumbnails_a, thumbnails_b)
    apart = plain / PLAIN + weighted / WEIGHTED + bits
    equal = (bits == 0) & (thumbnails_a == thumbnails_b).all(1)
    return np.where(equal, 0, apart).astype(np.float32)
