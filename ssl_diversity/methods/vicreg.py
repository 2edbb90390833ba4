"""VICReg: views agree (invariance), each feature varies (variance), none repeats another (covariance)."""

from lightly.loss.vicreg_loss import invariance_loss, variance_loss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor

from ssl_diversity.methods.base import Method
from ssl_diversity.methods.losses import covariance_loss


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
        self.weights = invariance_weight, variance_weight, covariance_weight

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        return self.projector(self.embed(self.backbone, views, positions)).chunk(2)

    def criterion(self, *outputs: Tensor) -> Tensor:
        a, b = outputs
        invariance, variance, covariance = self.weights
        return (
            invariance * invariance_loss(a, b)
            + variance * (0.5 * (variance_loss(a) + variance_loss(b)))
            + covariance * (covariance_loss(a) + covariance_loss(b))
        )


METHOD = VICReg
