"""Two of lightly's losses, bit for bit, without its masks of booleans: to index by one is to wait for the GPU."""

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of (B, d) embeddings of two views of B images: a scalar, the mean over 2 B anchors.

    Equals lightly's NTXentLoss without a memory bank. Source: arXiv 2002.05709, equation 1.
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("nc,mc->nm", x, y) / temperature

    aa, ab, ba, bb = similarity(a, a), similarity(a, b), similarity(b, a), similarity(b, b)
    logits = torch.cat([torch.cat([ab, off_diagonal(aa)], 1), torch.cat([ba, off_diagonal(bb)], 1)])
    return F.cross_entropy(logits, torch.arange(len(a), device=a.device).repeat(2))


def covariance_loss(x: Tensor) -> Tensor:
    """VICReg's third term of (B, d) embeddings: squared covariances of all pairs of features, summed, over d.

    Equals lightly's `covariance_loss`. Source: arXiv 2105.04906, equation 4.
    """
    x = x - x.mean(dim=0)
    covariance = torch.einsum("b...c,b...d->...cd", x, x) / (len(x) - 1)
    return off_diagonal(covariance).flatten().pow(2).sum() / x.shape[1]


def off_diagonal(square: Tensor) -> Tensor:
    """(n, n) without its diagonal: (n, n - 1), each row in its order. For n of at least 2."""
    n = len(square)
    return square.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
