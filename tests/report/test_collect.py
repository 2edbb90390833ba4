"""From a planned sweep and a store of made-up results to records."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data.leaks import find_leaks
from ssl_diversity.data.pool import Pool
from ssl_diversity.evaluation.outcome import Outcome, as_hits
from ssl_diversity.files import read_json, write_json
from ssl_diversity.report import write_report
from ssl_diversity.report.collect import collect, command, history
from ssl_diversity.report.table import read_table
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import store
from ssl_diversity.sweep.config import SweepConfig, load
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.record import remember
from ssl_diversity.sweep.task import Task
from ssl_diversity.sweep.work import prepare_pool

RUN = {"device": "cpu", "threads": 1, "machine": "laptop", "started": 1.7e9, "seconds": 60.0, "python": "3.11",
       "versions": {"torch": "2"}, "commit": "abc"}  # fmt: skip


def made_up(task: Task) -> dict[str, Any]:
    """A result of the task's kind."""
    if task.kind == "pretrain":
        return {"effective_rank": 9.5, "collapsed": False, "flops": 10**9, "train_seconds": 1.5, "peak_memory_bytes": 10**8,
                "final_loss": 0.5, "history": [[8, 2.0], [64, 0.5]]}  # fmt: skip
    if task.kind == "probe":
        n_test = Pool.open(task.spec.test_pool).size  # type: ignore[attr-defined]
        right = Outcome(0.5, 0.4, 0.6, hits=as_hits(np.arange(n_test) % 2), trials=1).row()
        rows = [{"probe": p, **right, "n_test": n_test, "chance": 0.5}
                for p in task.spec.probes]  # type: ignore[attr-defined]  # fmt: skip
        return {"rows": rows, "effective_rank": 4.0}
    n = task.spec.n  # type: ignore[attr-defined]
    return {"n": n, "extractor": "random-resnet", "frechet": 10.0 + n, "visual_dna": 0.1, "frechet_floor": None,
            "visual_dna_floor": None, "floor_n": 4, "vendi": 3.0, "effective_rank": float("nan"), "shared_images": 2}  # fmt: skip


def finish(task: Task) -> None:
    write_json(task.folder / "result.json", made_up(task) | {"run": RUN})
    store.settle(task)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepConfig:
    """Two labelled folders, prepared; nothing trained."""
    draw = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        for kind in ("a", "b"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(30):
                image = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / name / kind / f"{i}.png")
    sets = {name: f"{{recipe: folder, path: '{tmp_path / name}'}}" for name in ("cats", "dogs")}
    (tmp_path / "toy.yaml").write_text(
        f"name: toy\nimage_size: 8\nsources: {{cats: {sets['cats']}, dogs: {sets['dogs']}}}\n"
        f"downstream: {{cats: {sets['cats']}}}\nmethods: [simclr, mae]\n"
        "backbone: {default: conv-tiny, mae: vit-micro}\nunique_samples: [8, 16]\nbudget: 64\nbatch_size: 8\n"
        "seeds: 2\nprobes: [fewshot-2, knn]\n"
    )
    config = remember(load(str(tmp_path / "toy.yaml")))
    for task in expand(config).tasks:
        prepare_pool(task.spec, task.folder, Runtime())  # type: ignore[arg-type]
    return config


def test_every_cell_downstream_set_and_probe_is_a_record(sweep: SweepConfig) -> None:
    plan = expand(sweep)
    for task in plan.tasks:
        if task.kind != "prepare":
            finish(task)
    found = collect(sweep)
    cells = [r for r in found.records if r.get("source")]
    assert len(cells) == 2 * 2 * 2 * 2 * 2  # methods x sources x N x seeds x probes
    assert {(r["source"], r["source_kind"], r["budget_asked"]) for r in cells} == {
        ("cats", "folder", "64"),
        ("dogs", "folder", "64"),
    }
    assert {r["cell"] for r in cells} == {cell.task.key for cell in plan.cells if cell.task}
    one = next(r for r in cells if r["unique_samples"] == 16 and r["source"] == "dogs")
    assert (one["accuracy"], one["effective_rank"], one["flops"], one["status"]) == (0.5, 9.5, 10**9, "done")
    assert (one["frechet"], one["frechet_subset"], one["subset_n"]) == (10 + one["distance_n"], 26.0, 16)
    assert one["frechet_floor"] is None
    assert {r["leaked"] for r in cells if r["source"] == "dogs"} == {0}
    assert (
        max(r["leaked"] for r in cells if r["source"] == "cats") > 0
    )  # an unsplit set is its own test set, too
    baselines = {(r["method"], r["backbone"], r.get("seed")) for r in found.records if not r.get("source")}
    assert baselines == {("pixels", "", None)} | {
        ("random", b, s) for b in ("conv-tiny", "vit-micro") for s in (0, 1)
    }
    assert found.failed == []
    assert set(found.tasks["pretrain"]) == {"done"}
    assert found.run["machine"] == "laptop"
    assert history(one["cell"]) == [(8, 2.0), (64, 0.5)]


