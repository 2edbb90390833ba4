"""A counter-based generator in tensor operations: equal on CPU and GPU, whatever ran before.

Value j of sample t is a hash of (seed, stream, t, j): the SplitMix64 finaliser (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) in wrapping 64-bit integer arithmetic.
Nothing has state, so a resumed or re-sharded run draws what an undisturbed one draws.
"""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser of int64 `x`, elementwise."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def mix_int(value: int) -> int:
    """The same finaliser on one Python integer (unsigned 64 bits)."""
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ (value >> 30)) * _MIX_1) & mask
    value = ((value ^ (value >> 27)) * _MIX_2) & mask
    return value ^ (value >> 31)


def bits(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """Random int64 (B, count), one row for each of `positions` (int64, (B,)).

    `stream` separates uses (views, masks, drop-path) of one seed.
    """
    base = mix_int(mix_int(seed + _GOLDEN) + (stream + 1) * _GOLDEN)
    row = mix(positions * _signed(_GOLDEN) + _signed(base))
    column = torch.arange(1, count + 1, device=positions.device, dtype=torch.int64) * _signed(_MIX_2 | 1)
    return mix(row[:, None] + column[None, :])


def uniform(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """float32 (B, count), uniform in [0, 1): 24 random bits each."""
    return _shift(bits(seed, stream, positions, count), 40).to(torch.float32) * 2.0**-24


def normal(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """float32 (B, count), standard normal (Box-Muller)."""
    u = uniform(seed, stream, positions, 2 * count)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[:, :count]))
    return radius * torch.cos(2 * math.pi * u[:, count:])
