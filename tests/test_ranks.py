"""Any number of ranks trains the cell that one process trains; they stop, go on and fail together."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_helpers import (
    BATCH,
    STEPS,
    go_on_and_be_killed,
    on_ranks,
    pretrain_and_fail,
    rehearse,
    stopped_after,
    train,
    train_all,
)
from torch import nn

from ssl_diversity.collectives import GlobalBatchNorm, normalize_globally
from ssl_diversity.data import recipes
from ssl_diversity.data.order import Windowed
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.subset import Subset
from ssl_diversity.data.windowed import layout_digest
from ssl_diversity.errors import UserError
from ssl_diversity.methods.recipe import METHODS, load_recipe
from ssl_diversity.ranks import Group, Ranks, joined
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, pretrain

LARS = {"optimizer": "lars", "betas": None, "momentum": 0.9, "lars_eta": 0.02, "lars_clip": True}
IN_DOUBLE: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "dino-drop-path": {"method": "dino", "backbone": "vit-micro", "overrides": {"drop_path": 0.3}},
    "mae-clip": {"method": "mae", "overrides": {"clip_norm": 0.1, "drop_path": 0.3}},
    "byol-lars": {"method": "byol", "overrides": LARS},
}
IN_FLOAT = {f"{method} 32-true": {"method": method, "precision": "32-true"} for method in METHODS}
IN_BFLOAT = {"dino bf16-mixed": {"method": "dino", "precision": "bf16-mixed"}}
CASES = {**IN_DOUBLE, **IN_FLOAT, **IN_BFLOAT}
ON_THREE = {name: IN_DOUBLE[name] for name in ("vicreg", "dino")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses and state of each case, trained by one process."""
    return train_all(Group(), CASES, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(out: Path) -> list[dict[str, Any]]:
    """What each of two ranks made of them, and of a stop; `out/cells/stopped` holds the checkpoint."""
    return on_ranks(2, out / "two", rehearse, CASES, out / "cells")


@pytest.fixture(scope="module")
def three(out: Path, two: Any) -> list[Any]:
    """Three ranks go on where one process stopped, that had gone on where two stopped; then one is killed."""
    assert stopped_after(Group(), out / "cells" / "stopped", 5).startswith("5: stopped after 144 samples")
    return on_ranks(3, out / "three", go_on_and_be_killed, ON_THREE, out / "more", out / "cells" / "stopped")


def difference(a: Any, b: Any) -> tuple[float, float]:
    """The largest of two runs' losses, relative, and of their backbones' weights and statistics, absolute."""
    losses = np.abs(np.array(a[0]) / np.array(b[0]) - 1).max()
    names = [name for name in a[1] if name.startswith(("backbone", "teacher"))]
    return losses, max((a[1][name] - b[1][name]).abs().max().item() for name in names)


@pytest.mark.parametrize("case", IN_DOUBLE)
def test_in_double_precision_two_ranks_do_what_one_process_does(alone: Any, two: Any, case: str) -> None:
    losses, weights = difference(alone[case], two[0]["trained"][case])
    assert len(alone[case][0]) == STEPS
    assert losses < 1e-11
    assert weights < 1e-9


@pytest.mark.parametrize("case", IN_FLOAT)
def test_in_single_precision_loss_curves_are_equal_within_a_thousandth(
    alone: Any, two: Any, case: str
) -> None:
    expected, found = alone[case][0], two[0]["trained"][case][0]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=2e-3)


def test_in_bfloat16_too_ranks_train_alike(alone: Any, two: Any) -> None:
    for case in IN_BFLOAT:
        assert two[0]["trained"][case][0] == pytest.approx(alone[case][0], rel=5e-2)


def test_ranks_end_with_the_same_bits_and_the_names_of_one_process(alone: Any, two: Any) -> None:
    for case in CASES:
        first, second = (rank["trained"][case] for rank in two)
        assert first[0] == second[0]
        assert list(first[1]) == list(alone[case][1])
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_ranks_talk(two: Any) -> None:
    both = [True, False, [0, 10]]
    assert two[0]["said"] == [*both, "rank 1: no such shard", "no such shard"]
    assert two[1]["said"] == [{"task": 1}, "next", *both, "no such shard", "rank 0: no such shard"]


def test_one_rank_asked_to_stop_stops_all_at_the_same_step(two: Any, out: Path) -> None:
    assert two[0]["stopped"] == two[1]["stopped"]
    assert two[0]["stopped"].startswith(f"7: stopped after {7 * BATCH} samples")
    assert os.listdir(out / "cells" / "stopped") == ["last.ckpt"]


