"""Mixtures: how a sweep file names one, and how many images each part gives."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ssl_diversity.errors import UserError

MIX = "mix"
SHARE = "share"
_TOLERANCE = Fraction(1, 10**6)  # of the shares' sum: thirds have to be written somehow

Entry = dict[str, Any]


def normal(
    name: str, entry: Mapping[str, Any], known: Mapping[str, Any], one: Callable[[str, Entry], Entry]
) -> Entry:
    """`{mix: {digits: 0.9, web: {share: 0.1, recipe: folder, path: ...}}}` with each part as a mapping.

    A part that is `known` (a source of the sweep) has its share alone; any other is a set of its own, which
    `one` brings into normal form. Raises UserError for anything that is no mixture.
    """
    parts = entry[MIX]
    if not isinstance(parts, Mapping) or len(parts) < 2 or len(entry) > 1:
        raise UserError(
            f"set {name}={dict(entry)}: a mixture is written mix: {{NAME: SHARE, NAME: SHARE}} and nothing else"
        )
    out = {}
    for part, value in parts.items():
        options = dict(value) if isinstance(value, Mapping) else {SHARE: value}
        own = {key: option for key, option in options.items() if key != SHARE}
        set_ = known.get(part)
        if MIX in own or (not own and isinstance(set_, Mapping) and MIX in set_):
            raise UserError(f"set {name}: {part} is a mixture itself; name what it is made of")
        if own or part not in known:
            own = one(str(part), own)
        out[str(part)] = {SHARE: options.get(SHARE), **own}
    total = sum(shares(name, out).values(), Fraction(0))
    if abs(total - 1) > _TOLERANCE:
        raise UserError(f"set {name}: the shares of its mixture sum to {float(total):g}; make it 1")
    return {MIX: out}


def shares(name: str, parts: Mapping[str, Entry]) -> dict[str, Fraction]:
    """The share of each part of a mixture, exactly as written."""
    found = {}
    for part, entry in parts.items():
        share = entry[SHARE]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise UserError(f"set {name}: {part} has share {share}; expected a number between 0 and 1")
        found[part] = Fraction(str(share))
    return found


def chosen(entry: Entry, known: Mapping[str, Entry], kept: Mapping[str, Entry]) -> Entry:
    """A mixture in normal form for a sweep that keeps only some of its `known` sources: the others as its own."""
    if MIX not in entry:
        return entry
    parts = {
        part: {**known[part], **options}
        if part in known and part not in kept and len(options) == 1
        else options
        for part, options in entry[MIX].items()
    }
    return {MIX: parts}


def apportion(shares: Sequence[Fraction], n: int) -> tuple[int, ...]:
    """How many of n images each part gives: Webster's method (Sainte-Laguë), ties to the earlier part.

    House-monotone: one image more never takes one from a part, so subsets of a mixture are nested in n as those
    of its parts are. Every part is within one image or so of its share. O(parts^2): rounding all quotas for
    slightly fewer than n leaves at most one image per part to be dealt by Webster's quotients.
    """
    size = max(Fraction(0), Fraction(2 * n - len(shares), 2) / sum(shares))
    counts = [int(share * size + Fraction(1, 2)) for share in shares]
    while sum(counts) < n:
        quotients = [share / (2 * count + 1) for share, count in zip(shares, counts, strict=True)]
        counts[max(range(len(counts)), key=quotients.__getitem__)] += 1
    return tuple(counts)


def largest(shares: Sequence[Fraction], sizes: Sequence[int]) -> int:
    """The largest n whose shares all fit parts of `sizes`."""
    low, high = 0, sum(sizes)  # low fits; nothing above high does
    while low < high:
        middle = (low + high + 1) // 2
        fits = all(count <= size for count, size in zip(apportion(shares, middle), sizes, strict=True))
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
