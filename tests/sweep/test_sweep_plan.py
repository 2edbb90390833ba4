"""A plan is a pure function of the sweep and of what is on disk."""

import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import FaultServer
from omegaconf import OmegaConf

from ssl_diversity.data.attach import attach
from ssl_diversity.data.order import GlobalOrder, Windowed
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.windowed import layout_digest
from ssl_diversity.errors import UserError
from ssl_diversity.files import digest
from ssl_diversity.sweep import config, launch, plan
from ssl_diversity.sweep.config import SweepConfig, WindowedOrder
from ssl_diversity.sweep.plan import Plan, expand
from ssl_diversity.sweep.profile import LocalProfile
from ssl_diversity.sweep.store import Done
from ssl_diversity.sweep.task import NUMERICS
from ssl_diversity.train import CellSpec, make_order


def prepared(sweep: SweepConfig) -> Plan:
    for task in expand(sweep).tasks:
        if task.kind == "prepare":
            prepare(task.spec)  # type: ignore[arg-type]
    return expand(sweep)


def keys(plan: Plan, kind: str) -> set[str]:
    return {task.key for task in plan.tasks if task.kind == kind}


def test_before_its_pools_are_there_a_sweep_waits_for_them(small: SweepConfig) -> None:
    plan = expand(small)
    assert {task.kind for task in plan.tasks} == {"prepare"}
    assert len(plan.tasks) == 3
    assert len(plan.cells) == 4
    assert "source digits is not prepared yet" in plan.waiting
    assert all(cell.task is None and cell.waiting for cell in plan.cells)


def test_needs_come_before_what_needs_them_and_nothing_is_planned_twice(small: SweepConfig) -> None:
    plan = prepared(small)
    assert not plan.waiting
    seen: set[tuple[str, str]] = set()
    for task in plan.tasks:
        assert all(need.id in seen for need in task.needs)
        assert task.id not in seen
        seen.add(task.id)
    kinds = [task.kind for task in plan.tasks]
    assert kinds.count("pretrain") == 4
    assert kinds.count("probe") == 4 + 2  # pixels, and one random network
    assert kinds.count("distance") == 1 + 2  # the source, and each N's own rows


@pytest.mark.parametrize("order", ["global", "{windowed: {shards: 2, lanes: 2}}"])
def test_the_key_of_every_task_is_the_digest_of_its_own_spec(order: str) -> None:
    choices = ["sources=[digits]", "methods=[simclr,dino]", "unique_samples=[64,128,all]", "seeds=2"]
    plan = prepared(config.load("quickstart", [*choices, f"order={order}", "budget=[256,2048]"]))
    assert {task.kind for task in plan.tasks} == {"prepare", "pretrain", "probe", "distance"}
    for task in plan.tasks:
        text = {"kind": task.kind, "numerics": NUMERICS[task.kind], "spec": task.spec.identity()}
        assert task.key == digest(text)
        assert type(task.spec).model_validate(task.spec.model_dump()) == task.spec
    for cell in plan.cells:
        assert cell.task is not None
        assert cell.subset is not None
        spec = cell.task.spec
        assert isinstance(spec, CellSpec)
        named = (spec.method, spec.unique_samples, spec.seed, spec.replicate, spec.budget, cell.task.units)
        assert named == (cell.method, cell.unique_samples, cell.seed, cell.seed, cell.budget, cell.budget)
        assert (spec.parts, spec.rows_digest) == (cell.subset.specs, cell.subset.digest)
        assert {p.spec.network for p in cell.probes.values()} == {f"cell:{cell.task.key}"}  # type: ignore[attr-defined]


def test_planning_twice_gives_the_same_plan(small: SweepConfig) -> None:
    assert [task.id for task in prepared(small).tasks] == [task.id for task in expand(small).tasks]


def test_subsets_are_nested_and_replicates_differ() -> None:
    sweep = config.load("quickstart", ["sources=[digits]", "methods=[simclr]", "seeds=2", "budget=1024"])
    rows = {(c.unique_samples, c.seed): c.parts[0][1] for c in prepared(sweep).cells}
    small, large = (set(rows[n, 0].numbers()) for n in (64, 1024))
    assert small < large
    assert rows[64, 0].start != rows[64, 1].start
    shared = config.load(
        "quickstart", ["sources=[digits]", "methods=[simclr]", "seeds=2", "replicates=shared"]
    )
    assert len({c.parts[0][1].start for c in expand(shared).cells if c.unique_samples == 64}) == 1


def test_names_do_not_change_cells(small: SweepConfig, tmp_path: Path) -> None:
    before = prepared(small)
    path = tmp_path / "other.yaml"
    values = small.model_dump(mode="json")
    path.write_text(OmegaConf.to_yaml({**values, "name": "other", "sources": {"mine": "digits"}}))
    renamed = config.load(
        str(path), ["methods=[byol,simclr]", "unique_samples=[128,64]", "checkpoint_samples=64"]
    )
    assert list(renamed.sources) == ["mine"]
    assert keys(prepared(renamed), "pretrain") == keys(before, "pretrain")
    assert keys(expand(renamed), "probe") == keys(before, "probe")


