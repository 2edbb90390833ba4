"""Image i's class, prompt and seed are a hash of (pool seed, i): any prefix is an i.i.d. sample."""

import numpy as np
import pytest
import tiny_pipelines

from ssl_diversity.errors import UserError
from ssl_diversity.generation.conditions import (
    drawn,
    for_classes,
    for_text,
    image_seeds,
    model_classes,
)
from ssl_diversity.generation.sampling import Conditions

BIRDS = ("wren", "owl", "rook")


def test_seeds_are_distinct_and_keyed():
    seeds = image_seeds(0, range(10_000))
    assert len(set(seeds)) == 10_000
    assert seeds[100:110] == image_seeds(0, range(100, 110))
    assert not set(seeds) & set(image_seeds(1, range(10_000)))
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_an_image_does_not_know_how_it_is_asked_for():
    conditions = Conditions(classes=BIRDS, templates=("a {class}", "an old {class}"))
    whole = drawn(3, conditions, range(100))
    for low, high in ((0, 1), (17, 40), (99, 100)):
        part = drawn(3, conditions, range(low, high))
        assert part.label.tolist() == whole.label[low:high].tolist()
        assert part.inputs == whole.inputs[low:high]
        assert part.seeds == whole.seeds[low:high]
    assert drawn(4, conditions, range(100)).label.tolist() != whole.label.tolist()
    assert drawn(3, conditions, range(4, 8)).block_seed not in (*whole.seeds, whole.block_seed)


def test_classes_come_by_their_weights_in_every_stretch():
    """Each stretch of 3,000 is a sample of the weights: chi-square with 3 degrees of freedom below 21 (p = 1e-4)."""
    weights = (5.0, 0.0, 2.0, 1.0, 2.0)
    conditions = Conditions(classes=tuple("abcde"), weights=weights)
    labels = drawn(0, conditions, range(30_000)).label
    expected = np.array(weights) / sum(weights) * 3000
    for stretch in labels.reshape(10, 3000):
        counts = np.bincount(stretch, minlength=5)
        assert counts[1] == 0
        some = expected > 0
        assert ((counts - expected)[some] ** 2 / expected[some]).sum() < 21
    follows = np.histogram2d(labels[:-1], labels[1:], bins=5)[0]  # neighbours are independent
    outer = np.outer(expected, expected) / 3000**2 * (len(labels) - 1)
    wanted = outer > 0
    assert ((follows - outer)[wanted] ** 2 / outer[wanted]).sum() < 40  # 15 degrees of freedom, p = 5e-4


def test_prompts_are_templates_with_the_class_in_them():
    conditions = Conditions(classes=BIRDS, templates=("a {class}, {class}!", "the {class}"))
    found = drawn(0, conditions, range(600))
    names = [BIRDS[i] for i in found.label]
    kinds = [
        (f"a {name}, {name}!", f"the {name}").index(p) for p, name in zip(found.inputs, names, strict=True)
    ]
    assert 240 < sum(kinds) < 360
    assert abs(np.corrcoef(kinds, found.label)[0, 1]) < 0.15  # of each other's choice independent


def test_without_classes():
    found = drawn(0, for_text(Conditions(templates=("clouds", "waves")), "here"), range(50))
    assert set(found.inputs) == {"clouds", "waves"}
    assert set(found.label.tolist()) == {-1}
    with pytest.raises(UserError, match="say classes="):
        for_text(Conditions(), "pipeline=x")


def test_numbers_of_a_models_classes(tmp_path):
    tiny_pipelines.KINDS["classes"](tmp_path / "three")
    assert model_classes(tmp_path / "three") == ("0", "1", "2")
    tiny_pipelines.KINDS["dit"](tmp_path / "dit")
    known = model_classes(tmp_path / "dit")
    assert known is not None
    assert len(set(known)) == 1000  # names that come twice are told apart
    tiny_pipelines.KINDS["ddpm"](tmp_path / "plain")
    assert model_classes(tmp_path / "plain") is None

    every = for_classes(Conditions(), known, "here")
    assert every.model_labels == tuple(range(1000))
    assert every.classes == known
    named = for_classes(Conditions(classes=("kind 7", "class 3, kind 3")), known, "here")
    assert named.model_labels == (7, 3)
    assert drawn(0, named, range(9)).inputs == tuple((7, 3)[i] for i in drawn(0, named, range(9)).label)
    placed = for_classes(Conditions(classes=BIRDS), ("0", "1", "2"), "here")
    assert placed.model_labels == (0, 1, 2)
    given = for_classes(Conditions(classes=BIRDS, model_labels=(5, 5, 9)), known, "here")
    assert given.model_labels == (5, 5, 9)
    with pytest.raises(UserError, match=r"no class 'wren'.*model_labels"):
        for_classes(Conditions(classes=BIRDS), known, "here")
    with pytest.raises(UserError, match="classes 0 to 2, not 9"):
        for_classes(given, ("0", "1", "2"), "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ["a", "b", "a"]}, "'a' is there twice"),
        ({"classes": ["a", "b"], "weights": [1]}, "weights: 1 for 2 classes"),
        ({"classes": ["a", "b"], "weights": [0, 0]}, "all are 0"),
        ({"classes": ["a"], "templates": ["a bird"]}, "does not name the class"),
        ({"classes": ["a", "b"], "model_labels": [1, 2, 3]}, "model_labels: 3 for 2"),
    ],
)
def test_what_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        Conditions(**values)
