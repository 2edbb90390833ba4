"""How far a source is from a downstream set, and how diverse a set of images is. Imports no torch."""

from ssl_diversity.distance.config import NUMERICS, DistanceSpec, extractor_digest

__all__ = ["NUMERICS", "DistanceSpec", "extractor_digest"]
