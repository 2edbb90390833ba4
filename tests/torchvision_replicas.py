"""Small replicas of torchvision's sets, in the exact layout that each is published in."""

import bz2
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

NAMES = ["ant bear", "cat", "dog"]  # of the classes
SPLITS = ("train", "val", "test", "more")


class Picture(NamedTuple):
    label: int
    pixels: NDArray[np.uint8]  # (H, W, 3)
    jpeg: bytes


Pictures = dict[str, list[Picture]]


def pictures(size: int = 12, grey: bool = False) -> Pictures:
    """Two images of each class in each split, all different."""
    random = np.random.default_rng(size)
    found: Pictures = {}
    for split in SPLITS:
        found[split] = []
        for i in range(6):
            pixels = random.integers(0, 256, (size, size, 1 if grey else 3), np.uint8)
            pixels = np.repeat(pixels, 3, axis=2) if grey else pixels
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg")
            found[split].append(Picture(i % 3, pixels, buffer.getvalue()))
    return found


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def stack(images: list[Picture]) -> NDArray[np.uint8]:
    return np.stack([image.pixels for image in images])


def labels(images: list[Picture]) -> list[int]:
    return [image.label for image in images]


def cifar(root: Path, fine: bool) -> Pictures:
    images = pictures(32)
    base = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    key = "fine_labels" if fine else "labels"

    def batch(name: str, chosen: list[Picture]) -> None:
        data = stack(chosen).transpose(0, 3, 1, 2).reshape(len(chosen), -1)
        write(base / name, pickle.dumps({"data": data, key: labels(chosen)}, protocol=2))

    if fine:
        batch("train", images["train"])
    for i in range(0 if fine else 5):
        batch(f"data_batch_{i + 1}", images["train"][i : i + 1 if i < 4 else 6])
    batch("test" if fine else "test_batch", images["test"])
    meta = pickle.dumps({"fine_label_names" if fine else "label_names": NAMES}, protocol=2)
    write(base / ("meta" if fine else "batches.meta"), meta)
    return images


def stl10(root: Path) -> Pictures:
    images = pictures(96)
    for name, split in (("train", "train"), ("test", "test"), ("unlabeled", "more")):
        data = stack(images[split]).transpose(0, 3, 2, 1)  # column by column
        write(root / f"stl10_binary/{name}_X.bin", data.tobytes())
        if name != "unlabeled":
            write(root / f"stl10_binary/{name}_y.bin", bytes(label + 1 for label in labels(images[split])))
    write(root / "stl10_binary/class_names.txt", "\n".join(NAMES) + "\n")
    return images


def svhn(root: Path) -> Pictures:
    images = pictures(32)
    for name, split in (("train", "train"), ("test", "test"), ("extra", "more")):
        y = np.array([[label or 10] for label in labels(images[split])], np.uint8)  # a zero is 10
        savemat(root / f"{name}_32x32.mat", {"X": stack(images[split]).transpose(1, 2, 3, 0), "y": y})
    return images


def mnist(root: Path, name: str) -> Pictures:
    images = pictures(28, grey=True)
    for prefix, split in (("train", "train"), ("t10k", "test")):
        grey = stack(images[split])[..., 0]
        head = struct.pack(">4i", 0x803, *grey.shape)
        write(root / name / f"raw/{prefix}-images-idx3-ubyte", head + grey.tobytes())
        head = struct.pack(">2i", 0x801, len(grey))
        write(root / name / f"raw/{prefix}-labels-idx1-ubyte", head + bytes(labels(images[split])))
    return images


def usps(root: Path) -> Pictures:
    images = pictures(16, grey=True)
    for file, split in (("usps.bz2", "train"), ("usps.t.bz2", "test")):
        lines = []
        for image in images[split]:
            values = (image.pixels[..., 0].ravel() + 0.1) / 255 * 2 - 1
            lines.append(f"{image.label + 1} " + " ".join(f"{i}:{v:.6f}" for i, v in enumerate(values, 1)))
        write(root / file, bz2.compress(("\n".join(lines) + "\n").encode()))
    return images


