"""What a probe finds, with its 95 % interval."""

from dataclasses import dataclass
from typing import Any

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

    def row(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "chosen": self.chosen,
            "validation_accuracy": self.validation_accuracy,
        }


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 1927): the uncertainty that a test set of n leaves."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(values: tuple[float, ...]) -> tuple[float, float]:
    """Student's interval of the mean of accuracies, kept within [0, 1]."""
    import numpy as np
    from scipy.stats import t

    reach = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return max(0.0, float(np.mean(values) - reach)), min(1.0, float(np.mean(values) + reach))
