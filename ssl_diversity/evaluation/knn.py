"""The weighted nearest-neighbour probe."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_diversity.errors import UserError
from ssl_diversity.evaluation.config import ProbeSettings
from ssl_diversity.evaluation.labels import Labelled
from ssl_diversity.evaluation.outcome import Outcome, as_hits, wilson

_BLOCK = 1 << 24  # similarities or votes held at once


def knn(data: Labelled, settings: ProbeSettings) -> Outcome:
    """Accuracy on test with Wilson's interval. Nothing is chosen, and features are taken as they are.

    Raises UserError where train has fewer than k images.
    """
    k = settings.knn_k
    if k > len(data.train):
        raise UserError(
            f"probe 'knn': knn_k={k} is more than the {len(data.train)} training images; add some, or leave knn out of `probes`"
        )
    votes = knn_votes(
        data.train, data.train_labels, data.test, data.classes, k=k, temperature=settings.knn_temperature
    )
    right = votes.argmax(1) == data.test_labels
    correct, n = int(right.sum()), len(right)
    return Outcome(correct / n, *wilson(correct, n), hits=as_hits(right))


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, *, k: int, temperature: float
) -> Tensor:
    """float32 (n_test, K): per class, the sum of exp(cosine / T) over those of the k nearest that are of it.

    Features (n, d) of any float type, labels int64 (n,). As in DINO's `eval_knn.py` (Caron et al., ICCV
    2021), after Wu et al. (CVPR 2018).
    """
    bank = F.normalize(train.float(), dim=1)
    rows = max(1, _BLOCK // max(len(train), k * classes))
    votes = []
    for block in test.split(rows):
        similarity, nearest = (F.normalize(block.float(), dim=1) @ bank.mT).topk(k, dim=1)
        weights = (similarity / temperature).exp()
        votes.append((F.one_hot(labels[nearest], classes) * weights[..., None]).sum(1))
    return torch.cat(votes)
