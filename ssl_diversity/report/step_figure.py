"""A picture of what training steps cost: one horizontal bar per method, its parts end to end."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ssl_diversity.errors import UserError
from ssl_diversity.profiling import PARTS, StepProfile
from ssl_diversity.report.figures import FAINT, INK, PALETTE, STYLE

COLOURS = dict(
    zip(PARTS, [FAINT, "#9a9a9a", *PALETTE[:6], "#555555", INK], strict=True)
)  # waiting and the loop in greys
BAR_IN, MARGIN_IN, WIDTH_IN = 0.42, 1.1, 7.2


def draw(profiles: Sequence[StepProfile]) -> Figure:
    """Milliseconds per step; at the end of each bar samples/s and the share of the machine's peak."""
    with rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH_IN, MARGIN_IN + BAR_IN * len(profiles)), layout="constrained")
        axes = figure.subplots()
        names = [f"{p.method} · {p.backbone}" for p in profiles]
        left = [0.0] * len(profiles)
        for part in PARTS:
            widths = [max(0.0, 1e3 * p.parts[part]) for p in profiles]
            axes.barh(names, widths, left=left, height=0.62, color=COLOURS[part], label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, (end, p) in enumerate(zip(left, profiles, strict=True)):
            told = f" {p.samples_per_second:,.0f}/s, {p.share_of_peak:.0%} of peak"
            axes.text(end, place, told, va="center", fontsize=7)
        axes.set_xlim(0, 1.3 * max(left))
        axes.invert_yaxis()
        first = profiles[0]
        axes.set_xlabel(
            f"ms per step of {first.batch_size} images of {first.image_size} px, {first.precision}, {first.device}"
        )
        figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=7)
    return figure


def check(path: Path) -> None:
    """Raise UserError where `save` could not draw to `path`."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise UserError(f"--picture {path}: end its name in one of {', '.join(f'.{kind}' for kind in known)}")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.parent}; make it first")


def save(profiles: Sequence[StepProfile], path: Path) -> None:
    """The picture as a file, in the format of its name."""
    with rc_context(STYLE):
        draw(profiles).savefig(path, dpi=200, facecolor="white")
