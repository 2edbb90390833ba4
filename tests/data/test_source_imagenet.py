"""ImageNet in each of its forms, from small replicas in the official formats: one pool, the right labels."""

import io
import json
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from ssl_diversity.data import image, recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.sources import source_class
from ssl_diversity.data.sources.base import Item
from ssl_diversity.data.verify import verify
from ssl_diversity.errors import UserError

WNIDS = ["n01440764", "n01443537", "n02105855", "n13133613"]
IDS = {"n02105855": 1, "n13133613": 2, "n01440764": 3, "n01443537": 4}  # not in the order of the wnids
DEVKIT = "ILSVRC2012_devkit_t12"


def jpeg(seed: int, mode: str = "RGB") -> bytes:
    random = np.random.default_rng(seed)
    size = (int(random.integers(9, 20)), int(random.integers(9, 20)), len(mode))
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, size, np.uint8).squeeze(), mode).save(buffer, "jpeg")
    return buffer.getvalue()


class Replica:
    """`train[wnid][file]` and `val[file]` with `truth[file]` its wnid."""

    def __init__(self, images: list[bytes]) -> None:
        supply = iter(images)
        self.train = {w: {f"{w}_{7 * i}.JPEG": next(supply) for i in range(6)} for w in WNIDS}
        self.val = {f"ILSVRC2012_val_{i:08d}.JPEG": next(supply) for i in range(1, 13)}
        self.truth = {name: WNIDS[i * i % 4 if i % 3 else 2] for i, name in enumerate(self.val)}

    def devkit(self) -> dict[str, bytes]:
        """As in the official archive: IDs from 1 are classes, those after them have children."""
        kind = [
            (name, object)
            for name in (
                "ILSVRC2012_ID",
                "WNID",
                "words",
                "gloss",
                "num_children",
                "children",
                "wordnet_height",
                "num_train_images",
            )
        ]
        of_id = sorted((number, wnid) for wnid, number in IDS.items())
        rows = [(float(i), w, f"{w}, thing", "a gloss", 0.0, 0.0, 0.0, 6.0) for i, w in of_id]
        rows += [(5.0, "n00001740", "entity", "a gloss", 2.0, np.array([1.0, 3.0]), 2.0, 0.0)]
        buffer = io.BytesIO()
        savemat(buffer, {"synsets": np.array(rows, kind).reshape(-1, 1)})
        truth = "".join(f"{IDS[wnid]}\n" for wnid in self.truth.values())
        return {
            f"{DEVKIT}/readme.txt": b"ILSVRC2012",
            f"{DEVKIT}/data/meta.mat": buffer.getvalue(),
            f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        }


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def as_archives(replica: Replica, folder: Path) -> None:
    classes = list(replica.train.items())
    random.Random(0).shuffle(classes)
    train = tar({f"{wnid}.tar": tar(images) for wnid, images in classes})
    backwards = dict(reversed(replica.val.items()))
    archives = {"img_train.tar": train, "img_val.tar": tar(backwards)}
    archives["devkit_t12.tar.gz"] = tar(replica.devkit(), "w:gz")
    write(folder, {f"ILSVRC2012_{name}": data for name, data in archives.items()})


def train_files(replica: Replica) -> dict[str, bytes]:
    return {
        f"train/{wnid}/{name}": data
        for wnid, images in replica.train.items()
        for name, data in images.items()
    }


def as_folders(replica: Replica, folder: Path) -> None:
    write(folder, train_files(replica))
    write(folder, {f"val/{replica.truth[name]}/{name}": data for name, data in replica.val.items()})


def as_flat_validation(replica: Replica, folder: Path) -> None:
    write(folder, train_files(replica) | replica.devkit())
    write(folder, {f"val/{name}": data for name, data in replica.val.items()})