@pytest.mark.parametrize("near", [False, True])
def test_accuracy_without_leaked_images_leaves_out_those_of_the_cell(sweep: SweepConfig, near: bool) -> None:
    sweep = sweep.model_copy(update={"near_duplicates": near})
    for task in expand(sweep).tasks:
        if task.kind == "prepare":
            prepare_pool(task.spec, task.folder, Runtime())  # type: ignore[arg-type]
    plan = expand(sweep)
    for task in plan.tasks:
        if task.kind != "prepare":
            finish(task)
    test = plan.downstream[0].test
    assert test is not None
    cells = {cell.task.key: cell for cell in plan.cells if cell.task}
    found = collect(sweep).records
    leaky = 0
    for record in found:
        if not record.get("source"):
            assert record["accuracy_clean"] == record["accuracy"]
            continue
        leaks = find_leaks(test, cells[record["cell"]].parts)
        assert record["leaked"] == leaks.exact.sum()
        assert record["leaked_near"] == (leaks.near.sum() if leaks.near is not None else None)
        assert (leaks.near is not None) == near
        right = (np.arange(test.size) % 2)[~leaks.known]  # as `made_up` has it
        clean = record["accuracy"] if not leaks.known.any() else right.mean()
        assert record["accuracy_clean"] == pytest.approx(clean)
        leaky += record["leaked"] > 0
    assert leaky > 0


def test_what_is_missing_or_failed_is_said_and_fails_nothing(sweep: SweepConfig) -> None:
    plan = expand(sweep)
    trained = [cell.task for cell in plan.cells if cell.task]
    finish(trained[0])
    store.fail(trained[1], ValueError("a <bad> thing"))
    store.fail(trained[1], ValueError("a worse\nthing"))
    found = collect(sweep)
    status = {r["cell"]: r["status"] for r in found.records if r.get("source")}
    assert (status[trained[0].key], status[trained[1].key], status[trained[2].key]) == (
        "waiting",
        "failed",
        "waiting",
    )
    (failed,) = found.failed
    assert (failed.key, failed.message, failed.attempts) == (trained[1].key, "ValueError: a worse thing", 2)
    assert found.tasks["pretrain"] == {"done": 1, "failed": 1, "waiting": len(trained) - 2}


def test_sets_that_are_not_prepared_are_waited_for(sweep: SweepConfig, tmp_path: Path) -> None:
    more = sweep.model_copy(
        update={
            "sources": sweep.sources | {"birds": {"recipe": "folder", "path": str(tmp_path / "cats" / "a")}}
        }
    )
    found = collect(more)
    assert found.waiting == ("source birds is not prepared yet",)
    assert {r["source"] for r in found.records if r.get("source")} == {"cats", "dogs"}


def test_a_report_is_written_from_the_store_and_left_alone_after(
    sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for task in expand(sweep).tasks:
        if task.kind != "prepare":
            finish(task)
    page = write_report(sweep)
    assert page == sweep.folder / "report.html"
    table = read_table(sweep.folder)
    assert len(table) == 32 + 2 * 5
    assert not table["accuracy"].isna().any()
    stamp = page.stat().st_mtime_ns
    write_report(sweep)
    assert page.stat().st_mtime_ns == stamp


def test_a_report_imports_no_torch(sweep: SweepConfig) -> None:
    code = (
        "import sys; from ssl_diversity.sweep.config import recorded; from ssl_diversity.report import write_report\n"
        "write_report(recorded('toy')); heavy = {'torch', 'lightly', 'timm', 'diffusers', 'pytorch_lightning'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "WANDB_MODE": "disabled"})


def test_the_command_on_the_page_makes_the_same_sweep() -> None:
    overrides = ["budget=[4096,1e12flop]", "sources=[digits,photo_patches]", "methods=[simclr,mae]", "seeds=3",
                 "distance.n=512", "hyperparameters.simclr.lr=0.01", "precision=32-true"]  # fmt: skip
    sweep = load("quickstart", overrides)
    words = shlex.split(command(sweep))
    assert words[:3] == ["ssl-diversity", "sweep", "quickstart"]
    assert "sources=[digits,photo_patches]" in words
    assert load("quickstart", words[3:]) == sweep
    assert command(load("quickstart")) == "ssl-diversity sweep quickstart"


def test_results_hold_no_nan_that_json_cannot_say(sweep: SweepConfig) -> None:
    task = next(cell.task for cell in expand(sweep).cells if cell.task)
    finish(task)
    broken = read_json(task.folder / "result.json") | {"effective_rank": float("nan"), "collapsed": True}
    write_json(task.folder / "result.json", broken)
    found = [r for r in collect(sweep).records if r["cell"] == task.key]
    assert {(r["effective_rank"], r["collapsed"]) for r in found} == {(None, True)}


def test_the_command_says_a_backbone_and_a_budget_as_people_do() -> None:
    asked = ["methods=[simclr]", "backbone=resnet18", "budget=5e5"]
    sweep = load("quickstart", asked)
    words = shlex.split(command(sweep))
    assert {"backbone=resnet18", "budget=[500000]"} <= set(words)
    assert load("quickstart", words[3:]) == sweep
