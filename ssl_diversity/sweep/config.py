"""What a sweep is: the file a user writes, and the record that `runs/<sweep>/sweep.yaml` keeps of it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ssl_diversity import budget, config
from ssl_diversity.backbones import BACKBONES
from ssl_diversity.config import Config
from ssl_diversity.data import recipes
from ssl_diversity.data.config import Codec, PrepareSpec, Resize
from ssl_diversity.data.order import Windowed
from ssl_diversity.data.pool import Pool, find
from ssl_diversity.data.sources import SOURCES, paths
from ssl_diversity.errors import UserError
from ssl_diversity.evaluation.config import parse_probe
from ssl_diversity.files import REPOSITORY, pools_dir, runs_dir
from ssl_diversity.generation import config as generation
from ssl_diversity.methods.recipe import METHODS, check_backbone
from ssl_diversity.sweep import mixture

SETS = ("sources", "downstream")
PLACES = frozenset({"path", "metadata"})  # options that say where a set lies
Sets = dict[str, dict[str, Any]]  # name -> {"recipe": ..., and options}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _seeds(value: Any) -> Any:
    """`5` seeds are 0 to 4."""
    return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


def _numbers(value: Any) -> Any:
    """Whole numbers as such: YAML reads `5e5` as 500000.0."""
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in _listed(value)]


def _order(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"windowed"}:
        return config.validate(WindowedOrder, value, "order")
    if value == "global" or isinstance(value, WindowedOrder):
        return value
    raise UserError(f"order={value}: expected global, or windowed: {{shards: 4, lanes: 64}}")


def _defaulted(value: Any) -> Any:
    return {"default": value} if isinstance(value, str) else value


Number = int | float | str
Positive = Annotated[int, Field(ge=1)]


class Encoding(Config):
    """How every pool of the sweep is stored. Downstream sets are stored as squares of the sweep's image size."""

    resize: Resize = "square"
    size: Positive | None = None  # pixels; None: the sweep's image size
    filter: str = "bicubic"
    codec: Codec = "png"  # original: downstream sets are then stored as png
    quality: Annotated[int, Field(ge=1, le=100)] = 95


class WindowedOrder(Config):
    windowed: Windowed


class DistanceConfig(Config):
    """How far sources are from downstream sets: `n` images of each, fewer where a set has fewer."""

    extractor: str = "random-resnet"
    n: Annotated[int, Field(ge=2)] = 1024


