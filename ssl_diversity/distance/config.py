"""What a distance task is told, and which extractors there are. Imports no torch."""

import hashlib
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ssl_diversity.config import Config
from ssl_diversity.data.subset import PartSpec
from ssl_diversity.errors import UserError

NUMERICS = 2  # raised when distances or statistics change
RANDOM = "random-resnet"
TIMM = "timm:"

Resize = Literal["bicubic", "bilinear"]


class DistanceSpec(Config):
    """The n rows of `parts` (of one pool, or of a mixture's), against the first n images of the reference.

    `parts` and `reference_pool` say where the images are; the digests, in row order, what they are.
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"parts", "reference_pool"})

    parts: tuple[PartSpec, ...] = Field(min_length=1)
    rows_digest: str
    reference_pool: str
    reference_digest: str
    extractor: str = RANDOM  # random-resnet | timm:NAME | timm:NAME:WEIGHTS | path of a cell's weights.pt
    extractor_digest: str = ""  # of the weights file, if the extractor names one
    resize: Resize = "bicubic"
    bins: int = Field(1000, ge=2, le=100_000)
    seed: int = 0  # of the random extractor's weights

    @property
    def n(self) -> int:
        return sum(part.rows_count for part in self.parts)

    @model_validator(mode="after")
    def _several(self) -> "DistanceSpec":
        if self.n < 2:
            raise ValueError(
                f"n={self.n}: a distance is one of distributions; give at least 2 images of each set"
            )
        return self


def weights_file(extractor: str) -> Path | None:
    """The weights file that an extractor names, or None for those that come without one."""
    if extractor == RANDOM:
        return None
    if extractor.startswith(TIMM):
        _, _, path = extractor.removeprefix(TIMM).partition(":")
        return Path(path).expanduser() if path else None
    return Path(extractor).expanduser()


def extractor_digest(extractor: str) -> str:
    """Digest of the weights file that `extractor` names, "" where it names none.

    Raises UserError if there is no such file.
    """
    path = weights_file(extractor)
    if path is None:
        return ""
    if not path.is_file():
        raise UserError(
            f"extractor={extractor}: no such file: {path}; use {RANDOM}, {TIMM}NAME, {TIMM}NAME:WEIGHTS "
            "or the path of a weights.pt"
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
