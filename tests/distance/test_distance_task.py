"""The distance task on pools of real images."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool, Rows
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import PartSpec, Subset
from ssl_diversity.data.writer import write_pool
from ssl_diversity.distance import DistanceSpec, diversity, task
from ssl_diversity.distance.extractors import Extractor, load_extractor
from ssl_diversity.distance.frechet import frechet
from ssl_diversity.distance.task import distance, statistics
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

SIZE = 16


@pytest.fixture
def digits() -> Pool:
    return prepare(recipes.resolve("digits", {"size": SIZE, "max_images": 400}))


@pytest.fixture
def photos() -> Pool:
    return prepare(recipes.resolve("photo_patches", {"size": SIZE, "max_images": 200}))


@pytest.fixture
def noise(tmp_path: Path) -> Pool:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8), -1, None) for _ in range(150)]
    fields = {"name": "noise", "source": "noise", "image_size": SIZE, "real_images": 0}
    return write_pool(tmp_path / "noise", fields, rows)


def spec(source: Pool, reference: Pool, *, start: int = 0, count: int = 100, **changes: Any) -> DistanceSpec:
    subset = Subset(((source, Rows(start, count, source.size)),))
    values = {
        "parts": subset.specs,
        "rows_digest": subset.digest,
        "reference_pool": str(reference.path),
        "reference_digest": reference.digest,
        "bins": 100,
    }
    return DistanceSpec(**values | changes)  # type: ignore[arg-type]


def run(spec: DistanceSpec, runtime: Runtime | None = None) -> dict[str, Any]:
    return distance(spec, Path("unused"), runtime or Runtime())


def features(pool: Pool, rows: Rows, extractor: Extractor) -> np.ndarray:
    images = pool.images(rows.numbers()).transpose(0, 3, 1, 2)

    return extractor(torch.from_numpy(np.ascontiguousarray(images)))[0].numpy().astype(np.float64)


def test_digits_are_nearer_to_digits_than_photographs_and_those_than_noise(
    digits: Pool, photos: Pool, noise: Pool
) -> None:
    own = run(spec(digits, digits, start=100))
    shifted, far = run(spec(photos, digits)), run(spec(noise, digits))
    assert own["floor_n"] == own["n"] == 100
    assert own["floor_note"] is None
    for measure in ("frechet", "visual_dna"):
        assert own[measure] == pytest.approx(own[f"{measure}_floor"])  # the very draw of the floor
        assert 2 * own[measure] < shifted[measure] < far[measure] / 2
        assert shifted[f"{measure}_floor"] == own[f"{measure}_floor"]
    assert own["frechet_noise"] == shifted["frechet_noise"] == pytest.approx(far["frechet"], rel=0.2)
    assert own["extractor"] == "random-resnet@16px"


def test_measures_are_those_of_the_features_themselves(digits: Pool, photos: Pool) -> None:
    """The subset wraps at the pool's end; batches and the floor's cuts leave no trace."""
    result = run(spec(photos, digits, start=150))
    extractor = load_extractor("random-resnet", image_size=SIZE)
    mine = features(photos, Rows(150, 100, photos.size), extractor)
    theirs = features(digits, Rows(0, 100, digits.size), extractor)
    a, b = np.cov(mine, rowvar=False), np.cov(theirs, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    expected = ((mine.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert result["frechet"] == pytest.approx(expected, rel=1e-4)
    assert result["vendi"] == pytest.approx(diversity.vendi(mine), rel=1e-4)
    assert result["effective_rank"] == pytest.approx(diversity.effective_rank(mine), rel=1e-3)


def test_images_on_both_sides_are_counted(digits: Pool, photos: Pool) -> None:
    same, half = run(spec(digits, digits)), run(spec(digits, digits, start=60))
    assert same["shared_images"] == 100
    assert same["frechet"] == pytest.approx(0, abs=1e-3)
    assert same["visual_dna"] == 0
    assert half["shared_images"] == 40
    assert run(spec(photos, digits))["shared_images"] == 0


def test_a_small_reference_gives_the_floor_at_half_its_size(digits: Pool, photos: Pool) -> None:
    result = run(spec(photos, digits, count=150))
    assert (result["floor_n"], result["floor_note"]) == (150, None)
    result = run(spec(digits, photos, count=150))
    assert result["floor_n"] == 100
    assert "has 200 images, fewer than 2n = 300" in result["floor_note"]
    extractor = load_extractor("random-resnet", image_size=SIZE)
    halves = (statistics(photos, Rows(start, 100, 200), extractor, bins=100) for start in (0, 100))
    assert result["frechet_floor"] == pytest.approx(frechet(*halves))


def test_statistics_of_a_prefix_do_not_depend_on_the_batch(digits: Pool) -> None:
    extractor = load_extractor("random-resnet", image_size=SIZE)
    whole = statistics(digits, Rows(0, 300, digits.size), extractor, bins=50)
    merged = statistics(digits, Rows(0, 77, digits.size), extractor, bins=50) + statistics(
        digits, Rows(77, 223, digits.size), extractor, bins=50
    )
    assert whole.n == merged.n == 300
    assert np.abs(whole.counts - merged.counts).sum() <= 1e-5 * whole.counts.sum()  # rounding at edges
    np.testing.assert_allclose(whole.outer, merged.outer, rtol=1e-4)


def test_statistics_are_embedded_once_and_again_when_evicted(
    digits: Pool, photos: Pool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(spec(photos, digits))
    files = list((home / "store" / "statistics").rglob("*.npz"))
    assert len(files) == 4  # the pool's rows, the reference's first n and its next n, noise

    def no_images(self: Pool, rows: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "images", no_images)
        assert run(spec(photos, digits)) == first
    for file in files:
        file.unlink()
    assert run(spec(photos, digits)) == first


def test_it_stops_between_batches_and_keeps_what_is_whole(digits: Pool, photos: Pool, home: Path) -> None:
    seen: list[tuple[int, int]] = []
    runtime = Runtime(progress=lambda done, total: seen.append((done, total)))
    stopping = replace(runtime, stop=lambda: len(seen) == 2)
    with pytest.raises(Interrupted):
        run(spec(photos, digits), stopping)
    assert len(list((home / "store" / "statistics").rglob("*.npz"))) == 1
    run(spec(photos, digits), runtime)
    assert seen == [(100, 400), (200, 400), (100, 400), (200, 400), (300, 400), (400, 400)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_digest": "other"}, "photo_patches.* has changed since this distance was planned"),
        ({"reference_digest": "other"}, "digits.*: changed since this distance was planned"),
        ({"parts": [PartSpec(pool="nowhere", rows_start=0, rows_count=100)]}, "nowhere"),
        ({"extractor": "nowhere.pt"}, "extractor=nowhere.pt: no such file"),
    ],
)
def test_a_wrong_spec_is_one_clear_line(
    digits: Pool, photos: Pool, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(spec(photos, digits, **changes))
    assert "\n" not in str(error.value)


def test_more_than_the_reference_has_is_refused(digits: Pool, photos: Pool) -> None:
    with pytest.raises(UserError, match="only 200 images of photo_patches; lower n to 200"):
        run(spec(digits, photos, count=250))


def test_features_that_are_not_finite_are_refused(digits: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_options: Any) -> Extractor:
        good = load_extractor("random-resnet", image_size=SIZE)
        network = lambda pixels: (good.network(pixels)[0] * float("nan"), good.network(pixels)[1])  # noqa: E731
        return replace(good, network=network, identity={"broken": True})

    monkeypatch.setattr(task, "load_extractor", broken)
    with pytest.raises(UserError, match="not finite"):
        run(spec(digits, digits))


def test_planning_imports_no_torch() -> None:
    code = "import sys; import ssl_diversity.distance, ssl_diversity.distance.diversity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mixture_is_measured_as_the_images_of_all_its_parts(digits: Pool, photos: Pool) -> None:
    subset = Subset(((photos, photos.rows(60)), (digits, digits.rows(40))))
    result = run(spec(photos, digits, parts=subset.specs, rows_digest=subset.digest))
    extractor = load_extractor("random-resnet", image_size=SIZE)
    mine = np.concatenate([features(pool, rows, extractor) for pool, rows in subset.parts])
    assert result["n"] == 100
    assert result["vendi"] == pytest.approx(diversity.vendi(mine), rel=1e-4)
    assert result["shared_images"] == 40
    alone = run(spec(photos, digits))
    assert result["frechet"] < alone["frechet"]


@pytest.mark.parametrize("resize", ["square", "short", "none"])
def test_images_stored_larger_are_measured_as_cells_see_them(digits: Pool, photos: Pool, resize: str) -> None:
    larger = prepare(recipes.resolve("photo_patches", {"size": 20, "resize": resize, "max_images": 200}))
    result = run(spec(larger, digits))
    assert result["extractor"] == "random-resnet@16px"
    extractor = load_extractor("random-resnet", image_size=SIZE)
    seen = torch.from_numpy(larger.images(np.arange(100), SIZE)).permute(0, 3, 1, 2).contiguous()
    assert result["vendi"] == pytest.approx(diversity.vendi(extractor(seen)[0].numpy()), rel=1e-4)


def test_a_reference_without_a_size_is_told_apart(photos: Pool) -> None:
    loose = prepare(recipes.resolve("digits", {"resize": "none", "max_images": 300}))
    assert run(spec(photos, loose))["extractor"] == "random-resnet@16px"
    with pytest.raises(UserError, match="keeps images of different sizes"):
        run(spec(loose, loose))