class SweepConfig(Config):
    """A grid: methods x sources x unique_samples x budget x seeds, and what is measured of every cell."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    image_size: Annotated[int, Field(ge=4)]
    sources: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    downstream: dict[str, dict[str, Any]]  # none: a pool is wanted alone (`one_source`)
    methods: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
    backbone: Annotated[dict[str, str], BeforeValidator(_defaulted)]
    recipe: str = "auto"
    hyperparameters: dict[str, dict[str, Any]] = Field({})
    unique_samples: Annotated[tuple[Number, ...], BeforeValidator(_numbers), Field(min_length=1)]
    budget: Annotated[tuple[Number, ...], BeforeValidator(_numbers), Field(min_length=1)]
    batch_size: Positive
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_seeds), Field(min_length=1)]
    replicates: Literal["per-seed", "shared"] = "per-seed"
    encoding: Encoding = Encoding()
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    order: Annotated[Literal["global"] | WindowedOrder, BeforeValidator(_order)] = "global"
    decode: Literal["exact", "scaled"] = "exact"
    near_duplicates: bool = False
    probes: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
    baselines: tuple[Literal["random", "pixels"], ...] = ("random", "pixels")
    distance: DistanceConfig = DistanceConfig()
    checkpoint_samples: Positive = 1_000_000
    allow_mixed_encoding: bool = False
    evaluation_seed: int = 0

    @model_validator(mode="after")
    def _known(self) -> "SweepConfig":
        for method in [*self.methods, *self.hyperparameters, *set(self.backbone) - {"default"}]:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}; {config.hint(method, METHODS, 'known')}")
        for method in self.methods:
            backbone = self.backbone_of(method)
            if backbone not in BACKBONES:
                raise UserError(
                    f"backbone: unknown backbone {backbone!r}; {config.hint(backbone, BACKBONES, 'known')}"
                )
            check_backbone(method, backbone)
        for value in self.budget:
            budget.parse_budget(value)
        for name in self.probes:
            parse_probe(name)
        for field in ("methods", "seeds", "budget", "unique_samples", "probes"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise UserError(f"{field}={list(values)}: the same value twice; leave one out")
        return self

    def backbone_of(self, method: str) -> str:
        try:
            return self.backbone.get(method) or self.backbone["default"]
        except KeyError:
            raise UserError(
                f"backbone: none given for {method}; add `{method}: NAME` or `default: NAME`"
            ) from None

    @property
    def folder(self) -> Path:
        return runs_dir() / self.name

    @property
    def windowed(self) -> Windowed | None:
        """What the order says of windows; None where it is global."""
        return None if self.order == "global" else self.order.windowed

    @property
    def defaults(self) -> dict[str, Any]:
        """What all sources of the sweep have in common."""
        size = self.encoding.size or self.image_size
        return {**self.encoding.model_dump(), "size": size, "near_duplicates": self.near_duplicates}

    @property
    def downstream_defaults(self) -> dict[str, Any]:
        """What all its downstream sets have in common: what networks are evaluated at, encoded like the sources."""
        codec = "png" if self.encoding.codec == "original" else self.encoding.codec
        return {**self.defaults, "resize": "square", "size": self.image_size, "codec": codec}

    def downstream_specs(self, name: str) -> tuple[PrepareSpec, PrepareSpec]:
        """(train, test) of a downstream set; UserError where its recipe or path is wrong."""
        recipe, options = named_entry(self.downstream[name], name)
        return recipes.downstream(recipe, options, defaults=self.downstream_defaults)

    def prepared(self, name: str) -> bool:
        """Whether both pools of a downstream set are there."""
        try:
            return all((spec.directory / "pool.json").exists() for spec in self.downstream_specs(name))
        except UserError:
            return False

    def kept_downstream(self) -> Sets:
        """The downstream sets that are known to work: those that were prepared."""
        return {name: entry for name, entry in self.downstream.items() if self.prepared(name)}


def named_entry(entry: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """(recipe, options) of a set, its name among them."""
    if mixture.MIX in entry:
        raise UserError(f"set {name}: a mixture can be a source, and nothing else")
    return str(entry["recipe"]), {"name": name, **{k: v for k, v in entry.items() if k != "recipe"}}


def load(text: str, overrides: Sequence[str] = (), *, remembered: bool = True) -> SweepConfig:
    """The sweep `text` (a name in configs/sweeps/, a YAML path, or a sweep run before) with `key=value` overrides.

    Downstream sets that an earlier run of the sweep added and prepared are kept where `remembered`.
    Raises UserError for anything that is not a sweep.
    """
    path = _find(text)
    values = _combine(_normal(config.read_yaml(path)), config.parse_overrides(overrides))
    where = " ".join([text, *overrides])
    try:
        sweep = config.validate(SweepConfig, values, where)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
    if not sweep.downstream:
        raise UserError(f"{where}: downstream: name at least one labelled set, or a folder or tar")
    record = recorded(sweep.name) if remembered else None
    old = (record.sources, record.kept_downstream()) if record else ({}, {})
    before = record.downstream if record else {}
    sources = _with_paths(sweep.sources, same_recipe={}, before=old[0])
    by_recipe = {entry["recipe"]: entry for entry in sources.values() if "recipe" in entry}
    downstream = _with_paths({**old[1], **sweep.downstream}, same_recipe=by_recipe, before=before)
    return sweep.model_copy(update={"sources": sources, "downstream": downstream})


def recorded(name: str) -> SweepConfig | None:
    """What `runs/<name>/sweep.yaml` remembers: the latest config with every budget and downstream set asked for."""
    path = runs_dir() / name / "sweep.yaml"
    return config.validate(SweepConfig, config.read_yaml(path), str(path)) if path.exists() else None


def latest(text: str) -> SweepConfig:
    """The record of the sweep that `text` names (as `load` reads it), or the sweep itself if it was never run."""
    sweep = load(text)
    return recorded(sweep.name) or sweep


def add_downstream(sweep: SweepConfig, text: str, options: Mapping[str, Any]) -> SweepConfig:
    """`sweep` with one more downstream set, named by `options["name"]` or its path."""
    name, entry = next(iter(_normal_sets([text]).items()))
    name = str(options.get("name", name))
    options = {key: value for key, value in options.items() if key != "name"}
    entry = _normal_sets({name: {**entry, **options}})[name]
    if sweep.downstream.get(name, entry) != entry:
        raise UserError(
            f"downstream set {name!r} is already {sweep.downstream[name]} in sweep {sweep.name!r}; "
            "give the new one another name (name=...)"
        )
    return sweep.model_copy(update={"downstream": {**sweep.downstream, name: entry}})


def one_cell(overrides: Sequence[str]) -> list[str]:
    """Overrides that name one cell (`method=simclr source=digits seed=3`), as those of a sweep of one."""
    plural = {"method": "methods", "source": "sources", "seed": "seeds"}
    pairs = [item.partition("=") for item in overrides]
    named = [
        f"{plural[key]}=[{value}]" if key in plural else key + sign + value for key, sign, value in pairs
    ]
    return ["name=pretrain", "seeds=[0]", *named]


def one_source(recipe: str, options: Mapping[str, Any], image_size: int) -> SweepConfig:
    """The smallest sweep that makes the generated source `recipe`, a name of the user's where `pipeline` is given."""
    if "pipeline" in options and recipe not in recipes.names() and not recipe.endswith((".yaml", ".yml")):
        recipe, options = generation.SOURCE, {"name": recipe, **options}
    if recipes.load(recipe)["source"] != generation.SOURCE:
        raise UserError(f"{recipe!r} is prepared, not generated; run `ssl-diversity data prepare {recipe}`")
    base = load("quickstart", ["name=generate", "methods=[simclr]"], remembered=False)
    (name, entry), *_ = _normal_sets([recipe]).items()
    point = {"unique_samples": (1,), "budget": (1,), "batch_size": 1}
    return base.model_copy(
        update={
            "image_size": image_size,
            "downstream": {},
            "sources": _normal_sets({str(options.get("name", name)): {**entry, **options}}),
            **point,
        }
    )


