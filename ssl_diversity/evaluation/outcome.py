"""What a probe finds, with its 95 % interval, and which test images it was right about."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """Accuracies in [0, 1]. `chosen`: the L2 strength (few-shot: the median over draws), None for kNN."""

    accuracy: float
    low: float
    high: float
    chosen: float | None = None
    validation_accuracy: float | None = None
    draws: tuple[float, ...] = ()  # few-shot: the accuracy of each draw
    hits: bytes = b""  # little-endian uint16 (n_test,): how often the probe was right about each test image
    trials: int = 1  # how often each was asked about

    def row(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "chosen": self.chosen,
            "validation_accuracy": self.validation_accuracy,
            "hits": base64.b64encode(zlib.compress(self.hits)).decode(),
            "trials": self.trials,
        }


def as_hits(right: Any) -> bytes:
    """`Outcome.hits` of counts or flags (n_test,): a tensor or an array."""
    return np.asarray(right.cpu() if hasattr(right, "cpu") else right).astype("<u2").tobytes()


def accuracy_without(row: Mapping[str, Any], left_out: NDArray[np.bool_]) -> float | None:
    """Accuracy of a `row` over the test images that are not `left_out`, bool (n_test,); None where all are."""
    hits = np.frombuffer(zlib.decompress(base64.b64decode(row["hits"])), "<u2")[~left_out]
    return float(hits.mean(dtype=np.float64)) / row["trials"] if len(hits) else None


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 1927): the uncertainty that a test set of n leaves."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(values: tuple[float, ...]) -> tuple[float, float]:
    """Student's interval of the mean of accuracies, kept within [0, 1]."""
    from scipy.stats import t

    reach = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return max(0.0, float(np.mean(values) - reach)), min(1.0, float(np.mean(values) + reach))
