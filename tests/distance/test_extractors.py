"""Extractors: what they give, how they resize, what they remember, what they refuse."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from ssl_diversity.backbones import build_backbone
from ssl_diversity.distance import DistanceSpec, calibration, extractor_digest
from ssl_diversity.distance.extractors import load_extractor, resized
from ssl_diversity.distance.random_resnet import RandomResNet
from ssl_diversity.distance.visual_dna import histograms
from ssl_diversity.errors import UserError
from ssl_diversity.features import embed_images, load_weights


@pytest.fixture(autouse=True)
def few_calibration_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sixteenth is enough here."""
    whole = calibration.images
    monkeypatch.setattr(calibration, "images", lambda size: whole(size)[::16])


def some_images(n: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), np.uint8))


def weights_of_a_cell(path: Path, backbone: str, pooling: str) -> Path:
    torch.manual_seed(0)
    state = build_backbone(backbone, 16).state_dict()
    torch.save({"backbone": backbone, "image_size": 16, "pooling": pooling, "state_dict": state}, path)
    return path


def test_calibration_images_are_fixed_and_hold_photographs_and_digits() -> None:
    images = calibration.images(8)
    assert images.shape == (32, 3, 8, 8)
    assert images.dtype == torch.uint8
    saturation = (images.amax(1).int() - images.amin(1).int()).amax((1, 2))
    assert (saturation[:16] > 0).all()
    assert (saturation[16:] == 0).all()


def test_random_resnet_does_not_depend_on_torchs_generators() -> None:
    torch.manual_seed(1)
    a = RandomResNet(0).state_dict()
    torch.manual_seed(2)
    b, other = RandomResNet(0).state_dict(), RandomResNet(1).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    weights = [name for name in a if a[name].ndim == 4]
    assert len(weights) == 15  # 13 convolutions and 2 on shortcuts; the 14th layer would be the classifier
    for name in weights:
        assert not torch.equal(a[name], other[name])
        assert a[name].std() == pytest.approx((2 / a[name][0].numel()) ** 0.5, rel=0.1)


def test_random_resnet_gives_features_and_three_stages_at_the_images_own_size() -> None:
    extractor = load_extractor("random-resnet", image_size=16)
    features, layers = extractor(some_images())
    assert features.shape == (4, 64)
    assert [layer.shape for layer in layers] == [(4, 16, 256), (4, 32, 64), (4, 64, 16)]
    assert features.dtype == layers[0].dtype == torch.float32
    assert torch.allclose(layers[-1].mean(2), features)
    assert extractor.label(16, 16) == "random-resnet@16px"
    assert extractor.label(24, 16) == "random-resnet@16px-bicubic"
    assert load_extractor("random-resnet", image_size=16, seed=3).name == "random-resnet-seed3@16px"


def test_random_resnet_works_at_64_px_at_most() -> None:
    extractor = load_extractor("random-resnet", image_size=224, resize="bilinear")
    assert extractor.image_size == 64
    assert extractor.label(224, 224) == "random-resnet@64px-bilinear"
    assert extractor(some_images(1, 224))[1][0].shape == (1, 16, 64 * 64)


def test_batch_norm_is_calibrated_on_the_fixed_images() -> None:
    """Then every norm's output has mean 0 and variance 1 over them, up to n / (n - 1) in the variances."""
    network = load_extractor("random-resnet", image_size=16).network
    assert isinstance(network, RandomResNet)
    seen = []
    norm = network.stages[2][0].second[1]  # type: ignore[index]
    norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    network(calibration.images(16).float())
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-2
    assert (seen[0].var((0, 2, 3)) - 1).abs().max() < 2e-2


def test_calibration_is_stored_and_made_again_when_missing_or_broken(home: Path) -> None:
    images = some_images()
    extractor = load_extractor("random-resnet", image_size=16)
    features, ranges = extractor(images)[0], extractor.ranges()
    files = sorted((home / "store" / "cache").rglob("*.npz"))
    assert len(files) == 2
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:100])
    again = load_extractor("random-resnet", image_size=16)
    assert torch.equal(again(images)[0], features)
    assert (again.ranges().high == ranges.high).all()
    assert sorted((home / "store" / "cache").rglob("*")) == sorted([*files, *{f.parent for f in files}])


def test_ranges_hold_every_activation_of_the_calibration_images() -> None:
    extractor = load_extractor("random-resnet", image_size=16)
    ranges = extractor.ranges()
    first = 0
    for layer in extractor(calibration.images(16))[1]:
        neurons = slice(first, first := first + layer.shape[1])
        assert np.allclose(ranges.low[neurons], layer.amin((0, 2)).numpy(), atol=1e-4)
        assert np.allclose(ranges.high[neurons], layer.amax((0, 2)).numpy(), atol=1e-4)
    assert first == len(ranges.low) == 112


