"""A generated source in plans: what is asked for, what is there, and what they make of each other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines

from ssl_diversity.errors import UserError
from ssl_diversity.generation.assembly import generate
from ssl_diversity.generation.chunks import sample
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import config, estimate, store
from ssl_diversity.sweep.claims import claim
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import Task

SAMPLING = {"steps": 2, "block": 10, "chunk": 20}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    tiny_pipelines.ddpm(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def plan(pipeline: Path, n: int, **more: object) -> Plan:
    options = {"pipeline": str(pipeline), "n": n, "name": "made", "sampling": SAMPLING, **more}
    return expand(config.one_source("generated", options, 8))


def work(planned: Plan) -> list[str]:
    """Do what is left of a plan; the labels of what was done."""
    done = []
    for task in planned.tasks:
        if task.kind in ("sample", "generate") and task not in Done():
            _do(task)
            done.append(task.label)
    return done


def _do(task: Task) -> None:
    held = claim(task.folder, stale_s=60)
    assert held is not None
    function = sample if task.kind == "sample" else generate
    assert store.publish(task, held, function(task.spec, task.folder, Runtime()))  # type: ignore[operator]


def test_n_images_are_chunks_and_the_pool(pipeline: Path) -> None:
    planned = plan(pipeline, 50)
    assert [task.kind for task in planned.tasks] == ["sample"] * 3 + ["generate"]
    assert "source made is not prepared yet" in planned.waiting[0]
    assert len(work(planned)) == 4
    again = plan(pipeline, 50)
    assert not again.waiting
    assert not work(again)


def test_a_pool_that_grew_is_asked_for_again_after_it_was_removed(pipeline: Path) -> None:
    for n in (40, 60):
        work(plan(pipeline, n))
    (pool,) = plan(pipeline, 60).sources[0].pools
    before = pool.digest
    shutil.rmtree(pool.path)
    work(plan(pipeline, 40))
    grown = plan(pipeline, 60)
    assert [task.kind for task in grown.tasks if task not in Done() and task.kind != "pretrain"] == [
        "generate"
    ]
    work(grown)
    (pool,) = plan(pipeline, 60).sources[0].pools
    assert (pool.digest, pool.info.first_size) == (before, 40)


def test_draws_of_a_sweep_are_within_what_it_asks_for(pipeline: Path) -> None:
    work(plan(pipeline, 60))
    source = plan(pipeline, 40).sources[0]
    assert (source.size, source.pools[0].size) == (40, 60)
    large = [source.subset(30, replicate).parts[0][1].numbers() for replicate in range(6)]
    assert max(map(np.max, large)) < 40
    shutil.rmtree(source.pools[0].path)
    work(plan(pipeline, 40))
    small = plan(pipeline, 40).sources[0]
    assert small.pools[0].size == 40
    for replicate, rows in enumerate(large):
        subset = small.subset(30, replicate)
        np.testing.assert_array_equal(subset.parts[0][1].numbers(), rows)
    work(plan(pipeline, 60))
    assert source.subset(30, 3).specs[0].rows_ring == 40  # of the pool of 60


def test_a_mistake_is_not_answered_with_a_pool_of_that_name(pipeline: Path) -> None:
    work(plan(pipeline, 20))
    with pytest.raises(UserError, match=r"sources.made.*seeed"):
        plan(pipeline, 20, seeed=1)


def test_classes_of_a_pool_or_a_file_but_not_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipelines.classes(tmp_path / "three")
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="classes=birds: no such text file, set of this sweep or pool"):
        plan(tmp_path / "three", 20, classes="birds")
    Path("names.txt").write_text("wren\nowl\n")
    generate_task = plan(tmp_path / "three", 20, classes="names.txt").tasks[-1]
    assert generate_task.spec.conditions.classes == ("wren", "owl")  # type: ignore[attr-defined]


def test_what_was_there_is_no_measure_of_speed(pipeline: Path) -> None:
    task = plan(pipeline, 20).tasks[0]
    estimate.record(task, {"made": 0}, 0.001, "here")
    assert estimate.times().of(task, "here") is None
    estimate.record(task, {"made": 10}, 5.0, "here")
    assert estimate.times().of(task, "here") == 10.0


def test_a_damaged_pool_is_a_line(pipeline: Path) -> None:
    work(plan(pipeline, 20))
    (pool,) = plan(pipeline, 20).sources[0].pools
    (pool.path / "pool.json").write_text(json.dumps({"name": "made"})[:-3])
    with pytest.raises(UserError, match="damaged"):
        plan(pipeline, 20)
