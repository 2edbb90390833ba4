"""VisualDNA: a set of images as one histogram per neuron (Ramtoula et al., CVPR 2023, arXiv 2304.10036)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_diversity.distance.statistics import Float, Int


@dataclass(frozen=True)
class Ranges:
    """Each neuron's range (neurons,), float32, neurons of all layers in a row."""

    low: Float
    high: Float

    @classmethod
    def of(cls, layers: Sequence[Tensor]) -> "Ranges":
        """Smallest and largest activation per neuron; each layer (B, C, positions)."""
        low = torch.cat([layer.amin((0, 2)) for layer in layers])
        high = torch.cat([layer.amax((0, 2)) for layer in layers])
        return cls(low.cpu().numpy(), high.cpu().numpy())

    def __or__(self, other: "Ranges") -> "Ranges":
        return Ranges(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


def histograms(layers: Sequence[Tensor], ranges: Ranges, bins: int) -> Int:
    """int64 (neurons, bins): activations per bin, over all images and positions.

    Each neuron's range is mapped to [-1, 1] and cut into equal bins; what lies outside counts in the outer
    bins. A value on an inner edge belongs to the bin above it, so every activation counts exactly once.
    A neuron that never varied while its range was measured is taken to have a range of 1.
    """
    counts, first = [], 0
    for layer in layers:
        neurons = slice(first, first + layer.shape[1])
        low = torch.from_numpy(ranges.low[neurons]).to(layer)[:, None]
        width = torch.from_numpy(ranges.high[neurons]).to(layer)[:, None] - low
        standardised = (layer - low) / torch.where(width > 0, width, 1.0) * 2 - 1
        bin_ = ((standardised.clamp(-1, 1) + 1) * (bins / 2)).long().clamp(max=bins - 1)
        offset = torch.arange(layer.shape[1], device=layer.device)[:, None] * bins
        flat = torch.bincount((bin_ + offset).flatten(), minlength=layer.shape[1] * bins)
        counts.append(flat.view(-1, bins).cpu().numpy())
        first = neurons.stop
    return np.concatenate(counts)


def visual_dna(a: Int, b: Int) -> float:
    """Mean over neurons of the earth mover's distance between two sets' histograms, in [0, 1].

    Σ |CDF₁ − CDF₂| counts bins; the reference implementation stops there. Here it is divided by the most
    it can be, B − 1, so that values at different numbers of bins compare. `a`, `b`: (neurons, bins).
    """
    difference = _cdf(a) - _cdf(b)
    return float(np.abs(difference).sum(1).mean() / (a.shape[1] - 1))


def _cdf(counts: Int) -> Float:
    cumulative = counts.cumsum(1)
    return cumulative / cumulative[:, -1:]
