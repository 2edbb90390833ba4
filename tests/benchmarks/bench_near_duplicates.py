"""Near duplicates: recall, precision, and the false-drop rate as the pool grows.

    python tests/benchmarks/bench_near_duplicates.py --data FOLDER --sheet pairs.png

FOLDER holds photos.tar, tiny-imagenet-20k.tar and cifar10.tar. Copies of real images are made by re-encoding, resizing,
slight crops and more light. Different images are those of different data sets, classes or photographs; where two of
them are the same picture nevertheless, someone looked at them and near_images.py lists them. The false-drop rate is
the rate per pair at which different images are at a distance of at most 1, times n / 2 for the rows of a pool of n. No
such pair was found, so that the rate comes from the tail above 1, which falls like a power of the distance. The peer is
the usual 64-bit perceptual hash (signs of the cosine transform) within Hamming distance 8, on the same pairs.

The constants of likeness.py were chosen with such images in view. Recall and precision are therefore those of images
whose names have an odd hash, and the false drops of these are given by themselves as well.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from near_images import CHANGES, KINDS, TWINS, Images, Pixels, described, kind, made_small, meet, short
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ssl_diversity.data import likeness, near

SMALL = (16, 8)  # pixels, to which CIFAR-10 is made smaller
LARGE = 1e8
TAIL = 1.6  # distances up to it are looked at for the false-drop rate
ALIKE = 0.5  # least cosine of weighted thumbnails of pairs whose distance is computed
Tail = tuple[NDArray[np.int64], NDArray[np.float32]]  # pairs (m, 2) and their distances


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=300, help="images per kind of which copies are made")
    parser.add_argument("--limit", type=int, help="images per tar, for a quick look")
    parser.add_argument(
        "--sheet", type=Path, help="PNG to write: pairs found to be copies, then the next ones"
    )
    return parser


def joined(parts: list[near.Described]) -> near.Described:
    return near.Described(
        np.concatenate([part.signatures for part in parts]),
        np.concatenate([part.thumbnails for part in parts]),
    )


def matches(images: near.Described) -> NDArray[np.int64]:
    scratch = Path(tempfile.mkdtemp())
    try:
        return np.array(
            near.near_copies(images.signatures, images.thumbnails, scratch=scratch, memory_bytes=1 << 30)
        )
    finally:
        shutil.rmtree(scratch)


def recall(images: Images, pool: near.Described, count: int) -> None:
    """Copies of one kind at a time, put behind all images; precision over all of them."""
    draw = np.random.default_rng(0)
    base = {k: draw.permutation(np.flatnonzero((images.kind == k) & images.odd))[:count] for k in KINDS}
    groups = {k: [images.pixels(i) for i in rows] for k, rows in base.items()}
    for size in SMALL:
        rows = base[f"{size} px"] = draw.permutation(np.flatnonzero((images.kind == "cifar") & images.odd))[
            :count
        ]
        groups[f"{size} px"] = [made_small(images.pixels(i), size) for i in rows]
    originals = [pixels for group in groups.values() for pixels in group]
    kind_of = np.repeat(list(groups), [len(group) for group in groups.values()])
    owner = np.concatenate(list(base.values()))  # row of each original in the pool
    small = np.flatnonzero(~np.isin(kind_of, KINDS))  # not in it yet
    image_of = np.concatenate([np.arange(len(pool)), owner[small]])
    owner[small] = np.arange(len(pool), len(image_of))
    pool = joined([pool, described(originals[small[0] :], len(small))])
    print(
        f"\nRecall in %: copies found among {len(pool):,} images / found with the bands of 10^8 / confirmed"
    )
    print("| change | " + " | ".join(f"{name} ({len(group)})" for name, group in groups.items()) + " |")
    print("|---" * (1 + len(groups)) + "|")
    strays, total = [], 0
    rows, images_of = (
        np.arange(len(pool), len(pool) + len(owner)),
        np.concatenate([image_of, image_of[owner]]),
    )
    for name, change in CHANGES.items():
        copies = described((change(pixels, draw) for pixels in originals), len(originals))
        everything = joined([pool, copies])
        match = matches(everything)[rows]
        same = pool.apart(owner, copies, np.arange(len(owner))) <= 1
        equal = (pool.thumbnails[owner] == copies.thumbnails).all(1)
        shares = (match >= 0, same & (equal | meet(pool.take(owner), copies, LARGE**2)), same)
        cells = [" / ".join(f"{100 * share[kind_of == k].mean():.1f}" for share in shares) for k in groups]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        stray = np.flatnonzero((match >= 0) & (images_of[match] != images_of[rows]))
        apart = everything.apart(match[stray], everything, owner[stray]).tolist()
        pairs = images_of[np.stack([match[stray], rows[stray]], 1)].tolist()
        strays += [(images.names[a], images.names[b], d) for (a, b), d in zip(pairs, apart, strict=True)]
        total += int((match >= 0).sum())
    others = [stray for stray in strays if stray[2] > 1]
    print(
        f"\nPrecision: of {total:,} copies found, {len(strays)} were matched to another image than their own; in"
        f" {len(strays) - len(others)} of these cases that image is itself a near copy of their own."
    )
    for a, b, distance in others:
        print(f"  to another image: {a} instead of {b}, from which it is {distance:.2f} apart")


def perceptual_hash(images: Iterable[Pixels], count: int) -> NDArray[np.uint64]:
    """The usual 64-bit pHash: 32 x 32 grey, cosine transform, 8 x 8 lowest frequencies against their median."""
    cosines, out = likeness.cosines(32)[:8], np.empty(count, np.uint64)
    for i, pixels in enumerate(images):
        grey = np.asarray(
            Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64
        )
        low = (cosines @ grey @ cosines.T).ravel()
        out[i] = np.packbits(low > np.median(low[1:])).view(np.uint64)[0]
    return out


def blocks(n: int, size: int = 4096) -> Iterator[tuple[slice, slice]]:
    for i in range(0, n, size):
        for j in range(i, n, 4 * size):
            yield slice(i, min(i + size, n)), slice(j, min(j + 4 * size, n))


def different_pairs(key: NDArray[np.int64]) -> int:
    counts = np.bincount(key)
    return int((len(key) ** 2 - (counts**2).sum()) // 2)


def hash_pairs(hashes: NDArray[np.uint64], key: NDArray[np.int64]) -> int:
    """Pairs of different images within Hamming distance 8."""
    found = 0
    for a, b in blocks(len(hashes)):
        close = np.bitwise_count(hashes[a, None] ^ hashes[b]) <= 8
        i, j = np.nonzero(close)
        i, j = i + a.start, j + b.start
        found += int(((i < j) & (key[i] != key[j])).sum())
    return found


def tail_pairs(images: near.Described, key: NDArray[np.int64]) -> Tail:
    """(pairs, 2) and distance of all pairs with different keys up to TAIL, by comparing everything with everything."""
    luma = (
        images.thumbnails[:, : likeness.LUMA**2].reshape(-1, likeness.LUMA, likeness.LUMA).astype(np.float32)
    )
    cosines = likeness.cosines(likeness.LUMA).astype(np.float32)
    frequency = np.hypot(*np.mgrid[: likeness.LUMA, : likeness.LUMA]).astype(np.float32)
    spectrum = ((cosines @ luma @ cosines.T) * frequency).reshape(len(images), -1)
    spectrum /= np.maximum(np.linalg.norm(spectrum, axis=1, keepdims=True), 1)
    pairs, distances = [], []
    for a, b in blocks(len(images)):
        i, j = np.nonzero(spectrum[a] @ spectrum[b].T > ALIKE)
        i, j = i + a.start, j + b.start
        keep = (i < j) & (key[i] != key[j])
        apart = images.apart(i[keep], images, j[keep])
        near_ = apart <= TAIL
        pairs.append(np.stack([i[keep], j[keep]], 1)[near_])
        distances.append(apart[near_])
    return np.concatenate(pairs), np.concatenate(distances)


def without_twins(tail: Tail, names: list[str]) -> Tail:
    kept = [frozenset((short(names[a]), short(names[b]))) not in TWINS for a, b in tail[0]]
    return tail[0][kept], tail[1][kept]


def fitted(distance: NDArray[np.float32], pairs: float) -> tuple[float, float]:
    """Rate per pair up to distance 1, and the exponent of its power law: Hill's estimator below TAIL."""
    exponent = len(distance) / np.log(TAIL / np.maximum(distance, 0.1)).sum()
    with np.errstate(over="ignore"):  # distances next to TAIL alone: a rate of 0
        return len(distance) / pairs / TAIL**exponent, float(exponent)


