"""Backbones by name (no torch here until one is built)."""

from typing import TYPE_CHECKING

from ssl_diversity.errors import UserError

if TYPE_CHECKING:
    from torch import nn

BACKBONES = {
    "resnet18": False,
    "resnet50": False,
    "vit-ti": True,
    "vit-s": True,
    "vit-b": True,
    "conv-tiny": False,
    "vit-micro": True,
}
"""Name -> whether it is a ViT. The last two are for laptops."""


def is_vit(name: str) -> bool:
    """Whether `name` is a vision transformer; an unknown name is a UserError."""
    if name not in BACKBONES:
        raise UserError(f"backbone={name}: unknown; known backbones: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def patch_size(image_size: int) -> int:
    """Side of a ViT's patches in pixels: 4 up to 32 px, 8 up to 96 px, else 16."""
    return 4 if image_size <= 32 else 8 if image_size <= 96 else 16


def build_backbone(name: str, image_size: int, *, drop_path: float = 0.0) -> "nn.Module":
    """A randomly initialised network (from torch's CPU generator) for images of `image_size` pixels.

    Its `dim` features come from `network(x)`: float (B, 3, s, s) -> (B, dim): globally pooled, or a ViT's
    normalised CLS token. A ViT also has `network.tokens(x)`: the mean of its patch tokens, (B, dim), and takes
    any s that its patch divides. `drop_path` is the stochastic depth of a ViT's last block; other networks
    have none.

    Raises UserError for an unknown name and for a size that a ViT's patches do not divide.
    """
    vit = is_vit(name)
    if vit and image_size % patch_size(image_size):
        patch = patch_size(image_size)
        raise UserError(
            f"backbone={name}: image size {image_size} is not a multiple of its patch of {patch} px"
        )
    from ssl_diversity import networks

    if vit:
        return networks.vit(name, image_size, patch_size(image_size), drop_path)
    return networks.ConvTiny() if name == "conv-tiny" else networks.resnet(name, image_size)
