"""VICReg: views agree (invariance), each feature varies (variance), none repeats another (covariance)."""

from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor

from ssl_diversity.methods.base import Method


class VICReg(Method):
    """Bardes, Ponce and LeCun, "VICReg", arXiv 2105.04906."""

    def build(
        self,
        *,
        hidden_dim: int,
        output_dim: int,
        layers: int,
        invariance_weight: float,
        variance_weight: float,
        covariance_weight: float,
    ) -> None:
        self.projector = VICRegProjectionHead(self.dim, hidden_dim, output_dim, layers)
        self.loss = VICRegLoss(invariance_weight, variance_weight, covariance_weight)

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        return self.projector(self.embed(self.backbone, views, positions)).chunk(2)

    def criterion(self, *outputs: Tensor) -> Tensor:
        return self.loss(*outputs)


METHOD = VICReg