@pytest.mark.parametrize(
    "override",
    ["seeds=[1]", "budget=320", "batch_size=32", "precision=32-true", "hyperparameters.simclr.lr=0.5"],
)
def test_what_determines_results_changes_cells(small: SweepConfig, override: str) -> None:
    base = ["sources=[digits]", "methods=[simclr]", "unique_samples=64", "budget=256"]
    before = prepared(config.load("quickstart", base))
    after = expand(config.load("quickstart", [*base, override]))
    assert not keys(before, "pretrain") & keys(after, "pretrain")


def test_budgets_of_the_same_batches_are_one_cell() -> None:
    base = ["sources=[digits]", "methods=[simclr]", "unique_samples=64"]
    both = prepared(config.load("quickstart", [*base, "budget=[16384,16400]"]))
    assert [cell.budget for cell in both.cells] == [16384, 16400]
    assert len(keys(both, "pretrain")) == 1
    assert len(keys(prepared(config.load("quickstart", [*base, "budget=[16384,16448]"])), "pretrain")) == 2
    (cell,) = expand(config.load("quickstart", [*base, "budget=100", "unique_samples=64"])).cells
    assert cell.task is not None
    assert cell.task.spec.budget == 64  # type: ignore[attr-defined]


def test_every_image_of_a_budget_that_is_no_whole_number_of_batches_may_be_asked_for() -> None:
    base = ["sources=[digits]", "methods=[simclr]", "unique_samples=200", "budget=200"]
    (cell,) = prepared(config.load("quickstart", base)).cells
    assert cell.task is not None
    spec = cell.task.spec
    assert GlobalOrder(spec.unique_samples, spec.batch_size, 0, spec.budget).total == 192  # type: ignore[attr-defined]


def test_a_new_downstream_set_adds_probes_and_distances_alone(small: SweepConfig) -> None:
    before = prepared(small)
    after = prepared(config.add_downstream(small, "digits", {"name": "again", "max_images": 500}))
    assert keys(after, "pretrain") == keys(before, "pretrain")
    assert keys(after, "probe") > keys(before, "probe")
    assert keys(after, "distance") > keys(before, "distance")


def test_all_and_fractions_are_numbers_once_the_pool_is_there() -> None:
    sweep = config.load(
        "quickstart", ["sources=[digits]", "methods=[simclr]", "unique_samples=[all,C/8,128]", "budget=1024"]
    )
    assert [c.unique_samples for c in expand(sweep).cells] == [None, 128]
    assert [c.unique_samples for c in prepared(sweep).cells] == [1024, 128]
    large = config.load(
        "quickstart", ["sources=[digits]", "methods=[simclr]", "unique_samples=all", "budget=1e5"]
    )
    (cell,) = expand(large).cells
    assert cell.source.pool is not None
    assert cell.unique_samples == cell.source.pool.size


def test_more_than_the_pool_has_is_refused_once_that_is_known() -> None:
    sweep = config.load("quickstart", ["sources=[digits]", "methods=[simclr]", "unique_samples=5000"])
    expand(sweep)
    with pytest.raises(UserError, match="more than pool 'digits' has"):
        prepared(sweep)


def test_with_several_budgets_an_n_belongs_to_those_that_allow_it() -> None:
    sweep = config.load(
        "quickstart",
        ["sources=[digits]", "methods=[simclr]", "unique_samples=[64,1024]", "budget=[512,2048]"],
    )
    assert [(c.unique_samples, c.budget) for c in expand(sweep).cells] == [
        (64, 512),
        (64, 2048),
        (1024, 2048),
    ]


def test_a_given_pool_is_a_source(small: SweepConfig) -> None:
    plan = prepared(small)
    pool = plan.sources[0].pool
    assert pool is not None
    given = config.load(
        "quickstart", [f"sources=[{pool.path.name}]", "methods=[simclr]", "budget=256", "unique_samples=64"]
    )
    (cell,) = expand(given).cells
    assert cell.source.tasks == ()
    assert cell.task is not None
    assert cell.task.key in keys(plan, "pretrain")


