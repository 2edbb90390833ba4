"""Recipes: every one loads and fits its method, every value counts, every mistake is named."""

import inspect
from typing import Any

import pytest
import torch
from method_helpers import tiny, train

from ssl_diversity import methods
from ssl_diversity.errors import UserError
from ssl_diversity.methods.recipe import METHODS, Recipe, check_backbone, load_recipe

SETTINGS = {
    "quick": (16, "conv-tiny", "vit-micro"),
    "small": (32, "resnet18", "vit-s"),
    "imagenet": (224, "resnet50", "vit-b"),
}
EXTRA = {"dino": {"warmup_teacher_temperature": 0.02, "warmup_teacher_fraction": 0.7}}  # so that it warms up


def test_the_seven_methods_are_there() -> None:
    assert set(METHODS) == {"simclr", "mocov3", "byol", "barlow_twins", "vicreg", "dino", "mae"}
    assert [name for name, needs_vit in METHODS.items() if needs_vit] == ["mae"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_recipe_loads_fits_its_method_and_survives_json(method: str, name: str) -> None:
    image_size, net, vit = SETTINGS[name]
    recipe = load_recipe(method, name, budget_samples=64, image_size=image_size)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert (recipe.name, recipe.method) == (name, method)
    for backbone in {vit} if METHODS[method] else {net, vit}:
        with torch.device("meta"):
            module = methods.build(
                method,
                backbone=backbone,
                image_size=image_size,
                recipe=recipe,
                budget=64,
                batch_size=8,
                seed=0,
            )
    keywords = inspect.signature(type(module).build).parameters
    assert set(recipe.params) == set(keywords) - {"self"}


@pytest.mark.parametrize(
    ("budget", "image_size", "name"),
    [(999_999, 224, "quick"), (10**6, 64, "small"), (10**6, 65, "imagenet")],
)
def test_auto_goes_by_budget_and_image_size(budget: int, image_size: int, name: str) -> None:
    assert load_recipe("simclr", budget_samples=budget, image_size=image_size).name == name


def _changes(recipe: Recipe) -> dict[str, Any]:
    """Every key of a quick recipe with another value."""
    out: dict[str, Any] = {"lr": recipe.lr / 2, "final_lr": 0.5, "warmup_fraction": 0.5, "weight_decay": 0.7}
    out |= {"weight_decay_end": 0.9, "clip_norm": 1e-6, "betas": [0.5, 0.6]}
    out |= {"views": [{"count": sum(view.count for view in recipe.views), "crop_scale": [0.1, 0.2]}]}
    if recipe.ema:
        out |= {"ema": {"start": 0.1}}
    for key, value in recipe.params.items():
        if isinstance(value, bool):
            out[key] = not value
        elif isinstance(value, int):
            out[key] = value * 2
        else:
            out[key] = 0.9 if value != 0.9 else 0.6
    return out


@pytest.mark.parametrize("method", METHODS)
def test_no_value_of_a_recipe_is_ignored(method: str) -> None:
    base_overrides = EXTRA.get(method, {})

    def outcome(**overrides: Any) -> list[torch.Tensor]:
        module = tiny(method, budget=64, batch_size=16, overrides={**base_overrides, **overrides})
        losses = train(module, steps=2)
        return [*losses, *(p.detach() for p in module.parameters())]

    reference = outcome()
    for key, value in _changes(tiny(method).recipe).items():
        other = outcome(**{key: value})
        same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(reference, other, strict=False)]
        assert not all(same), f"{key}={value} changed nothing"


def test_overrides_reach_the_recipe_s_own_keys_and_its_params() -> None:
    recipe = load_recipe(
        "mocov3",
        budget_samples=64,
        image_size=16,
        overrides={"lr": 1, "temperature": 1, "ema": {"start": 0.5}},
    )
    assert (recipe.lr, recipe.params["temperature"]) == (1.0, 1)
    assert recipe.ema is not None
    assert (recipe.ema.start, recipe.ema.batch_size) == (0.5, 64)


@pytest.mark.parametrize(
    ("method", "name", "overrides", "message"),
    [
        ("simsiam", "auto", {}, r"method=simsiam: unknown; known methods: barlow_twins, byol, "),
        (
            "simclr",
            "huge",
            {},
            r"recipe=huge: simclr has no such recipe; known recipes: quick, small, imagenet, auto",
        ),
        (
            "simclr",
            "quick",
            {"temprature": 1.0},
            r"unknown key 'temprature'; did you mean 'temperature'\? known keys: ",
        ),
        ("simclr", "quick", {"ema": {"start": 0.5}}, r"unknown key 'ema'"),
        ("simclr", "quick", {"hidden_dim": 64.5}, r"hidden_dim: expected a value of type int \(got 64.5\)"),
        ("simclr", "quick", {"head_norm": 1}, r"head_norm: expected a value of type bool \(got 1\)"),
        ("simclr", "quick", {"lr": -1}, r"recipe simclr/quick: lr: .*greater than 0 \(got -1\)"),
        ("simclr", "quick", {"optimizer": "sgd"}, r"optimizer sgd has no betas: set betas=null"),
        ("simclr", "quick", {"optimizer": "lars", "betas": None}, r"optimizer lars needs momentum"),
        ("dino", "quick", {"views": [{"crop": 1}]}, r"unknown key 'views.0.crop'"),
    ],
)
def test_mistakes_are_named_in_one_line(
    method: str, name: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_recipe(method, name, budget_samples=64, image_size=16, overrides=overrides)
    assert "\n" not in str(error.value)


def test_mae_on_a_resnet_is_refused() -> None:
    check_backbone("mae", "vit-s")
    with pytest.raises(
        UserError, match=r"method=mae needs a ViT backbone \(it hides patches\), not 'resnet18'; use vit-"
    ):
        tiny("mae", backbone="resnet18")
    with pytest.raises(UserError, match="backbone=vgg: unknown"):
        check_backbone("simclr", "vgg")


def test_views_that_a_method_or_a_vit_cannot_take_are_refused() -> None:
    with pytest.raises(UserError, match=r"simclr takes 2, not 3"):
        tiny("simclr", overrides={"views": [{"count": 3}]})
    with pytest.raises(UserError, match=r"dino takes at least 2, not 1"):
        tiny("dino", overrides={"views": [{}]})
    with pytest.raises(UserError, match=r"views: 6 px .* are not whole patches of 4 px of vit-micro"):
        tiny("dino", backbone="vit-micro", overrides={"views": [{"count": 2}, {"size": 6}]})
