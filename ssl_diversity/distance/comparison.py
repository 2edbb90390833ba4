"""A pool against a reference: fidelity at a common n, and the reference's images that the pool's are nearest to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_diversity.data.pool import Pool
from ssl_diversity.data.table import Keys, as_keys
from ssl_diversity.distance.cache import cached
from ssl_diversity.distance.config import NUMERICS
from ssl_diversity.distance.extractors import Extractor, load_extractor
from ssl_diversity.distance.fidelity import LEAST, NEIGHBOURS, Kid, closeness, kid, nearest, precision_recall
from ssl_diversity.distance.frechet import frechet
from ssl_diversity.distance.statistics import Float, Int, Statistics, merge
from ssl_diversity.distance.task import measured_sizes, noise_images, progress_of, stretch
from ssl_diversity.errors import UserError
from ssl_diversity.files import digest
from ssl_diversity.runtime import Runtime

MOST = 10_000  # images of each set, unless told otherwise
SEARCHED = 50_000  # images of the reference among which neighbours are looked for, unless told otherwise
PIXELS_SIZE = 32  # larger images are compared pixel by pixel at this size
_CHUNK_ROWS = 1024  # embedded and cached together
_NO_HISTOGRAMS = np.zeros((0, 2), np.int64)

Single = NDArray[np.float32]
Images = NDArray[np.uint8]
Report = Callable[[int], None]


@dataclass(frozen=True)
class Measures:
    """Of one set of n images against as many of another."""

    n: int
    frechet: float
    kid: Kid
    precision: float
    recall: float

    @classmethod
    def of(cls, made: Single, real: Single) -> "Measures":
        return cls(len(made), _frechet(made, real), kid(made, real), *precision_recall(made, real))


@dataclass(frozen=True)
class Neighbours:
    """Rows of the reference in the order of their distance to each of q images: both (q, k)."""

    rows: Int
    distance: Float


@dataclass(frozen=True)
class Comparison:
    """The pool's first n images against the reference's first n; neighbours among the reference's first `searched`.

    `floor` and `noise` are the ends of the scale, as in a distance task: two disjoint draws of the reference (of floor.n
    images; None where it has too few), and n images of uniform noise against the reference.
    `closeness` (n,) is that of the pool's images, `closeness_left_out` (n,) that of the reference's own, each left out
    in turn. `by_features` and `by_pixels`: the neighbours of the pool's first images; distances between pixels
    are root mean squares in grey levels, of images at `pixels_size`.
    """

    n: int
    extractor: str
    made: Measures
    floor: Measures | None
    noise: Measures
    shared_images: int  # of the pool's n, those whose source pixels equal a searched image's
    searched: int
    closeness: Float
    closeness_left_out: Float
    by_features: Neighbours
    by_pixels: Neighbours
    pixels_size: int


def compare(
    pool: Pool,
    reference: Pool,
    runtime: Runtime,
    *,
    extractor: str,
    n: int = MOST,
    searched: int | None = None,
    shown: int = 16,
) -> Comparison:
    """Measure `pool` against `reference` with n images of each, or as many as both have.

    Neighbours are looked for among the first `searched` images of the reference, or all that it has; not given: 50,000,
    at least n. Features are computed once and cached. Raises UserError where that leaves fewer than 4 images.
    """
    runtime.set_threads()
    n = _common(n, pool, reference)
    searched = min(reference.size, max(n, searched or SEARCHED))
    size, own_size = measured_sizes(reference, pool)
    network = load_extractor(extractor, image_size=size, device=runtime.device)
    floor_n, pixels_size = min(n, reference.size // 2), min(size, PIXELS_SIZE)
    wanted = max(searched, 2 * floor_n)
    report = progress_of(runtime, 2 * n + wanted + searched)
    made, real = (
        Embedded.of(each, count, side, network, report)
        for each, count, side in ((pool, n, own_size), (reference, wanted, size))
    )
    noise = Embedded(
        lambda numbers: noise_images(numbers, size),
        lambda start, stop: {"noise": [start, stop], "image_size": size},
        n, network, report,
    )  # fmt: skip
    mine, theirs = made.rows(0, n), real.rows(0, n)
    floor = real.rows(0, floor_n), real.rows(floor_n, 2 * floor_n)
    neighbours, ratios = _neighbours(mine, theirs, real, searched)
    return Comparison(
        n=n,
        extractor=network.label(own_size, size),
        made=Measures.of(mine, theirs),
        floor=Measures.of(*floor) if floor_n >= LEAST else None,
        noise=Measures.of(noise.rows(0, n), theirs),
        shared_images=int(Keys(as_keys(reference.content[:searched])).have(as_keys(pool.content[:n])).sum()),
        searched=searched,
        closeness=ratios[:n],
        closeness_left_out=ratios[n:],
        by_features=Neighbours(neighbours.rows[:shown], neighbours.distance[:shown]),
        by_pixels=_by_pixels(pool.images(np.arange(min(shown, n)), pixels_size), reference, searched, report),
        pixels_size=pixels_size,
    )


class Embedded:
    """Features of `count` images, computed in chunks as they are asked for, and cached.

    `images` gives uint8 (b, S, S, 3) of their int64 (b,) numbers; `identity` of (start, stop) says what they are.
    """

    def __init__(
        self,
        images: Callable[[Int], Images],
        identity: Callable[[int, int], dict[str, Any]],
        count: int,
        network: Extractor,
        report: Report,
    ) -> None:
        self._images, self._identity, self._count = images, identity, count
        self._network, self._report = network, report
        self._reported = 0

    @classmethod
    def of(cls, pool: Pool, count: int, size: int, network: Extractor, report: Report) -> "Embedded":
        """Of the first `count` images of a pool, seen at `size` pixels."""

        def identity(start: int, stop: int) -> dict[str, Any]:
            return {"rows": pool.rows_digest(stretch(pool, start, stop)), "image_size": size}

        return cls(lambda rows: pool.images(rows, size), identity, count, network, report)

    def blocks(self, stop: int) -> Iterator[tuple[int, Single]]:
        """(number of its first image, float32 (b, d)) of each block of the images before `stop`."""
        for start in range(0, stop, _CHUNK_ROWS):
            yield start, self._chunk(start, min(start + _CHUNK_ROWS, self._count))[: stop - start]

    def rows(self, start: int, stop: int) -> Single:
        """float32 (stop - start, d)."""
        return np.concatenate([block[max(0, start - first) :] for first, block in self.blocks(stop)])

    def take(self, numbers: Int) -> Single:
        """float32 (b, d) of ascending `numbers`."""
        found = []
        for first, block in self.blocks(int(numbers[-1]) + 1):
            found.append(block[numbers[(numbers >= first) & (numbers < first + len(block))] - first])
        return np.concatenate(found)

    def _chunk(self, start: int, stop: int) -> Single:
        def compute() -> dict[str, Any]:
            parts = []
            for first in range(start, stop, self._network.batch_size):
                numbers = np.arange(first, min(first + self._network.batch_size, stop))
                features, _ = self._network(torch.from_numpy(self._images(numbers)).permute(0, 3, 1, 2))
                if not features.isfinite().all():
                    raise UserError(
                        f"extractor={self._network.name}: features are not finite; its weights are broken"
                    )
                parts.append(features.cpu().numpy())
            return {"features": np.concatenate(parts)}

        what = {"features of": self._identity(start, stop), "extractor": self._network.identity}
        found: Single = cached("statistics", digest({**what, "numerics": NUMERICS}), compute)["features"]
        self._report(max(0, stop - self._reported))
        self._reported = max(stop, self._reported)
        return found


def _common(n: int, *pools: Pool) -> int:
    """n, or what all pools have."""
    small = min(pools, key=len)
    if min(n, small.size) < LEAST:
        raise UserError(
            f"n={n}, and {small.name} has {small.size} images: fidelity is of distributions; give at least "
            f"{LEAST} images of each set"
        )
    return min(n, small.size)


def _frechet(a: Single, b: Single) -> float:
    return frechet(*(merge(Statistics.of(part, _NO_HISTOGRAMS) for part in _parts(x)) for x in (a, b)))


def _parts(features: Single) -> Iterator[Single]:
    for start in range(0, len(features), _CHUNK_ROWS):
        yield features[start : start + _CHUNK_ROWS]


def _neighbours(mine: Single, theirs: Single, real: Embedded, searched: int) -> tuple[Neighbours, Float]:
    """The nearest rows to `mine`, and the closeness of `mine` and then of `theirs`, which are the first rows themselves."""
    own = np.concatenate([np.full(len(mine), -1), np.arange(len(theirs))])
    distance, rows = nearest(np.concatenate([mine, theirs]), real.blocks(searched), NEIGHBOURS, own=own)
    found, place = np.unique(rows[:, 0], return_inverse=True)
    others, other_rows = nearest(real.take(found), real.blocks(searched), 2, own=found)
    left_out = other_rows[place, 0] == own  # is the query itself, as if it were not there
    reach = np.where(left_out, others[place, 1], others[place, 0])
    return Neighbours(rows, distance), closeness(distance[:, 0], reach)


def _by_pixels(images: Images, reference: Pool, searched: int, report: Report) -> Neighbours:
    """The one image of the reference's first `searched` that is nearest in pixels to each of uint8 (q, S, S, 3)."""
    side = images.shape[1]

    def blocks() -> Iterator[tuple[int, Images]]:
        for start in range(0, searched, _CHUNK_ROWS):
            numbers = np.arange(start, min(start + _CHUNK_ROWS, searched))
            yield start, reference.images(numbers, side).reshape(len(numbers), -1)
            report(len(numbers))

    flat = images.reshape(len(images), -1)
    distance, rows = nearest(flat, blocks(), 1)
    return Neighbours(rows, distance / flat.shape[1] ** 0.5)
