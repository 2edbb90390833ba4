"""The distance task: a source's images against a downstream set's, at one common n."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.table import Keys, as_keys
from ssl_diversity.distance.cache import cached
from ssl_diversity.distance.config import NUMERICS, DistanceSpec, extractor_digest
from ssl_diversity.distance.diversity import effective_rank_of, vendi_of
from ssl_diversity.distance.extractors import Extractor, load_extractor
from ssl_diversity.distance.frechet import frechet
from ssl_diversity.distance.statistics import Statistics, merge
from ssl_diversity.distance.visual_dna import histograms, visual_dna
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import digest
from ssl_diversity.runtime import Runtime


def distance(spec: DistanceSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Fréchet distance and VisualDNA at n, their floors, and the diversity of the pool's n rows.

    A floor is the same distance between two disjoint draws of the reference's own images (a pool is in
    random order, so two stretches of it are draws), of `floor_n` images each: n where the reference has
    2n, else half of what it has, as `floor_note` then says. `frechet_noise` is the other end of the scale: the
    distance of n images of uniform noise from the reference. `shared_images` of the pool's n rows have an
    exact copy among the reference's, which can take a distance below its floor.
    Raises UserError where n is more than a side has, or the files are not those that were planned.
    """
    runtime.set_threads()
    source, reference = Subset.open(spec.parts, spec.rows_digest, "distance"), Pool.open(spec.reference_pool)
    _check(spec, reference)
    size, *sizes = measured_sizes(reference, *(pool for pool, _ in source.parts))
    extractor = load_extractor(
        spec.extractor,
        image_size=size,
        resize=spec.resize,
        seed=spec.seed,
        device=runtime.device,
    )
    n, floor_n = spec.n, min(spec.n, reference.size // 2)
    cuts = sorted({0, floor_n, n, 2 * floor_n})
    report = progress_of(runtime, total=2 * n + cuts[-1])
    mine = merge(
        statistics(pool, rows, extractor, size=own, bins=spec.bins, report=report)
        for (pool, rows), own in zip(source.parts, sizes, strict=True)
    )
    parts = {
        cut: statistics(
            reference, stretch(reference, *cut), extractor, size=size, bins=spec.bins, report=report
        )
        for cut in pairwise(cuts)
    }

    def reference_rows(start: int, stop: int) -> Statistics:
        return merge(part for (a, b), part in parts.items() if start <= a and b <= stop)

    theirs = reference_rows(0, n)
    result: dict[str, Any] = {
        "n": n,
        "extractor": extractor.label(*sizes, size),
        "frechet": frechet(mine, theirs),
        "visual_dna": visual_dna(mine.counts, theirs.counts),
        "frechet_floor": None,
        "frechet_noise": frechet(noise_statistics(n, size, extractor, bins=spec.bins, report=report), theirs),
        "visual_dna_floor": None,
        "floor_n": floor_n,
        "floor_note": None,
        "vendi": vendi_of(mine.cosine),
        "effective_rank": effective_rank_of(mine.outer),
        "shared_images": _shared(source, Subset(((reference, stretch(reference, 0, n)),))),
    }
    if floor_n < n:
        result["floor_note"] = f"the reference has {reference.size} images, fewer than 2n = {2 * n}"
    if floor_n >= 2:
        draws = reference_rows(0, floor_n), reference_rows(floor_n, 2 * floor_n)
        result["frechet_floor"] = frechet(*draws)
        result["visual_dna_floor"] = visual_dna(draws[0].counts, draws[1].counts)
    return result


def measured_sizes(reference: Pool, *pools: Pool) -> list[int]:
    """The sizes in pixels at which the reference and pools are measured: the reference's, or a smaller one of their own.

    So that images stored larger than they are trained at are seen as cells see them.
    """
    first = max(reference.image_size, *(pool.image_size for pool in pools if not reference.image_size), 0)
    if not first:
        raise UserError(
            f"pool {reference.path.name} keeps images of different sizes; prepare it with size=..."
        )
    squares = [min(pool.image_size, first) if pool.info.resize == "square" else first for pool in pools]
    return [first, *squares]


def statistics(
    pool: Pool,
    rows: Rows,
    extractor: Extractor,
    *,
    bins: int,
    size: int | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Statistics of `rows` of `pool`: one pass in batches, cached by the rows' contents and the extractor.

    `size` is that of the images in pixels, the pool's own if not given.

    `report(images)` is called after each batch, or once where nothing had to be computed; it may raise
    Interrupted.
    """
    size = size or pool.square_size
    identity = {"rows": pool.rows_digest(rows), "image_size": size}
    return _statistics(
        lambda i: pool.images(rows[i], size), rows.count, identity, extractor, bins=bins, report=report
    )


def noise_statistics(
    n: int, size: int, extractor: Extractor, *, bins: int, report: Callable[[int], None] = lambda _: None
) -> Statistics:
    """Statistics of n images of uniform noise, always the same ones, of `size` pixels."""

    identity = {"noise": n, "image_size": size}
    return _statistics(
        lambda index: noise_images(index, size), n, identity, extractor, bins=bins, report=report
    )


def noise_images(numbers: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """uint8 (b, size, size, 3): images of uniform noise, always the same ones for the same numbers."""
    draws = (np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8) for i in numbers.tolist())
    return np.stack(list(draws))


def _statistics(
    images: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
    count: int,
    identity: Mapping[str, Any],
    extractor: Extractor,
    *,
    bins: int,
    report: Callable[[int], None],
) -> Statistics:
    embedded = 0

    def compute() -> dict[str, Any]:
        nonlocal embedded
        ranges = extractor.ranges()
        total: Statistics | None = None  # of one batch, with a large extractor, may be 100 MB
        for start in range(0, count, extractor.batch_size):
            index = np.arange(start, min(start + extractor.batch_size, count))
            features, layers = extractor(torch.from_numpy(images(index)).permute(0, 3, 1, 2))
            if not features.isfinite().all():
                raise UserError(
                    f"extractor={extractor.name}: features are not finite; its weights are broken"
                )
            part = Statistics.of(features.cpu().numpy(), histograms(layers, ranges, bins))
            total = part if total is None else total + part
            embedded += len(index)
            report(len(index))
        assert total is not None
        return total.arrays()

    key = digest({**identity, "extractor": extractor.identity, "bins": bins, "numerics": NUMERICS})
    found = Statistics(**cached("statistics", key, compute))
    if not embedded:
        report(count)
    return found


def stretch(pool: Pool, start: int, stop: int) -> Rows:
    """Rows `start` to `stop` of a pool, whatever its draws wrap in."""
    return Rows(start, stop - start, pool.size)


def _check(spec: DistanceSpec, reference: Pool) -> None:
    if spec.n > reference.size:
        raise UserError(
            f"distance n={spec.n}: there are only {reference.size} images of {reference.name};"
            f" lower n to {reference.size} or less"
        )
    planned = spec.reference_digest, spec.extractor_digest
    found = reference.digest, extractor_digest(spec.extractor)
    for name, a, b in zip((spec.reference_pool, spec.extractor), planned, found, strict=True):
        if a != b:
            raise UserError(
                f"{name}: changed since this distance was planned ({a or 'none'} to {b}); plan again"
            )


def progress_of(runtime: Runtime, total: int) -> Callable[[int], None]:
    """To be told of so many more images; raises Interrupted when asked to stop."""
    done = 0

    def report(images: int) -> None:
        nonlocal done
        done += images
        runtime.progress(done, total)
        if runtime.stop():
            raise Interrupted(
                f"stopped after {done} of {total} images; sets that were embedded whole are kept"
            )

    return report


def _shared(source: Subset, reference: Subset) -> int:
    """How many images of `source` have the content of one of `reference`."""
    mine, theirs = (
        as_keys(np.concatenate([pool.content[rows.numbers()] for pool, rows in subset.parts]))
        for subset in (source, reference)
    )
    return int(Keys(theirs).have(mine).sum())
