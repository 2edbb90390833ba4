"""Files appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from ssl_diversity import files
from ssl_diversity.errors import UserError


def test_an_error_leaves_the_old_content_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.glob(".*")) == []


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"disk full while writing .*a\.txt.*MiB free"),
        files.replacing(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "a.txt").exists()


def test_a_full_disk_is_seen_through_other_errors() -> None:
    error = RuntimeError("writing failed")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert files.is_disk_full(error)
    assert not files.is_disk_full(RuntimeError("else"))


def test_digest_depends_on_values_not_on_order() -> None:
    assert files.digest({"a": 1, "b": [1, 2]}) == files.digest({"b": [1, 2], "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 2})
    assert files.digest([1, 2]) != files.digest([2, 1])


def test_everything_moves_with_home(home: Path) -> None:
    assert files.pools_dir() == home / "pools"
    assert files.runs_dir() == home / "runs"
    assert files.task_dir("pretrain", "abcd") == home / "store" / "pretrain" / "ab" / "abcd"
