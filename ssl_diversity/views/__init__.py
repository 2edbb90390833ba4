"""Views: random augmentations as batched tensor code (views/augment.py, which needs torch) and their specs."""

from ssl_diversity.views.spec import MEAN, STD, ViewSpec

__all__ = ["MEAN", "STD", "ViewSpec"]
