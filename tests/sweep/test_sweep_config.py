"""A sweep file says what it means, refuses what it cannot mean in one line, and remembers what was asked."""

import pytest
from omegaconf import OmegaConf

from ssl_diversity.errors import UserError
from ssl_diversity.sweep import config
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import LocalProfile, SlurmProfile, load_profile


@pytest.mark.parametrize("name", ["quickstart", "cifar10", "tiny-imagenet"])
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
        (["sources=[digitz]"], "did you mean 'digits'"),
        (["sources=[/nowhere/at/all]"], "no such folder"),
        (["sources.digits.size=32", "sources.digits.recipe=digits"], "trains at image_size=16"),
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
    config.remember(config.load("cifar10"))
    monkeypatch.delenv("CIFAR10_PATH")
    again = config.load("cifar10")
    assert again.sources["cifar10"]["path"] == again.downstream["cifar10"]["path"] == str(first)
    expand(again)
    monkeypatch.setenv("CIFAR10_PATH", str(moved))
    assert config.load("cifar10").sources["cifar10"]["path"] == str(moved)


def test_the_record_remembers_budgets_and_downstream_sets() -> None:
    config.remember(config.load("quickstart", ["budget=4096"]))
    config.remember(config.load("quickstart", ["budget=8192"]))
    record = config.recorded("quickstart")
    assert record is not None
    assert record.budget == (4096, 8192)
    config.remember(config.add_downstream(record, "digits", {"name": "again"}))
    later = config.load("quickstart", ["budget=4096"])
    assert set(later.downstream) == {"digits", "again"}
    assert later.budget == (4096,)
    assert config.remember(later).budget == (4096, 8192)


def test_the_record_is_a_sweep_file() -> None:
    record = config.remember(config.load("quickstart", ["name=mine", "budget=[4096,1e9flop]"]))
    assert config.load("mine") == record
    assert OmegaConf.load(record.folder / "sweep.yaml").name == "mine"


def test_two_sets_cannot_share_a_name() -> None:
    sweep = config.load("quickstart")
    with pytest.raises(UserError, match="another name"):
        config.add_downstream(sweep, "photo_patches", {"name": "digits"})


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


def test_a_local_profile_refuses_a_clusters_keys(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("executor: local\npartition: gpu\n")
    with pytest.raises(UserError, match="partition"):
        load_profile(str(path))
