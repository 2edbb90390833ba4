"""What is done, what failed, and the results themselves: plain files that any number of workers share.

store/format                           the version of this layout
store/<kind>/<kk>/<key>/               one task: task.json, what its function writes, result.json last
store/done/<kind>/<kk>/<key>           empty; an index of the results (`store check` makes it anew)
store/failed/<kind>/<kk>/<key>         empty; an index of the failures
store/lost/<kind>/<kk>/<key>           empty; an index of the tasks that workers were lost on
store/workers/<nonce>.json             what each worker is doing (for the display)
store/cache/                           measured rates and counts
"""

import contextlib
import json
import os
import shutil
import textwrap
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_diversity.errors import UserError
from ssl_diversity.files import home, read_json, task_dir, write_atomic, write_json
from ssl_diversity.sweep.claims import Claim, Process, create_once, holder
from ssl_diversity.sweep.task import NUMERICS, Task

FORMAT = 1
EVICTABLE_KINDS = ("embed", "statistics")  # caches that are computed again when they are missing
SUMMARY_CHARACTERS = 400
WORKER_DIED = "WorkerDied"
SILENT_BEATS = 20  # heartbeats missed, after which a worker of another machine is taken for dead
DISPOSABLE = ("last.ckpt", "blocks")  # what a task keeps while it runs and nobody needs afterwards


def store_dir() -> Path:
    return home() / "store"


def cache_dir() -> Path:
    return store_dir() / "cache"


def open_store() -> None:
    """Create the store, or make sure that this code can read the one there is.

    Raises UserError if a newer version of the code made it.
    """
    path = store_dir() / "format"
    try:
        version = int(path.read_text())
    except FileNotFoundError:
        write_atomic(path, f"{FORMAT}\n")
        return
    except ValueError:
        raise UserError(
            f"{path}: not a version number; was the store damaged? restore it or move it away"
        ) from None
    if version > FORMAT:
        raise UserError(
            f"{path}: this store has format {version}, newer than this code's {FORMAT}; "
            "update ssl-diversity or set SSL_DIVERSITY_HOME to another folder"
        )


class Index:
    """The keys in `store/<what>/<kind>/`, listed once per kind and kept in memory; `refresh` looks again."""

    def __init__(self, what: str) -> None:
        self.root = store_dir() / what
        self._keys: dict[str, set[str]] = {}
        self._folders: dict[str, dict[str, _Folder]] = {}

    def keys(self, kind: str) -> set[str]:
        if kind not in self._keys:
            self._keys[kind] = set()
            self._look(kind)
        return self._keys[kind]

    def refresh(self) -> None:
        """See what others have added or removed; lists only folders that may have changed."""
        for kind in self._keys:
            self._look(kind)

    def _look(self, kind: str) -> None:
        keys, folders = self._keys[kind], self._folders.setdefault(kind, {})
        for name in _names(self.root / kind):
            if name not in folders:
                folders[name] = _Folder(f"{self.root}/{kind}/{name}")
        for folder in folders.values():
            if folder.look():
                keys -= folder.before - folder.names
                keys |= folder.names

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def add(self, kind: str, key: str) -> None:
        path = self.path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # another user made it
            path.touch()
        if kind in self._keys:
            self._keys[kind].add(key)

    def discard(self, kind: str, key: str) -> None:
        self.path(kind, key).unlink(missing_ok=True)
        if kind in self._keys:
            self._keys[kind].discard(key)


class _Folder:
    """The names in a folder, listed again while its time of change says that they may be others.

    A folder may change again without showing it within the granularity of that time: only what has shown the
    same time for longer, by our own clock, is believed to be as it was listed.
    """

    GRANULARITY_S = 3.0

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: frozenset[str] = frozenset()
        self.before = self.names
        self._changed_ns: int | None = None  # unknown at the first look, which lists alone
        self._since, self._settled = 0.0, False

    def look(self) -> bool:
        """Whether it was listed again: then `names` is new, and `before` what it was."""
        now, changed_ns = time.monotonic(), -1
        if self._changed_ns is not None:
            with contextlib.suppress(FileNotFoundError):
                changed_ns = os.stat(self.path).st_mtime_ns
        if changed_ns != self._changed_ns:
            self._changed_ns, self._since, self._settled = changed_ns, now, False
        elif self._settled:
            return False
        else:
            self._settled = now - self._since > self.GRANULARITY_S
        self.before, self.names = self.names, frozenset(_names(self.path))
        return True


