"""The answer in plain English, from the numbers of effect.py. Points are percentage points of accuracy."""

import math
from collections.abc import Collection, Mapping, Sequence

from ssl_diversity.analysis.effect import Effect, Estimate

NOTHING = "no difference detectable"


def points(value: float, signed: bool = True) -> str:
    """`+3.1`, with a true minus sign; `–` where there is no number."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    return text.replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def verdict(e: Estimate) -> str:
    """One of `help`, `hurt`, `nothing` (the interval holds 0), `unknown` (no interval)."""
    if math.isnan(e.low):
        return "unknown"
    return ("help" if e.mean > 0 else "hurt") if e.detectable else "nothing"


def counts(effect: Effect) -> str:
    """`7 methods, 5 seeds each`."""
    methods, (fewest, most) = len(effect.per_method), effect.seeds
    seeds = _plural(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
    text = f"{_plural(methods, 'method')}, {seeds}{' each' if methods > 1 else ''}"
    return text + (f"; {_plural(effect.missing, 'pair')} without a result" if effect.missing else "")


def sentence(effect: Effect) -> str:
    """What more unique images did, with interval and counts; honest where nothing can be said."""
    e = effect.overall
    interval = f"95 % interval {points(e.low)} to {points(e.high)}"
    kind = verdict(e)
    if e.count == 0:
        text = "no pair of cells has results yet"
    elif kind == "unknown":
        text = f"{points(e.mean)} points, but one method and one seed give no interval, so no conclusion"
    elif kind == "nothing":
        text = (
            f"{NOTHING} ({points(e.mean)} points, {interval}); "
            f"smallest detectable: {points(e.smallest_detectable, signed=False)} points"
        )
    else:
        text = (
            "more unique images help" if kind == "help" else "fewer images, seen more often, do better"
        ) + (f": {points(e.mean)} points, {interval}")
    over = "" if effect.over == "methods" or kind == "unknown" else "; interval over seeds of one method"
    return f"N = {effect.low_label} → {effect.high_label}: {text} ({counts(effect)}{over})."


def contrast_sentence(a: str, b: str, effect: Effect) -> str:
    """Which of two sources pretrains better at the same N."""
    e = effect.overall
    at = f"at N = {effect.high_label}"
    interval = f"95 % interval {points(e.low)} to {points(e.high)}"
    kind = verdict(e)
    if kind == "unknown":
        return f"{a} against {b} {at}: {points(e.mean)} points, no interval."
    if kind == "nothing":
        detectable = points(e.smallest_detectable, signed=False)
        return f"{a} against {b} {at}: {NOTHING} ({points(e.mean)}, {interval}; smallest detectable: {detectable})."
    better, worse = (a, b) if kind == "help" else (b, a)
    low, high = (e.low, e.high) if kind == "help" else (-e.high, -e.low)
    return (
        f"{better} beats {worse} {at} by {points(abs(e.mean), signed=False)} points "
        f"(95 % interval {points(low)} to {points(high)})."
    )


def answer(effects: Sequence[Effect]) -> str:
    """The headline over the sources of one downstream set (effects of one probe and budget)."""
    groups: dict[str, list[str]] = {"help": [], "hurt": [], "nothing": [], "unknown": []}
    for effect in effects:
        mean = f" ({points(effect.overall.mean)} points)" if effect.overall.count else ""
        groups[verdict(effect.overall)].append(effect.source + mean)
    if not effects:
        return "Every cell has the same number of unique images here, so this sweep cannot tell."
    parts = []
    if groups["help"]:
        parts.append(f"More unique images help when pretraining on {_list(groups['help'])}.")
    if groups["hurt"]:
        parts.append(f"Fewer images, seen more often, do better on {_list(groups['hurt'])}.")
    if groups["nothing"]:
        parts.append(f"{NOTHING.capitalize()} on {_list(groups['nothing'])}.")
    if groups["unknown"]:
        parts.append(f"Too few results for an interval on {_list(groups['unknown'])}.")
    return " ".join(parts)


def nearness(
    distances: Mapping[str, float], generated: Collection[str], downstream: str, noise: float = math.nan
) -> list[tuple[bool, str]]:
    """(holds, sentence): is each generated source nearer to the downstream set than the shifted real sources are?

    `distances`: one distance per source, at a common n; `noise`: that of noise, where it is known. Shifted: every
    real source but the nearest.
    """
    real = sorted((s for s in distances if s not in generated), key=lambda s: distances[s])
    out = []
    others = {shifted: distances[shifted] for shifted in real[1:]}
    if math.isfinite(noise):
        others["noise"] = noise
    for source in sorted(set(generated) & set(distances)):
        for shifted, far in others.items():
            holds = distances[source] < far
            numbers = f"{distances[source]:.3g} against {far:.3g}"
            relation = "is nearer to" if holds else "is NOT nearer to"
            out.append((holds, f"{source} {relation} {downstream} than {shifted} is ({numbers})."))
    return out


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
