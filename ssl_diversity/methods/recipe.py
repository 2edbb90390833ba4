"""Recipes: every value that a method's training depends on, from configs/methods/<method>.yaml (no torch here)."""

import difflib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ssl_diversity.backbones import is_vit
from ssl_diversity.config import Config, merge, read_yaml, validate
from ssl_diversity.errors import UserError
from ssl_diversity.files import REPOSITORY
from ssl_diversity.methods.schedules import cosine
from ssl_diversity.views import ViewSpec

LR_BATCH = 256
"""`Recipe.lr` is stated at this batch size."""

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EMA(Config):
    """A teacher's decay rate per step, stated at a reference batch size and, if `budget` is set, run length.

    A step of B samples is B / `batch_size` reference steps (the scaling rule of arXiv 2307.13813). With `budget`
    a run of C samples is one of `budget` samples, shrunk: its teacher forgets over the same fraction of the run.
    """

    start: Fraction
    end: Fraction
    batch_size: Annotated[int, Field(ge=1)]
    budget: Annotated[float, Field(gt=0)] | None = None

    def rate(self, progress: float, batch_size: int, budget: int) -> float:
        """The decay of one step at `progress` (fraction of C) of a run of `budget` samples."""
        shrink = self.budget / budget if self.budget else 1.0
        return cosine(self.start, self.end, progress) ** (batch_size / self.batch_size * shrink)


class Recipe(Config):
    """The values of one recipe. Fractions are of C (samples seen); `lr` is at batch 256."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"source"})

    method: str
    name: str
    source: str
    """The paper or reference code that it comes from."""
    optimizer: Literal["adamw", "lars", "sgd"]
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    final_lr: Fraction = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    weight_decay_end: NotNegative | None = None
    """Set: weight decay follows a cosine to this value. Biases and norms have none."""
    betas: tuple[Fraction, Fraction] | None = None
    momentum: Fraction | None = None
    lars_eta: NotNegative | None = None
    """LARS's trust coefficient."""
    lars_clip: bool | None = None
    """Whether LARS never exceeds the learning rate (LARC)."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Set: gradients are clipped to this global norm."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of a ViT's last block (convolutional backbones have none)."""
    ema: EMA | None = None
    params: dict[str, bool | int | float]
    """The method's own keys: the keyword arguments of its `build`."""
    views: Annotated[tuple[ViewSpec, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _optimizer_keys(self) -> "Recipe":
        own = {"adamw": {"betas"}, "sgd": {"momentum"}, "lars": {"momentum", "lars_eta", "lars_clip"}}
        for key in ("betas", "momentum", "lars_eta", "lars_clip"):
            wanted = key in own[self.optimizer]
            if (getattr(self, key) is not None) != wanted:
                raise ValueError(
                    f"optimizer {self.optimizer} {'needs' if wanted else 'has no'} {key}"
                    + ("" if wanted else f": set {key}=null")
                )
        return self


def _files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))}


METHODS = {
    name: bool(re.search(r"^vit_only: true", path.read_text(), re.M)) for name, path in _files().items()
}
"""Every method that has a file in configs/methods/ -> whether it needs a ViT."""


def check_backbone(method: str, backbone: str) -> None:
    """Refuse a backbone that `method` cannot train."""
    _check_method(method)
    if METHODS[method] and not is_vit(backbone):
        raise UserError(
            f"method={method} needs a ViT backbone (it hides patches), not {backbone!r}; "
            "use vit-micro, vit-ti, vit-s or vit-b"
        )
    is_vit(backbone)


def load_recipe(
    method: str,
    name: str = "auto",
    *,
    budget_samples: int,
    image_size: int,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe `name` of `method` with `overrides` (keys of the recipe or of its `params`, all on one level).

    `auto` is `quick` below 10^6 samples, else `small` up to 64 px, else `imagenet`. An unknown method, recipe or
    key, and a value of the wrong type, are UserErrors that name what is known.
    """
    _check_method(method)
    recipes = _read(method)
    if name == "auto":
        name = "quick" if budget_samples < 1e6 else "small" if image_size <= 64 else "imagenet"
    if name not in recipes:
        raise UserError(
            f"recipe={name}: {method} has no such recipe; known recipes: {', '.join(recipes)}, auto"
        )
    where = f"recipe {method}/{name}"
    values = {"method": method, "name": name, **recipes[name]}
    return validate(Recipe, _override(values, overrides or {}, where), where)


@functools.cache
def _read(method: str) -> dict[str, Any]:
    recipes = read_yaml(_files()[method])
    recipes.pop("vit_only", None)
    return recipes


def _override(values: dict[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    fixed = {"method", "name", "source", "params"} | ({"ema"} - set(values))
    own, params = set(Recipe.model_fields) - fixed, values.get("params", {})
    for key, value in overrides.items():
        if key in params:
            if not _same_type(params[key], value):
                kind = type(params[key]).__name__
                raise UserError(f"{where}: {key}: expected a value of type {kind} (got {value!r})")
            values = merge(values, {"params": {key: value}})
        elif key in own:
            values = merge(values, {key: value})
        else:
            known = sorted(own | set(params))
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"{where}: unknown key {key!r}; {hint}known keys: {', '.join(known)}")
    return values


def _same_type(default: bool | int | float, value: object) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int) or (isinstance(default, float) and isinstance(value, float))


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise UserError(f"method={method}: unknown; known methods: {', '.join(METHODS)}")
