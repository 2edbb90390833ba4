"""A user's mistake is one line and exit status 2, never a stack trace."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run

MISTAKES = {
    "unknown method": (["plan", "quickstart", "methods=[simclrr]"], "simclr"),
    "unknown key": (["plan", "quickstart", "bugdet=3"], "budget"),
    "unknown sweep": (["plan", "quickstrat"], "quickstart"),
    "N above C": (["plan", "quickstart", "unique_samples=[4096]", "budget=2048"], "4096"),
    "N the batch does not allow": (["plan", "quickstart", "unique_samples=[100]"], "128"),
    "MAE on a ResNet": (["plan", "quickstart", "methods=[mae]", "backbone=resnet18"], "resnet18"),
    "missing path": (["data", "prepare", "folder", "path=/nowhere/at/all"], "/nowhere/at/all"),
    "not key=value": (["plan", "quickstart", "budget"], "key=value"),
    "malformed budget": (["plan", "quickstart", "budget=lots"], "lots"),
    "no such pool": (["data", "verify", "nothing"], "nothing"),
    "probe of a sweep that is not there": (["probe", "--sweep", "nope", "--downstream", "."], "nope"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_that_names_it(home: Path, mistake: str) -> None:
    arguments, named = MISTAKES[mistake]
    done = run(home, *arguments, status=2)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1, done.stderr
    assert named in errors[0]


def test_empty_folder(home: Path) -> None:
    (home / "empty").mkdir()
    assert "empty" in run(home, "data", "prepare", "folder", f"path={home / 'empty'}", status=2).stderr


def test_n_above_the_pool(home: Path) -> None:
    run(home, "data", "prepare", "digits", "size=16")
    sweep = ["sweep", "quickstart", "sources=[digits]", "methods=[simclr]", "unique_samples=[5000]"]
    assert "5000" in run(home, *sweep, status=2).stderr


def test_an_image_that_does_not_decode_is_counted_not_fatal(home: Path) -> None:
    from helpers import labelled_folder

    folder = labelled_folder(home / "images", per_class=4)
    (folder / "noise" / "broken.png").write_bytes(b"not an image")
    run(home, "data", "prepare", "folder", "name=pics", f"path={folder}", "size=16")
    inspected = run(home, "data", "inspect", "pics").stdout
    assert "undecodable" in inspected
    assert "12" in inspected


def test_a_store_newer_than_the_code(home: Path) -> None:
    run(home, "store", "check")
    marker = next((home / "store").glob("format*"))
    marker.write_text("999\n")
    assert "999" in run(home, "plan", "quickstart", status=2).stderr


def test_a_damaged_pool_is_named(home: Path) -> None:
    run(home, "data", "prepare", "digits", "size=16")
    assert run(home, "data", "verify", "digits").returncode == 0
    shard = next((home / "pools").glob("digits-*/shards/*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = run(home, "data", "verify", "digits", status=1)
    assert shard.name in done.stdout + done.stderr


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """A file system of 20 MB: a tmpfs, for root; else the test cannot be had and says so."""
    folder = home / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> None:
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - leave_bytes))


def test_disk_full_leaves_nothing_that_counts_as_done(small_disk: Path) -> None:
    fill(small_disk, 600_000)
    done = run(small_disk, "data", "prepare", "photo_patches", "size=16", status=2)
    assert "disk full" in done.stderr
    assert not list(small_disk.glob("pools/*/pool.json"))
    (small_disk / "ballast").unlink()
    run(small_disk, "data", "prepare", "photo_patches", "size=8")


def test_a_sweep_on_a_full_disk_goes_on_once_there_is_room(small_disk: Path) -> None:
    sweep = [
        "sweep",
        "quickstart",
        "sources=[digits]",
        "methods=[simclr]",
        "unique_samples=[64]",
        "budget=256",
    ]
    run(small_disk, "data", "prepare", "digits", "size=16")
    fill(small_disk, 300_000)
    done = run(small_disk, *sweep, status=2)
    assert "disk full" in done.stdout + done.stderr
    for path in small_disk.glob("store/*/*/*/result.json"):
        json.loads(path.read_text())  # whole, whatever made it in time
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    run(small_disk, *sweep)