@pytest.mark.parametrize(("start", "end"), [(64, 16), (17, 32)])
def test_bicubic_is_pils_on_floats(start: int, end: int) -> None:
    pixels = some_images(1, start).float()
    channels = [
        Image.fromarray(channel, "F").resize((end, end), Image.Resampling.BICUBIC)
        for channel in pixels[0].numpy()
    ]
    expected = np.stack([np.asarray(channel) for channel in channels]).clip(0, 255)
    assert np.abs(resized(pixels, end, "bicubic")[0].numpy() - expected).max() < 1e-2
    assert resized(pixels, start, "bicubic") is pixels


def test_bilinear_is_not_antialiased() -> None:
    """Halving four pixels takes the mean of the middle two of each block of their own, none beyond."""
    pixels = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 3, 16, 16).clone() ** 2
    assert resized(pixels, 4, "bilinear")[0, 0, 0].tolist() == [2.5, 30.5, 90.5, 182.5]


@pytest.mark.parametrize(
    ("backbone", "pooling", "layers"),
    [("conv-tiny", "pool", 8), ("resnet18", "pool", 8), ("vit-micro", "cls", 2), ("vit-micro", "tokens", 2)],
)
def test_a_cells_features_are_those_that_are_probed(
    tmp_path: Path, backbone: str, pooling: str, layers: int
) -> None:
    path = weights_of_a_cell(tmp_path / "weights.pt", backbone, pooling)
    extractor = load_extractor(str(path), image_size=16)
    images = some_images()
    features, activations = extractor(images)
    probed = embed_images(images.permute(0, 2, 3, 1).numpy(), load_weights(path))
    assert np.allclose(features.numpy(), probed, atol=2e-3)
    assert len(activations) == layers
    assert all(activation.shape[0] == 4 and activation.ndim == 3 for activation in activations)
    counts = histograms(activations, extractor.ranges(), 10)
    assert counts.sum() == sum(activation.numel() for activation in activations)
    assert extractor.name == f"cell-{extractor_digest(str(path))[:8]}@16px"


def test_timm_weights_from_a_file(tmp_path: Path) -> None:
    for name, blocks in (("test_vit", 7), ("test_resnet", 5)):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0).eval()
        torch.save(model.state_dict(), tmp_path / name)
        extractor = load_extractor(f"timm:{name}:{tmp_path / name}", image_size=32)
        size, digest = (
            model.pretrained_cfg["input_size"][-1],
            extractor_digest(f"timm:{name}:{tmp_path / name}"),
        )
        images = some_images(2, size)
        features, layers = extractor(images)
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        with torch.no_grad():
            assert torch.allclose(model((images / 255 - mean) / std), features, atol=1e-4)
        assert len(layers) == blocks
        assert extractor.image_size == size
        assert extractor.label(32, 32) == f"timm:{name}-{digest[:8]}@{size}px-bicubic"


def test_identity_follows_what_determines_the_outputs(tmp_path: Path) -> None:
    path = weights_of_a_cell(tmp_path / "a.pt", "conv-tiny", "pool")
    copy = Path(shutil.copy(path, tmp_path / "b.pt"))
    torch.save({**torch.load(path), "pooling": "tokens"}, tmp_path / "c.pt")
    identity = load_extractor(str(path), image_size=16).identity
    assert load_extractor(str(copy), image_size=16).identity == identity
    assert load_extractor(str(tmp_path / "c.pt"), image_size=16).identity != identity
    random = load_extractor("random-resnet", image_size=16).identity
    for options in (
        {"image_size": 8},
        {"image_size": 16, "seed": 1},
        {"image_size": 16, "resize": "bilinear"},
    ):
        assert load_extractor("random-resnet", **options).identity != random  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inception", "extractor=inception: no such file: inception; use random-resnet, timm:NAME"),
        ("timm:resnet18:/no/where.pt", "no such file: /no/where.pt"),
        ("timm:resnet18", "extractor=timm:resnet18: the weights cannot be loaded.*give a file"),
        ("timm:no_such_model", "extractor=timm:no_such_model: .*Unknown model.*check the name"),
    ],
)
def test_missing_weights_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_extractor(text, image_size=16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 broken zip"])
def test_broken_weights_are_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    for text in (str(tmp_path / "weights.pt"), f"timm:test_resnet:{tmp_path / 'weights.pt'}"):
        with pytest.raises(UserError, match="weights") as error:
            load_extractor(text, image_size=16)
        assert "\n" not in str(error.value)


def test_a_spec_is_refused_where_a_value_makes_no_sense() -> None:
    here, there = (
        {"pool": pool, "rows_start": start, "rows_count": 4} for pool, start in (("a", 0), ("c", 9))
    )
    good = {"parts": [here], "rows_digest": "x", "reference_pool": "b", "reference_digest": "y"}
    spec = DistanceSpec(**good)  # type: ignore[arg-type]
    assert spec.n == 4
    moved = DistanceSpec(**good | {"parts": [there], "reference_pool": "d"})  # type: ignore[arg-type]
    assert spec.identity() == moved.identity()
    one = {"parts": [here | {"rows_count": 1}]}
    for bad in (one, {"parts": []}, {"bins": 1}, {"resize": "nearest"}, {"extractr": "x"}):
        with pytest.raises(ValueError):
            DistanceSpec(**good | bad)  # type: ignore[arg-type]
