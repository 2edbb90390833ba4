"""Schedules: pure functions of progress, the fraction of the budget C that has been processed.

Equal C means equal schedules, whatever the number of unique samples; nothing counts epochs.
"""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at 1 (SGDR, arXiv 1608.03983, without restarts)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def linear(start: float, end: float, progress: float, until: float) -> float:
    """From `start` at progress 0 to `end` at progress `until`, constant from there on."""
    return end if progress >= until else start + (end - start) * progress / until


def warmup_cosine(peak: float, end: float, progress: float, warmup: float) -> float:
    """Linear from 0 to `peak` over the first `warmup` of the run, then a cosine to `end`."""
    if progress < warmup:
        return linear(0.0, peak, progress, warmup)
    return cosine(peak, end, (progress - warmup) / (1 - warmup))