class Done(Index):
    """A snapshot of which tasks are done; take a new one, or `refresh` it, to see what others have done since."""

    def __init__(self) -> None:
        super().__init__("done")
        self._outputs: dict[Path, bool] = {}

    def refresh(self) -> None:
        self._outputs.clear()
        super().refresh()

    def __contains__(self, task: Task) -> bool:
        if task.output is not None:
            if task.output not in self._outputs:
                self._outputs[task.output] = task.output.exists()
            return self._outputs[task.output]
        return task.key in self.keys(task.kind)

    def all(self, tasks: Iterable[Task]) -> bool:
        return all(task in self for task in tasks)


def _names(folder: Path | str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)
    return []


def _leaves(root: Path) -> Iterator[Path]:
    for name in _names(root):
        for leaf in _names(root / name):
            yield root / name / leaf


def result(task: Task) -> dict[str, Any] | None:
    """The published result of a task, or None."""
    try:
        value: dict[str, Any] = read_json(task.folder / "result.json")
    except FileNotFoundError:
        return None
    return value


def describe(task: Task) -> None:
    """Write what the task is beside its result, for people and for later tools."""
    record = {"kind": task.kind, "numerics": NUMERICS[task.kind], "label": task.label}
    if task.output is not None:
        record["output"] = os.path.relpath(task.output, home())
    write_json(task.folder / "task.json", {**record, "spec": task.spec.model_dump(mode="json")})


def publish(task: Task, claim: Claim, value: dict[str, Any]) -> bool:
    """Make `value` the task's result, atomically and at most once; False if the claim was lost.

    The result of a task with an output is replaced: the output was removed and has been made again.
    """
    if not claim.held():
        return False
    path, text = task.folder / "result.json", json.dumps(value, indent=1, sort_keys=True) + "\n"
    if task.output is None:
        create_once(path, text)
    else:
        write_atomic(path, text)
    settle(task)
    claim.release()
    return True


def settle(task: Task) -> None:
    """Index a task that has its result and drop what only its running needed."""
    Index("done").add(task.kind, task.key)
    Index("failed").discard(task.kind, task.key)
    for path in _disposable(task.folder):
        path.unlink(missing_ok=True)


def _disposable(folder: Path) -> list[Path]:
    """The files in a task's folder that only its running needs."""
    paths = [folder / name for name in DISPOSABLE]
    return [path for path in paths if path.is_file()] + [
        inner for path in paths for inner in path.rglob("*") if inner.is_file()
    ]


