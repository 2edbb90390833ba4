"""Keys are equal if and only if what determines the result is equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_diversity.data.order import Windowed
from ssl_diversity.data.subset import PartSpec
from ssl_diversity.methods.recipe import load_recipe
from ssl_diversity.sweep import task as tasks
from ssl_diversity.sweep.task import Series, Task
from ssl_diversity.train import CellSpec

RECIPE = load_recipe("simclr", "quick", budget_samples=4096, image_size=16)
SPEC = CellSpec(
    method="simclr",
    backbone="conv-tiny",
    recipe=RECIPE,
    image_size=16,
    parts=(PartSpec(pool="digits-00000000", rows_start=3, rows_count=64),),
    rows_digest="ab" * 16,
    unique_samples=64,
    budget=4096,
    batch_size=64,
    seed=0,
)
DETERMINES = {
    "method": st.sampled_from(["simclr", "byol"]),
    "backbone": st.sampled_from(["conv-tiny", "resnet18"]),
    "image_size": st.sampled_from([16, 32]),
    "rows_digest": st.sampled_from(["ab" * 16, "cd" * 16]),
    "unique_samples": st.integers(64, 66),
    "budget": st.integers(4096, 4098),
    "batch_size": st.integers(64, 66),
    "seed": st.integers(0, 3),
    "replicate": st.integers(0, 3),
    "order": st.one_of(
        st.just("global"), st.builds(Windowed, shards=st.integers(1, 2), lanes=st.sampled_from([32, 64]))
    ),
    "layout": st.sampled_from(["", "ab" * 16]),
    "precision": st.sampled_from(["bf16-mixed", "32-true"]),
    "decode": st.sampled_from(["exact", "scaled"]),
    "recipe": st.builds(
        lambda lr, decay: RECIPE.model_copy(update={"lr": lr, "weight_decay": decay}),
        st.sampled_from([0.1, 0.1 + 1e-12]),
        st.sampled_from([0.0, 1e-6]),
    ),
}
DOES_NOT = {
    "parts": st.lists(
        st.builds(
            PartSpec,
            pool=st.sampled_from(["digits-00000000", "renamed-00000000"]),
            rows_start=st.integers(0, 3),
            rows_count=st.integers(1, 3),
        ),
        max_size=2,
    ).map(tuple),
    "checkpoint_samples": st.integers(1, 3),
}


def key(values: dict[str, object], label: str = "") -> str:
    return Task("pretrain", SPEC.model_copy(update=values), label=label).key


@given(
    st.fixed_dictionaries(DETERMINES),
    st.fixed_dictionaries(DETERMINES),
    *[st.fixed_dictionaries(DOES_NOT)] * 2,
)
def test_equal_if_and_only_if_results_are(a: dict, b: dict, a_rest: dict, b_rest: dict) -> None:
    assert (key(a | a_rest, "one sweep") == key(b | b_rest, "another")) == (a == b)


PLAIN = {name: values for name, values in DETERMINES.items() if name not in ("order", "recipe")}


@given(st.sets(st.sampled_from(sorted(PLAIN))), st.data())
def test_a_task_of_a_series_is_the_task_made_alone(fields: set[str], data: st.DataObject) -> None:
    given_values = st.fixed_dictionaries({name: (PLAIN | DOES_NOT)[name] for name in (*fields, "parts")})
    series = Series("pretrain", SPEC.model_copy(update=data.draw(given_values)), {*fields, "parts"})
    values = data.draw(given_values)
    made, alone = (
        series.task(values, (), "", units=1, like=""),
        Task("pretrain", SPEC.model_copy(update=values)),
    )
    assert (made.id, made.spec, made.folder) == (alone.id, alone.spec, alone.folder)


def test_every_field_of_a_cell_is_either_in_the_key_or_known_not_to_matter() -> None:
    assert set(CellSpec.model_fields) == set(DETERMINES) | set(DOES_NOT)


def test_any_recipe_value_is_in_the_key() -> None:
    first = next(name for name, value in RECIPE.params.items() if isinstance(value, float))
    changed = RECIPE.model_copy(update={"params": {**RECIPE.params, first: 0.123}})
    assert key({"recipe": changed}) != key({})
    flipped = RECIPE.views[0].model_copy(update={"flip": 0.25})
    assert key({"recipe": RECIPE.model_copy(update={"views": (flipped, *RECIPE.views[1:])})}) != key({})


def test_raised_numerics_make_a_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key({})
    monkeypatch.setitem(tasks.NUMERICS, "pretrain", 99)
    assert key({}) != before


def test_kinds_do_not_share_keys() -> None:
    assert Task("probe", SPEC).key != Task("pretrain", SPEC).key


def test_every_kind_has_a_function() -> None:
    assert set(tasks.FUNCTIONS) == set(tasks.NUMERICS)