def files(root: Path, template: str, names: list[str] = NAMES, **folders: str) -> Pictures:
    """Image i of each split named in `folders` as `template`, with {folder}, {name} (of its class), {i}, {nth}."""
    images = pictures()
    for split, folder in folders.items():
        for i, image in enumerate(images[split]):
            name = names[image.label]
            place = template.format(folder=folder, name=name, i=i, nth=i // 3 + 1, label=image.label)
            write(root / place, image.jpeg)
    return images


def food101(root: Path) -> Pictures:
    images = files(root, "food-101/images/{name}/{folder}{i}.jpg", train="1", test="2")
    for folder, split in (("1", "train"), ("2", "test")):
        listed = {name: [f"{name}/{folder}{i}" for i in (n, n + 3)] for n, name in enumerate(NAMES)}
        write(root / f"food-101/meta/{split}.json", json.dumps(listed))
    return images


def flowers102(root: Path) -> Pictures:
    base = root / "flowers-102"
    images = files(root, "flowers-102/jpg/image_{folder}{i}.jpg", train="0001", val="0002", test="0003")
    ids = {split: [10 * n + i for i in range(6)] for n, split in enumerate(("train", "val", "test"), 1)}
    savemat(base / "setid.mat", {"trnid": ids["train"], "valid": ids["val"], "tstid": ids["test"]})
    of = np.ones(40, int)
    for split, numbers in ids.items():
        of[np.array(numbers) - 1] = np.array(labels(images[split])) + 1
    savemat(base / "imagelabels.mat", {"labels": of})
    return images


def pets(root: Path) -> Pictures:
    names = ["Ant_bear", "cat", "Dog"]
    base = root / "oxford-iiit-pet"
    images = files(base, "images/{name}_{folder}{i}.jpg", names, train="1", test="2")
    for folder, split, file in (("1", "train", "trainval"), ("2", "test", "test")):
        lines = [f"{names[x.label]}_{folder}{i} {x.label + 1} 1 1" for i, x in enumerate(images[split])]
        write(base / f"annotations/{file}.txt", "\n".join(lines) + "\n")
    return images


def dtd(root: Path) -> Pictures:
    images = files(root, "dtd/dtd/images/{name}/{folder}{i}.jpg", train="1", val="2", test="3")
    for folder, split in (("1", "train"), ("2", "val"), ("3", "test")):
        lines = [f"{NAMES[x.label]}/{folder}{i}.jpg" for i, x in enumerate(images[split])]
        write(root / f"dtd/dtd/labels/{split}1.txt", "\n".join(lines) + "\n")
    return images


def gtsrb(root: Path) -> Pictures:
    images = pictures()
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for split, folder in (("train", "Training/{:05d}"), ("test", "Final_Test/Images")):
        for i, image in enumerate(images[split]):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(image.jpeg)).save(buffer, "ppm")
            images[split][i] = image._replace(jpeg=buffer.getvalue())
            name = f"{i:05d}_{i:05d}.ppm"
            write(root / "gtsrb/GTSRB" / folder.format(image.label) / name, buffer.getvalue())
            rows += [f"{name};12;12;1;1;9;9;{image.label}"] * (split == "test")
    write(root / "gtsrb/GT-final_test.csv", "\n".join(rows) + "\n")
    return images


def places365(root: Path) -> Pictures:
    images = files(
        root, "{folder}/{name}/{i}.jpg", ["a", "a", "a"], train="data_large_standard", val="val_large"
    )
    write(root / "categories_places365.txt", "".join(f"/a/{n} {i}\n" for i, n in enumerate("xyz")))
    for file, split in (("train_standard", "train"), ("val", "val")):
        prefix = "/" if split == "train" else ""  # as in the official lists
        lines = [f"{prefix}a/{i}.jpg {image.label}\n" for i, image in enumerate(images[split])]
        write(root / f"places365_{file}.txt", "".join(lines))
    return images


def aircraft(root: Path) -> Pictures:
    base = root / "fgvc-aircraft-2013b/data"
    images = files(base, "images/{folder}{i}.jpg", train="1", test="2")
    write(base / "variants.txt", "\n".join(NAMES) + "\n")
    for folder, split, file in (("1", "train", "trainval"), ("2", "test", "test")):
        lines = [f"{folder}{i} {NAMES[x.label]}" for i, x in enumerate(images[split])]
        write(base / f"images_variant_{file}.txt", "\n".join(lines) + "\n")
    return images


def cars(root: Path) -> Pictures:
    base = root / "stanford_cars"
    images = files(base, "{folder}/{i}.jpg", train="cars_train", test="cars_test")
    (base / "devkit").mkdir()
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(NAMES, object)})
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{i}.jpg", x.label + 1) for i, x in enumerate(images[split])]
        kind = [("fname", object), ("class", object)]
        savemat(base / file, {"annotations": np.array(rows, kind)})
    return images


