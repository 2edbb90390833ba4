"""Where things lie, and how files appear: whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_diversity.errors import UserError

_UMASK = os.umask(0)  # read once: asking for it means setting it, which threads would do to each other
os.umask(_UMASK)
REPOSITORY = Path(__file__).resolve().parent.parent  # holds configs/, datasets/ and launch/


def home() -> Path:
    """The folder that holds `runs/`, `store/` and `pools/`: `SSL_DIVERSITY_HOME`, else the current folder."""
    text = os.environ.get("SSL_DIVERSITY_HOME") or "."
    return _absolute(text) if os.path.isabs(text) else Path(text).expanduser().resolve()


@functools.cache
def _absolute(text: str) -> Path:
    return Path(text).resolve()


def pools_dir() -> Path:
    return home() / "pools"


def runs_dir() -> Path:
    return home() / "runs"


def task_dir(kind: str, key: str) -> Path:
    """The folder of one task's output: `store/<kind>/<key[:2]>/<key>/`."""
    return home() / "store" / kind / key[:2] / key


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it vanishes.

    Symptom without it: after a kill or a full disk, a half-written file is taken for a whole one.
    Cause: writing in place. Cure: write elsewhere on the same file system, fsync, rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_UMASK)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error) and not isinstance(error, UserError):
            raise disk_full(path) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a full disk or a used-up quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path) -> UserError:
    """The error for a full disk, naming where and how much is free."""
    free = shutil.disk_usage(path.parent).free
    return UserError(
        f"disk full while writing {path} ({free / 2**20:.0f} MiB free): nothing half-written was kept; "
        "free some space (`ssl-diversity store gc`) or move SSL_DIVERSITY_HOME, then run the same command again"
    )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` so that `path` holds all of it or what it held before."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def digest(value: Any) -> str:
    """128-bit hex digest of any JSON value, in canonical form."""
    return bytes_digest(canonical(value).encode())


def canonical(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def bytes_digest(data: bytes) -> str:
    """128-bit hex digest of some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def content_digest(file: Any) -> str:
    """128-bit hex digest of the bytes of an open binary file, from where it stands."""
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """What a file holds, or what was moved into a folder, outlasts a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
