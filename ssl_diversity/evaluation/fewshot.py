"""The few-shot probe: logistic regression on a few labels per class, over many draws of them.

Draws depend on the downstream set's labels and digest, the probe and the draw's number, never on the
network: all networks are compared on the same label sets. Each draw chooses its L2 strength by
cross-validation among its own labels. Features are standardised by all images of train, whose other labels
are not looked at.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_diversity.errors import UserError
from ssl_diversity.evaluation.config import Probe, ProbeSettings
from ssl_diversity.evaluation.labels import Labelled, ranks, standardise
from ssl_diversity.evaluation.logistic import CHOOSING, best_strength, fit, logits, principal_axes
from ssl_diversity.evaluation.outcome import Outcome, as_hits, t_interval
from ssl_diversity.files import digest

_BLOCK = 1 << 24  # coefficients solved for at once


def fewshot(data: Labelled, probe: Probe, settings: ProbeSettings, train_digest: str) -> Outcome:
    """Mean accuracy on test over the draws with a t-interval: the uncertainty that the choice of labels leaves.

    Raises UserError where a class has too few images.
    """
    labels = data.train_labels.cpu().numpy()
    wanted = labels_per_class(np.bincount(labels, minlength=data.classes), probe, data.names)
    folds = min(settings.folds, int(wanted.min()))
    rows, fold_of = draw(
        labels, wanted, folds, settings.draws, int(digest([probe.name, train_digest])[:15], 16)
    )
    train, test = standardise(data.train, data.test)
    width = min(rows.shape[1], train.shape[1]) * folds * len(settings.l2) * data.classes
    accuracies, chosen, validation = [], [], []
    hits = torch.zeros_like(data.test_labels)
    for block in np.array_split(np.arange(len(rows)), max(1, min(len(rows), len(rows) * width // _BLOCK))):
        here = torch.from_numpy(rows[block]).to(train.device)
        fold = torch.from_numpy(fold_of[block]).to(train.device)
        x, y = train[here], data.train_labels[here]
        axes = principal_axes(x)
        z = axes(x)
        best, held_out = cross_validate(z, y, fold, data.classes, settings.l2)
        l2 = torch.tensor(settings.l2, dtype=z.dtype, device=z.device)[best][:, None]
        coefficients = fit(z, y, torch.ones_like(z[..., :1]), l2, data.classes)
        for i in range(len(block)):  # one at a time: test may be large
            z_test = (test - axes.mean[i]) @ axes.basis[i]
            right = logits(z_test[None], coefficients[i : i + 1])[0, :, 0].argmax(1) == data.test_labels
            accuracies.append(float(right.double().mean()))
            hits += right
        chosen += l2[:, 0].tolist()
        validation += held_out.tolist()
    return Outcome(
        float(np.mean(accuracies)),
        *t_interval(tuple(accuracies)),
        chosen=float(np.median(chosen)),
        validation_accuracy=float(np.mean(validation)),
        draws=tuple(accuracies),
        hits=as_hits(hits),
        trials=len(accuracies),
    )


def labels_per_class(counts: NDArray[np.int64], probe: Probe, names: tuple[str, ...]) -> NDArray[np.int64]:
    """How many labels of each class a draw has, (K,), for training sets with `counts` (K,) images per class.

    Raises UserError, naming the class, where that is more than there are, or fewer than two.
    """
    share = np.rint(probe.share * counts).astype(np.int64)
    wanted = np.full_like(counts, probe.per_class) if probe.per_class else share
    if (wanted > counts).any():
        worst = int(counts.argmin())
        raise UserError(
            f"probe {probe.name!r}: class {names[worst]!r} has only {counts[worst]} training images; use a smaller k"
        )
    if wanted.min() < 2:
        worst = int(wanted.argmin())
        raise UserError(
            f"probe {probe.name!r}: takes {wanted[worst]} of the {counts[worst]} training images of class "
            f"{names[worst]!r}, but choosing an L2 strength needs 2; use fewshot-<k> or a larger share"
        )
    return wanted


def draw(
    labels: NDArray[np.int64], wanted: NDArray[np.int64], folds: int, draws: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of `wanted` (K,) images of each class, (draws, m), and each one's cross-validation fold."""
    places = [ranks(labels, seed, stream=number) for number in range(draws)]
    rows = [np.flatnonzero(place < wanted[labels]) for place in places]
    return np.stack(rows), np.stack([place[drawn] % folds for place, drawn in zip(places, rows, strict=True)])


def cross_validate(
    z: Tensor, labels: Tensor, fold: Tensor, classes: int, strengths: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Index (B,) of the strength that does best on held-out labels, per draw, and its held-out accuracy (B,).

    z (B, m, r), labels and fold int64 (B, m). All draws, folds and strengths are solved at once.
    """
    b, m = labels.shape
    folds, p = int(fold.max()) + 1, len(strengths)
    inside = fold[:, :, None] != torch.arange(folds, device=fold.device)  # (B, m, F)
    weights = inside.to(z.dtype)[..., None].expand(-1, -1, -1, p).reshape(b, m, -1)
    l2 = torch.tensor(strengths, dtype=z.dtype, device=z.device).repeat(b, folds)
    fits = fit(z, labels, weights, l2, classes, tol=CHOOSING)
    scores = logits(z, fits).view(b, m, folds, p, classes)
    own = fold[:, :, None, None, None].expand(-1, -1, 1, p, classes)
    held_out = scores.gather(2, own)[:, :, 0]  # (B, m, L, K): each image by the fit that did not see it
    return best_strength(held_out, labels)
