"""pool.html: self-contained, right in what it says, whole for any pool."""

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_pool import handmade
from PIL import Image

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.writer import write_pool
from ssl_diversity.report.pool_page import write_pool_page

PAGE = "pool.html"
PROVENANCE: dict[str, Any] = {
    "pipeline": "/models/<mine>",
    "pipeline_class": "ConsistencyModelPipeline",
    "pipeline_digest": "d" * 32,
    "scheduler": "ddim",
    "steps": 50,
    "guidance": None,
    "diffusers": "0.30",
    "cost": {"seconds": 7200.0, "flops_per_image": 2.5e12, "energy_joules": 3.6e6, "training_flops": 1.2e15},
}


@pytest.fixture
def digits() -> Pool:
    return prepare(recipes.resolve("digits", {"size": 16, "max_images": 300}))


@pytest.fixture
def generated(tmp_path: Path) -> Callable[..., Pool]:
    """120 images of blobs, one of them blank once more, with what a generated pool notes."""

    def make(**changes: Any) -> Pool:
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(120)]
        note = {"prompt": "A photo of a <cat> & dog"}
        rows = [
            (image, i % 2, {**note, "index": i, "seed": 1000 + i})
            for i, image in enumerate([*images, images[0]])
        ]
        fields = {
            "name": "made", "source": "generated", "image_size": 16, "real_images": 5000,
            "classes": ["cat", "<dog>"], "provenance": PROVENANCE,
        }  # fmt: skip
        return write_pool(tmp_path / "made", fields | changes, rows)

    return make


