"""The budget: C, N, E, D and FLOPs. The only place where they are computed.

C is the number of images a run processes, repeats counted; N how many of them are distinct. Then
E = C / N is how often each image is seen and D = N / C the diversity (arXiv 2403.13808).
"""

import re
from dataclasses import dataclass

from ssl_diversity.errors import UserError

_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:e\+?[0-9]+)?"


@dataclass(frozen=True)
class Budget:
    """How much a run may process: an exact number of samples, or FLOPs to be turned into one."""

    amount: float
    unit: str  # "samples" or "flop"

    def samples(self, flops_per_sample: int) -> int:
        """C. A budget in FLOPs gives the largest number of samples that it pays for."""
        if self.unit == "samples":
            return int(self.amount)
        samples = int(self.amount // flops_per_sample)
        if samples < 1:
            raise UserError(
                f"budget={self.amount:g}flop pays for no sample (one costs {flops_per_sample:g} FLOPs); raise it"
            )
        return samples


def parse_budget(value: int | float | str) -> Budget:
    """`16384`, `5e6` (samples) or `1e15flop`.

    Raises UserError for anything that is not a positive whole number of samples or a positive FLOP count.
    """
    text = str(value).strip().lower().replace("_", "")
    match = re.fullmatch(rf"({_NUMBER})\s*(flops?)?", text)
    amount = float(match.group(1)) if match else 0.0
    if match is None or amount <= 0:
        raise UserError(f"budget={value}: expected samples such as 16384 or 5e6, or FLOPs such as 1e15flop")
    unit = "flop" if match.group(2) else "samples"
    if unit == "samples" and amount != int(amount):
        raise UserError(f"budget={value}: a number of samples must be whole")
    return Budget(amount, unit)


def parse_unique(value: int | float | str, budget_samples: int, pool_size: int) -> int:
    """N from a number, `all` (the pool, at most C) or a fraction of the budget such as `C/8`.

    Raises UserError where N is not a positive whole number.
    """
    text = str(value).strip()
    if text.lower() == "all":
        return min(pool_size, budget_samples)
    fraction = re.fullmatch(r"[Cc]\s*/\s*([0-9]+)", text)
    if text in ("C", "c"):
        return budget_samples
    if fraction and int(fraction.group(1)) > 0:
        return max(1, budget_samples // int(fraction.group(1)))
    if re.fullmatch(_NUMBER, text.lower()) and float(text) == int(float(text)) and float(text) > 0:
        return int(float(text))
    raise UserError(
        f"unique_samples={value}: expected a number, `all`, or a fraction of the budget such as `C/8`"
    )


def used(budget_samples: int, batch_size: int) -> int:
    """C_used = B * floor(C / B): the samples that whole batches process.

    Raises UserError where the budget is smaller than one batch.
    """
    if budget_samples < batch_size:
        raise UserError(
            f"budget={budget_samples} is less than one batch of {batch_size}; raise budget or lower batch_size"
        )
    return batch_size * (budget_samples // batch_size)


def check_unique(
    unique_samples: int, budget_samples: int, batch_size: int, pool_size: int, pool: str
) -> None:
    """Refuse an N that the pool, the budget or the batch size cannot give, naming the nearest that works.

    N must be B or at least 2B: then no image stands twice in a batch, at any seam between epochs.
    """
    n, c, b = unique_samples, budget_samples, batch_size
    if n > pool_size:
        raise UserError(
            f"unique_samples={n} is more than pool {pool!r} has ({pool_size}); use `all` or a smaller number"
        )
    if n > c:
        raise UserError(f"unique_samples={n} is more than the budget of {c} samples; N must not exceed C")
    if n != b and n < 2 * b:
        nearest = b if n - b <= 2 * b - n else 2 * b
        raise UserError(
            f"unique_samples={n} does not work with batch_size={b} (N must be {b} or at least {2 * b}, "
            f"so that no image stands twice in a batch); the nearest that works is {nearest}"
        )


def epochs(unique_samples: int, budget_samples: int) -> float:
    """E = C / N."""
    return budget_samples / unique_samples


def diversity(unique_samples: int, budget_samples: int) -> float:
    """D = N / C, in (0, 1]."""
    return unique_samples / budget_samples
