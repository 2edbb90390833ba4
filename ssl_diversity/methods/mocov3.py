"""MoCo v3: a student's predictions find their other view among the batch's teacher projections."""

import torch
from lightly.models.modules import BYOLPredictionHead, MoCoProjectionHead
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_diversity.methods.base import Method


class MoCoV3(Method):
    """Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057."""

    def build(self, *, hidden_dim: int, output_dim: int, layers: int, temperature: float) -> None:
        def projector() -> nn.Module:
            return MoCoProjectionHead(self.dim, hidden_dim, output_dim, layers, batch_norm=True)

        self.temperature = temperature
        self.projector = projector()
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.teacher = self.follow(self.backbone, self.make_teacher_backbone)
        self.teacher_projector = self.follow(self.projector, projector)

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        queries = self.predictor(self.projector(self.embed(self.backbone, views, positions)))
        with torch.no_grad():
            keys = self.teacher_projector(self.embed(self.teacher, views, positions))
        return *queries.chunk(2), *keys.chunk(2)

    def criterion(self, *outputs: Tensor) -> Tensor:
        query_1, query_2, key_1, key_2 = outputs
        return contrast(query_1, key_2, self.temperature) + contrast(query_2, key_1, self.temperature)


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE of (B, d) queries and keys, row i against row i, times 2 * temperature (the paper's algorithm 1).

    lightly's NTXentLoss would count the queries' own batch among the negatives.
    """
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


METHOD = MoCoV3