def as_parquet(replica: Replica, folder: Path) -> None:
    """As Hugging Face's ILSVRC/imagenet-1k: labels by human names, each file's wnid at the end of its name."""
    image, label = {"_type": "Image"}, {"_type": "ClassLabel", "names": [f"{wnid}, thing" for wnid in WNIDS]}
    metadata = {"huggingface": json.dumps({"info": {"features": {"image": image, "label": label}}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata)
    train = [(name, data, wnid) for wnid, images in replica.train.items() for name, data in images.items()]
    val = [(name, data, replica.truth[name]) for name, data in replica.val.items()]
    unlabelled = [("ILSVRC2012_test_00000001.JPEG", jpeg(500), None)]
    for split, rows, count in (("train", train, 3), ("validation", val, 2), ("test", unlabelled, 1)):
        random.Random(1).shuffle(rows)
        for i in range(count):
            values = [
                {
                    "image": {"bytes": data, "path": name.replace(".", f"_{wnid}.") if wnid else name},
                    "label": WNIDS.index(wnid) if wnid else -1,
                }
                for name, data, wnid in rows[i::count]
            ]
            path = folder / f"data/{split}-{i:05d}-of-{count:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(values, schema), path, row_group_size=3)


FORMS: dict[str, Callable[[Replica, Path], None]] = {
    "archives": as_archives,
    "folders": as_folders,
    "flat validation": as_flat_validation,
    "parquet": as_parquet,
}


def noise() -> list[bytes]:
    """With the odd files of the real set: a PNG that is called JPEG, CMYK, grey, and one that is broken."""
    images = [jpeg(seed) for seed in range(36)]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (9, 11, 4), np.uint8)).save(buffer, "png")
    images[13], images[3], images[7], images[20] = buffer.getvalue(), jpeg(98, "CMYK"), jpeg(97, "L"), b"none"
    images[5] = images[11]  # a copy, in another class
    return images


def real() -> list[bytes]:
    folder = os.environ.get("SSL_DIVERSITY_TEST_DATA")
    if not folder:
        pytest.skip("SSL_DIVERSITY_TEST_DATA is not set")
    with tarfile.open(Path(folder) / "tiny-imagenet-20k.tar") as archive:
        files = (archive.extractfile(member) for member in archive if member.name.endswith(".JPEG"))
        return [file.read() for file, _ in zip(files, range(36), strict=False) if file]


def pool(folder: Path, split: str, **options: object) -> Pool:
    options = {"path": str(folder), "size": 8, "codec": "png", "split": split, **options}
    made = prepare(recipes.resolve("imagenet", options))
    assert verify(made) == []
    return made


def read(folder: Path, split: str) -> list[Item]:
    """What the parts yield after their way to a worker."""
    cls = source_class("imagenet")
    parts = cls(cls.Options(path=str(folder)), folder).parts(split, 5)
    return [item for part in parts for item in pickle.loads(pickle.dumps(part))]


@pytest.mark.parametrize("images", [noise, real])
def test_every_form_gives_one_pool_and_the_right_labels(
    images: Callable[[], list[bytes]], tmp_path: Path
) -> None:
    replica = Replica(images())
    pools = {}
    for name, make in FORMS.items():
        make(replica, tmp_path / name)
        for split in ("train", "test"):
            pools[name, split] = pool(tmp_path / name, split)
        items = {item.name: item for item in read(tmp_path / name, "all")}
        assert {n: i.image for n, i in items.items() if n.startswith("train/")} == train_files(replica)
        for file, wnid in replica.truth.items():
            assert items[f"val/{wnid}/{file}"].image == replica.val[file]
            assert items[f"val/{wnid}/{file}"].label == WNIDS.index(wnid)
        assert len(items) == 36
    for split in ("train", "test"):
        made = [pools[name, split] for name in FORMS]
        assert made[0].info.classes == WNIDS
        assert len({p.digest for p in made}) == len({p.info.source_digest for p in made}) == 1
    wanted = {}
    for file, wnid in replica.truth.items():
        if replica.val[file] != b"none":
            content = image.content_hash(image.decode_source(replica.val[file]))
            wanted[content] = WNIDS.index(wnid)
    test = pools["archives", "test"]
    assert {bytes(c): n for c, n in zip(test.content, test.label.tolist(), strict=True)} == wanted
    plain = prepare(recipes.resolve("folder", {"path": str(tmp_path / "folders"), "size": 8}))
    assert plain.digest == pools["archives", "train"].digest
    assert plain.info.source_digest == pools["archives", "train"].info.source_digest


def test_odd_files_are_kept_and_broken_ones_are_listed(tmp_path: Path) -> None:
    as_archives(Replica(noise()), tmp_path)
    counts = pool(tmp_path, "train").info.counts
    assert (counts["undecodable"], counts["duplicate"], counts["conflict"], counts["kept"]) == (1, 1, 1, 22)


def test_one_split_is_enough_and_the_other_is_asked_for(tmp_path: Path) -> None:
    replica = Replica([jpeg(i) for i in range(36)])
    as_archives(replica, tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    assert pool(tmp_path, "test").size == 12
    with pytest.raises(UserError, match="no training images"):
        read(tmp_path, "train")
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(UserError, match=r"no ImageNet in it; looked for ILSVRC2012_img_train.tar"):
        read(tmp_path, "train")
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "absent", "train")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    as_folders(Replica([jpeg(i) for i in range(36)]), tmp_path)
    (tmp_path / "train/n02000000").mkdir()
    with pytest.raises(UserError, match=r"train/n02000000: empty class"):
        read(tmp_path, "train")


