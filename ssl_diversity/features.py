"""Features: embed(images, network), computed once per (network, pool) and cached as float16.

A network is named by a short text: `cell:<key>` (the weights of a pretraining task),
`random:<backbone>:<seed>` (untrained, its batch norm calibrated) or `pixels` (the images themselves).
Imports no torch before a network is needed.
"""

import contextlib
import os
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.backbones import build_backbone, is_vit
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import digest, replacing, task_dir, write_atomic
from ssl_diversity.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ssl_diversity.data.pool import Pool

NUMERICS = 1  # raised when features change
CALIBRATION_IMAGES = 1024  # what a random network's batch norm sees
PIXELS_SIZE = 32  # `pixels` of larger images are taken at this size: 3,072 features
_FLOAT16_MAX = 65504.0
_PART_IMAGES = 1 << 14
_CHECKSUM_BYTES = 4

Features = NDArray[np.float16]
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class NetworkRef:
    """A network by name: kind `cell` (name: the task's key), `random` (name: the backbone) or `pixels`."""

    kind: str
    name: str = ""
    seed: int = 0


def parse_network(text: str) -> NetworkRef:
    """`cell:<key>`, `random:<backbone>:<seed>` or `pixels`; anything else, or no such backbone, is a UserError."""
    match text.split(":"):
        case ["pixels"]:
            return NetworkRef("pixels")
        case ["cell", key] if key:
            return NetworkRef("cell", key)
        case ["random", backbone, seed] if seed.isdecimal():
            is_vit(backbone)  # refuses an unknown name
            return NetworkRef("random", backbone, int(seed))
    raise UserError(f"network={text}: expected cell:<key>, random:<backbone>:<seed> or pixels")


@dataclass(frozen=True)
class Network:
    """A frozen network with what evaluation must know about it. `module` is None for `pixels`."""

    module: "nn.Module | None"
    pooling: str  # "cls" and "pool": the backbone's output; "tokens": the mean of its patch tokens
    image_size: int

    def __call__(self, images: "Tensor") -> "Tensor":
        """float32 (B, d) features of uint8 (B, 3, H, W), resized and cropped to `image_size` if need be."""
        from ssl_diversity.views.augment import normalise

        inputs = normalise(_to_size(images, self.image_size))
        if self.module is None:
            return inputs.flatten(1)
        return self.module.tokens(inputs) if self.pooling == "tokens" else self.module(inputs)  # type: ignore[operator]


