"""pool.html: one self-contained page about one pool, alone or against a reference."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from ssl_diversity.data.pool import Pool
from ssl_diversity.data.sheet import UNSIZED
from ssl_diversity.files import write_atomic
from ssl_diversity.report import figures
from ssl_diversity.report.tables import Cell, Table
from ssl_diversity.report.words import scientific
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep.status import duration

if TYPE_CHECKING:
    from ssl_diversity.distance.comparison import Comparison, Measures

SAMPLES, WITH_NEIGHBOURS = 64, 16
LARGEST = 160  # px of an image on the page
SMALL = 64  # px up to which an image is shown with its pixels apart, and as PNG
DROPPED = {
    "undecodable": "could not be decoded",
    "duplicate": "the same as an earlier image",
    "duplicate_after_resize": "the same as an earlier image once resized",
    "near_duplicate": "a near copy of an earlier image",
    "excluded": "a copy of a test image",
    "blank": "blank",
    "saturated": "saturated",
    "safety": "held back by the pipeline's own safety filter",
    "conflict": "copies with another label, counted above",
}


@dataclass(frozen=True)
class Picture:
    """An image of the page as a data URI; `small` ones show their pixels."""

    uri: str
    title: str
    caption: str
    small: bool


@dataclass(frozen=True)
class Against:
    """What the page says about a pool and its reference."""

    name: str
    sentences: list[str]
    measures: Table
    reading: list[str]
    closeness: list[str]
    figure: Markup
    figure_caption: str
    neighbours_caption: str
    neighbours: list[list[Picture]]


def write_pool_page(
    pool: Pool,
    out: Path,
    *,
    reference: Pool | None = None,
    extractor: str = "random-resnet",
    n: int = 10_000,
    searched: int | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Path:
    """Write the page to `out` and return it.

    What the pool is, what was dropped, a page of samples; with a `reference` also how far the pool is from it, at `n`
    images of each (or as many as both have), and which of its first `searched` images are nearest (both as `distance.comparison.compare` says,
    which also names the errors). The same pools and arguments give the same page.
    """
    against = None
    if reference is not None:
        from ssl_diversity.distance.comparison import compare

        found = compare(
            pool, reference, runtime, extractor=extractor, n=n, searched=searched, shown=WITH_NEIGHBOURS
        )
        against = _against(pool, reference, found)
    info = pool.info
    loader = PackageLoader("ssl_diversity", "report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html: str = environment.get_template("pool.html.j2").render(
        name=pool.name,
        folder=pool.path.name,
        lede=_lede(pool),
        facts=_facts(pool),
        samples=_pictures(pool, np.arange(min(SAMPLES, pool.size)), _captions(pool, min(SAMPLES, pool.size))),
        against=against,
        counts=_counts(pool),
        classes=_classes(pool),
        made=_made(pool),
        cost=_cost(pool),
        terms=info.terms,
        spec=json.dumps(info.spec, indent=1, sort_keys=True),
        palette=list(enumerate((figures.INK, figures.MUTED, figures.FAINT, *figures.PALETTE))),
    )
    write_atomic(out, html.replace(" %", "\u00a0%").replace(" px", "\u00a0px"))
    return out


# What the pool is


def _lede(pool: Pool) -> str:
    info = pool.info
    if not info.provenance:
        return f"{info.size:,} unique images, prepared from {info.source}."
    real = f", which saw {info.real_images:,} real images" if info.real_images else ""
    return f"{info.size:,} unique images, sampled from a {info.provenance.get('pipeline_class', 'generator')}{real}."


def _facts(pool: Pool) -> list[tuple[str, str]]:
    info = pool.info
    shape = {"square": f"{info.image_size} px square", "short": f"short side {info.image_size} px"}
    real = "not known" if info.real_images is None else f"{info.real_images:,}"
    return [
        ("images", f"{info.size:,}"),
        ("classes", f"{len(info.classes):,}" if info.classes else "–"),
        ("size", shape.get(info.resize, "as they are")),
        ("encoding", f"JPEG, quality {info.quality}" if info.codec == "jpeg" else info.codec.upper()),
        ("source", info.source),
        ("real images behind it", real),
        ("near copies", "dropped" if info.near_duplicates else "not looked for"),
        ("shards", f"{len(info.shards):,}, {sum(s.bytes for s in info.shards) / 2**20:,.1f} MiB"),
    ]


def _counts(pool: Pool) -> Table:
    """What was read, what was kept, and every cause why an image was not."""
    counts = dict(pool.info.counts)
    read, kept = counts.pop("read", 0), counts.pop("kept", pool.size)
    causes = [
        (DROPPED.get(name, name.replace("_", " ")), number) for name, number in counts.items() if number
    ]
    rows = [("read", read), *causes, ("kept", kept)]
    caption = "What was read, what was not kept and why, and what was kept."
    heads = ["", "images", "of those read"]
    return Table(caption, heads, [([name], [Cell(f"{x:,}"), Cell(_share(x, read))]) for name, x in rows])


def _classes(pool: Pool) -> Table:
    labels = np.asarray(pool.label)
    counts = np.bincount(labels[labels >= 0], minlength=len(pool.info.classes)).tolist()
    rows = list(zip(pool.info.classes, counts, strict=False))
    if rows and (labels < 0).any():
        rows.append(("without a class", int((labels < 0).sum())))
    heads = ["class", "images", "share"]
    body = [([name], [Cell(f"{x:,}"), Cell(_share(x, pool.size))]) for name, x in rows]
    return Table("Images per class.", heads, body)


def _made(pool: Pool) -> list[tuple[str, str]]:
    info = pool.info
    made = {"origin": info.origin, "seed": info.seed, "filter": info.filter, "digest": pool.digest}
    provenance = {key: value for key, value in info.provenance.items() if key != "cost"}
    return [
        (key.replace("_", " "), _plain(value)) for key, value in (made | provenance).items() if value != ""
    ]


def _cost(pool: Pool) -> list[tuple[str, str]]:
    """Totals over all images that were made, and per image kept."""
    cost = pool.info.provenance.get("cost") or {}
    seconds, joules, flops, training = (
        cost.get(key) for key in ("seconds", "energy_joules", "flops_per_image", "training_flops")
    )
    each = 1 / pool.size
    energy = (
        "not measured"
        if joules is None
        else f"{_number(joules / 3.6e6)} kWh, {_number(joules * each)} J per image kept"
    )
    rows = [
        ("time", seconds and f"{duration(seconds)}, {_number(seconds * each)} s per image kept"),
        ("FLOPs per image", flops and scientific(flops)),
        ("energy", energy),
    ]
    if training:
        price = f"{scientific(training)} FLOPs, {scientific(training * each)} per image kept"
        rows.append(("training the generator", price))
    return [(name, str(value or "not measured")) for name, value in rows] if cost else []


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.3g} %" if of else "–"


# Pictures


def _pictures(pool: Pool, rows: NDArray[np.int64], captions: Sequence[tuple[str, str]]) -> list[Picture]:
    """Rows of a pool; `captions`: (caption, title) of each."""
    side = min(pool.image_size or UNSIZED, LARGEST)
    images = pool.images(rows, side)
    return [
        Picture(_uri(image), title, caption, side <= SMALL)
        for image, (caption, title) in zip(images, captions, strict=True)
    ]


def _uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 (S, S, 3) as a data URI."""
    kind = "png" if len(pixels) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _captions(pool: Pool, n: int) -> list[tuple[str, str]]:
    """(class, all that is known) of each of the first n rows."""
    return [(_class(pool, row), _title(pool, row)) for row in range(n)]


