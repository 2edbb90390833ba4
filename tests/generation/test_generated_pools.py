"""A pool of any pipeline: the same however the work is cut, grown without a change, nothing made twice."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_worker import working

from ssl_diversity import files
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.verify import verify as verify_files
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.generation.assembly import generate, verify
from ssl_diversity.generation.chunks import Maker, sample
from ssl_diversity.generation.conditions import image_seeds
from ssl_diversity.generation.pipeline import Sampler
from ssl_diversity.generation.sampling import GenerateSpec, folder_digest
from ssl_diversity.generation.training import train_generator
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep.task import Task

ENCODING = {"size": 8, "filter": "bicubic", "codec": "png", "quality": 95}
BIRDS = ("wren", "owl", "rook")
KINDS = {"ddpm": {}, "ddim": {}, "classes": {"classes": BIRDS}, "dit": {}, "text": {"classes": BIRDS}}


@pytest.fixture
def spec(recipe, saved) -> GenerateSpec:
    return recipe(pipeline=str(saved()), real_images=5).generate_spec(**ENCODING)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The first image of every block that is computed; the one image that FLOPs are counted with left out."""
    blocks: list[int] = []
    whole = Sampler.block

    def block(self, drawn, **changes):
        if not changes:
            blocks.append(drawn.indices.start)
        return whole(self, drawn, **changes)

    monkeypatch.setattr(Sampler, "block", block)
    return blocks


@pytest.fixture
def paint(monkeypatch) -> Callable[..., None]:
    """Has images painted by a function of the image's number in place of a pipeline."""

    def use(picture: Callable[[int], np.ndarray], unsafe: Callable[[int], bool] = lambda i: False) -> None:
        def block(self, drawn, **changes):
            images = np.stack([picture(i) for i in drawn.indices])
            return images, np.array([unsafe(i) for i in drawn.indices])

        monkeypatch.setattr(Sampler, "block", block)

    return use


def noise(i: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(abs(i)).integers(1, 255, (size, size, 3), dtype=np.uint8)


def test_trained_here(real, recipe, tmp_path):
    """From a pool to a generator to a pool, as the sweep's tasks."""
    train = Task("train-generator", recipe().generator_spec(real))
    trained = train_generator(train.spec, train.folder, Runtime())
    files.write_json(train.folder / "result.json", trained)
    spec = recipe().generate_spec(**ENCODING, trained=(train.key, train.spec.rows_count))
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(result["pool"])
    assert pool.path == spec.directory
    assert (pool.size, pool.image_size, pool.info.source, pool.info.real_images) == (10, 8, "generated", 24)
    images = pool.images(np.arange(10))
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    assert (images == images[..., :1]).all()  # one channel: grey
    assert pool.info.provenance["cost"]["training_flops"] == trained.get("train_flops")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_a_pool_that_can_be_made_again(recipe, saved, tmp_path, kind):
    recipe = recipe(pipeline=str(saved(kind)), n=14, sampling={"scheduler": None}, **KINDS[kind])
    spec = recipe.generate_spec(**ENCODING)
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(result["pool"])
    assert pool.size == 14
    assert pool.images(np.arange(14)).shape == (14, 8, 8, 3)
    assert not list(verify_files(pool))
    found = verify(spec, 6, Runtime())
    assert found == {"images": 6, "equal": 6, "greatest_difference": 0, "differing_rows": []}
    cost = pool.info.provenance["cost"]
    assert cost["seconds"] > 0
    assert cost["flops_per_image"] > 0
    assert "energy_joules" in cost


def test_rows_know_how_to_be_made_again(recipe, saved, tmp_path):
    changes = {"classes": BIRDS, "sampling": {"guidance": 2.0}}
    spec = recipe(pipeline=str(folder := saved("text")), **changes).generate_spec(**ENCODING)
    generate(spec, tmp_path, Runtime())
    pool = Pool.open(spec.directory)
    assert pool.info.provenance["pipeline_digest"] == folder_digest(folder)
    assert pool.info.provenance["pipeline_class"] == "StableDiffusionPipeline"
    assert pool.info.provenance["block"] == 4
    assert pool.info.classes == list(BIRDS)
    rows = [pool.provenance(row) for row in range(pool.size)]
    assert [row["index"] for row in rows] == list(range(10))
    assert [row["seed"] for row in rows] == image_seeds(spec.seed, range(10))
    assert [row["label"] for row in rows] == pool.label.tolist()
    assert [row["prompt"] for row in rows] == [f"A photo of a {BIRDS[i]}" for i in pool.label]
    assert {row["pipeline_digest"] for row in rows} == {folder_digest(folder)}
    assert {(row["scheduler"], row["steps"], row["guidance"]) for row in rows} == {("DDIMScheduler", 3, 2.0)}
    assert all(row["diffusers"] for row in rows)


def test_however_the_work_is_cut(recipe, saved, tmp_path, monkeypatch, subprocess_environment):
    """By one worker or by three at once, in chunks of any size and order, or with no chunks at all: the same files."""
    changes = {"pipeline": str(saved("text")), "classes": BIRDS, "n": 40}
    found = set()
    for name, chunk, workers in (("alone", 4, 0), ("one", 8, 1), ("three", 12, 3), ("large", 400, 1)):
        monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / name))  # where nothing was made
        spec = recipe(**changes, sampling={"chunk": chunk}).generate_spec(**ENCODING)
        tasks = list(spec.samples())
        assert sum(task.images for task in tasks) == 40
        random.Random(name).shuffle(tasks)
        if workers == 1:
            for task in tasks:
                sample(task, tmp_path, Runtime())
        elif workers:
            environment = {**subprocess_environment, "SSL_DIVERSITY_HOME": str(tmp_path / name)}
            processes = [working(environment, *tasks[i::workers]) for i in range(workers)]
            assert [process.wait() for process in processes] == [0] * workers
        generate(spec, tmp_path, Runtime())
        pool = Pool.open(spec.directory)
        found.add((pool.digest, *(shard.blake2b for shard in pool.info.shards)))
    assert len(found) == 1


