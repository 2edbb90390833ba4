"""What sources yield: layouts, forms, and one clear error for each thing that can be wrong."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data import image, recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.sources import SOURCES, source_class
from ssl_diversity.data.sources.base import Item, Part
from ssl_diversity.data.sources.layout import is_image, read_layout
from ssl_diversity.data.sources.listing import FilePart, Lister, file_parts
from ssl_diversity.data.sources.tars import members
from ssl_diversity.errors import UserError

Tree = dict[str, bytes]


def items(kind: str, scratch: Path, split: str = "all", part_items: int = 7, **options: object) -> list[Item]:
    cls = source_class(kind)
    source = cls(cls.Options(**options), scratch)
    return [item for part in source.parts(split, part_items) for item in part]


def chosen(
    names: list[str], split: str, labelled: bool | None = None, folders: tuple[str, ...] = ()
) -> list[tuple[str, str]]:
    layout = read_layout(names, folders, labelled, "set")
    return [(names[i], layout.classes[n] if n >= 0 else "") for i, n in layout.chosen[split]]


def test_a_tree_with_splits_is_recognised_at_the_top_and_below_single_roots() -> None:
    for root in ("", "cifar10/", "data/cifar10/"):
        names = [f"{root}{split}/{c}/0.jpg" for split in ("test", "train") for c in ("cat", "dog")]
        for split in ("train", "test"):
            assert chosen(names, split) == [(f"{root}{split}/{c}/0.jpg", c) for c in ("cat", "dog")]
        assert read_layout(names, (), None, "set").base == root.rstrip("/")


def test_test_split_is_test_then_val_then_whichever_has_the_classes_of_train() -> None:
    train = ["train/a/0.jpg", "train/b/1.jpg"]
    both = [*train, "val/a/2.jpg", "test/b/3.jpg"]
    assert chosen(both, "test") == [("test/b/3.jpg", "b")]
    assert chosen([*train, "val/a/2.jpg", "test/3.jpg"], "test") == [("val/a/2.jpg", "a")]
    assert chosen([*train, "valid/a/images/2.JPEG"], "test") == [("valid/a/images/2.JPEG", "a")]
    with pytest.raises(UserError, match="images is not among the 2 classes"):
        chosen([*train, "val/images/2.jpg"], "test")
    assert chosen(["train/0.jpg", "val/1.jpg"], "test") == [("val/1.jpg", "")]


def test_unsplit_trees_flat_folders_and_labelled() -> None:
    assert chosen(["x/a/0.jpg", "x/b/deep/1.jpg"], "all") == [("x/a/0.jpg", "a"), ("x/b/deep/1.jpg", "b")]
    assert chosen(["x/0.jpg", "x/1.jpg"], "all") == [("x/0.jpg", ""), ("x/1.jpg", "")]
    assert chosen(["a/0.jpg", "b/1.jpg"], "all", labelled=False) == [("a/0.jpg", ""), ("b/1.jpg", "")]
    with pytest.raises(UserError, match="labelled=false"):
        chosen(["a/0.jpg", "b/1.jpg", "2.jpg"], "all")
    with pytest.raises(UserError, match="labelled=true"):
        chosen(["0.jpg", "1.jpg"], "all", labelled=True)
    with pytest.raises(UserError, match="set/b: empty class"):
        chosen(["a/0.jpg"], "all", folders=("a", "b", ".git"))
    with pytest.raises(UserError, match="no images"):
        chosen([], "all")


def test_which_files_are_images() -> None:
    assert is_image("a/b.JPEG")
    assert not any(
        map(is_image, ("a/b.txt", ".cache/b.png", "a/._b.png", "__MACOSX/b.png", "png", "a.png/b"))
    )


def test_folder_tar_and_gzipped_tar_yield_the_same(
    tree: Tree, tmp_path: Path, as_folder: Callable[..., Path], as_tar: Callable[..., Path]
) -> None:
    forms = [as_folder(tree), as_folder(tree) / "flowers", as_tar(tree), as_tar(tree, "set.tgz", "w:gz")]
    forms.append(as_tar({f"./{name}": data for name, data in reversed(tree.items())}, "reversed.tar"))
    expected = sorted(
        (name.removeprefix("flowers/"), "abc".index(name[8]), data)
        for name, data in tree.items()
        if name != "flowers/notes.txt"
    )
    for form in forms:
        assert sorted(items("folder", tmp_path, path=str(form))) == expected


def test_a_tar_with_long_names_and_a_name_twice(tmp_path: Path, as_tar: Callable[..., Path]) -> None:
    long = "a/" + "x" * 180 + ".png"
    path = as_tar({long: b"long", "a/0.png": b"old"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a/0.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    assert [(i.name, i.image) for i in items("folder", tmp_path, path=str(path))] == [
        (long[2:], b"long"),
        ("0.png", b"new"),
    ]


@pytest.mark.parametrize("cut", [1, 512, 1024, 1500, 3000])
@pytest.mark.parametrize("form", ["set.tar", "set.tar.gz"])
def test_a_truncated_tar_is_named(
    cut: int, form: str, tree: Tree, tmp_path: Path, as_tar: Callable[..., Path]
) -> None:
    path = as_tar(tree, form, "w:gz" if form.endswith("gz") else "w")
    data = path.read_bytes()
    end = data.rstrip(b"\0") if form == "set.tar" else data  # the padding after the end mark may go
    path.write_bytes(end[: len(end) - cut])
    with pytest.raises(UserError, match=rf"{form}: truncated tar"):
        items("folder", tmp_path, path=str(path))


def test_a_tar_without_end_mark_is_truncated(tree: Tree, tmp_path: Path, as_tar: Callable[..., Path]) -> None:
    path = as_tar(tree)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 512])
    with pytest.raises(UserError, match="truncated tar"):
        items("folder", tmp_path, path=str(path))


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png"])
def test_members_that_leave_the_folder_are_refused(
    name: str, tmp_path: Path, as_tar: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=r"leaves the target folder"):
        items("folder", tmp_path, path=str(as_tar({"a/0.png": b"", name: b""})))


def test_links_in_a_tar_are_refused_and_other_files_are_no_tar(
    tmp_path: Path, as_tar: Callable[..., Path]
) -> None:
    path = as_tar({"a/0.png": b""})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a/1.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match=r"a/1.png' is a link"):
        items("folder", tmp_path, path=str(path))
    (tmp_path / "some.tar").write_bytes(os.urandom(5120))
    with pytest.raises(UserError, match=r"some.tar: not a readable tar"):
        items("folder", tmp_path, path=str(tmp_path / "some.tar"))
    with pytest.raises(UserError, match="no such folder or archive"):
        items("folder", tmp_path, path=str(tmp_path / "absent"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing: no images in it"):
        items("folder", tmp_path, path=str(tmp_path / "nothing"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds_also_in_a_tar_inside_another(form: int, tmp_path: Path) -> None:
    names = ["./plain.png", "b/ü.png", f"b/{'long' * 20}/{'name' * 10}.png", "b//c/./d.png", "e", "empty.png"]
    sizes = [1, 511, 512, 513, 5000, 0]
    with tarfile.open(tmp_path / "set.tar", "w", format=form) as tar:
        for kind, linkname in ((tarfile.DIRTYPE, ""), (tarfile.SYMTYPE, "b"), (tarfile.LNKTYPE, "e")):
            member = tarfile.TarInfo(f"kind{kind.decode()}")
            member.type, member.linkname = kind, linkname
            tar.addfile(member)
        for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, i + 0.25  # a fraction takes an extension
            tar.addfile(member, io.BytesIO(os.urandom(size)))
    with tarfile.open(tmp_path / "set.tar") as tar:
        expected = [
            (
                str(PurePosixPath(m.name)),
                m.offset_data,
                m.size,
                "file" if m.isreg() else "folder" if m.isdir() else "other",
            )
            for m in tar
        ]
    assert [tuple(member) for member in members(tmp_path / "set.tar")] == expected
    data = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "outer").write_bytes(b"x" * 100 + data + b"x" * 1000)
    inner = members(tmp_path / "outer", start=100, stop=100 + len(data))
    assert [(m.name, m.offset - 100, m.size, m.kind) for m in inner] == expected
    with pytest.raises(UserError, match="outer: truncated tar"):
        list(members(tmp_path / "outer", start=100, stop=expected[-1][1] + 100))


def test_a_header_that_would_turn_back_is_no_member(tmp_path: Path, as_tar: Callable[..., Path]) -> None:
    path = as_tar({"a/0.png": b"", "a/1.png": b""})
    data = bytearray(path.read_bytes())
    data[512 + 124 : 512 + 136] = b"-0000001000\0"
    header = data[512:1024]
    total = sum(header) - sum(header[148:156]) + 8 * 32
    data[512 + 148 : 512 + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"truncated tar"):
        list(members(path))


def test_files_that_vanish_or_change_between_listing_and_reading_are_told(
    tree: Tree, tmp_path: Path, as_folder: Callable[..., Path], as_tar: Callable[..., Path]
) -> None:
    cls = source_class("folder")

    def opened(path: Path) -> list[Part]:
        return list(cls(cls.Options(path=str(path)), tmp_path).parts("all", 100))

    folder, archive = as_folder(tree), as_tar(tree)
    [part] = opened(folder)
    before = part.key()
    changed = folder / "flowers/b/copy.png"
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"b/copy.png: changed since it was listed"):
        list(part)
    [part] = opened(folder)
    assert part.key() != before
    changed.unlink()
    with pytest.raises(UserError, match=r"b/copy.png: vanished"):
        list(part)
    [part] = opened(archive)
    archive.write_bytes(archive.read_bytes())
    os.utime(archive, ns=(0, 1))
    with pytest.raises(UserError, match=r"set.tar: changed"):
        list(part)
    (folder / "flowers/a/nowhere.png").symlink_to("absent")
    with pytest.raises(UserError, match=r"nowhere.png: vanished"):
        opened(folder)


def test_listings_are_compact_and_parts_are_made_one_by_one(tmp_path: Path) -> None:
    names = [f"class{i // 100:04d}/image_{i:08d}.JPEG" for i in range(20_000)]
    lister = Lister()
    for i, name in enumerate(names):
        lister.add(name, i, 10**18 + i)
    listing = lister.finish()
    assert list(listing.names()) == names
    assert listing.size.tolist() == list(range(20_000))
    assert len(pickle.dumps(listing)) < 1000 + sum(len(name) + 24 for name in names)
    chosen = np.stack([np.arange(20_000), np.arange(20_000) // 100], axis=1)
    parts = file_parts(partial(FilePart, tmp_path, 0), listing, chosen[::-1], 1000)
    first = next(parts)
    assert list(first.listing.names()) == names[:-1001:-1]
    assert first.labels[0] == 199
    assert len(pickle.dumps(first)) < 1000 + 1000 * (len(names[0]) + 32)


def test_digits_and_photo_patches(tmp_path: Path) -> None:
    digits = items("digits", tmp_path, part_items=500)
    assert len(digits) == 1797 == len({item.name for item in digits})
    assert {item.label for item in digits} == set(range(10))
    pixels = np.stack([item.image for item in digits])
    assert pixels.shape == (1797, 8, 8, 3)
    assert pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    patches = items("photo_patches", tmp_path, part_items=500)
    assert len(patches) == 2 * (427 // 16) * (640 // 16) >= 2000
    assert {item.label for item in patches} == {-1}
    assert all(item.image.shape == (16, 16, 3) for item in patches)  # type: ignore[union-attr]
    assert len(items("photo_patches", tmp_path, patch=32)) == 2 * 13 * 20


def test_decoding_turns_by_exif_scales_16_bits_and_takes_any_mode() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 270 degrees
    Image.fromarray(pixels).save(turned, "png", exif=exif)
    np.testing.assert_array_equal(image.decode_source(turned.getvalue()), np.rot90(pixels, -1))
    deep = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(deep, "png")
    assert image.decode_source(deep.getvalue())[0, :, 0].tolist() == [0, 1, 255]
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "tiff")
        assert image.decode_source(buffer.getvalue()).shape == (4, 6, 3)


def test_fit_is_short_side_then_centre() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    np.testing.assert_array_equal(image.fit(pixels, 12, "bicubic"), pixels[:, 4:16])
    half = np.asarray(Image.fromarray(pixels).resize((10, 6), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(image.fit(pixels, 6, "lanczos"), half[:, 2:8])
    assert image.fit(pixels, 12, "box").shape == (12, 12, 3)


def test_hashes_see_shape_pixels_and_seed() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    assert image.content_hash(pixels) == image.content_hash(pixels.copy())
    assert image.content_hash(pixels) != image.content_hash(pixels.reshape(3, 2, 3))
    assert image.keyed_hash(0, b"x" * 16) != image.keyed_hash(1, b"x" * 16)


def test_real_archives_are_read_as_their_readme_says(
    tmp_path: Path, as_tar: Callable[..., Path], tree: Tree
) -> None:
    """CIFAR-10 and Tiny ImageNet where their tars are; a replica of their layout everywhere."""
    replica = {
        f"set/{split}/n{c}/{split}_{i}.JPEG": tree[
            f"flowers/a/{3 * (c * 4 + i + 8 * (split == 'val')):03d}.png"
        ]
        for split in ("train", "val")
        for c in (1, 2)
        for i in range(2)
    }
    cases = [(as_tar({**replica, "set/classes.txt": b"n1 n2"}), 2, 4, 4)]
    if folder := os.environ.get("SSL_DIVERSITY_TEST_DATA"):
        cases += [(Path(folder) / "cifar10.tar", 10, 50_000, 10_000)]
        cases += [(Path(folder) / "tiny-imagenet-20k.tar", 200, 20_000, 5_000)]
    for path, classes, train, test in cases:
        cls = source_class("folder")
        source = cls(cls.Options(path=str(path)), tmp_path)
        assert source.splits == {"train", "test"}
        assert len(source.classes) == classes
        for split, count in (("train", train), ("test", test)):
            parts = list(source.parts(split, 5000))
            assert sum(map(len, parts)) == count
            first = next(iter(parts[0]))
            assert source.classes[first.label] in first.name
    pool = prepare(recipes.resolve(str(cases[0][0]), {"size": 8}))
    assert isinstance(pool, Pool)
    assert pool.info.classes == ["n1", "n2"]


def test_data_imports_no_torch() -> None:
    modules = [
        f"ssl_diversity.data.{name}"
        for name in ("pool", "prepare", "recipes", "order", "reading", "sheet", "verify", "config")
    ]
    code = f"import sys, {', '.join([*modules, *(module for module, _ in SOURCES.values())])}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
