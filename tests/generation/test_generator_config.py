"""Recipes and specs: what is identity, what is refused, and that planning needs no torch."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_diversity.data import recipes
from ssl_diversity.errors import UserError
from ssl_diversity.files import digest
from ssl_diversity.generation.config import from_recipe
from ssl_diversity.generation.sampling import folder_digest, pipeline_class, task_folder

ENCODING = {"size": 8, "filter": "bicubic", "codec": "png", "quality": 95}


def test_planning_imports_no_torch(subprocess_environment):
    code = "import sys, ssl_diversity.generation.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=subprocess_environment)


def test_packaged_recipe():
    recipe = from_recipe(recipes.load("generated-digits"), {"n": 7})
    assert recipe.trains
    assert recipe.n == 7
    assert recipe.name == "generated-digits"
    base = recipes.resolve(str(recipe.base), recipe.base_options, defaults=ENCODING)
    assert recipe.generator is not None
    assert base.size == recipe.generator.image_size
    assert base.name != recipe.base  # the sweep's own pool of that recipe keeps its name to itself


def test_generator_identity(real, recipe):
    spec = recipe().generator_spec(real)
    assert (spec.rows_count, spec.rows_digest) == (24, real.rows_digest(real.rows(24)))
    same = spec.model_copy(update={"pool": "elsewhere", "checkpoint_samples": 1})
    assert same.identity() == spec.identity()
    for key, value in {
        "seed": 1,
        "samples": 48,
        "lr": 0.1,
        "rows_digest": "x",
        "precision": "bf16-mixed",
    }.items():
        assert spec.model_copy(update={key: value}).identity() != spec.identity()


def test_fewer_samples_than_images(real, recipe):
    """A run of 20 samples in batches of 8 sees 16 images, and says so."""
    few = recipe(generator={"samples": 20}).generator_spec(real)
    assert few.rows_count == 16


def test_generate_identity(recipe, saved):
    def spec(encoding=ENCODING, key="aa11", **changes):
        return recipe(**changes).generate_spec(**encoding, trained=(key, 24))

    one = spec()
    assert one.pipeline == "task:aa11"
    assert one.real_images == 24
    assert task_folder(one.pipeline).parts[-4:] == ("train-generator", "aa", "aa11", "pipeline")
    others = [
        spec(key="bb11"),
        spec(seed=1),
        spec(sampling={"block": 5}),
        spec(sampling={"scheduler": None}),
        spec(sampling={"guidance": 2.0}),
        spec(classes=["wren", "owl"]),
        spec(classes=["wren", "owl"], weights=[1, 2]),
        spec(filters=["blank"]),
        spec(near_duplicates=True),
        spec({**ENCODING, "size": 16}),
    ]
    assert len({digest(each.identity()) for each in (one, *others)}) == len(others) + 1
    assert len({each.directory for each in (one, *others)}) == len(others) + 1
    same = spec(origin="here", sampling={"oversample": 9, "chunk": 8, "offload": "model"})
    assert same.identity() == one.identity()
    longer = spec(n=11)  # another task, the same pool
    assert longer.identity() != one.identity()
    assert longer.directory == one.directory


def test_chunks_cover_what_n_images_need(recipe):
    """Each block once, in order; those of a longer pool are the same but for the last."""
    made = recipe(sampling={"chunk": 12})
    spec = made.generate_spec(**ENCODING, trained=("aa11", 24))
    for n in (1, 4, 5, 12, 13, 50):
        tasks = spec.model_copy(update={"n": n}).samples()
        blocks = [b for task in tasks for b in range(task.first_block, task.first_block + task.blocks)]
        assert blocks == list(range(-(-n // 4)))
        assert all(task.blocks == 3 for task in tasks[:-1])
        more = spec.model_copy(update={"n": n + 100}).samples()
        assert tasks[:-1] == more[: len(tasks) - 1]
    assert recipe(sampling={"block": 100}).sampling.chunk_blocks == 11
    assert recipe(sampling={"block": 2000}).sampling.chunk_blocks == 1
    renamed = spec.model_copy(update={"name": "other", "n": 50, "filters": ()}).samples()
    assert [t.identity() for t in renamed] == [
        t.identity() for t in spec.model_copy(update={"n": 50}).samples()
    ]


def test_what_images_are_made_of(recipe, tmp_path):
    path = tmp_path / "birds.txt"
    path.write_text("wren\n\n barn owl \nrook\n")
    listed = recipe(classes=["wren", "barn owl", "rook"]).conditions()
    assert recipe(classes=str(path)).conditions() == listed
    assert recipe(classes="a pool").conditions(["wren", "barn owl", "rook"]) == listed
    weighed = recipe(classes=str(path), weights={"rook": 2, "wren": 1})
    assert weighed.conditions().weights == (1, 0, 2)
    assert recipe(classes=str(path), weights=[1, 0, 2]).conditions() == weighed.conditions()
    with pytest.raises(UserError, match="weights: no class 'rok'; did you mean 'rook'"):
        recipe(classes=str(path), weights={"rok": 2}).conditions()
    with pytest.raises(UserError, match="classes=nowhere: no such text file; give a list"):
        recipe(classes="nowhere").conditions()
    with pytest.raises(UserError, match="set 'made': templates: 'clouds' does not name the class"):
        recipe(classes=["a"], templates=["clouds"]).conditions()


def test_pipelines_of_the_hub(recipe, saved, monkeypatch):
    """By the commit alone, so that planning needs no network; a folder of that name comes first."""
    commit = "0123456789abcdef" * 2 + "01234567"
    spec = recipe(pipeline="owner/tiny-ddpm", revision=commit).generate_spec(**ENCODING)
    assert spec.pipeline == f"hub:owner/tiny-ddpm@{commit}"
    assert spec.pipeline_digest == f"owner/tiny-ddpm@{commit}"
    for revision in (None, "main", commit[:7]):
        with pytest.raises(UserError, match="say which commit") as error:
            recipe(pipeline="owner/tiny-ddpm", revision=revision).generate_spec(**ENCODING)
        assert "https://huggingface.co/owner/tiny-ddpm/commits" in str(error.value)
    folder = saved()
    monkeypatch.chdir(folder.parent.parent)
    near = f"{folder.parent.name}/{folder.name}"
    assert recipe(pipeline=near).generate_spec(**ENCODING).pipeline == str(folder)


def test_a_folder_that_changes(saved):
    """Its digest is kept, and never that of other files."""
    folder = saved()
    first = folder_digest(folder)
    assert folder_digest(folder) == first
    weights = next((folder / "unet").glob("*.safetensors"))
    stat = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # times of change may be as coarse as 10 ms
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as old and as long as before
    assert folder_digest(folder) != first


def test_a_folder_is_what_it_holds(recipe, saved):
    folder = saved()
    copy = Path(shutil.copytree(folder, folder.parent / "elsewhere"))
    (copy / ".cache").write_text("hidden")
    here, there = (recipe(pipeline=str(path)).generate_spec(**ENCODING) for path in (folder, copy))
    assert not recipe(pipeline=str(folder)).trains
    assert here.identity() == there.identity()
    assert here.real_images is None
    (copy / "unet" / "config.json").write_text("{}")
    assert folder_digest(copy) != folder_digest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "give base"),
        ({"generator": {"image_size": 5}}, "cannot be halved"),
        ({"generator": {"widths": [6, 8]}}, "not a multiple of groups"),
        ({"generator": {"learning_rate": 1}}, "unknown key 'generator.learning_rate'"),
        ({"sampling": {"scheduler": "EulerDiscreteSchedular"}}, "did you mean 'EulerDiscreteScheduler'"),
        ({"sampling": {"chunk": 10}}, "chunk=10 is not a multiple of block=4; say chunk=8"),
        ({"filters": ["ugly"]}, "filters.0"),
        ({"n": 0}, "n:"),
    ],
)
def test_wrong_recipes(recipe, changes, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(**changes)
    assert "\n" not in str(error.value)


def test_generators_that_the_pool_does_not_allow(real, recipe):
    with pytest.raises(UserError, match="image_size=16 is more than pool 'real' has"):
        recipe(generator={"image_size": 16}).generator_spec(real)
    with pytest.raises(UserError, match="batch_size=16"):  # 24 images: neither B nor 2B
        recipe(generator={"batch_size": 16}).generator_spec(real)


def test_folders_that_are_no_such_pipeline(tmp_path, saved):
    with pytest.raises(UserError, match="no such folder"):
        pipeline_class(tmp_path / "nowhere")
    folder = saved()
    assert pipeline_class(folder) == "DDPMPipeline"
    custom = {"_class_name": ["my_pipeline", "MyPipeline"]}
    (folder / "model_index.json").write_text(json.dumps(custom))
    with pytest.raises(UserError, match="brings code of its own"):
        pipeline_class(folder)
    (folder / "model_index.json").write_text("nonsense")
    with pytest.raises(UserError, match="not a diffusers model index"):
        pipeline_class(folder)
