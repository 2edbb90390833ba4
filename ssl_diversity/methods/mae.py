"""MAE: a ViT sees a quarter of the patches; a small decoder paints the rest."""

import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.utils import get_at_index, normalize_mean_var, patchify, set_at_index
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_diversity.backbones import patch_size
from ssl_diversity.methods.base import Method
from ssl_diversity.randomness import uniform

MASK_STREAM = 1
"""Stream of `randomness` for the masks."""


class MAE(Method):
    """He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377."""

    view_counts = range(1, 2)
    joint_embedding = False
    mean_over_samples = True

    def build(self, *, mask_ratio: float, decoder_dim: int, decoder_depth: int, decoder_heads: int) -> None:
        self.patch = patch_size(self.image_size)
        self.patches = (self.recipe.views[0].pixels(self.image_size) // self.patch) ** 2
        self.visible = max(1, int(self.patches * (1 - mask_ratio)))
        self.encoder = MaskedVisionTransformerTIMM(vit=self.backbone)
        self.encoder.mask_token.requires_grad_(False)  # unused: the encoder never sees hidden patches
        self.enter = nn.Linear(self.dim, decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            self.patches, decoder_dim, decoder_depth, decoder_heads
        )
        self.paint = nn.Linear(decoder_dim, 3 * self.patch**2)
        for layer in (self.enter, self.paint):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def pooling(self) -> str:
        return "tokens"

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        (images,) = views
        visible, hidden = self.masks(positions)
        self.key_drop_path(self.backbone, positions)
        seen = self.enter(self.encoder.encode(images, idx_keep=visible))
        tokens = self.decoder.mask_token.to(seen.dtype).repeat(len(images), self.patches + 1, 1)
        decoded = self.decoder(set_at_index(tokens, visible, seen))
        return self.paint(get_at_index(decoded, hidden)), get_at_index(
            patchify(images, self.patch), hidden - 1
        )

    def masks(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Token indices of visible and hidden patches, (B, 1 + visible) and (B, hidden); token 0 is CLS, always seen."""
        noise = F.pad(uniform(self.seed, MASK_STREAM, positions, self.patches), (1, 0), value=-1.0)
        order = torch.argsort(noise, dim=1, stable=True)
        return order[:, : 1 + self.visible], order[:, 1 + self.visible :]

    def criterion(self, *outputs: Tensor) -> Tensor:
        """Mean squared error on hidden patches, each patch's pixels normalised by its own mean and variance."""
        painted, pixels = outputs
        return F.mse_loss(painted, normalize_mean_var(pixels))


METHOD = MAE
