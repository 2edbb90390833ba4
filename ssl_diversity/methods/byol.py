"""BYOL: a student predicts the teacher's projection of the other view; no negatives."""

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor, nn

from ssl_diversity.methods.base import Method


class BYOL(Method):
    """Grill et al., "Bootstrap Your Own Latent", arXiv 2006.07733."""

    mean_over_samples = True

    def build(self, *, hidden_dim: int, output_dim: int) -> None:
        def projector() -> nn.Module:
            return BYOLProjectionHead(self.dim, hidden_dim, output_dim)

        self.projector = projector()
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.teacher = self.follow(self.backbone, self.make_teacher_backbone)
        self.teacher_projector = self.follow(self.projector, projector)
        self.loss = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        predictions = self.predictor(self.projector(self.embed(self.backbone, views, positions)))
        with torch.no_grad():
            targets = self.teacher_projector(self.embed(self.teacher, views, positions))
        return *predictions.chunk(2), *targets.chunk(2)

    def criterion(self, *outputs: Tensor) -> Tensor:
        """Squared distances of unit vectors, 2 - 2 cos, summed over the two directions (equation 2)."""
        prediction_1, prediction_2, target_1, target_2 = outputs
        return 4 + 2 * (self.loss(prediction_1, target_2) + self.loss(prediction_2, target_1))


METHOD = BYOL
