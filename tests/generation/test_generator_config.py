"""Recipes and specs: what is identity, what is refused, and that planning needs no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_diversity.data import recipes
from ssl_diversity.errors import UserError
from ssl_diversity.files import digest
from ssl_diversity.generation.config import folder_digest, from_recipe, pipeline_class

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
    one = recipe().generate_spec(**ENCODING, trained=("aa11", 24))
    assert one.pipeline == "task:aa11"
    assert one.real_images == 24
    assert one.pipeline_folder.parts[-4:] == ("train-generator", "aa", "aa11", "pipeline")
    others = [
        recipe().generate_spec(**ENCODING, trained=("bb11", 24)),
        recipe(n=11).generate_spec(**ENCODING, trained=("aa11", 24)),
        recipe(seed=1).generate_spec(**ENCODING, trained=("aa11", 24)),
        recipe(sampling={"block": 5}).generate_spec(**ENCODING, trained=("aa11", 24)),
        recipe().generate_spec(**{**ENCODING, "size": 16}, trained=("aa11", 24)),
    ]
    assert len({digest(spec.identity()) for spec in (one, *others)}) == 6
    assert len({spec.directory for spec in (one, *others)}) == 6
    patient = recipe(sampling={"oversample": 9}).generate_spec(**ENCODING, trained=("aa11", 24))
    assert patient.identity() == one.identity()


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
        ({"sampling": {"scheduler": "euler"}}, "sampling.scheduler"),
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
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="a StableDiffusionPipeline cannot be sampled"):
        pipeline_class(folder)
    (folder / "model_index.json").write_text("nonsense")
    with pytest.raises(UserError, match="not a diffusers model index"):
        pipeline_class(folder)
