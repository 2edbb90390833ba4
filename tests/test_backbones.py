"""Backbones: shapes, stems, tokens, keyed drop path, and what is refused."""

import subprocess
import sys

import pytest
import torch

from ssl_diversity.backbones import BACKBONES, build_backbone, is_vit, patch_size
from ssl_diversity.errors import UserError
from ssl_diversity.networks import DropPathKey, KeyedDropPath, ViT

DIMS = {
    "resnet18": 512,
    "resnet50": 2048,
    "vit-ti": 192,
    "vit-s": 384,
    "vit-b": 768,
    "conv-tiny": 128,
    "vit-micro": 128,
}


def test_names_recipes_and_the_registry_import_no_torch() -> None:
    code = "import sys, ssl_diversity.methods.recipe, ssl_diversity.methods.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("image_size", [16, 64, 224])
def test_features_have_the_stated_dimension(name: str, image_size: int) -> None:
    with torch.device("meta"):
        network = build_backbone(name, image_size)
        assert network.dim == DIMS[name]
        assert network(torch.empty(2, 3, image_size, image_size)).shape == (2, DIMS[name])


def test_small_images_keep_their_size_in_a_resnet_s_stem() -> None:
    sizes = {}
    for image_size in (64, 224):
        network = build_backbone("resnet18", image_size)
        network.layer1.register_forward_hook(lambda m, i, o, s=image_size: sizes.update({s: o.shape[-1]}))
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    assert sizes == {64: 64, 224: 56}


def test_a_vit_s_feature_is_its_normalised_cls_and_tokens_are_the_patches_mean() -> None:
    network = build_backbone("vit-micro", 16).eval()
    images = torch.randn(3, 3, 16, 16)
    cls = network(images)
    torch.testing.assert_close(cls.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(cls.var(1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
    sequence = network.forward_features(images)
    assert sequence.shape == (3, 1 + 16, 128)
    torch.testing.assert_close(cls, sequence[:, 0])
    torch.testing.assert_close(network.tokens(images), sequence[:, 1:].mean(1))
    assert network(images[:, :, :8, :8]).shape == (3, 128)  # a local crop


def test_patches_grow_with_the_image() -> None:
    assert [patch_size(size) for size in (16, 32, 64, 96, 224)] == [4, 4, 8, 8, 16]


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone=vgg: unknown; known backbones: resnet18, "):
        is_vit("vgg")
    with pytest.raises(UserError, match=r"image size 30 is not a multiple of its patch of 4 px"):
        build_backbone("vit-s", 30)


def _keyed(network: ViT, images: torch.Tensor, positions: torch.Tensor, first: int = 0) -> torch.Tensor:
    network.key_drop_path(DropPathKey(seed=5, positions=positions, first=first))
    return network(images)


def test_drop_path_is_a_function_of_seed_position_and_view() -> None:
    network = build_backbone("vit-micro", 16, drop_path=0.5).train()
    assert isinstance(network, ViT)
    images, positions = torch.randn(6, 3, 16, 16), torch.arange(100, 106)
    stacked = _keyed(network, images.repeat(2, 1, 1, 1), positions)
    torch.rand(3)  # the global generator has no say
    torch.testing.assert_close(_keyed(network, images, positions), stacked[:6])
    torch.testing.assert_close(_keyed(network, images, positions, first=1), stacked[6:])
    torch.testing.assert_close(_keyed(network, images[2:4], positions[2:4]), stacked[2:4])
    assert not torch.allclose(stacked[:6], stacked[6:])


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation() -> None:
    layer = KeyedDropPath(0.25, stream=7)
    x = torch.ones(20_000, 1, 1)
    with pytest.raises(AssertionError, match="key_drop_path"):
        layer(x)
    layer.key = DropPathKey(seed=1, positions=torch.arange(20_000), first=0)
    assert layer(x).unique().tolist() == pytest.approx([0, 4 / 3])
    assert layer(x).mean().item() == pytest.approx(1, abs=0.02)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("name", ["conv-tiny", "vit-micro", "resnet18"])
def test_drop_path_changes_no_key_of_the_state_dict(name: str) -> None:
    build_backbone(name, 16).load_state_dict(
        build_backbone(name, 16, drop_path=0.3).state_dict(), strict=True
    )