def _find(text: str) -> Path:
    folder = REPOSITORY / "configs" / "sweeps"
    candidates = [folder / f"{text}.yaml", runs_dir() / text / "sweep.yaml"]
    if text.endswith((".yaml", ".yml")):
        candidates = [Path(text).expanduser()]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(
        {path.stem for path in folder.glob("*.yaml")}
        | {path.parent.name for path in runs_dir().glob("*/sweep.yaml")}
    )
    raise UserError(f"no such sweep: {text!r}; {config.hint(text, known, 'known')}")


def _with_paths(sets: Sets, *, same_recipe: Sets, before: Sets) -> Sets:
    """`sets` with the path that the recipe of each leaves to the environment, so that a record needs none.

    Where the set does not give it: that of a source of the `same_recipe`, else the environment's, else the
    one of the same set in the run `before`.
    """
    out = {}
    for name, entry in sets.items():
        if mixture.MIX in entry:
            own = {part: given for part, given in entry[mixture.MIX].items() if "recipe" in given}
            parts = _with_paths(
                own, same_recipe=same_recipe, before=before.get(name, {}).get(mixture.MIX, {})
            )
            out[name] = {mixture.MIX: {**entry[mixture.MIX], **parts}}
            continue
        recipe = entry["recipe"]
        packaged = recipe in recipes.names() or recipe.endswith((".yaml", ".yml"))
        options = (recipes.load(recipe).get("options") or {}) if packaged else {}
        found = {}
        for key in PLACES & options.keys() - entry.keys():
            candidates = (
                given.get(key) for given in (same_recipe.get(recipe, {}), options, before.get(name, {}))
            )
            if place := next(filter(None, candidates), None):
                found[key] = _absolute(place)
        out[name] = {**entry, **found}
    return out


