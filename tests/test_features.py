"""Features: names of networks, embedding, the cache."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_diversity import features
from ssl_diversity.backbones import build_backbone
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.features import embed, embed_images, load_weights, parse_network, random_network
from ssl_diversity.files import task_dir
from ssl_diversity.runtime import Runtime
from ssl_diversity.views.augment import normalise


@dataclass
class FakePool:
    """What embed needs of a pool; counts how often images are read."""

    pixels: np.ndarray
    digest: str = "d0"
    name: str = "fake"
    reads: int = 0
    resize: str = "square"

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(resize=self.resize)

    @property
    def size(self) -> int:
        return len(self.pixels)

    def images(self, rows: np.ndarray, size: int | None = None) -> np.ndarray:
        self.reads += 1
        return self.pixels[rows] if size is None else self.pixels[rows][:, :size, :size]


def photos(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def save_cell(
    key: str, backbone: str = "conv-tiny", size: int = 16, pooling: str = "pool", **changes: Any
) -> Path:
    torch.manual_seed(3)
    module = build_backbone(backbone, size)
    path = task_dir("pretrain", key) / "weights.pt"
    path.parent.mkdir(parents=True)
    saved = {"backbone": backbone, "image_size": size, "pooling": pooling, "state_dict": module.state_dict()}
    torch.save({**saved, **changes}, path)
    return path


def run(pool: FakePool, network: str, **options: Any) -> np.ndarray:
    return embed(pool, network, **{"image_size": 16, "runtime": Runtime(), **options})  # type: ignore[arg-type]


def cache_file(home: Path) -> Path:
    (path,) = home.glob("store/embed/*/*/features.npy")
    return path


@pytest.mark.parametrize(
    "text", ["", "cell:", "cell", "random:conv-tiny", "random:conv-tiny:x", "pixels:1", "random::0"]
)
def test_a_wrong_network_name_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_network(text)


def test_an_unknown_backbone_is_refused_when_the_name_is_read() -> None:
    with pytest.raises(UserError, match="conv-tiny"):
        parse_network("random:conv-huge:0")


def test_pixels_are_the_normalised_images_to_float16() -> None:
    images = photos(5)
    found = run(FakePool(images), "pixels")
    expected = normalise(torch.from_numpy(images).permute(0, 3, 1, 2)).flatten(1).numpy()
    assert found.dtype == np.float16
    assert found.shape == (5, 3 * 16 * 16)
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_pixels_of_large_images_are_taken_at_32() -> None:
    assert run(FakePool(photos(2, size=48)), "pixels", image_size=48).shape == (2, 3 * 32 * 32)


def test_images_of_another_size_are_resized_to_the_networks() -> None:
    flat = np.full((2, 24, 24, 3), 100, np.uint8)
    small = np.full((2, 16, 16, 3), 100, np.uint8)
    np.testing.assert_array_equal(run(FakePool(flat, "a"), "pixels"), run(FakePool(small, "b"), "pixels"))


def test_a_wide_image_is_cropped_at_its_centre() -> None:
    wide = np.zeros((1, 16, 32, 3), np.uint8)
    wide[:, :, 8:24] = photos(1)
    np.testing.assert_array_equal(run(FakePool(wide, "a"), "pixels"), run(FakePool(photos(1), "b"), "pixels"))


def test_second_embedding_comes_from_the_cache(home: Path) -> None:
    pool = FakePool(photos(20))
    first = run(pool, "pixels", batch_size=7)
    reads = pool.reads
    np.testing.assert_array_equal(run(pool, "pixels"), first)
    assert pool.reads == reads
    assert not list(home.rglob("*.tmp"))


@pytest.mark.parametrize("network", ["pixels", "random:conv-tiny:0"])
def test_images_of_many_shapes_are_read_at_the_networks_size(network: str) -> None:
    stored = photos(4, size=24)
    found = run(FakePool(stored, "a", resize="short"), network)
    np.testing.assert_array_equal(found, run(FakePool(stored[:, :16, :16], "b"), network))


def test_the_cache_distinguishes_network_pool_and_size(home: Path) -> None:
    pool = FakePool(photos(4))
    run(pool, "pixels")
    run(pool, "pixels", image_size=8)
    run(pool, "random:conv-tiny:0")
    run(pool, "random:conv-tiny:1")
    run(FakePool(photos(4), "d1"), "pixels")
    run(pool, "random:conv-tiny:0", calibration=FakePool(photos(9, seed=1), "d1"))
    assert len(list(home.glob("store/embed/*/*/features.npy"))) == 6


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other rows"])
def test_a_damaged_cache_file_is_computed_again(home: Path, damage: str) -> None:
    pool = FakePool(photos(6))
    first = np.array(run(pool, "pixels"))
    path = cache_file(home)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[200] ^= 1
    path.write_bytes({"cut": data[:-100], "flip": data, "empty": b"", "other rows": data}[damage])
    if damage == "other rows":
        np.save(path, first[:3])
    np.testing.assert_array_equal(run(pool, "pixels"), first)
    reads = pool.reads
    run(pool, "pixels")
    assert pool.reads == reads


def test_stopping_leaves_nothing_behind(home: Path) -> None:
    with pytest.raises(Interrupted):
        run(FakePool(photos(6)), "pixels", runtime=Runtime(stop=lambda: True))
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_stopped_it_goes_on_behind_the_last_whole_part(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_PART_IMAGES", 9)
    pool = FakePool(photos(23))
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(Interrupted, match="whole parts of 8 images are kept"):
        run(pool, "random:conv-tiny:1", batch_size=4, runtime=Runtime(stop=stop))
    reads = pool.reads
    resumed = run(pool, "random:conv-tiny:1", batch_size=4)
    assert pool.reads - reads == 1 + 4  # calibration; of six batches two were kept
    assert {path.name for path in cache_file(home).parent.iterdir()} == {"features.npy"}
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "other"))
    np.testing.assert_array_equal(resumed, run(FakePool(photos(23)), "random:conv-tiny:1", batch_size=4))


def test_random_networks_batch_norm_has_the_statistics_of_the_images() -> None:
    images = photos(300, seed=1) // 2
    module = random_network("conv-tiny", 0, 16, images).module
    assert module is not None
    assert not any(m.training for m in module.modules())
    first = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    convolution = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        out = convolution(normalise(torch.from_numpy(images).permute(0, 3, 1, 2)))
    assert first.running_mean is not None
    assert first.running_var is not None
    torch.testing.assert_close(first.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, out.var((0, 2, 3)), rtol=1e-2, atol=1e-5)


def test_random_network_depends_on_its_seed_and_not_on_the_global_generator() -> None:
    images = photos(8)
    torch.manual_seed(1)
    a = embed_images(images, random_network("conv-tiny", 0, 16, images))
    before = torch.get_rng_state()
    b = embed_images(images, random_network("conv-tiny", 0, 16, images))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(a, b)
    assert (a != embed_images(images, random_network("conv-tiny", 1, 16, images))).any()


def test_train_and_test_pools_can_share_a_calibration() -> None:
    train, test = FakePool(photos(30), "train"), FakePool(photos(5), "test")
    whole = run(train, "random:conv-tiny:0")
    part = run(test, "random:conv-tiny:0", calibration=train)
    np.testing.assert_allclose(part.astype(np.float32), whole[:5].astype(np.float32), rtol=2e-3, atol=2e-3)


def test_a_cells_network_is_loaded_strictly_and_evaluated() -> None:
    save_cell("k1")
    torch.manual_seed(3)
    module = build_backbone("conv-tiny", 16).eval()
    images = photos(3)
    with torch.no_grad():
        expected = module(normalise(torch.from_numpy(images).permute(0, 3, 1, 2))).numpy()
    np.testing.assert_array_equal(run(FakePool(images), "cell:k1"), expected.astype(np.float16))


def test_pooling_tokens_takes_the_mean_of_the_patch_tokens() -> None:
    tokens = load_weights(save_cell("k1", "vit-micro", pooling="tokens"))
    cls = load_weights(save_cell("k2", "vit-micro", pooling="cls"))
    batch = torch.from_numpy(photos(2)).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(tokens(batch), tokens.module.tokens(normalise(batch)))  # type: ignore[union-attr,operator]
        torch.testing.assert_close(cls(batch), cls.module(normalise(batch)))  # type: ignore[misc]


def test_missing_foreign_and_misfit_weights_are_user_errors() -> None:
    with pytest.raises(UserError, match="pretrain"):
        run(FakePool(photos(1)), "cell:none")
    with pytest.raises(UserError, match="not the weights"):
        load_weights(save_cell("k1", state_dict={"x": torch.zeros(1)}))
    path = save_cell("k2")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=str(path)):
        load_weights(path)
    save_cell("k3", size=32)
    with pytest.raises(UserError, match="32"):
        run(FakePool(photos(1)), "cell:k3")


def test_features_that_are_not_finite_are_refused(home: Path) -> None:
    state = build_backbone("conv-tiny", 16).state_dict()
    save_cell("k1", state_dict={name: value * float("nan") for name, value in state.items()})
    assert np.isnan(embed_images(photos(2), load_weights(task_dir("pretrain", "k1") / "weights.pt"))).all()
    with pytest.raises(UserError, match="diverged"):
        run(FakePool(photos(2)), "cell:k1")
    assert not list(home.glob("store/embed/*/*/*"))


def test_large_features_saturate() -> None:
    class Huge(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4] * 0 + 1e6

    huge = embed_images(photos(2), features.Network(Huge(), "pool", 16))
    assert np.isfinite(huge).all()


def test_importing_features_and_the_probes_spec_needs_no_torch() -> None:
    code = "import sys, ssl_diversity.features, ssl_diversity.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
