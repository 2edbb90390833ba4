"""The task that gathers a pool from the images that were made, and makes those that lack; and its check."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_diversity import files
from ssl_diversity.data import image
from ssl_diversity.data.growing import Growing, growing
from ssl_diversity.data.near import Described
from ssl_diversity.data.pool import Pool
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.generation import filters
from ssl_diversity.generation.chunks import Maker, cost, devices
from ssl_diversity.generation.conditions import Drawn
from ssl_diversity.generation.copies import earlier_copies
from ssl_diversity.generation.sampling import SOURCE, TASK, GenerateSpec, task_folder
from ssl_diversity.generation.stream import ROW, Block, Gone, Rows
from ssl_diversity.runtime import Runtime

CAUSES = ("kept", "safety", "blank", "saturated", "duplicate", "duplicate_after_resize", "near_duplicate")


def generate(spec: GenerateSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """The first n images that no filter drops, as the pool `spec.directory`, unshuffled: they are independent as
    they come. A pool of fewer that is there grows.

    Images that sample tasks have made are taken; those that lack, and those that stand in for dropped ones, are made
    here, block by block. What is dropped depends on earlier images alone, so the pool of n begins with that of
    fewer. A pool that has n images already is returned.

    Raises UserError where the pipeline cannot be sampled or is not what was planned, where nearly all of its images
    are dropped, or where a pool that is to grow holds others than are made now; Interrupted when asked to stop.
    """
    runtime.set_threads()
    while not spec.written:
        maker = Maker(spec, runtime)
        with contextlib.suppress(
            Gone
        ):  # another pool has taken images that this one was about to: look again
            _gather(spec, maker)
    pool = Pool.open(spec.directory)
    spec.mark.touch()
    with contextlib.suppress(UserError):  # a pipeline that is gone: nobody needs what it made
        Maker(spec, runtime).stream.release(pool.info.counts["read"] // spec.sampling.block)
    return _result(pool)


def _gather(spec: GenerateSpec, maker: Maker) -> None:
    """Write the pool, or more of it."""
    fields: dict[str, Any] = {
        **spec.model_dump(
            include={"name", "filter", "codec", "quality", "seed", "real_images", "origin", "terms"}
        ),
        "source": SOURCE,
        "image_size": spec.size,
        "spec": spec.pool_identity(),
        "classes": list(maker.conditions.classes),
    }
    with growing(spec.directory, fields, near_duplicates=spec.near_duplicates, runtime=maker.runtime) as pool:
        if pool.rows >= spec.n:
            return
        chosen = _choose(spec, maker, pool.rows)
        _check_first(spec, chosen, pool)
        _write(spec, maker, chosen, pool)
        abouts = [block.about for block in maker.stream.blocks(range(chosen.blocks))]
        pool.finish(
            chosen.counts,
            source_digest=hashlib.blake2b(chosen.rows["content"].tobytes(), digest_size=16).hexdigest(),
            provenance=_provenance(spec, maker, abouts),
        )


@dataclass
class Chosen:
    """Images 0, 1, ... as far as they were looked at, and what becomes of each."""

    rows: Rows = field(default_factory=lambda: np.zeros(0, ROW))
    near: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    fate: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))  # number in CAUSES
    first: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # it is a copy of; -1: none
    copies: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # of copies.earlier_copies
    blocks: int = 0

    @property
    def kept(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.fate == 0)

    @property
    def counts(self) -> dict[str, int]:
        found = np.bincount(self.fate, minlength=len(CAUSES)).tolist()
        return {"read": len(self.fate), "undecodable": 0, **dict(zip(CAUSES, found, strict=True))}

    def add(self, blocks: Iterator[Block]) -> None:
        made = list(blocks)
        self.rows = np.concatenate([self.rows, *(block.rows for block in made)])
        for name in made[0].near:
            parts = [block.near[name] for block in made]
            self.near[name] = np.concatenate([self.near.get(name, parts[0][:0]), *parts])
        self.blocks += len(made)

    def judge(self, spec: GenerateSpec, runtime: Runtime) -> None:
        """The fate of every row. It depends on the rows before it alone."""
        n = len(self.rows)
        self.fate, self.first = np.zeros(n, np.int8), np.full(n, -1)
        for name in ("safety", "blank", "saturated"):
            if name in spec.filters:
                caught = filters.caught(name, self.rows, spec)
                self.fate[caught & (self.fate == 0)] = CAUSES.index(name)
        left = self.kept
        # equal pixels are equal after resizing, so this finds both kinds of duplicates
        fitted = np.ascontiguousarray(self.rows["fitted"][left]).view("V16").ravel()
        _, firsts, group = np.unique(fitted, return_index=True, return_inverse=True)
        first = left[firsts[group]]
        again = first != left
        same = (self.rows["content"][left] == self.rows["content"][first]).all(1)
        kind = np.where(same, CAUSES.index("duplicate"), CAUSES.index("duplicate_after_resize"))
        self.fate[left[again]], self.first[left[again]] = kind[again], first[again]
        if spec.near_duplicates:
            left = self.kept
            described = Described(self.near["signature"][left], self.near["thumbnail"][left])
            self.copies = earlier_copies(described, self.copies, runtime)
            gone = np.flatnonzero(self.copies >= 0)
            self.fate[left[gone]] = CAUSES.index("near_duplicate")
            self.first[left[gone]] = left[self.copies[gone]]

    def stays(self, number: int) -> int:
        """The kept image that image `number` is a copy of, maybe by way of others; -1 where it is dropped for itself."""
        first = int(self.first[number])
        while first >= 0 and self.fate[first] != 0:
            first = int(self.first[first])
        return first

    def cut(self, n: int) -> None:
        """Forget what comes after the n-th row that is kept."""
        end = int(self.kept[n - 1]) + 1
        self.rows, self.fate, self.first = self.rows[:end], self.fate[:end], self.first[:end]
        self.near = {name: values[:end] for name, values in self.near.items()}


def _choose(spec: GenerateSpec, maker: Maker, there: int) -> Chosen:
    """Images until n are kept. Those from number `there` of the kept ones on have their images in the stream."""
    size, stream = spec.sampling.block, maker.stream
    most = math.ceil(spec.n * spec.sampling.oversample / size)
    chosen = Chosen()
    while (lacking := spec.n - len(chosen.kept)) > 0:
        more = range(chosen.blocks, min(most, chosen.blocks + math.ceil(lacking / size)))
        if not more:
            raise _exhausted(spec, chosen)
        missing = [number for number in more if number not in stream]
        maker.make(missing, more.stop - len(missing), max(more.stop, math.ceil(spec.n / size)))
        chosen.add(stream.blocks(more, near=spec.near_duplicates))
        chosen.judge(spec, maker.runtime)
    chosen.cut(spec.n)
    needed = np.unique(chosen.kept[there:] // size).tolist()
    gone = [number for number in needed if not stream.has_images(number)]
    if gone:  # another pool has taken them, or somebody removed them
        maker.make(gone, chosen.blocks - len(gone), chosen.blocks)
        return _choose(spec, maker, there)  # another device makes other images
    return chosen


def _exhausted(spec: GenerateSpec, chosen: Chosen) -> UserError:
    counts = {name: count for name, count in chosen.counts.items() if count and name not in ("read", "kept")}
    causes = ", ".join(f"{name} {count}" for name, count in counts.items())
    return UserError(
        f"pool {spec.name!r}: only {len(chosen.kept)} of {len(chosen.rows)} sampled images are left ({causes}), "
        f"n={spec.n} are wanted; lower n, change filters, or raise sampling.oversample"
    )


def _check_first(spec: GenerateSpec, chosen: Chosen, pool: Growing) -> None:
    made = chosen.rows["content"][chosen.kept[: pool.rows]]
    differ = np.flatnonzero((made != np.asarray(pool.content[: pool.rows])).any(1))
    if len(differ):
        raise UserError(
            f"pool {spec.directory.name}: {len(differ)} of its {pool.rows} images, the first in row {differ[0]}, are not "
            "those that are made now (another device, or other versions of torch and diffusers?); "
            "grow it where it was made, or give the new one another name"
        )


def _write(spec: GenerateSpec, maker: Maker, chosen: Chosen, pool: Growing) -> None:
    for i in np.flatnonzero(chosen.fate).tolist():
        first = chosen.stays(i)
        kept = {} if first < 0 else {"kept": first}
        pool.drop(CAUSES[chosen.fate[i]], i, seed=int(chosen.rows["seed"][i]), **kept)
    size, new = spec.sampling.block, chosen.kept[pool.rows :]
    numbers, starts = np.unique(new // size, return_index=True)
    groups = np.split(new, starts[1:])
    done = 0
    for block, group in zip(maker.stream.blocks(numbers.tolist(), images=True), groups, strict=True):
        if maker.runtime.stop():
            raise Interrupted("stopped while writing the pool; the images are kept")
        asked = maker.drawn(block.number)
        made = _made(spec, maker, block.about)
        for i in group.tolist():
            row, place = chosen.rows[i], i % size
            if (row["content"] != block.rows["content"][place]).any():
                raise UserError(
                    f"pool {spec.name!r}: image {i} was replaced meanwhile; run the same command again"
                )
            pool.add(
                row["content"].tobytes(),
                int(row["label"]),
                block.images[place] if block.images else b"",
                {**made, **_told(maker, asked, place)},
                *(values[i].tobytes() for values in chosen.near.values()),
            )
        done += len(group)
        maker.runtime.progress(done, len(new))


def _made(spec: GenerateSpec, maker: Maker, about: dict[str, Any]) -> dict[str, Any]:
    """How an image was made, of all images of a block."""
    return {
        "pipeline_digest": maker.digest,
        "scheduler": about["scheduler"],
        "steps": spec.sampling.steps,
        "guidance": spec.sampling.guidance,
        "diffusers": about["diffusers"],
    }


def _told(maker: Maker, asked: Drawn, place: int) -> dict[str, Any]:
    """What one image of a block was made of."""
    told_as = maker.model["input"]
    label, told = int(asked.label[place]), asked.inputs[place]
    return {
        "index": asked.indices[place],
        "seed": asked.seeds[place],
        **({"label": label, "class": maker.conditions.classes[label]} if label >= 0 else {}),
        **({} if told_as is None else {told_as.removesuffix("s"): told}),
    }


def _provenance(spec: GenerateSpec, maker: Maker, abouts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole pool. Where blocks differ in it, versions are the last block's."""
    return {
        **_made(spec, maker, abouts[-1]),
        "pipeline": spec.pipeline,
        "pipeline_class": abouts[-1]["pipeline_class"],
        "block": spec.sampling.block,
        "torch": abouts[-1]["torch"],
        "device": devices(abouts),
        "cost": {**cost(abouts, maker.model["flops_per_image"]), **_training(spec)},
    }


