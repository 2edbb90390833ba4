"""DINO: the student's distribution over prototypes, from any crop, matches the teacher's from a global crop."""

import warnings

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import Tensor, nn

from ssl_diversity.methods.base import Method
from ssl_diversity.methods.schedules import linear


class DINO(Method):
    """Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294.

    The recipe's first two views are the global crops, all others local ones. Warm-up of the teacher's temperature
    and freezing of the last layer are fractions of C. The teacher is evaluated.
    """

    view_counts = range(2, 100)
    mean_over_samples = True

    def build(
        self,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        prototypes: int,
        head_norm: bool,
        student_temperature: float,
        teacher_temperature: float,
        warmup_teacher_temperature: float,
        warmup_teacher_fraction: float,
        freeze_fraction: float,
        center_momentum: float,
    ) -> None:
        def head() -> DINOProjectionHead:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # lightly uses the older of two weight_norms
                return DINOProjectionHead(
                    self.dim, hidden_dim, bottleneck_dim, prototypes, head_norm, freeze_last_layer=1
                )

        self.temperatures = warmup_teacher_temperature, teacher_temperature
        self.warmup_fraction, self.freeze_fraction = warmup_teacher_fraction, freeze_fraction
        self.head = head()
        self.teacher = self.follow(self.backbone, self.make_teacher_backbone)
        self.teacher_head = self.follow(self.head, head)
        self.loss = DINOLoss(prototypes, student_temp=student_temperature, center_momentum=center_momentum)

    @property
    def evaluated(self) -> nn.Module:
        return self.teacher

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        student = self.head(self.embed(self.backbone, views, positions)).view(len(views), len(positions), -1)
        with torch.no_grad():
            teacher = self.teacher_head(self.embed(self.teacher, views[:2], positions))
        return teacher.view(2, len(positions), -1), student

    def criterion(self, *outputs: Tensor) -> Tensor:
        """Also moves the centre, by the mean over all ranks (lightly's)."""
        teacher, student = outputs
        return self.loss(list(teacher), list(student), teacher_temp=self.teacher_temperature())

    def teacher_temperature(self) -> float:
        """Of the current step."""
        return linear(*self.temperatures, self.progress, self.warmup_fraction)

    def before_update(self) -> None:
        """lightly counts freezing in epochs; here epoch 0 lasts the first `freeze_fraction` of C."""
        self.head.cancel_last_layer_gradients(0 if self.progress < self.freeze_fraction else 1)


METHOD = DINO
