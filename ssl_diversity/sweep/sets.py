"""The sets of a sweep: from a name and options to a pool, or to the tasks that will make it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import Any

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.subset import Subset
from ssl_diversity.errors import UserError
from ssl_diversity.generation import config as generation
from ssl_diversity.sweep import generated, mixture
from ssl_diversity.sweep.config import SweepConfig, given_pool, named_entry
from ssl_diversity.sweep.rows import shared_images
from ssl_diversity.sweep.supply import Supply, encoding_of, pool_of, prepare_task
from ssl_diversity.sweep.task import Task


@dataclass(frozen=True)
class Source:
    """What cells draw their images from: one pool, or several in given shares (a mixture)."""

    name: str
    supplies: tuple[Supply, ...]
    shares: tuple[Fraction, ...] = (Fraction(1),)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for supply in self.supplies for task in supply.tasks)

    @cached_property
    def needs(self) -> tuple[Task, ...]:
        """The tasks that write its pools."""
        return tuple(task for supply in self.supplies for task in supply.tasks[-1:])

    @cached_property
    def pools(self) -> tuple[Pool, ...]:
        """In the order of `supplies`; none before all of them are there."""
        found = tuple(supply.pool for supply in self.supplies if supply.pool is not None)
        return found if len(found) == len(self.supplies) else ()

    @cached_property
    def pool(self) -> Pool | None:
        """Its only pool; None before it is there, and of a mixture."""
        return self.pools[0] if len(self.pools) == 1 else None

    @cached_property
    def waiting(self) -> str:
        missing = [supply.name for supply in self.supplies if supply.pool is None]
        if missing in ([], [self.name]):
            return f"source {self.name} is not prepared yet" if missing else ""
        return f"source {self.name} waits for {' and '.join(missing)}"

    @cached_property
    def size(self) -> int:
        """The largest N; 0 before its pools are there."""
        return mixture.largest(self.shares, [supply.size for supply in self.supplies]) if self.pools else 0

    def subset(self, n: int, replicate: int = 0) -> Subset:
        """Draw number `replicate` of n images; draws of one replicate are nested in n."""
        counts = mixture.apportion(self.shares, n)
        drawn = zip(self.supplies, self.pools, counts, strict=True)
        return Subset(
            tuple(
                (pool, pool.rows(count, replicate, first=supply.asked))
                for supply, pool, count in drawn
                if count
            )
        )

    def check(self, n: int) -> None:
        """Refuse an N that a mixture's pools cannot give, naming the pool that is too small."""
        if len(self.pools) < 2:
            return
        for supply, count in zip(self.supplies, mixture.apportion(self.shares, n), strict=True):
            if count > supply.size:
                raise UserError(
                    f"unique_samples={n} of mixture {self.name!r} takes {count} images of pool {supply.name!r}, which"
                    f" has {supply.size}; use `all` or a number up to {self.size}"
                )


@dataclass(frozen=True)
class Downstream:
    """A labelled set to probe on, as two pools. `tasks` make them."""

    name: str
    tasks: tuple[Task, ...]
    train: Pool | None
    test: Pool | None
    encoding: dict[str, Any]

    @property
    def ready(self) -> bool:
        return self.train is not None and self.test is not None

    @property
    def waiting(self) -> str:
        return "" if self.ready else f"downstream set {self.name} is not prepared yet"


def source(sweep: SweepConfig, name: str) -> Source:
    """The source `name`: a recipe to prepare or generate, a pool that lies there already, or a mixture of such."""
    entry = sweep.sources[name]
    if mixture.MIX not in entry:
        return Source(name, (_supply(sweep, name, entry),))
    parts = entry[mixture.MIX]
    shares = mixture.shares(name, parts)
    supplies = []
    for part, options in parts.items():
        own = {key: value for key, value in options.items() if key != mixture.SHARE}
        supplies.append(_supply(sweep, part, own or sweep.sources[part]))
    made = Source(name, tuple(supplies), tuple(shares.values()))
    for a, b in combinations(made.pools, 2):
        if shared := shared_images(a, b):
            raise UserError(
                f"sources.{name}: pools {a.path.name} and {b.path.name} share {shared} images, so its N would not be"
                f" unique images; mix pools that share none (prepare one of them from a folder without them)"
            )
    return made


def _supply(sweep: SweepConfig, name: str, entry: Mapping[str, Any]) -> Supply:
    recipe, options = named_entry(entry, name)
    try:
        loaded = recipes.load(recipe)
        made = loaded["source"] == generation.SOURCE
        spec = None if made else recipes.resolve(recipe, options, defaults=sweep.defaults)
    except UserError as error:
        pool = given_pool(recipe)
        if pool is None:
            raise UserError(f"sources.{name}: {error}") from None
        return Supply(name, (), pool, pool.info.encoding)
    if spec is None:
        try:
            return generated.supply(sweep, name, generation.from_recipe(loaded, options))
        except UserError as error:
            raise UserError(f"sources.{name}: {error}") from None
    task = prepare_task(spec, recipes.expected(recipe))
    return Supply(name, (task,), pool_of(task), encoding_of(spec))


def downstream(sweep: SweepConfig, name: str) -> Downstream:
    """The labelled downstream set `name`: a recipe, or the path of a folder or tar."""
    try:
        specs = sweep.downstream_specs(name)
    except UserError as error:
        raise UserError(f"downstream.{name}: {error}") from None
    expected = recipes.expected(named_entry(sweep.downstream[name], name)[0])
    train, test = (prepare_task(spec, expected) for spec in specs)
    return Downstream(name, (train, test), pool_of(train), pool_of(test), encoding_of(specs[0]))


def check_encoding(sweep: SweepConfig, sources: Sequence[Source], downstream: Sequence[Downstream]) -> None:
    """Refuse pools that are too small, or stored in different ways: codecs are easier to tell apart than contents.

    Squares and images of the same short side are cropped to the same square as they are read. Downstream sets,
    stored at the size that networks are evaluated at, must have the sources' filter and codec.
    """
    supplies = [supply for source in sources for supply in source.supplies]
    for supply in supplies:
        size = supply.encoding["size"]
        if supply.encoding["resize"] != "none" and size < sweep.image_size:
            raise UserError(
                f"source {supply.name!r} is stored at {size} px, the sweep trains at image_size={sweep.image_size};"
                " prepare it at that size or a larger one"
            )
    if sweep.allow_mixed_encoding:
        return
    first = supplies[0]
    others: tuple[Supply | Downstream, ...] = (*supplies[1:], *downstream)
    for other in others:
        ignored = {"size", "resize"} if isinstance(other, Downstream) else {"resize"}
        if _compared(first.encoding, ignored) != _compared(other.encoding, ignored):
            raise UserError(
                f"sets {first.name!r} ({_words(first.encoding)}) and {other.name!r} ({_words(other.encoding)}) are "
                "stored differently, which a network could tell apart; store them alike or say allow_mixed_encoding=true"
            )


def _compared(encoding: Mapping[str, Any], ignored: set[str]) -> dict[str, Any]:
    """What must be equal. With original bytes go downstream sets as png, which adds no mark of its own."""
    same = {key: value for key, value in encoding.items() if key not in ignored}
    return (
        {**same, "codec": "png", "quality": None}
        if same["codec"] == "original" and "size" in ignored
        else same
    )


def _words(encoding: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in encoding.items() if value is not None)
