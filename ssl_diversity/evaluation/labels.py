"""Labelled features, and random choices among them that depend on the labels and a seed alone."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_diversity.randomness import bits


@dataclass(frozen=True)
class Labelled:
    """Train and test features of one network on one downstream set, on one device.

    float16 features (n, d) and int64 labels (n,), numbers of class names.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.names)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 with the mean and standard deviation of `train`; features constant there become 0."""
    train = train.to(torch.float64, copy=True)  # then in place: of ImageNet each copy is 20 GB
    mean, deviation = train.mean(0), train.std(0, correction=0)
    scale = torch.where(deviation > 1e-8 * mean.abs(), 1 / deviation, 0.0)
    return train.sub_(mean).mul_(scale), test.to(torch.float64, copy=True).sub_(mean).mul_(scale)


def ranks(labels: NDArray[np.int64], seed: int, stream: int) -> NDArray[np.int64]:
    """(n,) place of every sample within its class, in a random order given by (seed, stream).

    "rank < k" is a random draw of k samples per class, "rank % f" are f folds balanced over the classes.
    """
    keys = bits(seed, stream, torch.arange(len(labels)), 1)[:, 0].numpy()
    order = np.lexsort((keys, labels))
    counts = np.bincount(labels)
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place
