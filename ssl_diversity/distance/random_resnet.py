"""A ResNet with random weights: an extractor that needs no download and knows nothing of any dataset.

Random convolutional features tell image distributions apart (colour, contrast, texture, edges at several
scales), not semantics; use pretrained weights for that where you have them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ssl_diversity.randomness import normal

WIDTH = 16
STAGES = (1, 2, 4)  # channels over WIDTH; two blocks each, the first of a later stage halves the size
# Wider nets and a fourth stage cost more and see less: on pairs of sets of 800 images (CIFAR-10 against its
# grey or blurred self, against digits) the distance over the same-distribution floor was higher for this one
# than for ResNet-18's four stages at width 16 or 32, since the floor grows with the number of features.


class Block(nn.Module):
    """The basic block of He et al., CVPR 2016 (1x1 convolution on the shortcut where shapes change)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class RandomResNet(nn.Module):
    """The 14-layer ResNet for small images (He et al., CVPR 2016, section 4.2), with random weights.

    He-initialised from a counter-based generator: the same weights for the same seed, whatever torch's own
    generators do in later versions.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        widths = [WIDTH * scale for scale in STAGES]
        self.stem = _convolution(3, WIDTH, 3, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                Block(inputs, outputs, stride=1 if i == 0 else 2), Block(outputs, outputs, stride=1)
            )
            for i, (inputs, outputs) in enumerate(zip([WIDTH, *widths], widths, strict=False))
        )
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for stream, convolution in enumerate(convolutions):
            weight = convolution.weight.detach()
            fan_in = weight[0].numel()
            values = normal(seed, stream, torch.arange(len(weight)), fan_in) * (2 / fan_in) ** 0.5
            weight.copy_(values.view_as(weight))
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`pixels` float32 (B, 3, H, W) in 0..255; features (B, 64) and each stage's output (B, C, H, W)."""
        x = relu(self.stem(pixels / 127.5 - 1))
        layers = []
        for stage in self.stages:
            x = stage(x)
            layers.append(x)
        return x.mean((2, 3)), layers

    @torch.no_grad()
    def calibrate(self, pixels: Tensor) -> dict[str, Tensor]:
        """Set every batch norm's statistics to those of `pixels`; returns them by name."""
        norms = {name: m for name, m in self.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for norm in norms.values():
            norm.momentum = 1.0
        self.train()
        self(pixels)
        self.eval()
        return {name: value for name, value in self.state_dict().items() if "running" in name}


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
