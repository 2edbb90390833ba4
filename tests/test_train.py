"""A cell: exactly its budget, resumed bit for bit, the same weights under both tiers, collapse flagged."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_server import FaultServer

from ssl_diversity.data import reading, recipes
from ssl_diversity.data.attach import attach
from ssl_diversity.data.order import Windowed
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import PartSpec, Subset
from ssl_diversity.data.windowed import layout_digest
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.features import load_weights
from ssl_diversity.methods.recipe import load_recipe
from ssl_diversity.methods.simclr import SimCLR
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, first_images, pretrain

STEPS, BATCH = 6, 16


def cell(pool: Pool, method: str, **recipe: Any) -> CellSpec:
    subset = Subset(((pool, pool.rows(40)),))
    return CellSpec(
        method=method,
        backbone="vit-micro" if method == "mae" else "conv-tiny",
        recipe=load_recipe(method, "quick", budget_samples=STEPS * BATCH, image_size=16, overrides=recipe),
        image_size=16,
        parts=subset.specs,
        rows_digest=subset.digest,
        unique_samples=40,
        budget=STEPS * BATCH + 5,
        batch_size=BATCH,
        seed=3,
        checkpoint_samples=2 * BATCH,
    )


@pytest.fixture
def pool(home: Path) -> Pool:
    return prepare(recipes.resolve("digits", {}, defaults={"size": 16}))


def run(spec: CellSpec, out: Path, stop_after: int | None = None) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_after

    return pretrain(spec, out, Runtime(stop=stop))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "weights.pt", weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.mark.parametrize("method", ["simclr", "mocov3", "byol", "barlow_twins", "vicreg", "dino", "mae"])
@pytest.mark.parametrize("tier", ["resident", "random"])
def test_resumed_equals_undisturbed_under_both_tiers(
    pool: Pool, tmp_path: Path, method: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = cell(pool, method)
    expected = run(spec, tmp_path / "undisturbed")
    monkeypatch.setattr(reading, "open_reader", functools.partial(reading.open_reader, tier=tier))
    for stop_after in (1, STEPS - 3):
        with pytest.raises(Interrupted):
            run(spec, tmp_path / "stopped", stop_after)
    resumed = run(spec, tmp_path / "stopped")
    assert same(tmp_path / "undisturbed", tmp_path / "stopped")
    assert resumed["history"] == expected["history"]
    assert resumed["samples_seen"] == STEPS * BATCH
    assert resumed["flops"] == resumed["flops_per_sample"] * STEPS * BATCH


def test_weights_load_into_the_network_they_name(pool: Pool, tmp_path: Path) -> None:
    result = run(cell(pool, "simclr"), tmp_path / "cell")
    images = torch.rand(3, 3, 16, 16)
    assert load_weights(tmp_path / "cell" / "weights.pt")(images).shape == (3, 128)
    assert 1 <= result["effective_rank"] <= 40
    assert not result["collapsed"]


def test_a_collapsed_cell_is_flagged(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimCLR without negatives, its head without norms: alignment alone maps every image to one point."""
    spec = cell(pool, "simclr", head_norm=False).model_copy(update={"budget": 64 * BATCH})
    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "criterion", lambda self, a, b: -torch.cosine_similarity(a, b).mean())
        assert run(spec, tmp_path / "collapsed")["collapsed"]
    assert not run(spec, tmp_path / "healthy")["collapsed"]