def _class(pool: Pool, row: int) -> str:
    label = int(pool.label[row])
    return pool.info.classes[label] if 0 <= label < len(pool.info.classes) else ""


def _title(pool: Pool, row: int) -> str:
    noted = pool.provenance(row) if pool.info.provenance else {}
    about = {"class": _class(pool, row), **{key: noted.get(key) for key in ("prompt", "index", "seed")}}
    return ", ".join(
        [f"{pool.name} row {row}", *(f"{k} {v}" for k, v in about.items() if v not in (None, ""))]
    )


# Against a reference


def _against(pool: Pool, reference: Pool, found: "Comparison") -> Against:
    n, r = f"{found.n:,}", reference.name
    part = f"the first {found.searched:,} of {reference.size:,}" if found.searched < reference.size else "all"
    among = f"{part} images of {r}"
    closer, left_out = found.closeness, found.closeness_left_out
    return Against(
        name=r,
        sentences=[f"The first {n} images of the pool and the first {n} of {r}, seen through {found.extractor}."],
        measures=_measures(pool, reference, found),
        reading=_reading(found, r),
        closeness=[
            f"For each of the first {n} images of the pool: its distance to the nearest of {among} (in the features of "
            f"{found.extractor}), over the distance of that one to the nearest other one. Below 1, an image of the pool is "
            f"nearer to an image of {r} than any other image of {r} is.",
            f"That is so for {_percent(closer < 1)} of the images of the pool; their median ratio is "
            f"{_number(np.median(closer))}. For the first {n} images of {r} itself, each left out in turn, it is so for "
            f"{_percent(left_out < 1)}; their median ratio is {_number(np.median(left_out))}.",
            f"{found.shared_images:,} of the first {n} images of the pool were made of the same source pixels as one of {among}.",
        ],
        figure=_figure(found, pool.name, r),
        figure_caption=f"The ratio for images of the pool, and for images of {r} left out in turn. What lies beyond the ends "
        "counts at the ends.",
        neighbours_caption=f"Framed: the first images of the pool, with the ratio above. Beside each: the "
        f"{found.by_features.rows.shape[1]} nearest of {among} by features, with their distances, and last the nearest by "
        f"pixels, with the root mean square difference in grey levels at {found.pixels_size} px.",
        neighbours=_neighbours(pool, reference, found),
    )  # fmt: skip


