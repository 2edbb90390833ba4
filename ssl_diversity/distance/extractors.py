"""Networks whose features and activations stand for an image in a distance.

| extractor | works at | features | neurons |
|---|---|---|---|
| `random-resnet` | the images' own size up to 64 px, larger ones resized to 64 | 64 | three stages |
| `timm:NAME[:WEIGHTS]` | the size its weights were trained at | pooled output | every block, last norm |
| a cell's `weights.pt` | the size it was pretrained at | as probed | every block |

Where an image has another size it is resized by one of two filters, which is part of every number's name:
`bicubic` with antialiasing (clean-fid's choice: PIL's filter on floats) or `bilinear` without.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ssl_diversity.distance import calibration
from ssl_diversity.distance.cache import cached
from ssl_diversity.distance.config import NUMERICS, RANDOM, TIMM, Resize, extractor_digest, weights_file
from ssl_diversity.distance.random_resnet import RandomResNet
from ssl_diversity.distance.visual_dna import Ranges
from ssl_diversity.errors import UserError
from ssl_diversity.features import load_weights
from ssl_diversity.files import digest

RANDOM_LARGEST = 64  # px

Network = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Extractor:
    """A network with its preprocessing. `identity` is a JSON value: equal if and only if its outputs are."""

    name: str
    image_size: int
    resize: Resize
    identity: dict[str, Any]
    network: Network  # float32 (B, 3, s, s) in 0..255 -> features (B, d), layers (B, C, ...) or (B, T, C)
    device: str

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """uint8 (B, 3, H, W) -> float32 features (B, d) and activations, each (B, neurons, positions)."""
        pixels = resized(images.to(self.device).float(), self.image_size, self.resize)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features, layers = self.network(pixels)
        return features.float(), [_by_neuron(layer) for layer in layers]

    def label(self, *image_sizes: int) -> str:
        """Its name, and the filter where images of any of these sizes had to be resized."""
        return self.name if set(image_sizes) == {self.image_size} else f"{self.name}-{self.resize}"

    @property
    def batch_size(self) -> int:
        """Images per call that keep memory use moderate."""
        return max(8, min(256, (256 * 64 * 64) // self.image_size**2))

    def ranges(self) -> Ranges:
        """Every neuron's range over the fixed calibration images, measured once and cached."""

        def measure() -> dict[str, Any]:
            first, *others = (
                Ranges.of(self(batch)[1])
                for batch in calibration.images(self.image_size).split(self.batch_size)
            )
            for other in others:
                first |= other
            return {"low": first.low, "high": first.high}

        return Ranges(**cached("cache", digest({"ranges": self.identity}), measure))


def load_extractor(
    text: str, *, image_size: int, resize: Resize = "bicubic", seed: int = 0, device: str = "cpu"
) -> Extractor:
    """The extractor that `text` names (see the table above), for images of `image_size` px.

    `seed` draws the random network's weights. Raises UserError where weights are missing or do not fit.
    """
    file_digest = extractor_digest(text)
    if text == RANDOM:
        size = min(image_size, RANDOM_LARGEST)
        network: Network = _random_resnet(seed, size).to(device)
        kind, source = RANDOM, f"seed{seed}"
        name = RANDOM if seed == 0 else f"{RANDOM}-{source}"
    elif text.startswith(TIMM):
        network, size, source = _timm(text, device)
        kind = ":".join(text.split(":")[:2])
        name = f"{kind}-{file_digest[:8]}" if file_digest else kind
    else:
        network, size = _cell(Path(text).expanduser(), device)
        kind, source = "cell", file_digest
        name = f"cell-{file_digest[:8]}"
    identity = {"kind": kind, "source": source, "image_size": size, "resize": resize, "numerics": NUMERICS}
    return Extractor(f"{name}@{size}px", size, resize, identity, network, device)


def resized(pixels: Tensor, size: int, filter_: Resize) -> Tensor:
    """float32 (B, 3, H, W) in 0..255 -> (B, 3, size, size), not rounded."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    out = interpolate(pixels, (size, size), mode=filter_, align_corners=False, antialias=filter_ == "bicubic")
    return out.clamp(0, 255)


def _by_neuron(layer: Tensor) -> Tensor:
    """(B, C, H, W) maps, (B, T, C) tokens or (B, C) vectors as (B, C, positions)."""
    if layer.ndim == 3:
        return layer.transpose(1, 2).float()
    return layer.flatten(2).float() if layer.ndim == 4 else layer[..., None].float()


def _random_resnet(seed: int, size: int) -> RandomResNet:
    """With batch norm calibrated on the fixed images (measured once, on the CPU, and cached)."""
    network = RandomResNet(seed)

    def measure() -> dict[str, Any]:
        statistics = network.calibrate(calibration.images(size).float())
        return {name: value.numpy() for name, value in statistics.items()}

    key = digest({"batch norm": RANDOM, "seed": seed, "image_size": size, "numerics": NUMERICS})
    arrays = cached("cache", key, measure)
    state = network.state_dict() | {name: torch.from_numpy(value) for name, value in arrays.items()}
    network.load_state_dict(state)
    return network


def _timm(text: str, device: str) -> tuple[Network, int, str]:
    """The model, its image size and a digest of its weights."""
    import timm

    name = text.removeprefix(TIMM).partition(":")[0]
    weights = weights_file(text)
    overlay = {"file": str(weights), "custom_load": False} if weights else None
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, UnpicklingError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"extractor={text}: the weights cannot be loaded ({line}); check the name with timm.list_pretrained(), "
            f"load it once where there is a network, or give a file: {TIMM}{name}:WEIGHTS"
        ) from None
    size = int(model.pretrained_cfg["input_size"][-1])
    return timm_network(model.to(device).eval()), size, _weights_digest(model)


def timm_network(model: Any) -> Network:
    """A timm model: every block's activations, class tokens included, and for a ViT the last norm's."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    prefix = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}

    def network(pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = (pixels - mean.to(pixels)) / std.to(pixels)
        last, blocks = model.forward_intermediates(x, **prefix)
        features = model.forward_head(last, pre_logits=True)
        if prefix:
            blocks = [torch.cat([tokens, grid.flatten(2).transpose(1, 2)], 1) for grid, tokens in blocks]
        return features, [*blocks, last] if last.ndim == 3 else blocks

    return network


def _cell(path: Path, device: str) -> tuple[Network, int]:
    """A cell's network as it is probed, and the outputs of its backbone's blocks."""
    probed = load_weights(path)
    assert probed.module is not None
    layers: list[Tensor] = []
    for block in _blocks(probed.module.to(device)):
        block.register_forward_hook(lambda _module, _inputs, output: layers.append(output))

    def network(pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        layers.clear()
        return probed(pixels.round().to(torch.uint8)), list(layers)

    return network, probed.image_size


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members, those with weights, of its outermost lists of modules: residual or transformer blocks."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [member for member in module if any(True for _ in member.parameters())]
    return [block for child in module.children() for block in _blocks(child)]


def _weights_digest(model: nn.Module) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(value.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
