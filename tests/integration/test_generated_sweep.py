"""A generated source in a sweep: planned with its cost, made once, grown without touching what was there."""

import json
import shutil
from pathlib import Path

import numpy as np
import tiny_pipelines
from helpers import results, run

from ssl_diversity import files
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.verify import verify


def sweep_file(folder: Path, pipeline: Path, n: int, name: str = "growing", method: str = "simclr") -> str:
    """Cells of 500 and of n images that the pipeline makes."""
    sampling = {"steps": 2, "block": 50, "chunk": 100}
    values = {
        "name": name,
        "image_size": 8,
        "sources": {"made": {"recipe": "generated", "pipeline": str(pipeline), "n": n, "sampling": sampling}},
        "downstream": ["digits"],
        "methods": [method],
        "backbone": "conv-tiny",
        "unique_samples": sorted({500, n}),
        "budget": 1024,
        "batch_size": 64,
        "seeds": 1,
        "baselines": [],
        "probes": ["knn"],
        "distance": {"n": 256},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def times(home: Path, kind: str) -> dict[str, int]:
    """When each result of a kind was written, by key."""
    found = (home / "store" / kind).glob("*/*/result.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def test_grown_from_500_to_800_nothing_is_made_again(home: Path, tmp_path: Path) -> None:
    tiny_pipelines.ddpm(tmp_path / "pipeline")
    pipeline = tmp_path / "pipeline"
    small_sweep = sweep_file(tmp_path, pipeline, 500)
    told = run(home, "plan", small_sweep).stdout
    assert "sample made: 500 images in 5 tasks" in told
    run(home, "sweep", small_sweep)
    (folder,) = files.pools_dir().glob("made-*")
    small = Pool.open(folder)
    rows = np.array(small.content), small.images(np.arange(500)), small.rows_digest(small.rows(300, 2))
    first = {kind: times(home, kind) for kind in ("sample", "pretrain", "probe", "distance")}
    cell = results(home, "growing")
    assert (cell["source_cost_flops"] > 0).sum() == 1

    run(home, "sweep", sweep_file(tmp_path, pipeline, 800))
    grown = Pool.open(folder)
    assert (small.size, grown.size) == (500, 800)
    np.testing.assert_array_equal(grown.content[:500], rows[0])
    np.testing.assert_array_equal(grown.images(np.arange(500)), rows[1])
    assert grown.rows_digest(grown.rows(300, 2)) == rows[2]
    assert not verify(grown)
    for kind, before in first.items():
        assert before.items() <= times(home, kind).items()
    assert len(times(home, "sample")) == 8
    assert len(times(home, "pretrain")) == 2
    again = results(home, "growing")
    old = again[again["unique_samples"].eq(500)]
    assert old["accuracy"].tolist() == cell[cell["unique_samples"].eq(500)]["accuracy"].tolist()

    before = times(home, "sample")
    shutil.rmtree(home / "store" / "images")  # nothing but the pool is needed
    run(home, "sweep", sweep_file(tmp_path, pipeline, 800, "another", "vicreg"))
    assert times(home, "sample") == before
    assert not (home / "store" / "images").exists()


def test_the_command(home: Path, tmp_path: Path) -> None:
    tiny_pipelines.classes(tmp_path / "pipeline")
    asked = ["generate", "shapes", f"pipeline={tmp_path / 'pipeline'}", "classes=[a,b,c]", "n=60"]
    sampling = ["sampling.steps=2", "sampling.block=8", "weights={a: 3, b: 1}", "--size", "8"]
    told = run(home, *asked, *sampling)
    assert "60 images" in told.stdout
    (folder,) = files.pools_dir().glob("[!.]*")  # no other pool is made for it
    pool = Pool.open(folder)
    assert pool.name == "shapes"
    assert np.bincount(pool.label, minlength=3)[2] == 0
    told = run(home, *asked, *sampling, "--verify", "5")
    assert "equal" in told.stdout
    page = run(home, "data", "page", "shapes", "--to", str(tmp_path / "shapes.html")).stdout
    assert str(tmp_path / "shapes.html") in page.replace("\n", "")
    wrong = run(home, "generate", "shapes", "pipeline=nowhere", status=2).stderr
    assert "nowhere" in wrong
    assert "\n" not in wrong.strip()