def _measures(pool: Pool, reference: Pool, found: "Comparison") -> Table:
    columns: dict[str, Measures | None] = {
        pool.name: found.made,
        f"{reference.name}, other images": found.floor,
        "uniform noise": found.noise,
    }
    given = {name: measures for name, measures in columns.items() if measures is not None}
    rows = {
        "Fréchet distance": lambda m: Cell(_number(m.frechet)),
        "KID × 10³": lambda m: Cell(_number(1e3 * m.kid.mean), f"± {_number(1e3 * m.kid.deviation)}"),
        "precision": lambda m: Cell(f"{m.precision:.3f}"),
        "recall": lambda m: Cell(f"{m.recall:.3f}"),
        "images of each": lambda m: Cell(f"{m.n:,}"),
    }
    caption = f"Against {reference.name}: the pool, and the two ends of the scale."
    body = [([name], [cell(measures) for measures in given.values()]) for name, cell in rows.items()]
    return Table(caption, ["", *given], body)


def _reading(found: "Comparison", reference: str) -> list[str]:
    from ssl_diversity.distance.fidelity import NEIGHBOURS

    kid = found.made.kid
    small = found.floor is not None and found.floor.n < found.n
    less = f" at {found.floor.n:,} images, as it has no 2 × {found.n:,}" if small and found.floor else ""
    return [
        f"“{reference}, other images”: two disjoint draws of {reference} against each other{less}; what images of the same "
        "distribution reach.",
        "The Fréchet distance is squared, as FID is, and biased by the number of images: compare it at equal numbers and "
        "with the same extractor.",
        f"KID: mean and standard deviation over {kid.subsets} subsets of {kid.subset_size:,} images; unbiased, so around 0 "
        "for the same distribution.",
        f"Precision: the share of the images of the pool in the manifold of those of {reference}; recall: the reverse. A "
        f"manifold is the union of balls that reach from each image to its {NEIGHBOURS}rd nearest. An outlying image has a large "
        "ball, which holds whatever lies out there, too: the precision of noise tells whether there is one.",
    ]


def _figure(found: "Comparison", pool: str, reference: str) -> Markup:
    """Shares of images by the logarithm of their ratio."""
    both = np.concatenate([found.closeness, found.closeness_left_out])
    finite = both[np.isfinite(both) & (both > 0)]
    low, high = np.quantile(finite, [0.005, 0.995]) if len(finite) else (0.5, 2.0)
    edges = np.geomspace(min(low, 0.5), max(high, 2.0), 33)
    with rc_context(figures.STYLE):
        figure = Figure(figsize=(3.6, 2.1), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(1, color=figures.MUTED, linewidth=1)
        lines = (
            (found.closeness_left_out, figures.MUTED, reference),
            (found.closeness, figures.PALETTE[0], pool),
        )
        for ratios, colour, name in lines:
            counts, _ = np.histogram(ratios.clip(edges[0], edges[-1]), edges)
            axes.stairs(counts / len(ratios), edges, color=colour, linewidth=1.6, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(2 if edges[-1] < 32 * edges[0] else 10))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        axes.set_xlabel("distance to the nearest, over its own to the nearest")
        axes.legend(frameon=False, labelcolor="linecolor", handlelength=1)
    return Markup(figures.inline(figures.to_svg(figure), "Distances to the nearest images", "nearest"))


def _neighbours(pool: Pool, reference: Pool, found: "Comparison") -> list[list[Picture]]:
    """A row of pictures per sample: itself, its neighbours by features, its neighbour by pixels."""
    count = len(found.by_features.rows)
    own = [
        (f"ratio {_number(ratio)}", _title(pool, row)) for row, ratio in enumerate(found.closeness[:count])
    ]
    columns = [_pictures(pool, np.arange(count), own)]
    for neighbours, unit in ((found.by_features, ""), (found.by_pixels, " levels")):
        for rows, distance in zip(neighbours.rows.T, neighbours.distance.T, strict=True):
            captions = [
                (f"{_number(d)}{unit}", _title(reference, int(row)))
                for row, d in zip(rows, distance, strict=True)
            ]
            columns.append(_pictures(reference, rows, captions))
    return [list(row) for row in zip(*columns, strict=True)]


def _percent(flags: NDArray[np.bool_]) -> str:
    return f"{100 * flags.mean():.3g} %"


def _number(value: float) -> str:
    """Three digits or more, with a minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if value and not 1e-3 <= abs(value) < 1e5:
        text = scientific(float(value))
    return text.replace("-", "−")
