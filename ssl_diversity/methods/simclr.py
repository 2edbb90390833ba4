"""SimCLR: views of one image attract, all others in the batch repel."""

from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor

from ssl_diversity.methods.base import Method
from ssl_diversity.methods.losses import nt_xent


class SimCLR(Method):
    """Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709."""

    def build(
        self, *, hidden_dim: int, output_dim: int, layers: int, head_norm: bool, temperature: float
    ) -> None:
        self.projector = SimCLRProjectionHead(self.dim, hidden_dim, output_dim, layers, head_norm)
        self.temperature = temperature

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        return self.projector(self.embed(self.backbone, views, positions)).chunk(2)

    def criterion(self, *outputs: Tensor) -> Tensor:
        a, b = outputs
        return nt_xent(a, b, self.temperature)


METHOD = SimCLR
