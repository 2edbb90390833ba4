"""CIFAR-10 and Tiny ImageNet, where they lie, as tar, folder, WebDataset shards and parquet: one and the same pool.

Known of this Tiny ImageNet: two pairs of exact copies with conflicting labels, one of them across train and val.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from form_helpers import Picture, write_folder, write_parquet, write_shards, write_tar

from ssl_diversity.data import recipes
from ssl_diversity.data.leaks import leaked
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.verify import verify

pytestmark = pytest.mark.skipif("SSL_DIVERSITY_TEST_DATA" not in os.environ, reason="no real images here")

ARCHIVES = {"cifar10": ("cifar10.tar", 32), "tiny-imagenet": ("tiny-imagenet-20k.tar", 64)}  # and image size
CONFLICT = {"n07747607/n07747607_20.JPEG", "n07753592/n07753592_63.JPEG"}  # equal; both in train
ACROSS = {"n01855672/n01855672_44.JPEG", "n02002724/val_2157.JPEG"}  # equal; one in train, one in val
Pair = tuple[Pool, Pool]  # for pretraining, and the downstream test set


def archive(name: str) -> Path:
    return Path(os.environ["SSL_DIVERSITY_TEST_DATA"]) / ARCHIVES[name][0]


def read(name: str, every: int) -> tuple[list[str], list[Picture]]:
    """The classes, and every `every`-th image and the known copies, read by plain code."""
    found: list[tuple[str, str, str, bytes]] = []
    with tarfile.open(archive(name)) as tar:
        for i, member in enumerate(m for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))):
            _, split, wnid, file = member.name.split("/")
            if i % every == 0 or f"{wnid}/{file}" in CONFLICT | ACROSS:
                data = tar.extractfile(member)
                assert data is not None
                found.append(("train" if split == "train" else "val", wnid, f"{wnid}-{file}", data.read()))
    classes = sorted({wnid for _, wnid, _, _ in found})
    return classes, [Picture(split, classes.index(wnid), file, data) for split, wnid, file, data in found]


def in_every_form(name: str, every: int, root: Path) -> Pair:
    """The pools of one form, after all forms were found to give the same."""
    classes, pictures = read(name, every)
    paths = {
        "tar": write_tar(root / "set.tar", pictures, classes),
        "folder": write_folder(root / "folder", pictures, classes),
        "webdataset": write_shards(root / "shards", pictures, classes, len(pictures) // 7),
        "parquet": write_parquet(root / "hub", pictures, classes, len(pictures) // 3, 500),
    }
    if every == 1:
        paths["original"] = archive(name)
    processes = 2 if every == 1 else 1
    size = ARCHIVES[name][1]
    found = [pair(path, processes, name=form, size=size) for form, path in paths.items()]
    for pools in zip(*found, strict=True):
        assert len({pool.path for pool in pools}) == len(paths)
        assert len({pool.digest for pool in pools}) == 1
        assert len({str(pool.info.counts) for pool in pools}) == 1
        assert len({str(pool.info.shards) for pool in pools}) == 1
    assert len({str(conflicts(pool)) for pool, _ in found}) == 1
    assert verify(found[-1][0]) == []
    return found[-1]


def pair(path: Path, processes: int, **options: Any) -> Pair:
    specs = recipes.resolve(str(path), options), recipes.downstream(str(path), options)[1]
    pool, test = (prepare(spec, processes=processes) for spec in specs)
    return pool, test


def conflicts(pool: Pool) -> list[tuple[str, str]]:
    """(class of the dropped image, class of the kept one) of the copies whose labels differ."""
    lines = map(json.loads, (pool.path / "dropped.jsonl").read_text().splitlines())
    names = pool.info.classes
    return [(names[d["label"]], names[d["kept_label"]]) for d in lines if "kept_label" in d]


def check_known_copies(pool: Pool, test: Pool) -> None:
    assert conflicts(pool) == [("n07753592", "n07747607")]
    assert (pool.info.counts["duplicate"], pool.info.counts["conflict"]) == (1, 1)
    assert leaked(test, pool, pool.rows(pool.size)) == 1


def test_a_slice_of_cifar10(tmp_path: Path) -> None:
    pool, test = in_every_form("cifar10", 100, tmp_path)
    assert (pool.size, test.size) == (500, 100)


def test_a_slice_of_tiny_imagenet_with_its_known_copies(tmp_path: Path) -> None:
    pool, test = in_every_form("tiny-imagenet", 50, tmp_path)
    check_known_copies(pool, test)
    assert pool.size + test.size > 500


@pytest.mark.slow
def test_the_whole_of_cifar10(tmp_path: Path) -> None:
    pool, test = in_every_form("cifar10", 1, tmp_path)
    counts = pool.info.counts
    assert (counts["read"], counts["undecodable"], test.size) == (50_000, 0, 10_000)


@pytest.mark.slow
def test_the_whole_of_tiny_imagenet(tmp_path: Path) -> None:
    pool, test = in_every_form("tiny-imagenet", 1, tmp_path)
    check_known_copies(pool, test)
    assert (pool.size, test.size) == (19_999, 5_000)
