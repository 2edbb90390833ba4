"""A pool against a reference: what is measured is what a plain computation on the same images gives."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.writer import write_pool
from ssl_diversity.distance import DistanceSpec, comparison
from ssl_diversity.distance.comparison import Comparison, compare
from ssl_diversity.distance.extractors import load_extractor
from ssl_diversity.distance.task import distance
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

SIZE, N = 16, 150

Make = Callable[..., Pool]


@pytest.fixture
def digits() -> Pool:
    return prepare(recipes.resolve("digits", {"size": SIZE, "max_images": 600}))


@pytest.fixture
def photos() -> Pool:
    return prepare(recipes.resolve("photo_patches", {"size": SIZE, "max_images": 200}))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A pool of these uint8 (n, S, S, 3) images, in order."""

    def write(name: str, images: NDArray[np.uint8]) -> Pool:
        fields = {"name": name, "source": "test", "image_size": images.shape[1], "real_images": 0}
        return write_pool(tmp_path / name, fields, [(image, -1, None) for image in images])

    return write


def against(pool: Pool, reference: Pool, *, n: int = N, searched: int | None = None) -> Comparison:
    return compare(pool, reference, Runtime(), extractor="random-resnet", n=n, searched=searched)


def features(pool: Pool, count: int) -> NDArray[np.float64]:
    images = torch.from_numpy(pool.images(np.arange(count))).permute(0, 3, 1, 2)
    return load_extractor("random-resnet", image_size=SIZE)(images)[0].numpy().astype(np.float64)


def test_frechet_floor_and_noise_are_those_of_the_distance_task(digits: Pool, photos: Pool) -> None:
    found = against(photos, digits)
    subset = Subset(((photos, Rows(0, N, photos.size)),))
    spec = DistanceSpec(
        parts=subset.specs,
        rows_digest=subset.digest,
        reference_pool=str(digits.path),
        reference_digest=digits.digest,
    )
    task = distance(spec, Path("unused"), Runtime())
    assert found.floor is not None
    measured = found.made.frechet, found.floor.frechet, found.noise.frechet
    expected = [task[name] for name in ("frechet", "frechet_floor", "frechet_noise")]
    assert measured == pytest.approx(expected, rel=1e-4)
    assert (found.n, found.floor.n, found.extractor) == (N, task["floor_n"], task["extractor"])


def test_every_measure_tells_real_from_shifted_from_noise(digits: Pool, photos: Pool) -> None:
    found = against(photos, digits)
    assert found.floor is not None
    assert 2 * found.floor.frechet < found.made.frechet < found.noise.frechet / 2
    assert abs(found.floor.kid.mean) < 2 * found.floor.kid.deviation < found.made.kid.mean
    assert found.made.kid.mean < found.noise.kid.mean / 2
    assert found.floor.precision > 0.7 > found.made.precision
    assert found.floor.recall > 0.7
    assert found.noise.recall == 0