def with_interval(tail: Tail, n: int, pairs: float) -> tuple[float, float, float, float]:
    """(rate per pair, its 95 % interval, exponent), by a bootstrap over the n images: pairs share images.

    Nothing can be fitted to fewer than 5 pairs: then there were none in `pairs`, so at most 3 with 95 % confidence.
    """
    found, distance = tail
    if len(distance) < 5:
        return 0.0, 0.0, 3 / pairs, np.nan
    rate, exponent = fitted(distance, pairs)
    draw, rates = np.random.default_rng(0), []
    for _ in range(400):
        weight = np.bincount(draw.integers(0, n, n), minlength=n)
        times = weight[found[:, 0]] * weight[found[:, 1]]
        if times.sum() >= 5:
            rates.append(fitted(np.repeat(distance, times), pairs)[0])
    low, high = np.quantile(rates, [0.025, 0.975])
    return rate, float(low), float(high), exponent


def false_drops(
    title: str, tail: Tail, twins: int, key: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> None:
    """Print a row of the table, for images with `key` and pHash; `tail` is without `twins`."""
    pairs = different_pairs(key)
    counts = " / ".join(str(int((tail[1] <= limit).sum())) for limit in (1.0, 1.2, 1.4, TAIL))
    rate, low, high, exponent = with_interval(tail, len(key), pairs)
    theirs = hash_pairs(hashes, key) / pairs

    def dropped(rate: float, n: float) -> str:
        return f"{100 * min(1, rate * n / 2):.2g}"

    ours = [f"{dropped(rate, n)} ({dropped(low, n)} to {dropped(high, n)})" for n in (1e6, LARGE)]
    print(
        f"| {title} | {len(key):,} | {pairs:.2g} | {twins} | {counts} | {exponent:.1f}"
        f" | {rate:.1g} ({low:.1g} to {high:.1g}) | {' | '.join(ours)}"
        f" | {theirs:.1g} | {dropped(theirs, 1e6)} | {dropped(theirs, LARGE)} |",
        flush=True,
    )


def growth(found: NDArray[np.int64], count: int) -> None:
    """How the number of too similar different pairs grows with the pool."""
    draw, rows = np.random.default_rng(0), []
    print(f"\nPairs of different images at a distance up to {TAIL} among n of all (mean of 50 draws)")
    print("| n | pairs found | of |\n|---|---|---|")
    for n in sorted({min(n, count) for n in (1000, 3000, 10_000, 30_000, 100_000)}):
        means = []
        for _ in range(50):
            member = np.zeros(count, bool)
            member[draw.permutation(count)[:n]] = True
            means.append(member[found].all(1).sum())
        rows.append((n, np.mean(means)))
        print(f"| {n:,} | {np.mean(means):.4g} | {n * (n - 1) / 2:.2g} |")
    if sum(mean > 0 for _, mean in rows) > 1:
        n, pairs = np.array([row for row in rows if row[1] > 0]).T
        print(f"grows like n^{np.polyfit(np.log(n), np.log(pairs), 1, w=np.sqrt(pairs))[0]:.2f}")


def timing(images: Images) -> None:
    photo = images.pixels(int(np.flatnonzero(images.kind == "photos")[0]))
    for name, size in (("32 px", (32, 32)), ("64 px", (64, 64)), ("500 x 375", (500, 375))):
        pixels = np.asarray(Image.fromarray(photo).resize(size))
        times = []
        for _ in range(200):
            start = perf_counter()
            near.describe(pixels)
            times.append(perf_counter() - start)
        print(f"describe, {name}: {1e6 * median(times):.0f} us")


def sheet(
    images: Images, pairs: list[tuple[str, str, float]], path: Path, side: int = 64, columns: int = 10
) -> None:
    number = {name: i for i, name in enumerate(images.names)}
    out = Image.new("RGB", (columns * (2 * side + 8), -(-len(pairs) // columns) * (side + 14)), "white")
    draw = ImageDraw.Draw(out)
    for k, (a, b, distance) in enumerate(pairs):
        x, y = k % columns * (2 * side + 8), k // columns * (side + 14)
        draw.text((x, y), f"{distance:.2f}", fill="black")
        for step, name in enumerate((a, b)):
            picture = Image.fromarray(images.pixels(number[name])).resize((side, side))
            out.paste(picture, (x + step * side, y + 12))
    out.save(path)


def main() -> None:
    args = parser().parse_args()
    images = Images(args.data, args.limit)
    print(f"{len(images):,} images, numpy {np.__version__}")
    timing(images)
    pool = described((images.pixels(i) for i in range(len(images))), len(images))
    recall(images, pool, args.copies)
    start = perf_counter()
    match = matches(pool)
    seconds = perf_counter() - start
    print(f"\nnear_copies of {len(pool):,} rows: {seconds:.1f} s ({1e6 * seconds / len(pool):.0f} us each)")
    late = np.flatnonzero(match >= 0)
    own = [(images.names[match[r]], images.names[r]) for r in late]
    apart = pool.apart(match[late], pool, late)
    print(
        f"Among the images themselves {len(own)} were found to be copies of earlier ones (all on the sheet):"
    )
    for a, b in sorted({(kind(x), kind(y)) for x, y in own}):
        print(f"  {a} - {b}: {sum((kind(x), kind(y)) == (a, b) for x, y in own)}")

    print(
        "\nFalse drops. Different images; how many pairs are twins after all (looked at), and the number of the others at"
        f" distances up to 1 / 1.2 / 1.4 / {TAIL}; the rate of false drops per pair, and the share of rows of a pool"
    )
    print(
        f"| images | n | pairs | twins | up to 1 / 1.2 / 1.4 / {TAIL} | exponent | rate per pair (95 %)"
        " | % dropped at 10^6 (95 %) | at 10^8 | pHash: rate per pair | % dropped at 10^6 | at 10^8 |"
    )
    print("|---" * 12 + "|")
    hashes = perceptual_hash((images.pixels(i) for i in range(len(images))), len(images))
    everything = tail_pairs(pool, images.key)
    tail = without_twins(everything, images.names)
    subsets = {
        "64 px, Tiny ImageNet": images.kind == "tiny",
        "32 px, CIFAR-10": images.kind == "cifar",
        "all": np.ones(len(images), bool),
        "all with an odd hash": images.odd,
    }
    for title, member in subsets.items():
        inside = [member[pairs].all(1) for pairs, _ in (tail, everything)]
        numbers = np.cumsum(member) - 1
        part = numbers[tail[0][inside[0]]], tail[1][inside[0]]
        false_drops(title, part, int(inside[1].sum() - inside[0].sum()), images.key[member], hashes[member])
    rows = np.flatnonzero(images.kind == "cifar")
    for size in SMALL:
        small = [made_small(images.pixels(i), size) for i in rows]
        theirs = perceptual_hash(small, len(small))
        part = tail_pairs(described(small, len(small)), images.key[rows])
        false_drops(f"{size} px, CIFAR-10 made smaller", part, 0, images.key[rows], theirs)
    growth(tail[0], len(images))
    order = np.argsort(tail[1])
    listed = [
        (images.names[a], images.names[b], float(d))
        for (a, b), d in zip(tail[0][order], tail[1][order], strict=True)
    ]
    print("\nThe nearest different images:")
    for a, b, distance in listed[:12]:
        print(f"  {distance:.2f} {a} - {b}")
    if args.sheet:
        order = np.argsort(-apart)
        sheet(images, [(*own[i], float(apart[i])) for i in order] + listed, args.sheet)


if __name__ == "__main__":
    main()