def test_nothing_is_made_twice(spec, tmp_path, made):
    spec = spec.model_copy(update={"n": 20})
    for task in reversed(
        spec.model_copy(update={"sampling": spec.sampling.model_copy(update={"chunk": 8})}).samples()
    ):
        first = sample(task, tmp_path, Runtime())
        again = sample(task, tmp_path, Runtime())
        assert (first["made"], again["made"]) == (task.images, 0)
        assert first["seconds"] == again["seconds"]  # what its images took, whenever
    assert sorted(made) == [0, 4, 8, 12, 16]
    generate(spec, tmp_path, Runtime())
    generate(spec, tmp_path, Runtime())
    assert len(made) == 5
    stream = Maker(spec, Runtime()).stream.folder
    assert {path.suffix for path in stream.iterdir()} == {".npz", ".json"}  # the pool has the images now


def test_a_lost_chunk_costs_itself(spec, tmp_path, made):
    sampling = spec.sampling.model_copy(update={"chunk": 8})
    spec = spec.model_copy(update={"n": 24, "sampling": sampling})
    for task in spec.samples():
        sample(task, tmp_path, Runtime())
    made.clear()
    for path in Maker(spec, Runtime()).stream.folder.glob("00000002-2.*"):
        path.unlink()
    generate(spec, tmp_path, Runtime())
    assert made == [8, 12]
    assert Pool.open(spec.directory).size == 24


def test_stopped_and_resumed(spec, tmp_path, made, monkeypatch):
    """Stopped between blocks, and while writing: what was made is kept, and the pool is that of an undisturbed run."""
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        generate(spec, tmp_path, Runtime(stop=lambda: next(calls) >= 2))
    assert not spec.directory.exists()
    assert made == [0, 4]
    with pytest.raises(Interrupted):
        generate(spec, tmp_path, Runtime(stop=lambda: next(calls) >= 4))
    assert made == [0, 4, 8]
    assert not spec.directory.exists()
    generate(spec, tmp_path, Runtime())
    assert made == [0, 4, 8]  # each block once
    stopped = Pool.open(spec.directory)
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "undisturbed"))
    generate(spec, tmp_path, Runtime())
    assert Pool.open(spec.directory).digest == stopped.digest