@pytest.mark.parametrize("searched", [None, 400])
def test_neighbours_and_closeness_are_those_of_a_full_search(
    digits: Pool, photos: Pool, searched: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_CHUNK_ROWS", 64)
    found = against(photos, digits, n=40, searched=searched)
    assert found.searched == (searched or digits.size)
    real, made = features(digits, found.searched), features(photos, 40)
    apart = np.linalg.norm(made[:, None] - real, axis=2)
    among = np.linalg.norm(real[:, None] - real, axis=2)
    np.fill_diagonal(among, np.inf)
    first = apart.argmin(1)
    np.testing.assert_allclose(found.closeness, apart.min(1) / among[first].min(1), rtol=1e-3)
    np.testing.assert_array_equal(found.by_features.rows, apart[:16].argsort(1)[:, :3])
    np.testing.assert_allclose(found.by_features.distance, np.sort(apart[:16], 1)[:, :3], rtol=1e-3)
    left_out = []
    for i in range(40):
        others = np.delete(np.arange(found.searched), i)
        rest = among[np.ix_(others, others)]
        left_out.append(among[i, others].min() / rest[among[i, others].argmin()].min())
    np.testing.assert_allclose(found.closeness_left_out, left_out, rtol=1e-3)


def test_neighbours_in_pixels_are_those_of_a_full_search(digits: Pool, photos: Pool) -> None:
    found = against(photos, digits)
    mine, theirs = (
        pool.images(np.arange(count)).astype(float) for pool, count in ((photos, 16), (digits, 600))
    )
    levels = np.sqrt(((mine[:, None] - theirs) ** 2).mean((2, 3, 4)))
    np.testing.assert_array_equal(found.by_pixels.rows[:, 0], levels.argmin(1))
    np.testing.assert_allclose(found.by_pixels.distance[:, 0], levels.min(1))
    assert found.pixels_size == SIZE


def test_copies_of_real_images_are_seen_wherever_they_lie(digits: Pool, make: Make) -> None:
    """A generator that returns its training images, a little changed: far below what left-out images show."""
    originals = digits.images(np.arange(400, 500))
    noise = np.random.default_rng(0).integers(-1, 2, originals.shape)
    copies = make("copies", (originals.astype(int) + noise).clip(0, 255).astype(np.uint8))
    found = against(copies, digits, n=100)
    assert (found.closeness < 1).mean() > 0.9
    assert np.median(found.closeness) < 0.5
    assert 0.1 < (found.closeness_left_out < 1).mean() < 0.5
    np.testing.assert_array_equal(found.by_features.rows[:, 0], np.arange(400, 416))
    np.testing.assert_array_equal(found.by_pixels.rows[:, 0], np.arange(400, 416))
    assert (found.by_pixels.distance < 1).all()
    assert found.shared_images == 0
    exact = against(digits, digits, n=100)
    assert exact.shared_images == 100
    assert exact.closeness.max() < 1e-4
    assert against(copies, digits, n=100, searched=300).by_features.rows.max() < 300


def test_fresh_images_of_the_same_distribution_are_as_close_as_left_out_ones(
    digits: Pool, make: Make
) -> None:
    images = digits.images(np.arange(600))
    fresh, real = make("fresh", images[:200]), make("real", images[200:])
    found = against(fresh, real, n=200)
    shares = [(ratios < 1).mean() for ratios in (found.closeness, found.closeness_left_out)]
    assert abs(shares[0] - shares[1]) < 0.12  # four standard errors
    assert np.median(found.closeness) == pytest.approx(np.median(found.closeness_left_out), rel=0.1)


def test_features_are_computed_once_and_again_when_evicted(
    digits: Pool, photos: Pool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = against(photos, digits)
    files = list((home / "store" / "statistics").rglob("*.npz"))
    sides: list[int | None] = []
    read = Pool.images

    def watched(self: Pool, rows: NDArray[np.int64], size: int | None = None) -> NDArray[np.uint8]:
        sides.append(len(rows))
        return read(self, rows, size)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "images", watched)
        again = against(photos, digits)
    assert sum(filter(None, sides)) == 16 + digits.size  # for the pixels alone
    for file in files:
        file.unlink()
    for other in (again, against(photos, digits)):
        for name, value in asdict(first).items():
            np.testing.assert_equal(asdict(other)[name], value)


def test_n_is_at_most_what_both_have(digits: Pool, photos: Pool) -> None:
    assert against(photos, digits, n=10_000).n == against(digits, photos, n=201).n == 200
    small = against(digits, photos, n=180, searched=1)
    assert (small.n, small.searched) == (180, 180)
    assert small.floor is not None
    assert small.floor.n == 100
    with pytest.raises(
        UserError, match=r"n=3, and photo_patches has 200 images: .* at least 4 images"
    ) as error:
        against(digits, photos, n=3)
    assert "\n" not in str(error.value)


def test_the_fewest_images_are_measured(digits: Pool, make: Make) -> None:
    found = against(digits, make("four", digits.images(np.arange(100, 104))), n=4)
    assert found.floor is None
    assert found.made.kid.subset_size == 2
    assert np.isfinite(found.closeness).all()


def test_it_stops_between_chunks_and_progress_ends_at_the_total(digits: Pool, photos: Pool) -> None:
    seen: list[tuple[int, int]] = []
    runtime = Runtime(progress=lambda done, total: seen.append((done, total)))
    with pytest.raises(Interrupted):
        compare(photos, digits, replace(runtime, stop=lambda: True), extractor="random-resnet", n=N)
    seen.clear()
    compare(photos, digits, runtime, extractor="random-resnet", n=N)
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (2 * N + 2 * digits.size, 2 * N + 2 * digits.size)


def test_images_of_another_size_are_seen_at_the_references(digits: Pool) -> None:
    larger = prepare(recipes.resolve("photo_patches", {"size": 20, "max_images": 200}))
    found = against(larger, digits)
    assert found.extractor == "random-resnet@16px"
    smaller = prepare(recipes.resolve("photo_patches", {"size": 8, "max_images": 200}))
    assert against(smaller, digits).extractor == "random-resnet@16px-bicubic"
