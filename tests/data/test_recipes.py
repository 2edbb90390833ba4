"""From what a user names to a spec."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_diversity import files
from ssl_diversity.data import recipes
from ssl_diversity.data.sources import SOURCES
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


GENERIC = {"folder", "webdataset", "parquet"}


def test_every_packaged_recipe_says_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"digits", "photo_patches", "cifar10", "tiny-imagenet", *GENERIC} <= set(recipes.names())
    for name in recipes.names():
        text = (files.REPOSITORY / "datasets" / f"{name}.yaml").read_text()
        for variable in re.findall(r"oc\.env:(\w+)", text):
            monkeypatch.setenv(variable, str(tmp_path))
        raw = recipes.load(name)
        assert raw["name"] == name
        assert raw["description"]
        assert recipes.expected(name).keys() <= {"train", "test", "all", "classes"}
        if raw["source"] in SOURCES:
            spec = recipes.resolve(name, {"path": str(tmp_path)} if name in GENERIC else {})
            assert spec.source == raw["source"]
            assert spec.name == (tmp_path.name if name in GENERIC else name)
            assert spec.directory.parent == files.pools_dir()
            assert name in GENERIC or (spec.terms and spec.origin)


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


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        (["a/0.jpg", "a/1.tar"], "folder"),
        (["000.tar", "000.parquet", "000_stats.json"], "webdataset"),  # as img2dataset leaves them
        (["train/0.tar", "val/0.tar", "classes.txt"], "webdataset"),
        (["data/train-00000-of-00001.parquet", "README.md"], "parquet"),
        ([".cache/0.jpg", "._0.jpg", "data/0.parquet"], "parquet"),
        (["notes.txt"], "folder"),
        ([], "folder"),
    ],
)
def test_a_folder_is_known_by_what_is_in_it(entries: list[str], kind: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for entry in entries:
        (tmp_path / "set" / entry).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / entry).touch()
    raw = recipes.load(str(tmp_path / "set"))
    assert raw == {"source": kind, "name": "set", "options": {"path": str(tmp_path / "set")}}


def test_files_patterns_and_addresses_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers").mkdir()
    for name in ("0.tar", "1.tar", "odd[1].tar", "x.parquet"):
        (tmp_path / "flowers" / name).touch()
    cases = {
        "flowers/0.tar": ("folder", "0"),
        "flowers/odd[1].tar": ("folder", "odd-1-"),
        "flowers/{0..1}.tar": ("webdataset", "flowers"),
        "flowers/[01].tar": ("webdataset", "flowers"),
        "flowers/x.parquet": ("parquet", "x"),
        "flowers/*.parquet": ("parquet", "flowers"),
        "https://host.example/sets/flowers/{000..127}.tar": ("webdataset", "flowers"),
    }
    for text, (kind, name) in cases.items():
        spec = recipes.resolve(text)
        assert (spec.source, spec.name) == (kind, name), text
        assert spec.options["path"] == (text if "://" in text else str(tmp_path / text))
        assert recipes.resolve(kind, {"path": text}).identity() == spec.identity()
    exclude = ("digits", "torchvision:CIFAR10", "flowers/0.tar", "https://host.example/{0..1}.tar")
    kept = recipes.resolve("digits", {"exclude": exclude}).exclude
    assert kept == (*exclude[:2], str(tmp_path / "flowers/0.tar"), exclude[3])


def test_a_torchvision_set_by_its_name(tmp_path: Path) -> None:
    raw = recipes.load("torchvision:STL10")
    assert (raw["source"], raw["name"], raw["options"]) == ("torchvision", "stl10", {"dataset": "STL10"})
    spec = recipes.resolve("torchvision:STL10", {"path": str(tmp_path)})
    assert spec.name == recipes.resolve("torchvision", {"dataset": "STL10", "path": str(tmp_path)}).name
    assert recipes.downstream("torchvision:STL10", {"path": str(tmp_path)})[1].name == "stl10-test"
    with pytest.raises(UserError, match=r"path: .* give path=FOLDER, torchvision's root"):
        recipes.resolve("torchvision:STL10")


def test_expected_counts_are_for_people_and_checked(tmp_path: Path) -> None:
    assert recipes.expected("digits") == {}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: digits\nexpected: {train: 1437, test: 360}\nchecksums: {a.tar: 00ff}\n")
    assert recipes.expected(str(recipe)) == {"train": 1437, "test": 360}
    assert recipes.resolve(str(recipe)).digest == recipes.resolve("digits", {"size": 64}).digest
    for wrong in ("5", "{train: many}", "{valid: 3}"):
        recipe.write_text(f"source: digits\nexpected: {wrong}\n")
        with pytest.raises(UserError, match="write a number for some of all, classes, test, train"):
            recipes.expected(str(recipe))


def test_what_a_sweep_sets_for_all_its_pools_is_checked_too() -> None:
    spec = recipes.resolve("digits", {}, defaults={"resize": "none", "near_duplicates": True})
    assert (spec.resize, spec.near_duplicates) == ("none", True)
    with pytest.raises(UserError, match="unknown key 'reszie'; did you mean 'resize'"):
        recipes.resolve("digits", {}, defaults={"reszie": "none"})


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


def test_a_single_set_to_exclude_and_a_name_that_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    spec = recipes.resolve("digits", {"exclude": f"{tmp_path}/flowers", "name": 2024})
    assert (spec.exclude, spec.name) == ((f"{tmp_path}/flowers",), "2024")
    assert recipes.resolve("digits", {"exclude": None}).exclude == ()


def test_mistakes_are_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR10_PATH", raising=False)
    cases = [
        (("digit", {}), "did you mean 'digits'"),
        (("digits", {"sice": 3}), "unknown key 'sice'; did you mean 'size'"),
        (("folder", {"path": str(tmp_path), "lebelled": True}), "did you mean 'labelled'"),
        (("digits", {"size": 0}), "size: .*greater than 0"),
        (("digits", {"filter": "sharp"}), "filter: .*bicubic"),
        (("digits", {"name": "a/b"}), "name: "),
        (("photo_patches", {"patch": "x"}), "patch: "),
        (("cifar10", {}), "path=FOLDER_OR_TAR .* CIFAR10_PATH"),
        (("cifar10", {"path": "/nowhere/c.tar"}), "path=/nowhere/c.tar: no such folder .* CIFAR10_PATH"),
        (("folder", {}), "give path="),
        (("/nowhere/x", {}), "path=/nowhere/x: no such folder"),
        (("/nowhere/{00..11}.tar", {}), "no such file like that"),
        (("/nowhere/*.parquet", {}), "no such file like that"),
        ((f"{tmp_path}/{{0..3.tar", {}), "a brace is not closed"),
        (("absent.yaml", {}), "no such file: absent.yaml"),
    ]
    for (text, options), message in cases:
        with pytest.raises(UserError, match=message) as error:
            recipes.resolve(text, options)
        assert "\n" not in str(error.value)