def _normal(values: dict[str, Any]) -> dict[str, Any]:
    """A sweep file with its sets as mappings from names to recipes and options."""
    sets = {key: _normal_sets(values[key]) for key in SETS if values.get(key) is not None}
    backbone = {"backbone": _defaulted(values["backbone"])} if "backbone" in values else {}
    return {**values, **sets, **backbone}


def _normal_sets(value: Any) -> dict[str, dict[str, Any]]:
    """`[digits, ~/pets.tar]` or `{pets: {recipe: folder, path: ~/pets.tar}}`, as the latter."""
    if isinstance(value, Mapping):
        entries = {str(name): entry for name, entry in value.items()}
    else:
        names = [str(item) for item in _listed(value)]
        entries = {set_name(text): {"recipe": text} for text in names}
        if len(entries) < len(names):
            raise UserError(f"{names}: two sets of the same name; write them as `name: {{recipe: ...}}`")
    return {name: _normal_set(name, entry, entries) for name, entry in entries.items()}


def _normal_set(name: str, entry: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(entry, str | Mapping | None):
        raise UserError(f"set {name}={entry}: expected a recipe, a path, or options such as {name}.seed=1")
    if isinstance(entry, Mapping) and mixture.MIX in entry:
        return mixture.normal(name, entry, known, lambda part, own: _normal_set(part, own, {}))
    options = {"recipe": entry} if isinstance(entry, str) else dict(entry or {})
    options = {"recipe": name, **options}
    for key, text in options.items():  # a record must mean the same from any folder
        if (key in PLACES and text is not None) or (key == "recipe" and _is_path(str(text))):
            options[key] = _absolute(text)
    return options


def _absolute(place: Any) -> Any:
    return (
        [paths.absolute(str(one)) for one in place] if isinstance(place, list) else paths.absolute(str(place))
    )


def set_name(text: str) -> str:
    """The name of a set given as a recipe or a path: `~/My Pets.tar` is `My-Pets`, `torchvision:DTD` is `dtd`."""
    if _is_path(text) and not text.endswith((".yaml", ".yml")):
        return recipes.set_name(text)
    if ":" in text:
        return str(recipes.load(text)["name"])
    return re.sub(r"\.ya?ml$", "", text.rstrip("/").rpartition("/")[2])


def _is_path(text: str) -> bool:
    """Whether a set is given as a path: what is no recipe, source kind or pool, and lies there."""
    if "/" in text or text in recipes.names() or text in SOURCES:
        return "/" in text
    return Path(text).expanduser().exists() and given_pool(text) is None


def given_pool(text: str) -> Pool | None:
    """The pool of exactly this name or folder name."""
    if not pools_dir().exists():
        return None
    try:
        pool = find(text)
    except UserError:
        return None
    return pool if text in (pool.name, pool.path.name) else None


def _combine(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides on a normal sweep file. `sources=[a,b]` chooses among its sources, keeping their options."""
    chosen: dict[str, Any] = {}
    for key in SETS:
        value = overrides.get(key)
        if value is not None and not isinstance(value, Mapping):
            known = base.get(key, {})
            kept = {name: known.get(name, entry) for name, entry in _normal_sets(value).items()}
            chosen[key] = {name: mixture.chosen(entry, known, kept) for name, entry in kept.items()}
    if isinstance(overrides.get("backbone"), str):
        chosen["backbone"] = {"default": overrides["backbone"]}
    rest = {key: value for key, value in overrides.items() if key not in chosen}
    merged = {**config.merge(base, rest), **chosen}
    return _normal(merged)