def test_pools_grow(recipe, saved, tmp_path, made, monkeypatch):
    """From 500 to 800 in chunks: no image of the 500 is made again, draws of them are what they were, and the pool is
    that of 800 at once."""
    changes = {"pipeline": str(saved("ddpm")), "sampling": {"steps": 2, "block": 16, "chunk": 64}}

    def make(n: int) -> Pool:
        spec = recipe(**changes, n=n).generate_spec(**ENCODING)
        assert not spec.written
        for task in spec.samples():
            sample(task, tmp_path, Runtime())
        generate(spec, tmp_path, Runtime())
        assert spec.written
        return Pool.open(spec.directory)

    short = make(500)
    assert len(made) == 32
    draws = [(n, r) for n in (1, 16, 400, 500) for r in (0, 1, 2)]
    before = [short.rows_digest(short.rows(n, r)) for n, r in draws]
    images = short.images(np.arange(500))
    shards = [(short.path / shard.file).read_bytes() for shard in short.info.shards]
    long = make(800)
    assert long.path == short.path
    assert sorted(made) == list(range(0, 800, 16))  # each block once
    assert [long.rows_digest(long.rows(n, r)) for n, r in draws] == before
    np.testing.assert_array_equal(long.images(np.arange(500)), images)
    assert [(long.path / shard.file).read_bytes() for shard in long.info.shards[: len(shards)]] == shards
    assert long.provenance(799)["index"] == 799
    assert not list(verify_files(long))
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "elsewhere"))
    whole = make(800)
    assert (whole.digest, whole.info.counts) == (long.digest, long.info.counts)
    fewer = recipe(**changes, n=300).generate_spec(**ENCODING)
    assert generate(fewer, tmp_path, Runtime())["size"] == 800  # has them


def test_grown_with_drops(recipe, saved, tmp_path, paint, monkeypatch):
    """Filters and copies of every kind, cut anywhere: rows, counts and the list of drops are those of one go."""

    def picture(i: int) -> np.ndarray:
        kind = i % 7
        if kind == 3:
            return noise(i - 3 - 7 * (i % 3), 16)  # equal to an earlier one, which may be dropped itself
        if kind == 5:
            return smooth(i - 4 - 7 * (i % 3)) + np.uint8(4)  # a little brighter
        return (
            np.full((16, 16, 3), i % 256, np.uint8) if kind == 6 else smooth(i) if kind == 1 else noise(i, 16)
        )

    paint(picture, unsafe=lambda i: i % 13 == 4)
    options = {"pipeline": str(saved()), "near_duplicates": True, "sampling": {"oversample": 9}}

    def make(home: str, *sizes: int) -> tuple[Pool, list[str]]:
        monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / home))
        for n in sizes:
            spec = recipe(**options, n=n).generate_spec(**ENCODING)
            generate(spec, tmp_path, Runtime())
        pool = Pool.open(spec.directory)
        assert pool.size == sizes[-1]
        return pool, (pool.path / "dropped.jsonl").read_text().splitlines()

    whole, drops = make("whole", 90)
    counts = whole.info.counts
    for cause in ("safety", "blank", "duplicate", "near_duplicate"):
        assert counts[cause] == sum(json.loads(line)["cause"] == cause for line in drops) > 0
    assert counts["read"] == whole.size + len(drops)
    indices = [whole.provenance(row)["index"] for row in range(whole.size)]
    dropped = [json.loads(line)["name"] for line in drops]
    assert sorted(indices + dropped) == list(range(counts["read"]))
    assert indices == sorted(indices)
    assert all(json.loads(line)["kept"] < json.loads(line)["name"] for line in drops if "kept" in line)
    for home, sizes in (("two", (37, 90)), ("many", (1, 5, 36, 38, 70, 90))):
        grown, given = make(home, *sizes)
        assert (grown.digest, grown.info.counts, given) == (whole.digest, counts, drops)


