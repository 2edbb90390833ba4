"""`attach`: use a pool that lies elsewhere. Its index comes here, its shards are read from where they are."""

import json
import re
from pathlib import Path

from ssl_diversity import files
from ssl_diversity.config import validate
from ssl_diversity.data.config import NAME, PoolInfo
from ssl_diversity.data.pool import REMOTE, Pool
from ssl_diversity.data.remote import Client
from ssl_diversity.data.transports import join, local_path, shown
from ssl_diversity.data.writer import file_digest, locked, reporting_full_disk
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime

_FIRST_RETRIES = 4  # of pool.json: a wrong address is told within seconds
_INSIDE = re.compile(r"(index/|shards/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")  # a file of a pool's folder


def attach(
    url: str,
    *,
    name: str | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
    client: Client | None = None,
) -> Pool:
    """The pool whose folder is at `url` (http(s)://, s3://, gs://, `pipe:... {}`, or a path), as one of `pools_dir()`.

    Fetches pool.json and the index, checked against its checksums; pool.json is written last. Called again, it
    returns what is there. Raises UserError where `url` has no pool, another one than before, or a damaged index.
    """
    path = local_path(url)
    where = str(path.resolve()) if path is not None else url
    try:
        data = (client or Client(retries=_FIRST_RETRIES, stop=runtime.stop)).get(join(where, "pool.json"))
    except UserError as error:
        raise UserError(f"{shown(url)}: no pool there ({error})") from None
    info = _described(data, shown(join(where, "pool.json")))
    name = name or info.name
    if not re.match(NAME, name):
        raise UserError(f"name={name!r}: use letters, digits, '.', '_' and '-'")
    client = client or Client(stop=runtime.stop)
    directory = files.pools_dir() / f"{name}-{info.spec_digest[:8]}"
    with reporting_full_disk(directory), locked(directory, runtime):
        _refuse_another(directory, info, where)
        if not (directory / "pool.json").exists():
            (directory / "index").mkdir(parents=True, exist_ok=True)
            for done, (file, checksum) in enumerate(info.files.items()):
                if runtime.stop():
                    raise Interrupted("stopped while fetching an index; what has arrived is kept")
                runtime.progress(done, len(info.files))
                if not (directory / file).exists() or file_digest(directory / file) != checksum:
                    client.download(join(where, file), directory / file, blake2b=checksum)
            files.write_json(directory / REMOTE, {"url": where})
            files.write_atomic(directory / "pool.json", data)
    return Pool.open(directory)


def _described(data: bytes, where: str) -> PoolInfo:
    """A pool.json, checked: nothing that it names leaves the pool's folder."""
    try:
        values = json.loads(data)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{where}: is no pool.json; give the pool's folder")
    Pool.check_format(values, where)
    info = validate(PoolInfo, values, where)
    for name in [info.spec_digest, *info.files, *(shard.file for shard in info.shards)]:
        if not _INSIDE.fullmatch(name):
            raise UserError(f"{where}: names {name!r}, which is no file of a pool; nothing was fetched")
    return info


def _refuse_another(directory: Path, info: PoolInfo, where: str) -> None:
    """UserError where the folder holds a pool that is not the one at `where`."""
    if not (directory / "pool.json").exists():
        return
    here = Pool.open(directory)
    if (here.info.shards, here.info.files) != (info.shards, info.files):
        raise UserError(
            f"pool {directory.name} is here already and is not what {shown(where)} is now; give another name"
            " (name=...), or remove its folder to take the new one"
        )
    if here.remote and here.remote != where:  # the same pool, at another address
        files.write_json(directory / REMOTE, {"url": where})
