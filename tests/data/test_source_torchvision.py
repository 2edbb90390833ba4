"""torchvision's sets, each from a small replica of its files on disk in the exact layout, become verified pools.

torchvision compares the files of some sets with the MD5 of the originals, which no replica has: those tests put
"is the file there?" in place of that comparison, in torchvision itself.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision_replicas as replicas
from torchvision_replicas import HASHED, REPLICAS, Pictures, write

from ssl_diversity.data import recipes
from ssl_diversity.data.image import decode_source
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.sources import source_class
from ssl_diversity.data.sources.base import Item
from ssl_diversity.data.sources.torchvision import SETS
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import UserError


@pytest.fixture
def any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in HASHED:
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: os.path.isfile(path)
        )


def read(name: str, root: Path, scratch: Path, split: str, **options: object) -> list[Item]:
    cls = source_class("torchvision")
    source = cls(cls.Options(dataset=name, path=str(root), **options), scratch)
    return [item for part in source.parts(split, 4) for item in pickle.loads(pickle.dumps(part))]


def expected(images: Pictures, splits: tuple[str, ...], *, in_files: bool) -> list[tuple[int, bytes]]:
    found = [image for split in splits for image in images[split]]
    return sorted((image.label, image.jpeg if in_files else image.pixels.tobytes()) for image in found)


def content(items: list[Item]) -> list[tuple[int, bytes]]:
    return sorted(
        (item.label, item.image if isinstance(item.image, bytes) else item.image.tobytes()) for item in items
    )


def test_every_set_but_one_that_needs_h5py_has_a_replica_here() -> None:
    assert set(SETS) - set(REPLICAS) == {"PCAM"}


@pytest.mark.usefixtures("any_bytes")
@pytest.mark.parametrize("name", REPLICAS)
def test_a_replica_in_the_official_layout_is_read_exactly_and_becomes_a_verified_pool(
    name: str, tmp_path: Path
) -> None:
    replica = REPLICAS[name]
    root, scratch = tmp_path / "data", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    images = replica.make(root)
    split_items = {split: read(name, root, scratch, split) for split in ("train", "test", "all")}
    in_files = isinstance(split_items["all"][0].image, bytes)
    for split, wanted in (("train", replica.train), ("test", replica.test or replica.train)):
        assert content(split_items[split]) == expected(images, wanted, in_files=in_files)
    both = split_items["all"]
    assert len({item.name for item in both}) == len(both) == 6 * len(replica.train + replica.test)
    pool = prepare(
        recipes.resolve("torchvision", {"dataset": name, "path": str(root), "size": 8, "name": "set"})
    )
    assert pool.size == 6 * len(replica.train)
    assert pool.info.classes[:3] == replica.classes
    assert verify(pool) == []


@pytest.mark.usefixtures("any_bytes")
def test_other_training_splits_and_arguments(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    images = replicas.stl10(tmp_path)
    unlabelled = [image._replace(label=-1) for image in images["more"]]
    wanted = expected({"more": unlabelled, "train": images["train"]}, ("more", "train"), in_files=False)
    assert content(read("STL10", tmp_path, scratch, "train", train_split="train+unlabeled")) == wanted
    only = read("STL10", tmp_path, scratch, "train", train_split="unlabeled")
    assert {item.label for item in only} == {-1}
    assert len(only) == 6
    images = replicas.svhn(tmp_path)
    extra = read("SVHN", tmp_path, scratch, "train", train_split="extra")
    assert content(extra) == expected(images, ("more",), in_files=False)
    images = replicas.aircraft(tmp_path)
    base = tmp_path / "fgvc-aircraft-2013b/data"
    write(base / "families.txt", "Boeing 737\n")
    for split in ("trainval", "test"):
        lines = (base / f"images_variant_{split}.txt").read_text().splitlines()
        write(base / f"images_family_{split}.txt", "".join(f"{x.split()[0]} Boeing 737\n" for x in lines))
    family = read("FGVCAircraft", tmp_path, scratch, "test", arguments={"annotation_level": "family"})
    assert [item.label for item in family] == [0] * 6


def test_parts_are_small_and_their_keys_follow_the_pixels(
    tmp_path: Path, any_bytes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = source_class("torchvision")

    def keys(images: Pictures) -> list[object]:
        monkeypatch.setattr(replicas, "pictures", lambda size: images)
        replicas.cifar(tmp_path, fine=True)
        parts = list(cls(cls.Options(dataset="CIFAR100", path=str(tmp_path)), tmp_path).parts("train", 4))
        assert [len(part) for part in parts] == [4, 2]
        assert all(len(pickle.dumps(part)) < 1000 for part in parts)
        return [part.key() for part in parts]

    images = replicas.pictures(32)
    before = keys(images)
    images["train"][5].pixels[0, 0, 0] ^= 1
    after = keys(images)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_what_is_missing_or_unknown_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean 'CIFAR10'"):
        recipes.resolve("torchvision", {"dataset": "CIFAR1O", "path": str(tmp_path)})
    with pytest.raises(UserError, match=r"CIFAR10 with .* does not open there .*download=true"):
        read("cifar10", tmp_path, tmp_path, "train")
    with pytest.raises(UserError, match=r"SVHN with .*unlabeled.* does not open there"):
        read("SVHN", tmp_path, tmp_path, "train", train_split="unlabeled")

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refused)
    with pytest.raises(UserError, match=r"could not download CIFAR10 \(OSError: no route to host\)"):
        read("CIFAR10", tmp_path, tmp_path, "train", download=True)
    replicas.food101(tmp_path)
    (tmp_path / "food-101/images/cat/14.jpg").unlink()
    with pytest.raises(UserError, match=r"food-101/images/cat/14.jpg: vanished"):
        read("Food101", tmp_path, tmp_path, "train")


def test_original_bytes_are_decoded_by_us_as_any_other_source(tmp_path: Path) -> None:
    images = replicas.food101(tmp_path)
    first = read("Food101", tmp_path, tmp_path, "test")[0]
    assert isinstance(first.image, bytes)
    np.testing.assert_array_equal(decode_source(first.image), decode_source(images["test"][0].jpeg))
    assert first.name == "food-101/images/ant bear/20.jpg"