def test_whether_it_collapsed_is_looked_at_in_the_cells_own_batches(pool: Pool, tmp_path: Path) -> None:
    """All 40 images of the measure in one piece may take more memory than any step of training did."""
    sizes = []
    forward = SimCLR.forward

    def seen(self: SimCLR, views: list[torch.Tensor], positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append((self.training, len(positions)))
        return forward(self, views, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimCLR, "forward", seen)
        run(cell(pool, "simclr"), tmp_path / "cell")
    looked = [size for training, size in sizes if not training]
    assert sum(looked) == 40
    assert max(looked) == BATCH


def test_a_pool_that_changed_is_not_trained_on(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has changed since this cell was planned"):
        run(cell(pool, "simclr").model_copy(update={"rows_digest": "another"}), tmp_path / "cell")


def test_where_the_pool_lies_is_not_the_cell(pool: Pool) -> None:
    spec = cell(pool, "simclr")
    elsewhere = PartSpec(pool="elsewhere", rows_start=7, rows_count=40)
    moved = spec.model_copy(update={"parts": (elsewhere,), "checkpoint_samples": 1})
    assert moved.identity() == spec.identity()
    for change in (
        {"seed": 4},
        {"budget": 32},
        {"rows_digest": "other"},
        {"precision": "32-true"},
        {"batch_size": 8},
        {"decode": "scaled"},
        {"order": Windowed(shards=1, lanes=4)},
        {"layout": "other"},
    ):
        assert spec.model_copy(update=change).identity() != spec.identity()


@pytest.fixture
def sources(pool: Pool) -> Subset:
    """A mixture: some digits, and patches of photographs that are stored larger."""
    photos = prepare(recipes.resolve("photo_patches", {"size": 24, "shard_bytes": 20_000}))
    return Subset(((pool, pool.rows(16)), (photos, photos.rows(32, 1))))


def windowed(spec: CellSpec, subset: Subset) -> CellSpec:
    window = Windowed(shards=2, lanes=4)
    order = {"order": window, "layout": layout_digest(subset.pieces)}
    rows = {"parts": subset.specs, "rows_digest": subset.digest, "unique_samples": len(subset)}
    return spec.model_copy(update={**order, **rows})


def test_a_windowed_mixture_of_stored_sizes_is_trained_on_and_resumed(
    pool: Pool, sources: Subset, tmp_path: Path
) -> None:
    spec = windowed(cell(pool, "simclr"), sources)
    expected = run(spec, tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        run(spec, tmp_path / "stopped", stop_after=4)
    assert run(spec, tmp_path / "stopped")["history"] == expected["history"]
    assert same(tmp_path / "undisturbed", tmp_path / "stopped")
    run(spec.model_copy(update={"order": "global"}), tmp_path / "global")
    assert not same(tmp_path / "undisturbed", tmp_path / "global")


def test_measures_are_of_all_parts_and_shards_that_moved_are_noticed(
    pool: Pool, sources: Subset, tmp_path: Path
) -> None:
    shown = first_images(sources, 24, 16)
    np.testing.assert_array_equal(shown[:8], pool.images(range(8)))
    photos, rows = sources.parts[1]
    np.testing.assert_array_equal(shown[8:], photos.images(rows[range(16)], 16))
    assert len(first_images(sources, 1000, 16)) == 48
    spec = windowed(cell(pool, "simclr"), sources).model_copy(update={"layout": "another"})
    with pytest.raises(UserError, match="shards of a pool have changed"):
        run(spec, tmp_path / "cell")


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_from_afar_the_weights_are_the_same(
    pool: Pool, sources: Subset, tmp_path: Path, home: Path, order: str
) -> None:
    spec = windowed(cell(pool, "simclr"), sources)
    if order == "global":
        spec = spec.model_copy(update={"order": "global", "layout": ""})
    expected = run(spec, tmp_path / "here")
    for near, _ in sources.parts:
        near.path.rename(tmp_path / near.path.name)
    with FaultServer(tmp_path) as server:
        names = [
            attach(f"{server.url}/{near.path.name}", name="far-" + near.name).path.name
            for near, _ in sources.parts
        ]
        parts = tuple(
            part.model_copy(update={"pool": name}) for part, name in zip(spec.parts, names, strict=True)
        )
        moved = spec.model_copy(update={"parts": parts})
        (tmp_path / "afar").mkdir()
        result = pretrain(moved, tmp_path / "afar", Runtime(cache_bytes=1 << 28))
        with pytest.raises(UserError, match="cache_gb"):
            pretrain(moved, tmp_path / "afar", Runtime(cache_bytes=0))
    assert same(tmp_path / "here", tmp_path / "afar")
    assert result["history"] == expected["history"]