def live_workers() -> Iterator[dict[str, Any]]:
    """What each live worker is doing; records that dead ones left behind are removed."""
    for path in sorted((store_dir() / "workers").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = read_json(path)
            silent = time.time() - path.stat().st_mtime
            alive = Process(**record.pop("process")).alive()
            if alive is False or (alive is None and silent > SILENT_BEATS * record.pop("heartbeat_s")):
                path.unlink(missing_ok=True)
            else:
                yield record


@dataclass(frozen=True)
class Failure:
    """One failed attempt: the first line says what went wrong, `text` holds the traceback."""

    path: Path
    when: float
    text: str

    @property
    def summary(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def by_user(self) -> bool:
        """Whether trying again is pointless until the user has changed something."""
        return self.summary.startswith("UserError: ")

    @property
    def worker_died(self) -> bool:
        """Whether it was the worker that ended, not the task that failed."""
        return self.summary.startswith(f"{WORKER_DIED}: ")


def fail(task: Task, error: BaseException | str) -> Failure:
    """Keep the traceback of a failed attempt in `failed.<attempt>.txt`."""
    if isinstance(error, str):
        text = error
    else:
        summary = textwrap.shorten(f"{type(error).__name__}: {error}", SUMMARY_CHARACTERS, placeholder=" ...")
        text = summary + "\n\n" + "".join(traceback.format_exception(error))
    number = len(failures(task)) + 1
    while not create_once(task.folder / f"failed.{number}.txt", text.rstrip() + "\n"):
        number += 1
    Index("failed").add(task.kind, task.key)
    path = task.folder / f"failed.{number}.txt"
    return Failure(path, path.stat().st_mtime, text)


def failures(task: Task, since: float = 0.0) -> list[Failure]:
    """The failed attempts of a task from `since` (seconds since 1970) on, oldest first."""
    found = []
    for path in task.folder.glob("failed.*.txt"):
        with contextlib.suppress(FileNotFoundError):  # forgiven at this moment
            if (when := path.stat().st_mtime) >= since:
                found.append(Failure(path, when, path.read_text()))
    return sorted(found, key=lambda failure: (failure.when, failure.path))


def check() -> list[str]:
    """Rebuild the index of results from the results; returns what was wrong, one line each."""
    open_store()
    notes: list[str] = []
    done, failed = Done(), Index("failed")
    for kind in NUMERICS:
        found = set()
        for folder in _leaves(store_dir() / kind):
            if not (folder / "result.json").exists():
                continue
            try:
                read_json(folder / "result.json")
                found.add(folder.name)
            except ValueError:
                (folder / "result.json").unlink()
                notes.append(f"{folder / 'result.json'}: not readable, removed: the task will run again")
        for key in sorted(done.keys(kind) - found):
            if (task_dir(kind, key) / "result.json").exists():
                continue  # published meanwhile
            done.discard(kind, key)
            notes.append(f"{kind} {key}: was marked done but has no result; the task will run again")
        for key in sorted(found - done.keys(kind)):
            done.add(kind, key)
            notes.append(f"{kind} {key}: has a result but was not marked done; marked")
        for key in sorted(found & failed.keys(kind)):
            failed.discard(kind, key)
    return notes


def listing(kind: str | None) -> Iterator[tuple[str, str, str, str]]:
    """(kind, key, state, label) of every task that was ever begun."""
    done, failed = Done(), Index("failed")
    for name in NUMERICS if kind is None else [kind]:
        if name not in NUMERICS:
            raise UserError(f"unknown kind {name!r}; known: {', '.join(NUMERICS)}")
        for folder in sorted(_leaves(store_dir() / name)):
            key = folder.name
            state = "done" if key in done.keys(name) else "failed" if key in failed.keys(name) else "begun"
            with contextlib.suppress(FileNotFoundError):
                yield name, key, state, read_json(folder / "task.json")["label"]


def usage() -> list[tuple[str, int, int]]:
    """(kind, files, bytes) of every part of the store."""
    rows = []
    for part in (
        sorted(path for path in store_dir().iterdir() if path.is_dir()) if store_dir().exists() else []
    ):
        sizes = []
        for path in part.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # some live for moments
                if path.is_file():
                    sizes.append(path.stat().st_size)
        rows.append((part.name, len(sizes), sum(sizes)))
    return rows


def collect_garbage(*, older_than_s: float, now: float) -> tuple[int, int]:
    """Drop caches, temporary files left by kills, and what only the running of finished tasks needed.

    Returns (files, bytes) freed. Files touched within `older_than_s` stay; so do the folders of tasks that a
    worker holds, the caches while any worker lives, and the checkpoints of tasks that are not done.
    """
    doomed: list[Path] = []
    if not any(True for _ in live_workers()):
        for kind in EVICTABLE_KINDS:
            doomed += [path for path in (store_dir() / kind).rglob("*") if path.is_file()]
    doomed += [path for path in store_dir().rglob(".*.tmp") if path.is_file()]
    for kind in NUMERICS:
        for folder in _leaves(store_dir() / kind):
            if _finished(folder):
                doomed += _disposable(folder)
    files = size = 0
    for path in doomed:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if now - stat.st_mtime >= older_than_s and not _held(path):
                path.unlink()
                files, size = files + 1, size + stat.st_size
    for kind in EVICTABLE_KINDS:
        if (store_dir() / kind).exists() and not any(p.is_file() for p in (store_dir() / kind).rglob("*")):
            shutil.rmtree(store_dir() / kind)
    return files, size


def _finished(folder: Path) -> bool:
    """Whether the task of this folder is done: by its output where it makes one, else by its result."""
    output = ""
    with contextlib.suppress(FileNotFoundError, ValueError):
        output = read_json(folder / "task.json").get("output", "")
    return (home() / output).exists() if output else (folder / "result.json").exists()


def _held(path: Path) -> bool:
    """Whether a file lies in the folder of a task that a worker holds, who may need it."""
    parts = path.relative_to(store_dir()).parts
    if len(parts) < 4:  # not in store/<kind>/<kk>/<key>/
        return False
    found = holder(store_dir().joinpath(*parts[:3]))
    return found is not None and found.process.alive() is not False
