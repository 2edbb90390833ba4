"""Barlow Twins: the views' cross-correlation matrix is drawn to the identity."""

from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from torch import Tensor

from ssl_diversity.methods.base import Method


class BarlowTwins(Method):
    """Zbontar et al., "Self-Supervised Learning via Redundancy Reduction", arXiv 2103.03230."""

    def build(self, *, hidden_dim: int, output_dim: int, redundancy_weight: float, loss_scale: float) -> None:
        self.projector = BarlowTwinsProjectionHead(self.dim, hidden_dim, output_dim)
        self.loss = BarlowTwinsLoss(redundancy_weight)
        self.loss_scale = loss_scale

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        return self.projector(self.embed(self.backbone, views, positions)).chunk(2)

    def criterion(self, *outputs: Tensor) -> Tensor:
        return self.loss_scale * self.loss(*outputs)


METHOD = BarlowTwins