def load_weights(path: Path) -> Network:
    """The network in a cell's `weights.pt`: {"backbone", "image_size", "pooling", "state_dict"}, loaded strictly.

    Raises UserError if the file is missing or holds something else.
    """
    import torch

    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        module = build_backbone(saved["backbone"], saved["image_size"])
        module.load_state_dict(saved["state_dict"], strict=True)
        return Network(module.eval(), saved["pooling"], saved["image_size"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights; run the sweep again to pretrain this cell") from None
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not the weights of a cell ({reason}); remove it and pretrain again"
        ) from None


def random_network(backbone: str, seed: int, image_size: int, images: Images) -> Network:
    """An untrained backbone whose batch norm has the statistics of `images`, uint8 (n, H, W, 3).

    One pass in batches of about 256, statistics averaged over the batches; nothing else is in train mode.
    """
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_backbone(backbone, image_size).eval()
    network = Network(module, "pool", image_size)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    if norms:
        with torch.no_grad():
            for batch in np.array_split(images, -(-len(images) // 256)):
                network(_to_tensor(batch))
    module.eval()
    return network


def embed_images(images: Images, network: Network, *, device: str = "cpu", batch_size: int = 256) -> Features:
    """float16 (n, d) features of uint8 (n, H, W, 3), computed in float32 and deterministically.

    Values beyond float16's range saturate; those of a network that diverged are not finite.
    """
    import torch

    if network.module is not None:
        network.module.to(device)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    parts = []
    with torch.inference_mode(), exact:
        for start in range(0, len(images), batch_size):
            batch = network(_to_tensor(images[start : start + batch_size]).to(device)).float()
            parts.append(batch.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16).cpu().numpy())
    return np.concatenate(parts)


def embed(
    pool: "Pool",
    network: str,
    *,
    image_size: int,
    runtime: Runtime,
    batch_size: int = 256,
    calibration: "Pool | None" = None,
) -> Features:
    """float16 (n, d) features of all images of `pool`, in pool order, as a read-only memory map.

    `network` is a name as `parse_network` reads it; images are brought to `image_size` (short side resized,
    centre crop), which must be what a cell was pretrained at. A random network's batch norm is calibrated
    on the first 1,024 images of `calibration` (default: `pool`): give train and test sets the same one.

    Cached in `store/embed/<key[:2]>/<key>/features.npy` under (network, pool digest, image size, NUMERICS).
    The file ends in a CRC-32 of the features; one that is cut short or damaged is computed again. Stopped or killed, the
    next call goes on behind the last whole part.
    Raises UserError for a network that cannot be loaded or whose features are not finite, and for a full
    disk; Interrupted when `runtime.stop()`.
    """
    ref = parse_network(network)
    calibration = pool if calibration is None else calibration
    identity = {
        "network": network,
        "calibration": calibration.digest if ref.kind == "random" else None,
        "pool": pool.digest,
        "image_size": image_size,
        "numerics": NUMERICS,
    }
    path = task_dir("embed", digest(identity)) / "features.npy"
    cached = _read(path, pool.size)
    if cached is not None:
        return cached
    runtime.set_threads()
    loaded = _load(ref, image_size, calibration)
    step = max(1, _PART_IMAGES // batch_size) * batch_size
    parts = [path.with_name(f"{start}.{step}.{batch_size}.part") for start in range(0, pool.size, step)]
    for number, part in enumerate(parts):
        if part.exists():
            continue  # of a run that was stopped
        blocks = []
        end = min((number + 1) * step, pool.size)
        for start in range(number * step, end, batch_size):
            if runtime.stop():
                raise Interrupted(f"stopped embedding {pool.name}; whole parts of {step} images are kept")
            rows = np.arange(start, min(start + batch_size, end))
            block = embed_images(
                _images(pool, rows, image_size), loaded, device=runtime.device, batch_size=batch_size
            )
            if not np.isfinite(block).all():
                raise UserError(
                    f"{network} on {pool.name}: features are not finite: the network diverged; lower its lr and pretrain again"
                )
            blocks.append(block.tobytes())
            runtime.progress(int(rows[-1]) + 1, pool.size)
        write_atomic(part, b"".join(blocks))
    with contextlib.suppress(FileNotFoundError):  # another process was as far as we are, and joined them
        _join(parts, path, pool.size)
    for part in parts:
        part.unlink(missing_ok=True)
    cached = _read(path, pool.size)
    assert cached is not None
    return cached


def _join(parts: Sequence[Path], path: Path, rows: int) -> None:
    """Features of all rows (float16, row by row) as one .npy file with their CRC-32."""
    dim = sum(part.stat().st_size for part in parts) // (2 * rows)
    with replacing(path) as temporary, temporary.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        checksum = 0
        for part in parts:
            data = part.read_bytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
        file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))


def _load(ref: NetworkRef, image_size: int, calibration: "Pool") -> Network:
    if ref.kind == "pixels":
        return Network(None, "pool", min(image_size, PIXELS_SIZE))
    if ref.kind == "random":
        images = _images(calibration, np.arange(min(calibration.size, CALIBRATION_IMAGES)), image_size)
        return random_network(ref.name, ref.seed, image_size, images)
    path = task_dir("pretrain", ref.name) / "weights.pt"
    network = load_weights(path)
    if network.image_size != image_size:
        raise UserError(
            f"{path}: pretrained at {network.image_size} px, to be evaluated at image_size={image_size}; use its own"
        )
    return network


def _images(pool: "Pool", rows: NDArray[np.int64], image_size: int) -> Images:
    """uint8 (n, H, W, 3): as stored, for `Network` to resize; where shapes differ, resized while read."""
    return pool.images(rows, None if pool.info.resize == "square" else image_size)


def _read(path: Path, rows: int) -> Features | None:
    """The cached features, or None if there are none or they are damaged."""
    try:
        features = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(-_CHECKSUM_BYTES, os.SEEK_END)
            stored = int.from_bytes(file.read(), "little")
    except (OSError, ValueError, EOFError):
        return None
    whole = features.shape[:1] == (rows,) and features.dtype == np.float16
    return features if whole and zlib.crc32(features.data) == stored else None


def _to_tensor(images: Images) -> "Tensor":
    """uint8 (n, H, W, 3) as uint8 (n, 3, H, W)."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


def _to_size(images: "Tensor", size: int) -> "Tensor":
    """Short side resized to `size` (bicubic, antialiased), then a centre crop; uint8 (B, 3, H, W)."""
    if images.shape[2:] == (size, size):
        return images
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    resized = F.resize(images, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(resized, [size, size])
