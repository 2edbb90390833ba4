"""What a probe task is told, and the names of the probes. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from ssl_diversity.config import Config
from ssl_diversity.errors import UserError
from ssl_diversity.features import parse_network


@dataclass(frozen=True)
class Probe:
    """A parsed probe. kind: `linear`, `knn` or `fewshot` with labels per class or a share of each class."""

    name: str
    kind: str
    per_class: int = 0
    share: float = 0.0


def parse_probe(name: str) -> Probe:
    """`linear`, `knn`, `fewshot-<k>` (k labels per class, k >= 2) or `fewshot-<p>pct` (p % of each class).

    Raises UserError for anything else.
    """
    if name in ("linear", "knn"):
        return Probe(name, name)
    if match := re.fullmatch(r"fewshot-([1-9][0-9]*)", name):
        if int(match[1]) < 2:
            raise UserError(f"probe {name!r}: needs at least 2 labels per class to choose its L2 strength")
        return Probe(name, "fewshot", per_class=int(match[1]))
    match = re.fullmatch(r"fewshot-([0-9]+(?:\.[0-9]+)?)pct", name)
    if match and 0 < float(match[1]) <= 100:
        return Probe(name, "fewshot", share=float(match[1]) / 100)
    raise UserError(
        f"unknown probe {name!r}: known are linear, knn, fewshot-<k> and fewshot-<p>pct (fewshot-5, fewshot-1pct)"
    )


class ProbeSettings(Config):
    """How probes are made. `l2` are the strengths λ of mean cross-entropy + λ/2 |W|² that are tried."""

    l2: tuple[Annotated[float, Field(gt=0)], ...] = Field((1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1)
    validation_fraction: float = Field(0.15, gt=0, lt=1)  # of train, within classes: where `linear` chooses
    draws: int = Field(20, ge=2)  # few-shot label sets
    folds: int = Field(5, ge=2)  # of few-shot cross-validation, at most the labels per class
    knn_k: int = Field(20, ge=1)
    knn_temperature: float = Field(0.07, gt=0)


class ProbeSpec(Config):
    """All probes of one network on one downstream set.

    `network` is a name as `features.parse_network` reads it, `image_size` its pretraining resolution;
    `seed` that of the validation split of `linear`. The pools are directory names: where the images are.
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"train_pool", "test_pool"})

    network: str
    image_size: int = Field(ge=1)
    train_pool: str
    test_pool: str
    train_digest: str
    test_digest: str
    probes: tuple[str, ...] = Field(("linear", "knn", "fewshot-5"), min_length=1)
    seed: int = 0
    settings: ProbeSettings = ProbeSettings()

    @field_validator("network")
    @classmethod
    def _network(cls, value: str) -> str:
        parse_network(value)
        return value

    @field_validator("probes")
    @classmethod
    def _probes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            parse_probe(name)
        return value
