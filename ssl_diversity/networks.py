"""The backbones' modules; `backbones.build_backbone` is their door."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, cast

import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_diversity.randomness import uniform

DROP_PATH_STREAM = 100
"""Stream of `randomness` for the first drop path; the next ones follow."""

VITS: dict[str, dict[str, Any]] = {
    "vit-micro": {"embed_dim": 128, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0},
    "vit-ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit-s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit-b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
"""Sizes as in ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877); vit-micro is ours."""


@dataclass
class DropPathKey:
    """Which samples a forward holds: `views` of every position, view-major, the first being view `first`."""

    seed: int
    positions: Tensor
    first: int


class KeyedDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) per sample, drawn from (seed, position, view), not from a generator."""

    def __init__(self, rate: float, stream: int) -> None:
        super().__init__()
        self.rate, self.stream = rate, stream
        self.key: DropPathKey | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.key is not None, "a ViT with drop path needs key_drop_path() before a training forward"
        first, views = self.key.first, len(x) // len(self.key.positions)
        draws = uniform(self.key.seed, self.stream, self.key.positions, first + views)[:, first:]
        keep = (draws.T.reshape(-1) >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * keep[:, None, None]


class ViT(VisionTransformer):
    """timm's VisionTransformer without a classifier: forward gives the normalised CLS token."""

    def __init__(self, *, drop_path: float, **options: Any) -> None:
        super().__init__(num_classes=0, dynamic_img_size=True, **options)
        self.dim = int(self.embed_dim)
        depth = len(self.blocks)
        for i, block in enumerate(cast("list[Any]", self.blocks)):
            rate = drop_path * i / max(1, depth - 1)
            if rate > 0:
                block.drop_path1 = KeyedDropPath(rate, DROP_PATH_STREAM + 2 * i)
                block.drop_path2 = KeyedDropPath(rate, DROP_PATH_STREAM + 2 * i + 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Mean of the normalised patch tokens, (B, dim)."""
        return self.forward_features(x)[:, self.num_prefix_tokens :].mean(1)

    def key_drop_path(self, key: DropPathKey) -> None:
        """Tell the drop paths which samples the next forward holds."""
        for module in self.modules():
            if isinstance(module, KeyedDropPath):
                module.key = replace(key)


def vit(name: str, image_size: int, patch: int, drop_path: float) -> ViT:
    return ViT(img_size=image_size, patch_size=patch, drop_path=drop_path, **VITS[name])


def resnet(name: str, image_size: int) -> nn.Module:
    """torchvision's ResNet without its classifier; up to 64 px with SimCLR's CIFAR stem: 3x3, no max-pooling.

    Source: arXiv 2002.05709, appendix B.9.
    """
    network = getattr(torchvision.models, name)(weights=None)
    network.dim = network.fc.in_features
    network.fc = nn.Identity()
    if image_size <= 64:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


class ConvTiny(nn.Sequential):
    """Four stages of 3x3 convolution, batch norm and ReLU, 16 to 128 channels, halving the size between them."""

    dim = 128

    def __init__(self) -> None:
        widths = [3, 16, 32, 64, 128]
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(itertools.pairwise(widths)):
            convolution = nn.Conv2d(before, after, 3, stride=2 if stage else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """As its base's; torch.compile leaves alone what is torch's own."""
        return cast(Tensor, super().forward(x))
