"""Configs say what is wrong, where, and what to write instead."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from ssl_diversity import config
from ssl_diversity.errors import UserError


class Example(config.Config):
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"where"})
    budget: int = 1
    methods: tuple[str, ...] = ()
    where: str = ""


class Outer(config.Config):
    inner: Example = Example()
    several: tuple[Example, ...] = ()
    named: dict[str, Example] = Field({})


def test_overrides_nest_and_replace_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("budget: 5e6\nmethods: [a, b]\nx: {y: 1, z: 2}\n")
    values = config.merge(config.read_yaml(path), config.parse_overrides(["methods=[c]", "x.y=3"]))
    assert values == {"budget": 5e6, "methods": ["c"], "x": {"y": 3, "z": 2}}


def test_unknown_keys_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"here: unknown key 'bugdet'; did you mean 'budget'\?"):
        config.validate(Example, {"bugdet": 3}, "here")
    with pytest.raises(UserError, match="known keys: budget, methods, where"):
        config.validate(Example, {"qqq": 3}, "here")


def test_wrong_values_name_the_key() -> None:
    with pytest.raises(UserError, match=r"here: budget: .*integer.*\(got 'many'\)"):
        config.validate(Example, {"budget": "many"}, "here")


@pytest.mark.parametrize("item", ["budget", "=3", "methods=[a"])
def test_malformed_overrides(item: str) -> None:
    with pytest.raises(UserError):
        config.parse_overrides([item])


def test_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        config.read_yaml(tmp_path / "none.yaml")
    for text in ("a: [", "- 1\n- 2\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            config.read_yaml(tmp_path / "bad.yaml")


def test_identity_leaves_out_what_does_not_determine_results() -> None:
    assert Example(where="a").identity() == Example(where="b").identity()
    assert Example(budget=2).identity() != Example(budget=3).identity()


def test_identity_and_hints_reach_nested_configs() -> None:
    a, b = Example(where="a"), Example(where="b")
    assert (
        Outer(inner=a, several=(a,), named={"x": a}).identity()
        == Outer(inner=b, several=(b,), named={"x": b}).identity()
    )
    assert Outer(several=(Example(budget=2),)).identity() != Outer(several=(a,)).identity()
    with pytest.raises(UserError, match=r"unknown key 'inner\.bugdet'; did you mean 'budget'"):
        config.validate(Outer, {"inner": {"bugdet": 3}}, "here")
