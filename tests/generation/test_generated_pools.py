"""Sampling a pool: every image from its own seed, blocks the same however they are made, nothing made twice."""

import functools
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline

from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import write_atomic
from ssl_diversity.generation import pipeline as pipelines
from ssl_diversity.generation.config import GenerateSpec, folder_digest
from ssl_diversity.generation.pipeline import Sampler, image_seeds
from ssl_diversity.generation.task import Blocks, generate, train_generator
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep.task import Task

ENCODING = {"size": 8, "filter": "bicubic", "codec": "png", "quality": 95}


@pytest.fixture
def spec(recipe, saved) -> GenerateSpec:
    return recipe(pipeline=str(saved()), real_images=5).generate_spec(**ENCODING)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The first seed of every block that is computed."""
    blocks: list[int] = []
    whole = Sampler.block

    def block(self, seeds):
        blocks.append(seeds[0])
        return whole(self, seeds)

    monkeypatch.setattr(Sampler, "block", block)
    return blocks


def test_trained_here(real, recipe, tmp_path):
    """From a pool to a generator to a pool, as the sweep's tasks."""
    train = Task("train-generator", recipe().generator_spec(real))
    train_generator(train.spec, train.folder, Runtime())
    spec = recipe().generate_spec(**ENCODING, trained=(train.key, train.spec.rows_count))
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(result["pool"])
    assert pool.path == spec.directory
    assert (pool.size, pool.image_size, pool.info.source, pool.info.real_images) == (10, 8, "generated", 24)
    images = pool.images(np.arange(10))
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    assert (images == images[..., :1]).all()  # one channel: grey


def test_rows_know_how_to_be_made_again(spec, tmp_path):
    generate(spec, tmp_path, Runtime())
    pool = Pool.open(spec.directory)
    folder = spec.pipeline_folder
    assert pool.info.provenance["pipeline_digest"] == folder_digest(folder)
    assert pool.info.provenance["block"] == 4
    rows = [pool.provenance(row) for row in range(pool.size)]
    assert [row["index"] for row in rows] == list(range(10))
    assert [row["seed"] for row in rows] == image_seeds(spec.seed, range(10))
    assert {row["pipeline_digest"] for row in rows} == {folder_digest(folder)}
    assert {(row["scheduler"], row["steps"]) for row in rows} == {("ddim", 3)}
    assert all(row["diffusers"] for row in rows)
    # with diffusers alone, from what row 5 says: its block is images 4 to 7
    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    again = DDIMPipeline(loaded.unet, DDIMScheduler.from_config(loaded.scheduler.config))
    generators = [torch.Generator().manual_seed(rows[i]["seed"]) for i in range(4, 8)]
    image = again(batch_size=4, generator=generators, num_inference_steps=3).images[1]
    np.testing.assert_array_equal(np.asarray(image), pool.images([5])[0])


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_blocks_do_not_know_of_each_other(recipe, saved, tmp_path, scheduler):
    changes = {"pipeline": str(saved()), "sampling": {"scheduler": scheduler}, "real_images": 5}
    spec = recipe(**changes).generate_spec(**ENCODING)
    in_order, shuffled = (Blocks(spec, tmp_path / name, "cpu") for name in "ab")
    first = [in_order.images(number) for number in range(3)]
    torch.manual_seed(7)
    second = {number: shuffled.images(number) for number in (2, 0, 1)}
    for number in range(3):
        np.testing.assert_array_equal(first[number], second[number])
        np.testing.assert_array_equal(
            first[number], Blocks(spec, tmp_path / f"alone{number}", "cpu").images(number)
        )
    assert not np.array_equal(first[0], first[1])


def test_longer_pools_begin_with_the_shorter(recipe, saved, tmp_path):
    folder = str(saved())
    images = []
    for n in (5, 10):
        spec = recipe(pipeline=folder, real_images=5, n=n).generate_spec(**ENCODING)
        generate(spec, tmp_path / str(n), Runtime())
        images.append(Pool.open(spec.directory).images(np.arange(5)))
    np.testing.assert_array_equal(*images)


def test_seeds_are_distinct_and_keyed():
    seeds = image_seeds(0, range(10_000))
    assert len(set(seeds)) == 10_000
    assert seeds[100:110] == image_seeds(0, range(100, 110))
    assert not set(seeds) & set(image_seeds(1, range(10_000)))
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_stopped_and_resumed(spec, tmp_path, made):
    """Stopped in the second block: its blocks are kept, and the pool is that of an undisturbed run."""
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        generate(spec, tmp_path, Runtime(stop=lambda: next(calls) >= 5))
    assert not spec.directory.exists()
    before = list(made)
    assert 1 <= len(before) < 3
    generate(spec, tmp_path, Runtime())
    seeds = image_seeds(spec.seed, range(12))
    assert made == [seeds[0], seeds[4], seeds[8]]  # each block once
    assert not (tmp_path / "blocks").exists()
    generate(spec, tmp_path / "again", Runtime())
    assert len(made) == 3  # a finished pool is returned
    whole = Blocks(spec, tmp_path / "whole", "cpu")
    want = np.concatenate([whole.images(number) for number in range(3)])[:10]
    np.testing.assert_array_equal(Pool.open(spec.directory).images(np.arange(10)), want)


