"""The linear probe: multinomial logistic regression on standardised features.

After DINOv2's `log_regression`: features once, a grid of L2 strengths, chosen on a held-out part of train,
refitted on all of train. The test set is scored once, at the very end.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_diversity.errors import UserError
from ssl_diversity.evaluation.config import ProbeSettings
from ssl_diversity.evaluation.labels import Labelled, ranks, standardise
from ssl_diversity.evaluation.logistic import CHOOSING, best_strength, fit, logits, principal_axes
from ssl_diversity.evaluation.outcome import Outcome, as_hits, wilson


@dataclass(frozen=True)
class Chosen:
    """A fitted probe: float64 logits = x @ weights + bias, and how its strength was chosen."""

    weights: Tensor  # (d, K)
    bias: Tensor  # (K,)
    l2: float
    validation_accuracy: float


def linear(data: Labelled, settings: ProbeSettings, seed: int) -> Outcome:
    """Accuracy on test with Wilson's interval; `seed` is that of the validation split."""
    train, test = standardise(data.train, data.test)
    chosen = choose(train, data.train_labels, data.classes, settings, seed)
    right = (test @ chosen.weights + chosen.bias).argmax(1) == data.test_labels
    correct, n = int(right.sum()), len(right)
    return Outcome(
        correct / n, *wilson(correct, n), chosen.l2, chosen.validation_accuracy, hits=as_hits(right)
    )


def choose(x: Tensor, labels: Tensor, classes: int, settings: ProbeSettings, seed: int) -> Chosen:
    """The strength that does best on the validation part of x (n, d), refitted on all of it; x is centred in place.

    Raises UserError where no class has the two images that a validation part takes.
    """
    validation = validation_part(labels.cpu().numpy(), settings.validation_fraction, seed)
    if not validation.any():
        raise UserError(
            "probe 'linear': no class has 2 training images, so no validation part can be held out"
        )
    held_out = torch.from_numpy(validation).to(x.device)
    l2 = torch.tensor(settings.l2, dtype=x.dtype, device=x.device)[None]
    axes = principal_axes(x[None])
    z = x.sub_(axes.mean[0])[None] @ axes.basis  # `axes(x)` without another copy of x
    weights = (~held_out).to(x.dtype)[None, :, None].expand(1, -1, l2.shape[1])
    grid = fit(z, labels[None], weights, l2, classes, tol=CHOOSING)
    index, accuracy = best_strength(logits(z[:, held_out], grid)[0], labels[held_out])
    best = int(index)
    start = grid[:, :, best : best + 1]
    whole = fit(
        z, labels[None], torch.ones_like(weights[..., :1]), l2[:, best : best + 1], classes, start=start
    )
    coefficients = whole[0, :, 0]
    direct = axes.basis[0] @ coefficients[:-1]
    return Chosen(
        weights=direct,
        bias=coefficients[-1] - axes.mean[0, 0] @ direct,
        l2=settings.l2[best],
        validation_accuracy=float(accuracy),
    )


def validation_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool (n,): about `fraction` of each class, at least one image, and never all of them."""
    counts = np.bincount(labels)
    held = np.minimum(np.maximum(np.rint(fraction * counts).astype(np.int64), 1), np.maximum(counts - 1, 0))
    return ranks(labels, seed, stream=0) < held[labels]