class Elements(HTMLParser):
    """Checks that elements nest; collects attributes and ids."""

    VOID = frozenset({"meta", "img", "path", "use", "rect", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def text_of(page: Path) -> str:
    """What a person reads, spaces made plain."""
    plain = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(plain.replace("\u00a0", " ").split())


def pixels(attributes: dict[str, str | None]) -> Image.Image:
    data = str(attributes["src"]).partition("base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_page_is_one_file_that_asks_for_nothing(
    digits: Pool, generated: Callable[..., Pool], tmp_path: Path
) -> None:
    page = write_pool_page(generated(), tmp_path / "out" / PAGE, reference=digits, n=100)
    assert page == tmp_path / "out" / PAGE
    assert list(page.parent.iterdir()) == [page]
    html = page.read_text()
    assert not re.search(r"@import|<script|<link", html)
    elements = Elements(html)
    sources = [str(attributes["src"]) for attributes in elements.of("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(src|href)="(https?:)?//', html.replace("xmlns", ""))
    ids = [str(a["id"]) for _, a in elements.found if a.get("id")]
    assert len(ids) == len(set(ids))
    assert all(attributes["alt"] for attributes in elements.of("img"))


def test_samples_are_the_pools_first_rows_pixel_for_pixel(
    generated: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = generated()
    shown = Elements(write_pool_page(pool, tmp_path / PAGE).read_text()).of("img")
    assert len(shown) == 64
    for row, image in zip(pool.images(np.arange(64)), shown, strict=True):
        np.testing.assert_array_equal(np.asarray(pixels(image)), row)
    assert shown[3]["title"] == "made row 3, class <dog>, prompt A photo of a <cat> & dog, index 3, seed 1003"


def test_neighbours_shown_are_the_ones_that_were_found(
    digits: Pool, generated: Callable[..., Pool], tmp_path: Path
) -> None:
    shown = Elements(write_pool_page(generated(), tmp_path / PAGE, reference=digits, n=100).read_text()).of(
        "img"
    )[64:]
    assert len(shown) == 16 * 5  # itself, three by features, one by pixels
    for first in range(0, len(shown), 5):
        assert str(shown[first]["title"]).startswith(f"made row {first // 5},")
        for image in shown[first + 1 : first + 5]:
            found = re.match(r"digits row (\d+)", str(image["title"]))
            assert found
            np.testing.assert_array_equal(np.asarray(pixels(image)), digits.images([int(found[1])])[0])


def test_it_says_what_the_pool_is_what_was_dropped_and_what_it_cost(
    generated: Callable[..., Pool], tmp_path: Path
) -> None:
    text = text_of(write_pool_page(generated(), tmp_path / PAGE))
    assert "120 unique images, sampled from a ConsistencyModelPipeline, which saw 5,000 real images." in text
    assert "read 121 100 % the same as an earlier image 1 0.826 % kept 120 99.2 %" in text
    assert "cat 60 50 % &lt;dog&gt; 60 50 %" in text
    assert "scheduler ddim" in text
    assert "guidance –" in text
    assert "pipeline /models/&lt;mine&gt;" in text
    assert "time 2 h 0 min, 60 s per image kept" in text
    assert "FLOPs per image 2.5 × 10¹²" in text
    assert "energy 1 kWh, 30,000 J per image kept" in text
    assert "training the generator 1.2 × 10¹⁵ FLOPs, 1.0 × 10¹³ per image kept" in text
    assert "Nearest images" not in text


@pytest.mark.parametrize("cost", [{"seconds": 5.0, "flops_per_image": None, "energy_joules": None}, {}, None])
def test_a_cost_that_was_not_measured_is_said_to_be_so(
    generated: Callable[..., Pool], tmp_path: Path, cost: dict[str, Any] | None
) -> None:
    text = text_of(write_pool_page(generated(provenance={**PROVENANCE, "cost": cost}), tmp_path / PAGE))
    assert (
        "time 5 s, 0.0417 s per image kept FLOPs per image not measured energy not measured" in text
    ) == bool(cost)
    assert ("What it cost" in text) == bool(cost)


def test_it_gives_every_measure_with_n_extractor_and_both_ends_of_the_scale(
    digits: Pool, generated: Callable[..., Pool], tmp_path: Path
) -> None:
    text = text_of(write_pool_page(generated(), tmp_path / PAGE, reference=digits))
    assert (
        "The first 120 images of the pool and the first 120 of digits, seen through random-resnet@16px."
        in text
    )
    assert "made digits, other images uniform noise Fréchet distance" in text
    assert re.search(r"KID × 10³ [−\d.,× ⁰-⁹]+ ± [\d.,× ]+", text)
    assert "images of each 120 120 120" in text
    assert "100 subsets of 60 images" in text
    share = r"That is so for [\d.]+ % of the images of the pool; their median ratio is [\d.]+\."
    assert re.search(share + r" For the first 120 images of digits itself, each left out in turn", text)
    assert (
        "0 of the first 120 images of the pool were made of the same source pixels as one of all images"
        in text
    )


def test_a_small_reference_and_a_short_search_are_said_to_be_so(
    digits: Pool, generated: Callable[..., Pool], tmp_path: Path
) -> None:
    text = text_of(write_pool_page(digits, tmp_path / PAGE, reference=generated(), n=100, searched=110))
    assert "two disjoint draws of made against each other at 60 images, as it has no 2 × 100" in text
    assert "the nearest of the first 110 of 120 images of made" in text


def test_the_same_pools_give_the_same_bytes(
    digits: Pool, generated: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = generated()
    pages = [write_pool_page(pool, tmp_path / name, reference=digits, n=50).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(("resize", "size"), [("short", 20), ("none", 0)])
def test_images_of_any_shape_have_a_page(tmp_path: Path, resize: str, size: int) -> None:
    rng = np.random.default_rng(0)
    encoded = []
    for i in range(10):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(file, "png")
        encoded.append(file.getvalue())
    pool = handmade(tmp_path / "shapes", encoded, resize=resize, image_size=size)
    page = write_pool_page(pool, tmp_path / PAGE)
    shown = Elements(page.read_text()).of("img")
    assert {pixels(image).size for image in shown} == {(size or 96,) * 2}
    assert len(shown) == 10
    assert ("short side 20 px" in text_of(page)) == (resize == "short")


def test_large_images_are_shown_smaller_and_many_classes_folded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, (200, 200, 3), np.uint8), i, None) for i in range(30)]
    classes = [f"class {i}" for i in range(30)]
    pool = write_pool(tmp_path / "large", {"name": "large", "source": "test", "image_size": 200, "classes": classes, "real_images": None}, rows)  # fmt: skip
    page = write_pool_page(pool, tmp_path / PAGE)
    shown = Elements(page.read_text()).of("img")
    assert {(pixels(image).size, pixels(image).format) for image in shown} == {((160, 160), "JPEG")}
    assert "<summary>Images per class</summary>" in page.read_text()
    assert "real images behind it not known" in text_of(page)


def test_the_specification_is_on_the_page(digits: Pool, tmp_path: Path) -> None:
    html = write_pool_page(digits, tmp_path / PAGE).read_text()
    found = re.search(r"<pre>(.*?)</pre>", html, flags=re.DOTALL)
    assert found
    assert json.loads(found[1].replace("&#34;", '"')) == digits.info.spec