def test_duplicates_yield_to_the_earlier_image(spec, tmp_path, monkeypatch):
    """A generator that repeats itself is asked for more, up to a bound."""

    def block(self, seeds, kinds):
        return np.stack([np.full((8, 8, 3), seed % kinds, np.uint8) for seed in seeds])

    monkeypatch.setattr(Sampler, "block", functools.partialmethod(block, kinds=30))
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(spec.directory)
    assert result["size"] == 10
    indices = [pool.provenance(row)["index"] for row in range(10)]
    values = [seed % 30 for seed in image_seeds(spec.seed, range(20))]
    assert indices == [i for i, value in enumerate(values) if value not in values[:i]][:10]
    assert result["counts"]["duplicate"] == indices[-1] + 1 - 10

    monkeypatch.setattr(Sampler, "block", functools.partialmethod(block, kinds=3))
    other = spec.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="only 3 of 20 sampled images are distinct, n=10"):
        generate(other, tmp_path / "other", Runtime())
    assert not other.directory.exists()


@pytest.mark.parametrize("saving", [("ddpm", 1, 8), ("ddim", 3, 8), ("ddpm", 3, (8, 12))])
def test_anybodys_pipeline(recipe, saved, tmp_path, saving):
    folder = saved(*saving)
    spec = recipe(pipeline=str(folder), n=3, real_images=9).generate_spec(**{**ENCODING, "size": 16})
    result = generate(spec, tmp_path, Runtime())
    pool = Pool.open(result["pool"])
    assert pool.images([0, 1, 2]).shape == (3, 16, 16, 3)
    assert pool.info.real_images == 9
    assert pool.info.provenance["pipeline_class"] == (
        "DDPMPipeline" if saving[0] == "ddpm" else "DDIMPipeline"
    )


def test_pipelines_that_cannot_be_sampled(recipe, saved, tmp_path):
    folder = saved()
    good = recipe(pipeline=str(folder), real_images=1)

    def refused(message: str, spec: GenerateSpec) -> None:
        with pytest.raises(UserError, match=message) as error:
            generate(spec, tmp_path / "out", Runtime())
        assert "\n" not in str(error.value)
        assert not spec.directory.exists()

    spec = good.generate_spec(**ENCODING)
    refused("no such folder", spec.model_copy(update={"pipeline": "task:00ff", "pipeline_digest": None}))
    refused("changed since", spec.model_copy(update={"pipeline_digest": "0" * 32}))
    many = recipe(pipeline=str(folder), real_images=1, sampling={"steps": 21})
    refused("sampling.steps=21", many.generate_spec(**ENCODING))
    odd = recipe(pipeline=str(saved("ddpm", 4)), real_images=1)
    refused("makes 4-channel images", odd.generate_spec(**ENCODING))
    weights = next((folder / "unet").glob("*.safetensors"))
    write_atomic(weights, weights.read_bytes()[:100])
    refused("cannot be loaded", good.generate_spec(**ENCODING))


def test_saving_is_all_or_nothing(tmp_path):
    class Failing:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="No space"):
        pipelines.save(Failing(), out / "pipeline")
    assert not list(out.iterdir())


@pytest.mark.slow
def test_killed(recipe, saved, tmp_path, subprocess_environment):
    """kill -9 at random moments: the pool is the undisturbed one."""
    folder = str(saved())
    changes = {"pipeline": folder, "real_images": 5, "n": 200, "sampling": {"steps": 20, "block": 8}}
    spec = recipe(**changes).generate_spec(**ENCODING)
    code = (
        "import sys; from pathlib import Path; from ssl_diversity.runtime import Runtime\n"
        "from ssl_diversity.generation.config import GenerateSpec\n"
        "from ssl_diversity.generation.task import generate\n"
        "generate(GenerateSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Runtime())"
    )
    command = [sys.executable, "-c", code, spec.model_dump_json(), str(tmp_path / "out")]
    whole = recipe(**changes, name="whole").generate_spec(**ENCODING)
    generate(whole, tmp_path / "whole", Runtime())
    delays = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, env=subprocess_environment)
        deadline = time.monotonic() + 60
        count = len(list(tmp_path.glob("out/blocks/*/*.npy")))
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(tmp_path.glob("out/blocks/*/*.npy"))) > count:
                break
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, env=subprocess_environment)
    killed, undisturbed = Pool.open(spec.directory), Pool.open(whole.directory)
    assert killed.digest == undisturbed.digest
    assert [s.blake2b for s in killed.info.shards] == [s.blake2b for s in undisturbed.info.shards]
