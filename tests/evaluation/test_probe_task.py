"""The probe task on real digits: rows, baselines, and the errors of a downstream set."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ssl_diversity.config import validate
from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.errors import UserError
from ssl_diversity.evaluation import ProbeSettings, ProbeSpec, probe
from ssl_diversity.evaluation.outcome import accuracy_without
from ssl_diversity.evaluation.task import check
from ssl_diversity.runtime import Runtime

PROBES = ("linear", "knn", "fewshot-5", "fewshot-2pct")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, Pool]:
    """The train and test pools of scikit-learn's digits at their native 8 px."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_DIVERSITY_HOME", str(tmp_path_factory.mktemp("pools")))
        train, test = (prepare(spec) for spec in recipes.downstream("digits", defaults={"size": 8}))
        return train, test


def spec_of(digits: tuple[Pool, Pool], network: str, **changes: Any) -> ProbeSpec:
    train, test = digits
    values = {
        "network": network,
        "image_size": 8,
        "train_pool": str(train.path),
        "test_pool": str(test.path),
        "train_digest": train.digest,
        "test_digest": test.digest,
        "probes": PROBES,
        "settings": ProbeSettings(draws=5),
        **changes,
    }
    return validate(ProbeSpec, values, "probe")


@pytest.mark.parametrize("network", ["pixels", "random:conv-tiny:0"])
def test_a_baseline_gets_a_row_per_probe(digits: tuple[Pool, Pool], tmp_path: Path, network: str) -> None:
    result = json.loads(json.dumps(probe(spec_of(digits, network), tmp_path, Runtime())))
    assert [row["probe"] for row in result["rows"]] == list(PROBES)
    for row in result["rows"]:
        assert 0.5 < row["accuracy_low"] < row["accuracy"] < row["accuracy_high"] <= 1
        assert row["n_test"] == digits[1].size
        assert row["chance"] == pytest.approx(0.1)
        none = np.zeros(digits[1].size, bool)
        assert accuracy_without(row, none) == pytest.approx(row["accuracy"])
    by_name = {row["probe"]: row for row in result["rows"]}
    assert by_name["linear"]["accuracy"] > by_name["fewshot-5"]["accuracy"]
    assert by_name["linear"]["chosen"] in ProbeSettings().l2
    assert {name: len(draws) for name, draws in result["draws"].items()} == {
        "fewshot-5": 5,
        "fewshot-2pct": 5,
    }
    assert np.mean(result["draws"]["fewshot-5"]) == pytest.approx(by_name["fewshot-5"]["accuracy"])
    assert 1 < result["effective_rank"] < 200


def test_a_probe_run_twice_is_the_same(
    digits: tuple[Pool, Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(digits, "random:conv-tiny:0", probes=("linear", "fewshot-5"))
    first = probe(spec, tmp_path, Runtime())
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "elsewhere"))  # nothing cached
    assert probe(spec, tmp_path, Runtime()) == first


def test_where_the_pools_lie_is_no_part_of_the_identity(digits: tuple[Pool, Pool]) -> None:
    assert (
        spec_of(digits, "pixels").identity() == spec_of(digits, "pixels", train_pool="elsewhere").identity()
    )
    assert spec_of(digits, "pixels").identity() != spec_of(digits, "pixels", seed=1).identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": ("linera",)}, "unknown probe 'linera'"),
        ({"network": "best"}, "network=best"),
        ({"settings": {"knn_kk": 3}}, "knn_kk"),
        ({"settings": {"l2": [0]}}, "l2"),
    ],
)
def test_a_wrong_spec_is_one_line(digits: tuple[Pool, Pool], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        spec_of(digits, **{"network": "pixels", **changes})


def fake(labels: list[int], classes: list[str], digest: str) -> Any:
    return SimpleNamespace(
        name=digest,
        path=Path(digest),
        digest=digest,
        label=np.array(labels, np.int32),
        info=SimpleNamespace(classes=classes),
    )


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (fake([0, 1], ["a", "b"], "other"), fake([0], ["a", "b"], "test"), "has changed"),
        (
            fake([0, -1], ["a", "b"], "train"),
            fake([0], ["a", "b"], "test"),
            "train: not all images have labels",
        ),
        (fake([], [], "train"), fake([], [], "test"), "labels"),
        (fake([0, 1], ["a", "b"], "train"), fake([0], ["a", "c"], "test"), "differ in classes: b, c"),
        (
            fake([0, 0], ["a", "b"], "train"),
            fake([1], ["a", "b"], "test"),
            "class 'b' has no training images",
        ),
    ],
)
def test_a_downstream_set_that_cannot_be_probed_is_one_line(
    digits: tuple[Pool, Pool], train: Any, test: Any, message: str
) -> None:
    spec = spec_of(digits, "pixels", train_digest="train", test_digest="test")
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        check(spec, train, test)