def test_what_is_wrong_with_labels_is_told(tmp_path: Path) -> None:
    replica = Replica([jpeg(i) for i in range(36)])
    as_flat_validation(replica, tmp_path)
    (tmp_path / f"val/{next(iter(replica.val))}").rename(tmp_path / "val/ILSVRC2012_val_00000013.JPEG")
    with pytest.raises(UserError, match=r"not the 12 images ILSVRC2012_val_00000001.JPEG"):
        read(tmp_path, "test")
    (tmp_path / f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt").write_text("5\n" * 13)
    with pytest.raises(UserError, match=r"names a class that data/meta.mat does not have"):
        read(tmp_path, "test")
    (tmp_path / f"{DEVKIT}/data/meta.mat").unlink()
    with pytest.raises(UserError, match=r"meta\.mat: missing; validation labels come from it"):
        read(tmp_path, "test")
    (tmp_path / "train/n01440764").rename(tmp_path / "train/n99999999")
    write(tmp_path, replica.devkit())
    with pytest.raises(UserError, match="validation class n01440764 is not among the training classes"):
        read(tmp_path, "test")


def test_parquet_labels_of_another_order_and_names_of_another_set(tmp_path: Path) -> None:
    replica = Replica([jpeg(i) for i in range(36)])
    as_parquet(replica, tmp_path)
    expected = sorted(read(tmp_path, "all"))
    for path in (tmp_path / "data").iterdir():
        table = pq.read_table(path)
        turned = pa.array([3 - label for label in table["label"].to_pylist()])
        pq.write_table(table.set_column(1, "label", turned), path, row_group_size=3)
    assert sorted(read(tmp_path, "all")) == expected
    images = [{"image": {"bytes": jpeg(0), "path": "cat_1.JPEG"}, "label": 0}]
    pq.write_table(pa.Table.from_pylist(images), tmp_path / "data/train-00000-of-00003.parquet")
    with pytest.raises(UserError, match=r"'cat_1.JPEG' is not named as ImageNet's are"):
        read(tmp_path, "train")


@pytest.mark.parametrize("cut", [1, 600, 1024, 3000])
def test_a_truncated_archive_is_named(cut: int, tmp_path: Path) -> None:
    as_archives(Replica([jpeg(i) for i in range(36)]), tmp_path)
    for name, split in (("ILSVRC2012_img_train.tar", "train"), ("ILSVRC2012_img_val.tar", "test")):
        data = (tmp_path / name).read_bytes().rstrip(b"\0")
        (tmp_path / name).write_bytes(data[:-cut])
        with pytest.raises(UserError, match=rf"{name}: truncated tar"):
            read(tmp_path, split)
        as_archives(Replica([jpeg(i) for i in range(36)]), tmp_path)


def test_a_truncated_class_tar_does_not_run_on_into_the_next(tmp_path: Path) -> None:
    replica = Replica([jpeg(i) for i in range(36)])
    for cut in (512, 10 * 1024):
        inner = {f"{wnid}.tar": tar(images) for wnid, images in replica.train.items()}
        inner["n01443537.tar"] = inner["n01443537.tar"].rstrip(b"\0")
        inner["n01443537.tar"] += bytes(-len(inner["n01443537.tar"]) % 512)  # no end mark
        inner["n01443537.tar"] = inner["n01443537.tar"][: len(inner["n01443537.tar"]) - cut + 512]
        write(tmp_path, {"ILSVRC2012_img_train.tar": tar(inner)})
        with pytest.raises(UserError, match=r"img_train.tar/n01443537.tar: truncated tar"):
            read(tmp_path, "train")


def test_an_archive_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    as_archives(Replica([jpeg(i) for i in range(36)]), tmp_path)
    cls = source_class("imagenet")
    parts = list(cls(cls.Options(path=str(tmp_path)), tmp_path).parts("train", 5))
    keys = [part.key() for part in parts]
    assert len(list(parts[0])) == 6
    os.utime(tmp_path / "ILSVRC2012_img_train.tar", ns=(0, 1))
    with pytest.raises(UserError, match="changed since it was listed"):
        list(parts[1])
    again = cls(cls.Options(path=str(tmp_path)), tmp_path).parts("train", 5)
    assert not any(part.key() in keys for part in again)