def smooth(i: int) -> np.ndarray:
    """An image that near copies can be found of."""
    from PIL import Image

    small = Image.fromarray(np.random.default_rng(abs(i)).integers(30, 220, (5, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC))


def test_a_pool_that_is_made_otherwise_now(recipe, saved, tmp_path, paint, home):
    """Grown on another device, which makes other images: refused; the pool stays what it was."""
    paint(noise)
    options = {"pipeline": str(saved())}
    generate(recipe(**options).generate_spec(**ENCODING), tmp_path, Runtime())
    for path in (home / "store" / "images").rglob("*.npz"):
        path.unlink()
    paint(lambda i: noise(i + 1000))
    more = recipe(**options, n=20).generate_spec(**ENCODING)
    with pytest.raises(UserError, match=r"10 of its 10 images, the first in row 0, are not those"):
        generate(more, tmp_path, Runtime())
    assert Pool.open(more.directory).size == 10


def test_images_that_another_pool_has_taken(recipe, saved, tmp_path, made):
    """Two pools of the same images: what the first took is made again for the second."""
    one, two = (
        recipe(pipeline=str(saved_at), name=name).generate_spec(**ENCODING)
        for saved_at, name in zip([saved()] * 2, "ab", strict=True)
    )
    for spec in (one, two):
        generate(spec, tmp_path, Runtime())
    assert made == [0, 4, 8, 0, 4]  # of the last block, the first pool has not taken all
    assert Pool.open(one.directory).digest == Pool.open(two.directory).digest


def test_duplicates_yield_to_the_earlier_image(spec, tmp_path, paint):
    """A generator that repeats itself is asked for more, up to a bound."""
    paint(lambda i: noise(i * 7 % 30 // 2))
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(spec.directory)
    assert result["size"] == 10
    indices = [pool.provenance(row)["index"] for row in range(10)]
    values = [i * 7 % 30 // 2 for i in range(20)]
    assert indices == [i for i, value in enumerate(values) if value not in values[:i]][:10]
    assert result["counts"]["duplicate"] == indices[-1] + 1 - 10

    paint(lambda i: noise(i % 3))
    other = spec.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r"only 3 of 20 sampled images are left \(duplicate 17\), n=10"):
        generate(other, tmp_path / "other", Runtime())
    assert not other.directory.exists()


def test_filters_are_the_users(recipe, saved, tmp_path, paint):
    def picture(i: int) -> np.ndarray:
        flat = np.full((8, 8, 3), 100 + i, np.uint8)
        burnt = np.where(noise(i) > 128, 255, 0).astype(np.uint8)
        return {0: flat, 1: burnt, 2: noise(i)}.get(i % 4, noise(i))

    paint(picture, unsafe=lambda i: i % 4 == 2)
    counts = {}
    for filters in ((), ("blank",), ("saturated",), ("safety",), ("safety", "blank", "saturated")):
        options = {"pipeline": str(saved()), "filters": filters, "sampling": {"oversample": 9}}
        spec = recipe(**options, name=f"f{len(counts)}").generate_spec(**ENCODING)
        counts[filters] = generate(spec, tmp_path, Runtime())["counts"]
    for filters, found in counts.items():
        assert found["kept"] == 10
        for name in ("blank", "saturated", "safety"):
            assert (found[name] > 0) == (name in filters)
        assert found["read"] == sum(count for name, count in found.items() if name != "read")


def test_resized_copies_are_told_from_equal_ones(recipe, saved, tmp_path, paint):
    """Images that differ as the model gives them and not as the pool has them."""
    black = np.zeros((64, 64, 3), np.uint8)

    def picture(i: int) -> np.ndarray:
        out = noise(i // 3, 64) if i % 3 else black.copy()
        out[0, 0, 0] ^= i % 3 == 2
        return out

    paint(picture)
    options = {"pipeline": str(saved()), "filters": [], "sampling": {"oversample": 9}}
    counts = generate(recipe(**options).generate_spec(**ENCODING), tmp_path, Runtime())["counts"]
    assert counts["duplicate"] == counts["read"] // 3 - (counts["read"] % 3 == 0)
    assert counts["duplicate_after_resize"] > 0


@pytest.mark.parametrize("saving", [("ddpm", 1, 8), ("ddim", 3, 8), ("ddpm", 3, (8, 12))])
def test_anybodys_pipeline(recipe, saved, tmp_path, saving):
    spec = recipe(pipeline=str(saved(*saving)), n=3, real_images=9).generate_spec(**{**ENCODING, "size": 16})
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(result["pool"])
    assert pool.images([0, 1, 2]).shape == (3, 16, 16, 3)
    assert pool.info.real_images == 9


def test_pipelines_that_changed_or_are_missing(spec, tmp_path):
    def refused(message: str, **changes: Any) -> None:
        other = spec.model_copy(update=changes)
        with pytest.raises(UserError, match=message) as error:
            generate(other, tmp_path, Runtime())
        assert "\n" not in str(error.value)
        assert not other.directory.exists()

    refused("no such folder", pipeline="task:00ff", pipeline_digest=None)
    refused("changed since", pipeline_digest="0" * 32)
    hub = f"owner/name@{'0' * 40}"
    refused("cannot be had from the Hugging Face hub", pipeline=f"hub:{hub}", pipeline_digest=hub)


def test_verify_tells_what_differs(spec, tmp_path, paint):
    paint(noise)
    generate(spec, tmp_path, Runtime())
    assert verify(spec, 100, Runtime())["equal"] == 10
    paint(lambda i: noise(i) + np.uint8(i == 3))
    found = verify(spec, 100, Runtime())
    assert found == {"images": 10, "equal": 9, "greatest_difference": 1, "differing_rows": [3]}
    write = files.write_atomic
    write(spec_folder(spec) / "unet" / "config.json", "{}")
    with pytest.raises(UserError, match="changed since"):
        verify(spec, 1, Runtime())


def spec_folder(spec: GenerateSpec) -> Path:
    return Path(spec.pipeline)
