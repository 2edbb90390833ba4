"""A pool that a sweep draws from, and the tasks that make it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssl_diversity.data.config import PrepareSpec
from ssl_diversity.data.pool import Pool
from ssl_diversity.sweep.task import Task


@dataclass(frozen=True)
class Supply:
    """A pool to pretrain on. `tasks` make it, the last of them the pool itself (none for a given pool)."""

    name: str
    tasks: tuple[Task, ...]
    pool: Pool | None
    encoding: dict[str, Any]
    asked: int | None = (
        None  # how many of its images the sweep may see: the pool may have grown beyond; None: all
    )

    @property
    def size(self) -> int:
        """Images; 0 before the pool is there."""
        return min(self.pool.size, self.asked or self.pool.size) if self.pool is not None else 0


def encoding_of(spec: Any) -> dict[str, Any]:
    """As `PoolInfo.encoding`, of a pool still to be made."""
    quality = spec.quality if spec.codec == "jpeg" else None
    size = 0 if spec.resize == "none" else spec.size
    return {
        "resize": spec.resize,
        "size": size,
        "filter": spec.filter,
        "codec": spec.codec,
        "quality": quality,
    }


def prepare_task(spec: PrepareSpec, expected: Mapping[str, int] | None = None) -> Task:
    """The task that makes a pool; `expected` is what its recipe says of the number of images (`recipes.expected`)."""
    images = expected or {}
    return Task(
        "prepare",
        spec,
        output=spec.directory / "pool.json",
        label=f"prepare {spec.name} {spec.split}",
        units=images.get(spec.split, images.get("all", 0)),
        like=f"{spec.source}/{spec.resize}/{spec.size}px/{spec.codec}",
    )


def pool_of(task: Task) -> Pool | None:
    return Pool.open(task.output.parent) if task.output is not None and task.output.exists() else None