def sun397(root: Path) -> Pictures:
    images = files(
        root, "SUN397/{name}/sun_{folder}{i}.jpg", ["a/abbey", "a/apse/indoor", "b/bar"], train="1"
    )
    write(root / "SUN397/ClassName.txt", "/a/abbey\n/a/apse/indoor\n/b/bar\n")
    return images


def caltech101(root: Path) -> Pictures:
    base = "caltech101/101_ObjectCategories/"
    write(root / base / "BACKGROUND_Google/image_0001.jpg", b"not a class")
    return files(root, base + "{name}/image_{folder}{nth}.jpg", train="000")


def caltech256(root: Path) -> Pictures:
    names = [f"{i:03d}.{name}" for i, name in enumerate(NAMES, 1)]
    images = pictures()
    for i, image in enumerate(images["train"]):
        name = f"{names[image.label]}/{image.label + 1:03d}_{i // 3 + 1:04d}.jpg"
        write(root / "caltech256/256_ObjectCategories" / name, image.jpeg)
    return images


def sst2(root: Path) -> Pictures:
    names = ["negative", "positive", "positive"]
    images = files(
        root, "rendered-sst2/{folder}/{name}/{i}.png", names, train="train", val="valid", test="test"
    )
    return {split: [x._replace(label=min(x.label, 1)) for x in chosen] for split, chosen in images.items()}


def inaturalist(root: Path) -> Pictures:
    names = [f"{i:05d}_Animalia_P_C_O_F_G_{name}" for i, name in enumerate("xyz")]
    return files(root, "{folder}/{name}/{i}.jpg", names, train="2021_train", val="2021_valid")


class Replica(NamedTuple):
    make: Callable[[Path], Pictures]
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test",)
    classes: list[str] = NAMES  # the first of them


JOINED = ("train", "val")
DIGITS = ["0", "1", "2"]
REPLICAS = {
    "CIFAR10": Replica(lambda root: cifar(root, fine=False)),
    "CIFAR100": Replica(lambda root: cifar(root, fine=True)),
    "Caltech101": Replica(caltech101, test=()),
    "Caltech256": Replica(caltech256, test=(), classes=["001.ant bear", "002.cat", "003.dog"]),
    "Country211": Replica(
        lambda root: files(
            root, "country211/{folder}/{name}/{i}.jpg", train="train", val="valid", test="test"
        ),
        JOINED,
    ),
    "DTD": Replica(dtd, JOINED),
    "EuroSAT": Replica(lambda root: files(root, "eurosat/2750/{name}/{name}_{i}.jpg", train=""), test=()),
    "FGVCAircraft": Replica(aircraft),
    "FashionMNIST": Replica(
        lambda root: mnist(root, "FashionMNIST"), classes=["T-shirt/top", "Trouser", "Pullover"]
    ),
    "Flowers102": Replica(
        flowers102, JOINED, classes=["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]
    ),
    "Food101": Replica(food101),
    "GTSRB": Replica(gtsrb, classes=["00000", "00001", "00002"]),
    "INaturalist": Replica(
        inaturalist, test=("val",), classes=[f"{i:05d}_Animalia_P_C_O_F_G_{n}" for i, n in enumerate("xyz")]
    ),
    "Imagenette": Replica(
        lambda root: files(
            root,
            "imagenette2/{folder}/{name}/{i}.JPEG",
            ["n01440764", "n02102040", "n02979186"],
            train="train",
            val="val",
        ),
        test=("val",),
        classes=[
            "tench, Tinca tinca",
            "English springer, English springer spaniel",
            "cassette player",
        ],
    ),
    "KMNIST": Replica(lambda root: mnist(root, "KMNIST"), classes=["o", "ki", "su"]),
    "MNIST": Replica(lambda root: mnist(root, "MNIST"), classes=["0 - zero", "1 - one", "2 - two"]),
    "OxfordIIITPet": Replica(pets, classes=["Ant Bear", "Cat", "Dog"]),
    "Places365": Replica(places365, test=("val",), classes=["/a/x", "/a/y", "/a/z"]),
    "RenderedSST2": Replica(sst2, JOINED, classes=["negative", "positive"]),
    "STL10": Replica(stl10),
    "SUN397": Replica(sun397, test=(), classes=["abbey", "apse/indoor", "bar"]),
    "SVHN": Replica(svhn, classes=DIGITS),
    "StanfordCars": Replica(cars),
    "USPS": Replica(usps, classes=DIGITS),
}
HASHED = ("cifar", "stl10", "svhn", "mnist", "flowers102", "places365")  # modules that compare MD5s
