"""How every picture looks: colours, markers, bands, and marks for what is zero, absent or broken.

Colours are seaborn's ``colorblind`` palette without its two faintest members; each series also has
its own marker and line style, so that a greyscale print tells the same. Settings hold for the
artists drawn here only (`context`); the caller's global ones are left alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "Band",
    "Marks",
    "axes",
    "axis_label",
    "context",
    "finish",
    "integer_ticks",
    "legend",
    "log_ticks",
    "look",
    "series",
    "summary",
]

Band = Literal["range", "interval"]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_SETTINGS: Final[Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "figure.dpi": 150,
}
#: Members of the palette in order; 6 (light pink) and 8 (yellow) are too faint for lines on white.
_COLOURS: Final = (0, 1, 2, 3, 4, 5, 9, 7)
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_LINES: Final[tuple[Any, ...]] = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
_MAX_MARKERS: Final = 13
#: Marks every artist that stands for a series, so that a second call on the same axes goes on counting.
_GID: Final = "gradscope series"


@contextmanager
def context() -> Generator[None]:
    """The settings of this package, for what is drawn inside the block."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        yield


def axes(ax: Axes | None, width_in: float, height_in: float) -> Axes:
    """The caller's axes, or those of a new figure that makes room for a legend beside them."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    _, created = plt.subplots(figsize=(width_in, height_in), layout="constrained")
    return created


def look(index: int) -> tuple[Any, str, Any]:
    """Colour, marker and line style of the series with that number."""
    import seaborn as sns

    colour = sns.color_palette("colorblind")[_COLOURS[index % len(_COLOURS)]]
    return colour, _MARKERS[index % len(_MARKERS)], _LINES[index % len(_LINES)]


@dataclass(slots=True)
class Marks:
    """What was drawn besides the lines, and so needs a word in the legend."""

    band: set[str] = field(default_factory=set[str])
    zero: bool = False
    broken: bool = False
    single: bool = False
    thin: bool = False
    branch: bool = False


def summary(y: Floats, *, log: bool, band: Band) -> tuple[Floats, Floats, Floats]:
    """Centre, lower and upper edge over replicates. [R, P] → three [P].

    The centre is the mean (of ln y where ``log``), the edges are the full range or the 95 % interval
    of Student's t for the mean. NaN unless every replicate has a finite (and positive) value: a mean
    over those that happen to be left would be biased.
    """
    from gradscope.analysis import interval

    usable = np.all(np.isfinite(y) & ((y > 0) | (not log)), axis=0)
    z = np.where(usable, y, 1.0)
    z = np.log(z) if log else z
    if band == "range":
        low, high = z.min(0), z.max(0)
    else:
        ends = [interval(column) for column in z.T]
        low = np.asarray([e.low for e in ends])
        high = np.asarray([e.high for e in ends])
    found = [np.exp(v) if log else v for v in (z.mean(0), low, high)]
    centre, low, high = (np.where(usable, v, np.nan) for v in found)
    return centre, low, high


def series(
    ax: Axes,
    x: Floats,
    y: Floats,
    marks: Marks,
    *,
    label: str,
    log: bool,
    band: Band = "range",
    present: Mask | None = None,
    markers: bool = True,
    of: str = "replicates",
    number: int | None = None,
) -> None:
    """Draw one series: the mean over replicates, its band, and marks for all that has no place on it.

    Args:
        ax: the axes.
        x: [P].
        y: [R, P].
        marks: is told what was drawn.
        label: the series' name.
        log: whether y is on a logarithmic axis (then means are of ln y).
        band: full range over replicates, or 95 % interval of the mean.
        present: [R, P], where a value was measured; elsewhere there is a gap. None: everywhere.
        markers: whether points carry markers.
        of: what the replicates are, for the legend.
        number: which colour, marker and line style; None: the next on these axes.
    """
    present = np.ones(y.shape, dtype=np.bool_) if present is None else present
    y = np.where(present, y, np.nan)
    index = sum(line.get_gid() == _GID for line in ax.lines) if number is None else number
    color, marker, linestyle = look(index)
    marker = marker if markers else "none"
    centre, low, high = summary(y, log=log, band=band)
    every = max(1, -(-len(x) // _MAX_MARKERS))
    ax.plot(
        x,
        centre,
        color=color,
        marker=marker,
        linestyle=linestyle,
        markevery=(index % every, every),
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
        gid=_GID,
        zorder=3,
    )
    alone = _alone(np.isfinite(centre))
    if alone.any():
        # Between two gaps there is no line, and the marker may be one of those that are skipped.
        ax.plot(
            x[alone], centre[alone], linestyle="none", marker=marker, color=color, markersize=4, zorder=3
        )
    if len(y) > 1:
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=1)
        marks.band.add(f"{len(y)} {of}")
    with np.errstate(invalid="ignore"):
        lone = np.isfinite(y) & ~np.isfinite(centre) & ((y > 0) | (not log))
    if lone.any() and markers:
        marks.single = True
        at = np.broadcast_to(x, y.shape)[lone]
        ax.plot(at, y[lone], linestyle="none", marker=".", markersize=3, color=color, alpha=0.8, zorder=2)
    elif lone.any():
        marks.single = marks.thin = True
        for row, there in zip(y, lone, strict=True):
            ax.plot(x, np.where(there, row, np.nan), linestyle="-", linewidth=0.7, color=color, zorder=2)
    across = ax.get_xaxis_transform()
    zero = np.any(present & (y == 0), axis=0)
    if log and zero.any():
        marks.zero = True
        # In axes coordinates, and one row per series: zero has no place on a logarithmic axis.
        level = np.full(int(zero.sum()), 0.018 + 0.03 * (index % 6))
        ax.plot(
            x[zero],
            level,
            linestyle="none",
            marker=marker if markers else "v",
            color=color,
            markerfacecolor="white",
            transform=across,
            clip_on=False,
            zorder=4,
        )
    broken = np.any(present & ~np.isfinite(y), axis=0)
    if broken.any():
        marks.broken = True
        if not markers:  # a curve: only where it breaks off
            broken = np.diff(np.concatenate([[0], broken.astype(np.int8)])) == 1
        level = np.full(int(broken.sum()), 0.985 - 0.03 * (index % 6))
        ax.plot(x[broken], level, linestyle="none", marker="x", color=color, transform=across, zorder=4)


def _alone(finite: Mask) -> Mask:
    padded = np.concatenate([[False], finite, [False]])
    return finite & ~padded[:-2] & ~padded[2:]


def legend(
    ax: Axes, marks: Marks, *, names: bool, band: Band = "range", also: Sequence[Artist] = ()
) -> None:
    """The legend, right of the data: the series, what bands and marks mean, and ``also``."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = []
    if names:
        handles.extend(line for line in ax.lines if line.get_gid() == _GID)
    grey: dict[str, Any] = {"color": "0.35", "linestyle": "none"}
    if marks.band:
        what = "range over" if band == "range" else "95 % interval of the mean,\n"
        label = f"{what} {_either(sorted(marks.band))}".replace("\n ", "\n")
        handles.append(Patch(color="0.35", alpha=0.3, linewidth=0, label=label))
    if marks.branch:
        handles.append(Line2D([], [], marker=".", label="branch outputs", **grey))
    if marks.single:
        label = "single replicates\n(others have no value)"
        dots: dict[str, Any] = {**grey, "marker": ".", "markersize": 3}
        thin: dict[str, Any] = {**grey, "linestyle": "-", "linewidth": 0.7}
        handles.append(Line2D([], [], label=label, **(thin if marks.thin else dots)))
    if marks.zero:
        label = "on the floor: exactly 0\n(underflow, or by construction)"
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", label=label, **grey))
    if marks.broken:
        handles.append(Line2D([], [], marker="x", label="at the top: not finite", **grey))
    handles.extend(also)
    if handles:
        ax.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            borderaxespad=0.0,
            frameon=False,
            handlelength=2.8,
        )


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def finish(ax: Axes, *, log: bool) -> None:
    """Grid, and a logarithmic y axis of at least one decade, so that what is flat looks flat."""
    ax.grid(visible=True, which="major", color="0.88", linewidth=0.6)
    ax.set_axisbelow(True)
    if not log:
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 10 * low and ax.get_autoscaley_on():
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
        ax.set_ylim(low, high, auto=None)  # a later series may still widen it
    log_ticks(ax.yaxis, low, high)


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks that read well over a tenth of a decade or over two hundred."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    decades = math.log10(high / low)
    if decades < 2:
        coarse, fine = (1.0, 2.0, 5.0), (1.0, 2.0, 3.0, 5.0, 7.0)
        finest = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
        steps = finest if decades < 0.7 else fine if decades < 1.5 else coarse
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(NullFormatter())
    elif decades > 8:
        stride = next((s for s in (2, 5, 10, 20, 50) if decades / s <= 8), 100)
        axis.set_major_locator(LogLocator(base=10.0**stride))
        axis.set_minor_locator(NullLocator())


def integer_ticks(axis: Axis, count: int = 9) -> None:
    """Ticks at whole numbers only: there is no block one half and no step one half."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=count, integer=True, min_n_ticks=1))


def _plain(x: float, _: int) -> str:
    if 1e-3 <= x < 1e4:
        return f"{x:g}"
    exponent = math.floor(math.log10(x) + 1e-9)
    factor = x / 10.0**exponent
    power = f"10^{{{exponent}}}"
    return f"${power}$" if abs(factor - 1) < 1e-6 else f"${factor:.3g}\\times {power}$"


def axis_label(name: str, unit: str, *, width: int = 34) -> str:
    """``Name [unit]``, broken into lines that fit beside a small plot."""
    return "\n".join(textwrap.wrap(f"{name[:1].upper()}{name[1:]} [{unit}]", width))
