"""A sweep file says what it means, refuses what it cannot mean in one line, and remembers what was asked."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ssl_diversity.data.order import Windowed
from ssl_diversity.data.prepare import prepare
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import config, record
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import LocalProfile, SlurmProfile, load_profile


@pytest.mark.parametrize("name", ["quickstart", "cifar10", "tiny-imagenet", "imagenet", "yfcc100m"])
def test_the_packaged_sweeps_load(name: str) -> None:
    assert config.load(name).name == name


def test_quickstart_is_what_the_readme_says() -> None:
    sweep = config.load("quickstart")
    assert len(sweep.methods) == 7
    assert list(sweep.sources) == ["digits", "photo_patches", "generated-digits"]
    assert set(sweep.unique_samples) >= {64, 1024}
    assert sweep.batch_size == 64
    assert sweep.backbone_of("mae") == "vit-micro"
    assert sweep.backbone_of("simclr") == "conv-tiny"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["methods=[simclrr]"], "did you mean 'simclr'"),
        (["method=[simclr]"], "did you mean 'methods'"),
        (["backbone=resnet18"], "needs a ViT"),
        (["backbone=resnet81"], "did you mean 'resnet18'"),
        (["budget=lots"], "expected samples"),
        (["budget=0"], "expected samples"),
        (["batch_size=0"], "batch_size"),
        (["seeds=[1,1]"], "same value twice"),
        (["seeds=[-1]"], "seeds"),
        (["probes=[linear,linear]"], "same value twice"),
        (["probes=[linaer]"], "unknown probe 'linaer'"),
        (["sources.digits=3"], "expected a recipe"),
        (["sources.digits=[1,2]"], "expected a recipe"),
        (["precision=fp8"], "precision"),
        (["distance.extracter=x"], "distance.extracter"),
        (["hyperparameters.simclrr.lr=1"], "did you mean 'simclr'"),
        (["sources=[]"], "sources"),
        (["seeds"], "key=value"),
        (["sources=[a/x.tar,b/x.tar]"], "same name"),
    ],
)
def test_nonsense_is_refused_in_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as error:
        config.load("quickstart", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["budget=512", "unique_samples=1024"], "must not exceed C"),
        (["unique_samples=100"], "nearest that works is 128"),
        (["unique_samples=5.5"], "expected a number"),
        (["budget=32"], "less than one batch"),
        (["hyperparameters.simclr.lrr=1"], "did you mean 'lr'"),
        (["recipe=slow"], "no such recipe"),
        (["distance.extractor=random-resnte"], "no such file"),
        (["sources=[digitz]"], "did you mean 'digits'"),
        (["sources=[/nowhere/at/all]"], "no such folder"),
        (["sources.digits.size=8", "sources.digits.recipe=digits"], "trains at image_size=16"),
        (["sources.digits.size=32", "sources.digits.recipe=digits"], "allow_mixed_encoding"),
        (["downstream.digits.codec=jpeg"], "allow_mixed_encoding"),
        (["downstream=[/nowhere.tar]"], "downstream.nowhere"),
    ],
)
def test_what_can_never_work_is_refused_when_planning(overrides: list[str], says: str) -> None:
    sweep = config.load("quickstart", overrides)
    with pytest.raises(UserError, match=says) as error:
        expand(sweep)
    assert "\n" not in str(error.value)


def test_every_method_needs_a_backbone(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    values = config.load("quickstart").model_dump(mode="json")
    path.write_text(OmegaConf.to_yaml({**values, "backbone": {"mae": "vit-micro"}}))
    with pytest.raises(UserError, match="none given for simclr"):
        config.load(str(path))


def test_an_unknown_sweep_and_profile_name_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        config.load("quickstrat")
    with pytest.raises(UserError, match="local, slurm"):
        load_profile("moon")


def test_a_list_of_sources_keeps_their_options() -> None:
    sweep = config.load("quickstart", ["sources.digits.seed=7"])
    chosen = config.load("quickstart", ["sources.digits.seed=7"]).sources["digits"]
    assert chosen == {"recipe": "digits", "seed": 7}
    assert list(sweep.sources) == ["digits", "photo_patches", "generated-digits"]
    assert list(config.load("quickstart", ["sources=[digits]"]).sources) == ["digits"]


def test_a_path_is_named_by_its_last_part_and_made_absolute() -> None:
    sweep = config.load("quickstart", ["downstream=[some/My Pets.tar]"])
    assert list(sweep.downstream) == ["My-Pets"]
    assert sweep.downstream["My-Pets"]["recipe"].startswith("/")


def test_seeds_are_a_number_or_a_list() -> None:
    assert config.load("quickstart", ["seeds=3"]).seeds == (0, 1, 2)
    assert config.load("quickstart", ["seeds=[5]"]).seeds == (5,)


def test_a_cifar10_without_its_path_says_how_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR10_PATH", raising=False)
    with pytest.raises(UserError, match="CIFAR10_PATH"):
        expand(config.load("cifar10"))


def test_the_source_path_serves_the_downstream_set_of_the_same_recipe(tmp_path) -> None:
    (tmp_path / "cifar10").mkdir()
    plan = expand(config.load("cifar10", [f"sources.cifar10.path={tmp_path}"]))
    assert {str(task.spec.options["path"]) for task in plan.tasks} == {str(tmp_path)}


def test_a_run_needs_the_environment_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, moved = tmp_path / "first", tmp_path / "moved"
    first.mkdir()
    moved.mkdir()
    monkeypatch.setenv("CIFAR10_PATH", str(first))
    record.remember(config.load("cifar10"))
    monkeypatch.delenv("CIFAR10_PATH")
    again = config.load("cifar10")
    assert again.sources["cifar10"]["path"] == again.downstream["cifar10"]["path"] == str(first)
    expand(again)
    monkeypatch.setenv("CIFAR10_PATH", str(moved))
    assert config.load("cifar10").sources["cifar10"]["path"] == str(moved)


def test_imagenet_is_stored_with_pixels_to_spare_and_probed_at_the_training_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGENET_PATH", str(tmp_path))
    monkeypatch.setenv("YFCC100M_METADATA", str(tmp_path))
    for name in ("imagenet", "yfcc100m"):
        sweep = config.load(name)
        source, train, test = (task.spec for task in expand(sweep).tasks)
        stored = {"size": 256, "resize": "short", "codec": "jpeg", "quality": 90}
        assert {key: getattr(source, key) for key in stored} == stored
        assert source.near_duplicates == train.near_duplicates == sweep.near_duplicates
        for spec in (train, test):
            assert {key: getattr(spec, key) for key in stored} == stored | {"size": 224, "resize": "square"}
        assert sweep.windowed is not None
        assert sweep.batch_size % sweep.windowed.lanes == 0
    record.remember(sweep)
    monkeypatch.delenv("IMAGENET_PATH")
    monkeypatch.delenv("YFCC100M_METADATA")
    expand(config.load("yfcc100m"))  # the record knows where they are


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("order=local", "expected global, or windowed"),
        ("order={windowed: {shards: 0}}", "order: windowed.shards"),
        ("order={windowed: {shard: 2}}", "did you mean 'shards'"),
        ("order={shards: 2}", "expected global, or windowed"),
        ("decode=fast", "decode"),
        ("encoding.resize=round", "encoding.resize"),
    ],
)
def test_how_images_are_read_is_refused_in_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        config.load("quickstart", [override])
    assert "\n" not in str(error.value)


def test_original_bytes_go_with_downstream_sets_that_add_no_mark() -> None:
    base = ["sources=[digits,photo_patches]", "encoding={codec: original, resize: none}"]
    plan = expand(config.load("quickstart", base))
    stored = [(task.spec.codec, task.spec.resize, task.spec.size) for task in plan.tasks]  # type: ignore[attr-defined]
    assert [codec for codec, *_ in stored] == ["original", "original", "png", "png"]
    assert stored[2] == stored[3] == ("png", "square", 16)
    with pytest.raises(UserError, match="allow_mixed_encoding"):
        expand(config.load("quickstart", [*base, "downstream.digits.codec=jpeg"]))


@pytest.mark.parametrize("resize", ["square", "short"])
def test_what_is_stored_may_be_larger_but_not_smaller(resize: str) -> None:
    base = ["sources=[digits,photo_patches]", f"encoding.resize={resize}"]
    expand(config.load("quickstart", [*base, "encoding.size=24"]))
    with pytest.raises(UserError, match="stored at 12 px, the sweep trains at image_size=16"):
        expand(config.load("quickstart", [*base, "encoding.size=12"]))


def test_an_order_is_written_as_it_is_read() -> None:
    sweep = config.load("quickstart", ["name=mine", "order.windowed.shards=2", "decode=scaled"])
    assert sweep.windowed == Windowed(shards=2, lanes=64)
    record.remember(sweep)
    assert config.load("mine") == sweep
    assert config.load("mine", ["order=global"]).windowed is None


def test_a_set_is_named_like_its_pool() -> None:
    sweep = config.load(
        "quickstart", ["downstream=[torchvision:EuroSAT,/data/My Pets.tar,'/data/web-{00..99}.tar']"]
    )
    assert list(sweep.downstream) == ["eurosat", "My-Pets", "data"]


def prepared(sweep: config.SweepConfig, name: str) -> None:
    for spec in sweep.downstream_specs(name):
        prepare(spec)


def test_the_record_remembers_budgets_and_downstream_sets() -> None:
    record.remember(config.load("quickstart", ["budget=4096"]))
    record.remember(config.load("quickstart", ["budget=8192"]))
    old = config.recorded("quickstart")
    assert old is not None
    assert old.budget == (4096, 8192)
    wider = record.remember(config.add_downstream(old, "digits", {"name": "again"}))
    prepared(wider, "again")
    later = config.load("quickstart", ["budget=4096"])
    assert set(later.downstream) == {"digits", "again"}
    assert later.budget == (4096,)
    assert record.remember(later).budget == (4096, 8192)
    assert set(record.remember(config.load("quickstart", remembered=False)).downstream) == {"digits", "again"}


def test_a_budget_that_no_longer_goes_with_the_sweep_is_dropped() -> None:
    said: list[str] = []
    record.remember(config.load("quickstart", ["budget=[64,8192]", "unique_samples=[64]"]))
    later = ["budget=16384", "batch_size=128", "unique_samples=[128]"]
    kept = record.remember(config.load("quickstart", later), tell=said.append)
    assert kept.budget == (8192, 16384)
    assert len(said) == 1
    assert "budget=64" in said[0]
    expand(kept)
    assert config.recorded("quickstart") == kept


def test_a_downstream_set_is_kept_once_it_is_prepared(tmp_path) -> None:
    (tmp_path / "bad").mkdir()
    asked = config.add_downstream(config.load("quickstart"), str(tmp_path / "bad"), {})
    assert set(record.remember(asked).downstream) == {"digits", "bad"}
    assert set(config.load("quickstart").downstream) == {"digits"}  # if the run was killed
    prepared(asked, "digits")
    assert set(record.remember(asked, ended=True).downstream) == {"digits"}
    (tmp_path / "bad").rmdir()
    expand(config.latest("quickstart"))


def test_a_relative_path_is_recorded_from_the_root(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flowers").mkdir()
    (tmp_path / "My Pets.tar").touch()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    sweep = config.load("quickstart", ["downstream=[flowers,digits,'My Pets.tar']"])
    assert sweep.downstream == {
        "flowers": {"recipe": str(tmp_path / "flowers")},
        "digits": {"recipe": "digits"},
        "My-Pets": {"recipe": str(tmp_path / "My Pets.tar")},
    }
    added = config.add_downstream(sweep, "folder", {"name": "more", "path": "flowers"})
    assert added.downstream["more"]["path"] == str(tmp_path / "flowers")


def test_a_sweep_given_as_a_path_finds_its_record(tmp_path) -> None:
    path = tmp_path / "file.yaml"
    values = config.load("quickstart", ["name=mine", "budget=4096"]).model_dump(mode="json")
    path.write_text(OmegaConf.to_yaml(values))
    assert config.latest(str(path)) == config.load(str(path))
    record.remember(config.load(str(path), ["budget=8192"]))
    assert config.latest(str(path)).budget == config.latest("mine").budget == (8192,)


def test_whole_numbers_are_whole_however_they_are_written() -> None:
    assert str(config.load("quickstart", ["budget=5e5"]).budget) == "(500000,)"


def test_the_record_is_a_sweep_file() -> None:
    kept = record.remember(config.load("quickstart", ["name=mine", "budget=[4096,1e9flop]"]))
    assert config.load("mine") == kept
    assert OmegaConf.load(kept.folder / "sweep.yaml").name == "mine"


def test_two_sets_cannot_share_a_name() -> None:
    sweep = config.load("quickstart")
    with pytest.raises(UserError, match="another name"):
        config.add_downstream(sweep, "photo_patches", {"name": "digits"})


def test_a_sweep_wants_a_downstream_set() -> None:
    with pytest.raises(UserError, match="name at least one labelled set"):
        config.load("quickstart", ["downstream=[]"])


def test_one_cell_is_named_in_the_singular() -> None:
    sweep = config.load(
        "quickstart", config.one_cell(["method=mae", "source=digits", "unique_samples=64", "seed=3"])
    )
    assert (sweep.name, sweep.methods, list(sweep.sources), sweep.seeds) == (
        "pretrain",
        ("mae",),
        ["digits"],
        (3,),
    )


def test_the_packaged_profiles_load() -> None:
    local, slurm = load_profile("local"), load_profile("slurm")
    assert isinstance(local, LocalProfile)
    assert isinstance(slurm, SlurmProfile)
    assert local.layout()[0] >= 1


def test_workers_and_threads_fill_the_cores_that_may_be_used(monkeypatch) -> None:
    profile = LocalProfile(executor="local", device="cpu")
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert profile.layout() == (1, 1)
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
    workers, threads = profile.layout()
    assert workers * threads <= len(os.sched_getaffinity(0))


def test_a_local_profile_refuses_a_clusters_keys(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("executor: local\npartition: gpu\n")
    with pytest.raises(UserError, match="partition"):
        load_profile(str(path))


def test_an_executor_is_a_name(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("executor: [local]\n")
    with pytest.raises(UserError, match="expected one of"):
        load_profile(str(path))


def test_the_cache_lies_where_the_node_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", "/scratch/7")
    profile = LocalProfile(executor="local", cache_gb=0.5, cache_dir="$NODE_DISK/shards")
    assert (profile.cache_folder, profile.cache_bytes) == ("/scratch/7/shards", 1 << 29)
    assert LocalProfile(executor="local").cache_folder is None
    assert load_profile("local").cache_bytes == 16 << 30


def test_gres_stands_for_gpus() -> None:
    profile = SlurmProfile(executor="slurm", workers=1, time_min=10, gpus=1)
    assert profile.parameters("x")["gpus_per_node"] == 1
    gres = profile.model_copy(update={"gres": "gpu:a100:1"}).parameters("x")
    assert "gpus_per_node" not in gres
    assert gres["slurm_gres"] == "gpu:a100:1"