@pytest.mark.slow
def test_three_ranks_train_alike_and_go_on_from_the_checkpoint_of_others(alone: Any, three: Any) -> None:
    trained, went_on, _ = three[0]
    for found, case in [(trained["vicreg"], "vicreg"), (trained["dino"], "dino"), (went_on, "simclr")]:
        losses, weights = difference(alone[case], found)
        assert losses < 1e-11
        assert weights < 1e-9


@pytest.mark.slow
def test_a_killed_rank_is_noticed_by_the_others(three: Any) -> None:
    assert three[2] is None
    for _, _, noticed in three[:2]:
        assert "another rank has gone" in noticed


@pytest.mark.slow
@pytest.mark.parametrize("order", ["global", "windowed"])
def test_a_cell_of_two_ranks_is_published_by_the_first_and_a_failure_is_told(
    tmp_path: Path, order: str
) -> None:
    pool = prepare(recipes.resolve("digits", {}, defaults={"size": 16}))
    subset = Subset(((pool, pool.rows(48)),))
    recipe = load_recipe("barlow_twins", "quick", budget_samples=96, image_size=16)
    spec = CellSpec(
        method="barlow_twins",
        backbone="conv-tiny",
        recipe=recipe,
        image_size=16,
        parts=subset.specs,
        rows_digest=subset.digest,
        unique_samples=48,
        budget=96,
        batch_size=16,
        seed=3,
        order="global" if order == "global" else Windowed(shards=1, lanes=4),
        layout="" if order == "global" else layout_digest(subset.pieces),
        precision="32-true",
    )
    (tmp_path / "one").mkdir()
    expected = pretrain(spec, tmp_path / "one", Runtime())
    (found, told, _), (nothing, untold, failure) = (
        answer if isinstance(answer, tuple) else ({}, [], answer)
        for answer in on_ranks(2, tmp_path / "ranks", pretrain_and_fail, spec, tmp_path / "two")
    )
    assert (nothing, untold) == ({}, [])
    assert told[-1] == 96
    assert "shard 7 is cut" in failure
    assert found["samples_seen"] == 96
    assert found["flops"] == expected["flops"]
    np.testing.assert_allclose(found["history"], expected["history"], rtol=2e-3)
    one, two = (
        torch.load(tmp_path / name / "weights.pt", weights_only=True)["state_dict"] for name in ("one", "two")
    )
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3)


def test_ranks_that_cannot_share_a_batch_say_which_could(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be one of 1, 2, 3, 4, 6, 12"):
        train(Group(Ranks(0, 5)), "simclr", tmp_path)


@pytest.mark.parametrize("announced", ["", '{"hosts": ["127.0.0.1"], "port": 9, "nonce": "old"}'])
def test_ranks_that_do_not_meet_say_where_and_why(tmp_path: Path, announced: str) -> None:
    meeting = tmp_path / "meeting"
    if announced:
        meeting.write_text(announced)
    why = "nobody answers at 127.0.0.1, port 9" if announced else "rank 0 has not written it"
    with pytest.raises(UserError, match=f"{meeting}: {why}"), joined(Ranks(1, 2), "cpu", meeting, 0.5):
        pass
    alone = joined(Ranks(0, 2), "cpu", meeting, 4)
    with pytest.raises(UserError, match=f"no other rank came to {meeting} in 4 s"), alone:
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Ranks()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NODEID": "0"}, Ranks()),
        (
            {
                "SLURM_PROCID": "4",
                "SLURM_STEP_NUM_TASKS": "5",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "2",
                "SLURM_STEP_NUM_NODES": "3",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
            },
            Ranks(4, 5, 0, 1, 2, 3),
        ),
        (
            {
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_GLOBALID": "1",
                "SUBMITIT_LOCAL_NTASKS": "2",
                "SUBMITIT_LOCAL_LOCALID": "1",
            },
            Ranks(1, 2, 1, 2),
        ),
    ],
)
def test_the_launcher_says_who_is_who(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Ranks
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Ranks.current() == expected


def test_batch_norms_are_replaced_by_name_with_the_same_parameters() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False)))
    before = dict(net.named_parameters()), dict(net.named_buffers())
    normalize_globally(net.eval(), "cpu")
    assert isinstance(net[1], GlobalBatchNorm)
    assert not net[2][0].training
    assert all(value is before[0][name] for name, value in net.named_parameters())
    assert all(value is before[1][name] for name, value in net.named_buffers())


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    with joined(Ranks(), "cpu", tmp_path / "meeting") as group, group.together():
        group.tell("nobody")
        assert group.first
        assert group.any(True)
        assert group.gather(1) == [1]
    assert not (tmp_path / "meeting").exists()
