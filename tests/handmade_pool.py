"""Pools written by hand, row by row: any codec and resize policy, whatever prepare does."""

import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ssl_diversity.data import image
from ssl_diversity.data.config import PoolInfo, Shard
from ssl_diversity.data.pool import COLUMNS, Pool


def handmade(
    folder: Path, encoded: Sequence[bytes], *, shard_rows: int = 7, suffix: str = "", **info: Any
) -> Pool:
    """A pool of these images, in this order, label = row modulo 3; `info` goes into pool.json."""
    (folder / "shards").mkdir(parents=True)
    (folder / "index").mkdir()
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    shards = []
    for number, first in enumerate(range(0, len(encoded), shard_rows)):
        path = folder / f"shards/{number:06d}.tar"
        rows = range(first, min(first + shard_rows, len(encoded)))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                data = encoded[row]
                place = tar.offset + 512
                for kind, content in ((suffix or image.suffix(data), data), ("cls", str(row % 3).encode())):
                    member = tarfile.TarInfo(f"{row:09d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                hashed = np.frombuffer(blake2b(data, digest_size=16).digest(), np.uint8)
                row_values = (row % 3, hashed, number, place, len(data), zlib.crc32(data))
                for name, value in zip(COLUMNS, row_values, strict=True):
                    columns[name].append(value)
        shards.append(
            Shard(
                file=f"shards/{path.name}",
                blake2b=blake2b(path.read_bytes(), digest_size=16).hexdigest(),
                bytes=path.stat().st_size,
                rows=len(rows),
                chained=f"{number:032x}",
            )
        )
    for name, (dtype, _) in COLUMNS.items():
        np.save(folder / "index" / f"{name}.npy", np.array(columns[name], dtype))
    values = {
        "name": folder.name, "source": "by hand", "spec": {}, "spec_digest": "", "size": len(encoded),
        "first_size": len(encoded), "counts": {"kept": len(encoded)}, "classes": ["a", "b", "c"],
        "image_size": 0, "filter": "bicubic", "codec": "png", "quality": 90, "seed": 0, "source_digest": "",
        "shards": shards, "files": {}, "real_images": None,
    }  # fmt: skip
    made = PoolInfo.model_validate(values | info)
    (folder / "pool.json").write_text(json.dumps(made.model_dump(mode="json")))
    return Pool.open(folder)
