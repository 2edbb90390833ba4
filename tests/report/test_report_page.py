"""The page and its figures: self-contained, honest, whole for any table."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ssl_diversity.report import write
from ssl_diversity.report.records import Collected

Records = Callable[..., list[dict]]
Make = Callable[..., Collected]
SECTIONS = ["The answer", "Accuracy against unique images", "Gain against distance", "Tables", "Leaked test images", "Baselines",
            "Collapsed cells and failed tasks", "How it was run"]  # fmt: skip


def text_of(page: Path) -> str:
    """What a person reads, spaces made plain."""
    plain = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(plain.replace("\u00a0", " ").replace("&nbsp;", " ").split())


class Balanced(HTMLParser):
    """Fails where an element is closed that was not the last opened."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        for value in filter(None, found.values()):
            self.uses += re.findall(r"url\(#([^)]+)\)", value)
        self.uses += [
            value[1:] for key, value in attrs if key.endswith("href") and value and value.startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def page(records: Records, collected: Make, tmp_path: Path) -> Path:
    return write(collected(records()), tmp_path / "runs" / "toy")


def test_the_page_is_one_file_that_asks_for_nothing(page: Path) -> None:
    html = page.read_text()
    assert not re.search(r'(src|href)="(https?:)?//', html.replace("xmlns", ""))
    assert not re.search(r"@import|<script|<link|<img", html)
    assert 'name="viewport"' in html
    assert re.findall(r"<h2>([^<]+)</h2>", html) == SECTIONS


def test_the_page_is_well_formed_and_its_figures_do_not_share_ids(page: Path) -> None:
    parser = Balanced()
    parser.feed(page.read_text())
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert set(parser.uses) <= set(parser.ids)


def test_it_answers_with_interval_and_counts_and_names_what_went_wrong(page: Path) -> None:
    text = text_of(page)
    assert "More unique images help when pretraining on digits" in text
    assert re.search(r"95 % interval \+\d+\.\d to \+\d+\.\d \(2 methods, 2 seeds each\)", text)
    assert "smallest detectable: " in text
    assert "generated-digits is nearer to digits than photo_patches is (3.4 against 17.8)" in text
    assert "Leaving out the collapsed cells" in text
    assert "simclr on photo_patches, N = 64, seed 0, 1: effective rank 1.20" in text
    assert "RuntimeError: &lt;boom&gt; &amp; more" in text  # a message is text, not markup
    assert "source textures is not prepared yet" in text
    assert "The generator behind generated-digits saw 1,437 real images." in text
    assert "took 2.5 × 10¹¹ FLOPs: 0.25 times what pretraining a cell on them took" in text
    assert "digits, at the largest N: " in text
    assert "ssl-diversity sweep toy budget=4096" in text


def test_a_generated_source_that_is_not_nearer_is_said_to_be_so(
    records: Records, collected: Make, tmp_path: Path
) -> None:
    made = [r | ({"frechet": 99.0} if r.get("source_kind") == "generated" else {}) for r in records()]
    assert "generated-digits is NOT nearer to digits than photo_patches is" in text_of(
        write(collected(made), tmp_path)
    )


def test_a_leak_is_named_with_what_it_does_to_accuracy(
    records: Records, collected: Make, tmp_path: Path
) -> None:
    leaky = {"leaked": 7, "leaked_near": 9}
    made = [
        r | (leaky | {"accuracy_clean": r["accuracy"] - 0.012} if r.get("source") == "digits" else {})
        for r in records()
    ]
    text = text_of(write(collected(made), tmp_path))
    assert (
        "digits leaks into digits: up to 7 of 360 test images have an exact copy among the images of a cell, and 9 an "
        "exact or near one. Without them, fewshot-5 accuracy changes by −1.2 points (mean of 8 cells" in text
    )
    assert "digits leaks into photo_patches" not in text
    assert "were not looked for" not in text


def test_near_copies_that_nobody_looked_for_are_not_said_to_be_absent(
    records: Records, collected: Make, tmp_path: Path
) -> None:
    assert "No test image has an exact or near copy" in text_of(write(collected(records()), tmp_path / "a"))
    unknown = [{k: v for k, v in r.items() if k != "leaked_near"} for r in records()]
    text = text_of(write(collected(unknown), tmp_path / "b"))
    assert "No test image has an exact copy in any cell's subset." in text
    assert "were not looked for everywhere" in text
    exact = [r | ({"leaked": 7} if r.get("source") == "digits" else {}) for r in unknown]
    text = text_of(write(collected(exact), tmp_path / "c"))
    assert "up to 7 of 360 test images have an exact copy among the images of a cell." in text


def test_figures_are_files_too_as_svg_and_png(page: Path) -> None:
    found = sorted(path.name for path in (page.parent / "figures").iterdir())
    stems = ["accuracy-digits-4096-fewshot-5", "accuracy-digits-4096-linear", "effect-digits-4096",
             "gain-digits-4096-frechet", "gain-digits-4096-visual_dna"]  # fmt: skip
    assert found == sorted(f"{stem}.{kind}" for stem in stems for kind in ("svg", "png"))
    for path in (page.parent / "figures").glob("*.svg"):
        ElementTree.parse(path)


@pytest.mark.parametrize(
    "what",
    [
        {"ns": (64,)},
        {"seeds": 1},
        {"methods": ("simclr",), "seeds": 1},
        {"ns": (64, 128, 256, 512, 1024, 2048, 50000)},
    ],
)
def test_any_grid_gives_a_page(what: dict, records: Records, collected: Make, tmp_path: Path) -> None:
    assert "The answer" in text_of(write(collected(records(**what)), tmp_path))


def test_a_sweep_without_any_result_gives_a_page(records: Records, collected: Make, tmp_path: Path) -> None:
    assert "No cell has been planned yet" in text_of(write(collected([]), tmp_path / "none"))
    measured = {"accuracy", "accuracy_low", "accuracy_high", "train_seconds", "flops", "collapsed", "effective_rank",
                "frechet", "visual_dna", "n_test", "chance"}  # fmt: skip
    waiting = [{k: v for k, v in r.items() if k not in measured} | {"status": "waiting"} for r in records()]
    text = text_of(write(collected(waiting), tmp_path / "waiting"))
    assert "0 of 24" in text
    assert "no pair of cells has results yet" in text


def test_two_downstream_sets_and_budgets_have_an_answer_each(
    records: Records, collected: Make, tmp_path: Path
) -> None:
    made = records(seeds=1)
    made += [r | {"downstream": "flowers"} for r in made]
    made += [
        r | {"budget": 8192, "budget_asked": "8192", "cell": r["cell"][::-1]} for r in made if r.get("source")
    ]
    html = write(collected(made), tmp_path).read_text()
    heads = [f"On {d}, budget C = {c}" for c in ("8,192", "4,096") for d in ("digits", "flowers")]
    assert re.findall(r"<h3>(On [^<]+)</h3>", html) == heads


def test_the_same_results_write_nothing_and_others_write_anew(
    records: Records, collected: Make, tmp_path: Path
) -> None:
    page = write(collected(records()), tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert write(collected(records()), tmp_path) == page
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == stamps
    first = page.read_bytes()
    write(collected(records(draw_seed=1)), tmp_path)
    assert page.read_bytes() != first
    write(collected(records()), tmp_path)
    assert page.read_bytes() == first
    (tmp_path / "results.csv").unlink()
    write(collected(records()), tmp_path)
    assert (tmp_path / "results.csv").exists()


def test_figures_of_an_earlier_report_do_not_stay(records: Records, collected: Make, tmp_path: Path) -> None:
    import os

    write(collected(records(seeds=1)), tmp_path)
    for path in (tmp_path / "figures").iterdir():
        os.utime(path, (1, 1))
    write(collected([r for r in records(seeds=1) if r["probe"] == "fewshot-5"]), tmp_path)
    assert not list((tmp_path / "figures").glob("*linear*"))
    assert list((tmp_path / "figures").glob("*fewshot-5.png"))