def test_an_attached_pool_is_a_source_and_needs_a_cache_in_the_global_order(
    small: SweepConfig, tmp_path: Path
) -> None:
    (pool,) = (source.pool for source in prepared(small).sources)
    assert pool is not None
    elsewhere, expected = tmp_path / "elsewhere", pool.rows_digest(pool.rows(64))
    pool.path.rename(elsewhere)
    asked = ["methods=[simclr]", "budget=256", "unique_samples=64"]
    sizes = sum(shard.bytes for shard in pool.info.shards)
    tiny = LocalProfile(executor="local", cache_gb=0.0)
    enough = LocalProfile(executor="local", cache_gb=sizes / 2**30)
    with FaultServer(elsewhere) as server:
        for place, name in ((str(elsewhere), "by-path"), (server.url, "by-address")):
            attached = attach(place, name=name)
            one = [f"sources=[{attached.path.name}]", *asked]
            plan = expand(config.load("quickstart", one))
            (cell,) = plan.cells
            assert cell.task is not None
            assert cell.source.tasks == ()
            assert cell.task.spec.rows_digest == expected  # type: ignore[attr-defined]
            assert cell.task.spec.parts[0].pool == attached.path.name  # type: ignore[attr-defined]
            launch.check_cache(plan, enough)
            launch.check_cache(expand(config.load("quickstart", [*one, "order.windowed.shards=1"])), tiny)
            if name == "by-path":
                launch.check_cache(plan, tiny)
        with pytest.raises(UserError, match=r"order=global reads .* raise cache_gb, or .*windowed"):
            launch.check_cache(plan, tiny)


def test_a_windowed_order_is_planned_with_its_shards_and_refused_where_it_cannot_be_exact() -> None:
    sweep = config.load("quickstart", ["methods=[simclr]", "budget=512", "unique_samples=256"])
    sweep = sweep.model_copy(update={"sources": {"digits": {"recipe": "digits", "shard_bytes": 100_000}}})
    windowed = sweep.model_copy(update={"order": WindowedOrder(windowed=Windowed(shards=2, lanes=8))})
    (cell,) = prepared(windowed).cells
    assert cell.task is not None
    assert cell.subset is not None
    assert len(cell.subset.pieces) > 2
    assert make_order(cell.task.spec, cell.subset).steps == 8  # type: ignore[arg-type]
    assert cell.task.spec.layout == layout_digest(cell.subset.pieces)  # type: ignore[attr-defined]
    (plain,) = expand(sweep).cells
    assert plain.task is not None
    assert plain.task.key != cell.task.key
    assert plain.task.spec.layout == ""  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="lanes=9 does not divide batch_size=64"):
        expand(windowed.model_copy(update={"order": WindowedOrder(windowed=Windowed(lanes=9))}))
    odd = windowed.model_copy(update={"unique_samples": (131,)})
    with pytest.raises(UserError, match="does not work with 8 lanes"):
        expand(odd)


def test_a_generated_source_is_a_chain_that_unfolds() -> None:
    sweep = config.load("quickstart", ["sources=[digits,generated-digits]", "methods=[simclr]"])
    assert "train-generator" not in {task.kind for task in expand(sweep).tasks}
    plan = prepared(sweep)
    kinds = [task.kind for task in plan.tasks]
    assert kinds.count("train-generator") == kinds.count("generate") == 1
    assert kinds.count("sample") == 2  # 1,536 images, 1,024 at a time
    assert kinds.count("prepare") == 4  # the source, the generator's own, and downstream train and test
    generate = next(task for task in plan.tasks if task.kind == "generate")
    assert {need.kind for need in generate.needs} == {"sample"}
    assert {need.kind for task in generate.needs for need in task.needs} == {"train-generator"}
    assert "source generated-digits is not prepared yet" in plan.waiting
    assert not any(task.kind == "distance" and "generated" in task.label for task in plan.tasks)


def test_a_generator_shares_the_pool_of_a_source_that_is_the_same() -> None:
    options = "sources.generated-digits.base_options"
    sweep = config.load("quickstart", ["methods=[simclr]", f"{options}.size=16", f"{options}.name=digits"])
    labels = [task.label for task in prepared(sweep).tasks if task.kind == "prepare"]
    assert labels.count("prepare digits train") == 1
    assert len(labels) == 4  # with photo_patches and downstream train and test


def test_skipping_a_kind_skips_what_would_need_it(small: SweepConfig) -> None:
    plan = prepared(small).without(frozenset({"pretrain"}), Done())
    assert not keys(plan, "pretrain")
    assert len(keys(plan, "probe")) == 2  # the baselines
    assert keys(plan, "distance")


def test_a_budget_in_flops_waits_until_they_are_counted(
    small: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["sources=[digits]", "methods=[simclr]", "unique_samples=64", "budget=1e9flop"]
    sweep = config.load("quickstart", base)
    assert "FLOPs of simclr are not counted" in " ".join(prepared(sweep).waiting)
    monkeypatch.setattr(plan, "known_flops", lambda *_: 1_000_000)
    (cell,) = expand(sweep).cells
    assert cell.budget == 1000
    assert cell.budget_asked == "1e9flop"
    monkeypatch.setattr(plan, "known_flops", lambda *_: 10**12)
    with pytest.raises(UserError, match="pays for no sample"):
        expand(sweep)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from ssl_diversity.sweep import config, flops, launch, table\n"
        "from ssl_diversity.sweep.plan import expand\n"
        "plan = expand(config.load('quickstart'))\n"
        "heavy = {'torch', 'pytorch_lightning', 'lightly', 'timm', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy or not plan.cells else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