def _training(spec: GenerateSpec) -> dict[str, Any]:
    """FLOPs of training the generator, where that was a task here; None where its result does not say."""
    if not spec.pipeline.startswith(TASK):
        return {}
    path = task_folder(spec.pipeline).parent / "result.json"
    return {"training_flops": files.read_json(path).get("train_flops") if path.exists() else None}


def _result(pool: Pool) -> dict[str, Any]:
    return {
        "pool": pool.path.name,
        "digest": pool.digest,
        "size": pool.size,
        "counts": pool.info.counts,
        "real_images": pool.info.real_images,
        "pipeline_digest": pool.info.provenance["pipeline_digest"],
    }


def verify(spec: GenerateSpec, count: int, runtime: Runtime) -> dict[str, Any]:
    """Make the blocks of `count` random images of the pool of `spec` again, and compare.

    `images` were compared, `equal` are the same pixel for pixel as the model gives them; `greatest_difference` is that
    of the others in grey levels, as the pool stores them (0 where all are equal), and `differing_rows` the first ten.

    Raises UserError where there is no such pool, or its pipeline is not what it was.
    """
    pool = Pool.open(spec.directory)
    runtime.set_threads()
    maker = Maker(spec, runtime)
    if maker.digest != pool.info.provenance["pipeline_digest"]:
        raise UserError(f"pipeline={spec.pipeline}: is not the one that pool {pool.path.name} was made with")
    draw = np.random.default_rng(int(pool.digest, 16))
    rows = np.sort(draw.choice(pool.size, min(count, pool.size), replace=False))
    place = {int(pool.provenance(row)["index"]): int(row) for row in rows}
    size = spec.sampling.block
    differences: dict[int, tuple[bool, int]] = {}
    for number in sorted({index // size for index in place}):
        if runtime.stop():
            raise Interrupted("stopped while verifying")
        _, images, _ = maker.pixels(number)
        for index in range(number * size, (number + 1) * size):
            if index in place:
                differences[place[index]] = _difference(pool, place[index], images[index % size])
                runtime.progress(len(differences), len(rows))
    wrong = [row for row, (equal, _) in differences.items() if not equal]
    return {
        "images": len(differences),
        "equal": len(differences) - len(wrong),
        "greatest_difference": max(difference for _, difference in differences.values()),
        "differing_rows": wrong[:10],
    }


def _difference(pool: Pool, row: int, pixels: NDArray[np.uint8]) -> tuple[bool, int]:
    """Whether a row is of these very pixels, and how many grey levels what is stored is off at most."""
    equal = image.content_hash(pixels) == pool.content[row].tobytes()
    info = pool.info
    fitted = image.fit(pixels, info.image_size, info.filter)
    again = image.decode(image.encode(fitted, info.codec, info.quality)).astype(np.int16)
    return equal, int(np.abs(again - pool.images([row])[0]).max())
