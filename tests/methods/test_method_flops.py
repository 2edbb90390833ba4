"""FLOPs per sample: against hand counts, the same at any batch size, cached."""

import pytest
from method_helpers import tiny

from ssl_diversity.files import home, read_json
from ssl_diversity.methods import flops
from ssl_diversity.methods.recipe import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_does_not_matter(method: str) -> None:
    for backbone in ["vit-micro"] if METHODS[method] else ["vit-micro", "conv-tiny"]:
        recipe = tiny(method).recipe
        four, eight = (flops.count(method, backbone, 16, recipe, batch_size) for batch_size in (4, 8))
        assert four == eight > 0


def test_simclr_on_the_small_convolutional_net_by_hand() -> None:
    """Two views; a layer costs a forward and two backwards, the first one none for its input."""
    stages = [(3, 16, 16), (16, 32, 8), (32, 64, 4), (64, 128, 2)]
    convolutions = [2 * 9 * before * after * side**2 for before, after, side in stages]
    head = 2 * (128 * 32 + 32 * 24)
    expected = 2 * (3 * (sum(convolutions) + head) - convolutions[0])
    recipe = tiny("simclr", overrides={"hidden_dim": 32, "output_dim": 24}).recipe
    assert flops.count("simclr", "conv-tiny", 16, recipe) == expected


def test_byol_on_a_small_vit_by_hand_counts_attention_and_the_teacher_s_forward() -> None:
    tokens, dim, hidden, depth = 17, 128, 256, 2
    patches = 2 * 16 * dim * (3 * 4 * 4)
    linear = 2 * tokens * dim * (3 * dim + dim + 2 * hidden)
    attention = 2 * 2 * tokens * tokens * dim
    projector, predictor = 2 * (dim * 32 + 32 * 24), 2 * (24 * 32 + 32 * 24)
    teacher = patches + depth * (linear + attention) + projector
    student = teacher + predictor
    expected = 2 * (3 * student - patches + teacher)
    recipe = tiny("byol", overrides={"hidden_dim": 32, "output_dim": 24}).recipe
    assert flops.count("byol", "vit-micro", 16, recipe) == expected


def test_counts_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("simclr").recipe
    first = flops.flops_per_sample("simclr", "conv-tiny", 16, recipe)
    assert list(read_json(home() / "store" / "cache" / "flops.json").values()) == [first]
    monkeypatch.setattr(flops, "count", lambda *_: pytest.fail("counted again"))
    assert flops.flops_per_sample("simclr", "conv-tiny", 16, recipe) == first
