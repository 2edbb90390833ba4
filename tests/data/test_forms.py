"""The same images as tar, folder, WebDataset shards and parquet give the same pool, whatever the order inside."""

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from form_helpers import Picture, write_folder, write_parquet, write_shards, write_tar
from PIL import Image

from ssl_diversity.data import recipes
from ssl_diversity.data.leaks import leaked
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.verify import verify

CLASSES = ["ant", "bee", "cow"]


def encoded(seed: int, codec: str = "png", size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec)
    return buffer.getvalue()


def pictures() -> list[Picture]:
    """60 + 20 images; copies with equal and conflicting labels, one across the splits, one that does not decode.

    The copy of the lower class has the later name, so that an order by names would keep the other.
    """
    made = [
        Picture(
            "train" if i < 60 else "val",
            i % 3,
            f"{i:03d}.{'png' if i % 2 else 'webp'}",
            encoded(i, "png" if i % 2 else "webp", (8 + i % 3, 8)),
        )
        for i in range(80)
    ]
    png = {i: made[i].data for i in (1, 4, 7, 61)}
    return [
        *made,
        Picture("train", 1, "copy.png", png[1]),  # of 001, same class
        Picture("train", 0, "zz-conflict.png", png[4]),  # of 004, which is of class 1
        Picture("train", 2, "0-conflict.png", png[7]),  # of 007, which is of class 1
        Picture("val", 0, "across.png", png[7]),
        Picture("train", 2, "broken.png", b"no image"),
    ]


def forms(root: Path, made: list[Picture]) -> dict[str, Path]:
    """Each in an order of its own."""
    orders = [random.Random(seed).sample(made, len(made)) for seed in range(4)]
    return {
        "tar": write_tar(root / "flowers.tar", orders[0], CLASSES),
        "folder": write_folder(root / "folder", orders[1], CLASSES),
        "webdataset": write_shards(root / "shards", orders[2], CLASSES, 17),
        "parquet": write_parquet(root / "hub", orders[3], CLASSES, 30, 8),
    }


def dropped(pool: Pool) -> Counter[tuple[Any, ...]]:
    """What was left out, without the names, which are each form's own."""
    lines = map(json.loads, (pool.path / "dropped.jsonl").read_text().splitlines())
    return Counter((d["cause"], d.get("label"), d.get("kept_label")) for d in lines)


Prepared = dict[str, tuple[Pool, Pool, Pool]]  # form -> pretraining pool, downstream train and test


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Prepared]:
    def make(made: list[Picture], **options: Any) -> Prepared:
        out = {}
        for form, path in forms(tmp_path, made).items():
            whole = prepare(recipes.resolve(str(path), {"size": 6, "name": form, **options}))
            train, test = recipes.downstream(str(path), {"size": 6, "name": form, **options})
            out[form] = (whole, prepare(train), prepare(test))
        return out

    return make


def test_every_form_gives_the_same_pools(prepared: Callable[..., Prepared]) -> None:
    out = prepared(pictures())
    sources = {form: pools[0].info.source for form, pools in out.items()}
    assert sources == {"tar": "folder", "folder": "folder", "webdataset": "webdataset", "parquet": "parquet"}
    for pools in zip(*out.values(), strict=True):
        first = pools[0]
        assert len({pool.path for pool in pools}) == 4
        assert {pool.digest for pool in pools} == {first.digest}
        assert {tuple(shard.blake2b for shard in pool.info.shards) for pool in pools} == {
            tuple(shard.blake2b for shard in first.info.shards)
        }
        assert all(pool.info.counts == first.info.counts for pool in pools)
        assert all(pool.info.classes == CLASSES for pool in pools)
        assert all(dropped(pool) == dropped(first) for pool in pools)
        assert all(verify(pool) == [] for pool in pools)


def test_conflicts_are_settled_by_the_label_and_listed(prepared: Callable[..., Prepared]) -> None:
    for pool, train, test in prepared(pictures()).values():
        counts = pool.info.counts
        assert [counts[name] for name in ("read", "undecodable", "duplicate", "conflict", "kept")] == [
            64,
            1,
            3,
            2,
            60,
        ]
        assert dropped(pool) == {
            ("undecodable", None, None): 1,
            ("duplicate", None, None): 1,
            ("duplicate", 1, 0): 1,
            ("duplicate", 2, 1): 1,
        }
        assert (train.size, test.size) == (63, 21)  # nothing is dropped downstream
        assert leaked(test, pool, pool.rows(pool.size)) == 1


def test_without_splits_the_held_out_part_is_the_same_too(prepared: Callable[..., Prepared]) -> None:
    unsplit = [picture._replace(split="", name=f"{i}-{picture.name}") for i, picture in enumerate(pictures())]
    out = prepared(unsplit, holdout=0.25)
    for pools in zip(*out.values(), strict=True):
        assert len({(pool.digest, str(pool.info.counts)) for pool in pools}) == 1
    train, test = out["webdataset"][1:]
    assert test.size > 0
    assert leaked(test, train, train.rows(train.size)) == 0
