"""From what a user names to a spec."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_diversity import files
from ssl_diversity.data import recipes
from ssl_diversity.data.sources import SOURCES
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


def test_every_packaged_recipe_says_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIFAR10_PATH", str(tmp_path))
    monkeypatch.setenv("TINY_IMAGENET_PATH", str(tmp_path))
    assert {"digits", "photo_patches", "cifar10", "tiny-imagenet", "folder"} <= set(recipes.names())
    for name in recipes.names():
        raw = recipes.load(name)
        assert raw["name"] == name
        assert raw["description"]
        if raw["source"] in SOURCES:
            spec = recipes.resolve(name, {"path": str(tmp_path)} if name == "folder" else {})
            assert spec.source == raw["source"]
            assert spec.directory.parent == files.pools_dir()
            assert name == "folder" or (spec.terms and spec.origin)


def test_layers_recipe_then_defaults_then_options(tmp_path: Path) -> None:
    assert recipes.resolve("digits").size == 16
    assert recipes.resolve("digits", defaults={"size": 24, "seed": None}).size == 24
    spec = recipes.resolve("photo_patches", {"size": 8, "patch": 32, "name": "p"}, defaults={"size": 24})
    assert (spec.size, spec.options, spec.name) == (8, {"patch": 32}, "p")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: digits\nsize: 5e1\nseed: 7\n")
    assert (recipes.resolve(str(recipe)).size, recipes.resolve(str(recipe)).name) == (50, "mine")


def test_a_path_is_a_recipe(
    tree: Tree, as_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = as_folder(tree, "My flowers!")
    direct = recipes.resolve(str(folder))
    by_kind = recipes.resolve("folder", {"path": str(folder)})
    monkeypatch.chdir(folder.parent)
    relative = recipes.resolve("My flowers!")
    assert direct == relative
    assert direct.identity() == by_kind.identity()
    assert (direct.name, by_kind.name) == ("My-flowers-", "My-flowers-")
    assert recipes.resolve("folder", {"path": str(folder), "name": "flowers"}).name == "flowers"
    train, test = recipes.downstream(str(folder))
    assert (train.name, test.name, train.split, test.split) == (
        "My-flowers--train",
        "My-flowers--test",
        "train",
        "test",
    )
    assert not train.deduplicate
    assert (train.holdout, direct.holdout) == (0.2, None)


def test_name_and_notes_are_not_identity_and_values_are() -> None:
    base = recipes.resolve("digits")
    assert recipes.resolve("digits", {"name": "other"}).digest == base.digest
    for options in (
        {"size": 8},
        {"seed": 1},
        {"split": "test"},
        {"codec": "jpeg"},
        {"exclude": ["digits"]},
        {"holdout": 0.3},
    ):
        assert recipes.resolve("digits", options).digest != base.digest


def test_the_generated_kind_can_be_seen_but_not_prepared(tmp_path: Path) -> None:
    recipe = tmp_path / "made.yaml"
    recipe.write_text("source: generated\noptions: {steps: 3}\n")
    assert recipes.load(str(recipe)) == {"name": "made", "source": "generated", "options": {"steps": 3}}
    with pytest.raises(UserError, match="source=generated: unknown kind"):
        recipes.resolve(str(recipe))


def test_mistakes_are_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR10_PATH", raising=False)
    cases = [
        (("digit", {}), "did you mean 'digits'"),
        (("digits", {"sice": 3}), "unknown key 'sice'"),
        (("digits", {"size": 0}), "size: .*greater than 0"),
        (("digits", {"filter": "sharp"}), "filter: .*bicubic"),
        (("digits", {"name": "a/b"}), "name: "),
        (("photo_patches", {"patch": "x"}), "patch: "),
        (("cifar10", {}), "path=FOLDER_OR_TAR .* CIFAR10_PATH"),
        (("cifar10", {"path": "/nowhere/c.tar"}), "path=/nowhere/c.tar: no such folder .* CIFAR10_PATH"),
        (("folder", {}), "give path="),
        (("/nowhere/x", {}), "path=/nowhere/x: no such folder"),
        (("absent.yaml", {}), "no such file: absent.yaml"),
    ]
    for (text, options), message in cases:
        with pytest.raises(UserError, match=message) as error:
            recipes.resolve(text, options)
        assert "\n" not in str(error.value)
