"""Mixtures of pools as sources: shares kept exactly, subsets nested, nothing twice, nothing silently less."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ssl_diversity import files
from ssl_diversity.data.pool import Pool, find
from ssl_diversity.data.prepare import prepare
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import config, record, rows
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.mixture import apportion, largest
from ssl_diversity.sweep.plan import Plan, expand

MIXED = "sources.mixed.mix={digits: 0.25, photo_patches: 0.75}"
SMALL = ["methods=[simclr]", "unique_samples=[64,128]", "budget=256"]

weights = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda w: [Fraction(x, sum(w)) for x in w])


@given(weights, st.integers(0, 300))
def test_shares_are_websters_and_one_more_image_takes_none_away(shares: list[Fraction], n: int) -> None:
    counts, more = apportion(shares, n), apportion(shares, n + 1)
    assert sum(counts) == n
    assert all(a <= b for a, b in zip(counts, more, strict=True))
    assert all(
        abs(count - share * n) < max(1, len(shares) / 2) for count, share in zip(counts, shares, strict=True)
    )
    dealt = [0] * len(shares)  # seat by seat, as the method is defined
    for _ in range(n):
        quotients = [share / (2 * seats + 1) for share, seats in zip(shares, dealt, strict=True)]
        dealt[quotients.index(max(quotients))] += 1
    assert counts == tuple(dealt)


@given(weights, st.data())
def test_the_largest_n_fits_and_the_next_does_not(shares: list[Fraction], data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 50)) for _ in shares]

    def fits(n: int) -> bool:
        return all(count <= size for count, size in zip(apportion(shares, n), sizes, strict=True))

    n = largest(shares, sizes)
    assert fits(n)
    assert not fits(n + 1)


def load(*overrides: str) -> SweepConfig:
    """Two sources and a small grid of one method, and whatever else."""
    path = files.home() / "mine.yaml"
    if not path.exists():
        base = config.load("quickstart", ["name=mine", "sources=[digits,photo_patches]", *SMALL])
        path.write_text(OmegaConf.to_yaml(base.model_dump(mode="json")))
    return config.load(str(path), overrides)


def prepared(sweep: SweepConfig) -> Plan:
    for task in expand(sweep).tasks:
        if task.kind == "prepare":
            prepare(task.spec)  # type: ignore[arg-type]
    return expand(sweep)


def test_a_part_whose_path_says_mix_is_no_mixture(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    sweep = load(f"sources.web={tmp_path}/mixed", "sources.both.mix={digits: 0.5, web: 0.5}")
    assert set(sweep.sources["both"]["mix"]) == {"digits", "web"}


def test_a_mixture_waits_for_its_pools_and_then_draws_its_shares() -> None:
    sweep = load(MIXED, "seeds=2")
    waiting = expand(sweep)
    assert "source mixed waits for digits and photo_patches" in waiting.waiting
    assert [task.kind for task in waiting.tasks].count("prepare") == 4  # nothing is prepared for it alone
    plan = prepared(sweep)
    assert not plan.waiting
    cells = {(c.unique_samples, c.seed): c for c in plan.cells if c.source.name == "mixed"}
    for (n, seed), cell in cells.items():
        assert [(pool.name, len(drawn)) for pool, drawn in cell.parts] == [
            ("digits", n // 4),
            ("photo_patches", 3 * n // 4),
        ]
        assert all(drawn.start == pool.rows(1, seed).start for pool, drawn in cell.parts)
        assert cell.task is not None
        assert {need.label for need in cell.task.needs} == {
            "prepare digits train",
            "prepare photo_patches train",
        }
    for seed in (0, 1):
        for (_, few), (_, more) in zip(cells[64, seed].parts, cells[128, seed].parts, strict=True):
            assert set(few.numbers()) < set(more.numbers())
    assert len({cell.task.key for cell in cells.values() if cell.task}) == 4
    assert {name for name, _ in plan.distances} == {"digits", "photo_patches", "mixed"}
    (distance,) = (task for (name, _), task in plan.distances.items() if name == "mixed")
    assert [part.rows_count for part in distance.spec.parts] == [256, 768]  # type: ignore[attr-defined]


def test_a_cell_of_a_mixture_is_its_rows_and_not_its_name() -> None:
    keys = {}
    shares = {"a": "{digits: 0.25, photo_patches: 0.75}", "b": "{digits: 0.5, photo_patches: 0.5}"}
    for name, mix in shares.items():
        plan = prepared(load(f"sources.{name}.mix={mix}", "unique_samples=64"))
        keys[name] = next(c.task.key for c in plan.cells if c.source.name == name and c.task)
    again = prepared(load("sources.c.mix={digits: 0.25, photo_patches: 0.75}", "unique_samples=64"))
    assert keys["a"] != keys["b"]
    assert keys["a"] in {task.key for task in again.tasks}


def test_a_mixture_can_stand_alone_with_sets_of_its_own() -> None:
    options = "{digits: 0.5, other: {share: 0.5, recipe: photo_patches, seed: 7}}"
    sweep = load("sources.digits.max_images=500", f"sources.mixed.mix={options}")
    plan = prepared(sweep)
    cell = next(c for c in plan.cells if c.source.name == "mixed")
    assert [pool.name for pool, _ in cell.parts] == ["digits", "other"]
    assert cell.parts[1][0].info.seed == 7
    record.remember(sweep)
    alone = config.load(str(config.runs_dir() / "mine" / "sweep.yaml"), ["sources=[mixed]"])
    assert list(alone.sources) == ["mixed"]
    (first, *_), before = expand(alone).cells, {c.task.key for c in plan.cells if c.task}
    assert first.task is not None
    assert first.task.key in before  # its digits kept the options of the source that is left out


def test_all_is_what_the_smallest_pool_allows_and_more_names_it() -> None:
    plan = prepared(load(MIXED, "sources.digits.max_images=200", "unique_samples=all", "budget=1e4"))
    source = next(source for source in plan.sources if source.name == "mixed")
    digits = source.pools[0]
    cell = next(c for c in plan.cells if c.source.name == "mixed")
    assert cell.unique_samples == source.size
    assert len(cell.parts[0][1]) == digits.size
    alone = plan.sweep.model_copy(update={"unique_samples": (1000,)})
    with pytest.raises(UserError, match="more than pool 'digits' has"):
        expand(alone)
    mixed = {"mixed": plan.sweep.sources["mixed"], **plan.sweep.sources}
    message = rf"takes 250 images of pool 'digits', which has {digits.size}; .* up to {source.size}$"
    with pytest.raises(UserError, match=message):
        expand(alone.model_copy(update={"sources": mixed}))


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ("{digits: 0.5, photo_patches: 0.4}", "sum to 0.9; make it 1"),
        ("{digits: 1.0}", "mix: {NAME: SHARE"),
        ("[digits, photo_patches]", "mix: {NAME: SHARE"),
        ("{digits: much, photo_patches: 0.5}", "share much; expected a number between 0 and 1"),
        ("{digits: -0.5, photo_patches: 1.5}", "share -0.5"),
        ("{digits: 0.5, photo_patches: {share: 0.5, mix: {a: 1}}}", "is a mixture itself"),
    ],
)
def test_nonsense_is_refused_in_one_line(mix: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("{", r"\{")) as error:
        load(f"sources.mixed.mix={mix}")
    assert "\n" not in str(error.value)


def test_a_mixture_of_mixtures_and_a_downstream_mixture_are_refused() -> None:
    with pytest.raises(UserError, match="is a mixture itself"):
        load(MIXED, "sources.more.mix={digits: 0.5, mixed: 0.5}")
    with pytest.raises(UserError, match="a mixture can be a source"):
        expand(load("downstream.mixed.mix={digits: 0.5, photo_patches: 0.5}"))


def test_pools_that_share_images_are_not_mixed() -> None:
    again = "{share: 0.5, recipe: digits, max_images: 300, seed: 3}"
    sweep = load(f"sources.mixed.mix={{digits: 0.5, again: {again}}}")
    with pytest.raises(UserError, match=r"share \d+ images, so its N would not be unique") as error:
        prepared(sweep)
    a, b = (find(name) for name in ("digits", "again"))
    common = {bytes(row) for row in a.content} & {bytes(row) for row in b.content}
    assert f"share {len(common)} images" in str(error.value)


def test_what_is_costly_to_know_of_large_pools_is_known_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = prepared(load())
    a, b = (source.pools[0] for source in plan.sources)
    subset = plan.sources[0].subset(100, 1)
    expected = subset.digest
    monkeypatch.setattr(rows, "_LARGE_ROWS", 10)
    monkeypatch.setattr(rows, "_SORTED_ROWS", 100)

    def fresh() -> None:
        rows._digests.clear()
        rows._shared.cache_clear()

    fresh()
    assert rows.digest(subset) == expected
    assert rows.shared_images(a, b) == 0
    assert rows.shared_images(a, a) == a.size
    fresh()
    monkeypatch.setattr(Pool, "rows_digest", lambda *_: 1 / 0)
    monkeypatch.setattr(rows, "_count_shared", lambda *_: 1 / 0)
    assert rows.digest(subset) == expected
    assert rows.shared_images(a, b) == 0
    for path in (files.home() / "store" / "cache" / "rows").iterdir():
        path.write_text("broken")
    fresh()
    with pytest.raises(ZeroDivisionError):
        rows.digest(subset)
