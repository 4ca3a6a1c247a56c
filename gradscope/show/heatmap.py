"""Layer × step heat map of one quantity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis import History, find_quantity, history
from gradscope.errors import QuantityError
from gradscope.record import Record
from gradscope.show import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heatmap"]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: How cells without a colour look and what they mean; none of the faces is in the colour map.
_CELLS: Final[dict[str, dict[str, Any]]] = {
    "absent": {"facecolor": "0.87", "edgecolor": "0.6", "hatch": "////"},
    "exactly 0": {"facecolor": "white", "edgecolor": "0.2", "hatch": "...."},
    "not finite": {"facecolor": "#d55e00", "edgecolor": "white", "hatch": "xxxx"},
}


def heatmap(
    record: Record,
    quantity: str = "grad_l2",
    *,
    ax: Axes | None = None,
    trunk: str | None = None,
    replicate: int | None = None,
    normalize: bool | None = None,
    limits: tuple[float, float] | None = None,
    colorbar: bool = True,
) -> Axes:
    """Depth × step in colour.

    Each cell reaches half-way to its neighbours. Where steps are spaced so unevenly that most of the
    axis would be a few cells, every recorded step has the same width and the axis says so. Absent,
    exactly zero and non-finite cells have their own hatched faces.

    Args:
        record: the Record.
        quantity: a name in `gradscope.analysis.QUANTITIES`.
        ax: axes to draw on; None makes a new figure.
        trunk: the trunk's name, where the Record has several.
        replicate: which replicate; None: the mean over all of them (of ln y for logarithmic
            quantities), a cell being absent, zero or not finite where any of them is.
        normalize: divide each step by its value at the last layer. None: exactly where steps cannot
            be compared, that is for gradients whose loss denominator is unknown.
        limits: ends of the colour scale, to compare several heat maps; None: those of the data.
        colorbar: whether to add the colour bar.

    Returns:
        The axes.

    Raises:
        QuantityError: the Record does not give the quantity, it has no such replicate, or
            ``normalize=False`` would compare levels that are known only up to a factor per step.
    """
    asked = find_quantity(quantity)
    full = history(record, quantity, trunk=trunk)
    relative = full.unit == "relative"
    if relative and normalize is False:
        raise QuantityError(
            f"the levels of {quantity!r} cannot be compared between steps: the loss's denominator is "
            "unknown. Set loss_denominator= in gradscope.measure or scope.step, or leave normalize=None "
            "to draw each step relative to its last layer."
        )
    if normalize and not asked.log:
        raise QuantityError(
            f"normalize=True needs a positive quantity; {quantity!r} may be 0 or negative."
        )
    normalized = relative if normalize is None else normalize
    steps, value, kind, count = _grid(full, replicate, log=asked.log, normalized=normalized)
    from matplotlib.colors import LogNorm, Normalize

    with style.context():
        ax = style.axes(ax, 6.8, 3.2)
        x, ticks = _step_edges(steps)
        y = _edges(full.depth)
        shown = np.ma.masked_array(value, kind != "")
        low, high = limits if limits is not None else _limits(shown, log=asked.log)
        norm = LogNorm(low, high) if asked.log else Normalize(low, high)
        mesh = ax.pcolormesh(x, y, shown.T, norm=norm, cmap="cividis", rasterized=True, zorder=1)
        used = [name for name in _CELLS if (kind == name).any()]
        for name in used:
            _fill(ax, x, y, np.asarray(kind == name, dtype=np.bool_), _CELLS[name])
        ax.set_xlim(x[0], x[-1])
        ax.set_ylim(y[0], y[-1])
        style.integer_ticks(ax.yaxis, 7)
        if ticks is None:
            style.integer_ticks(ax.xaxis)
            ax.set_xlabel("step [optimizer steps]")
        else:
            ax.set_xticks(ticks, [str(steps[t]) for t in ticks])
            ax.set_xlabel("recorded step, not to scale [optimizer steps]")
        ax.set_ylabel("depth $l$ [blocks]")
        ax.spines[["top", "right"]].set_visible(True)
        if colorbar:
            bar = ax.figure.colorbar(
                mesh, ax=ax, pad=0.02, extend="neither" if limits is None else "both"
            )
            name = f"{asked.label}, relative to the last layer" if normalized else asked.label
            label = style.axis_label(name, "1" if normalized else full.unit)
            bar.set_label(label if count == 1 else f"{label}\nmean over {count} replicates")
            if asked.log:
                style.log_ticks(bar.ax.yaxis, low, high)
        if used:
            _legend(ax, used)
    return ax


def _grid(
    full: History, replicate: int | None, *, log: bool, normalized: bool
) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.object_], int]:
    """Steps [S], values [S, P], what each cell is ("" for a value), and the number of replicates."""
    known = sorted(set(full.replicates.tolist()))
    if replicate is not None and replicate not in known:
        raise QuantityError(f"no replicate {replicate} in this Record; it holds {known}.")
    wanted = known if replicate is None else [replicate]
    rows = np.isin(full.replicates, wanted)
    value, ok, numbers = full.value[rows], full.ok[rows], full.steps[rows]
    # A statistic that is recorded on every tenth step leaves the others out, not grey.
    due = ~np.asarray(full.status[rows] == "not sampled", dtype=np.bool_).all(1)
    due = due if due.any() else np.ones_like(due)
    value, ok, numbers = value[due], ok[due], numbers[due]
    if normalized:
        last = value[:, -1:]
        with np.errstate(all="ignore"):
            known_level = ok[:, -1:] & np.isfinite(last) & (last > 0)
            ok = ok & known_level
            value = np.where(known_level, value / last, np.nan)
    steps = np.unique(numbers)
    shape = (len(steps), value.shape[1])
    grid, kind = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    for i, step in enumerate(steps):
        v, there = value[numbers == step], ok[numbers == step]
        with np.errstate(all="ignore"):
            grid[i] = np.exp(np.log(v).mean(0)) if log else v.mean(0)
        kind[i, ~np.isfinite(v).all(0)] = "not finite"
        if log:
            kind[i, (v == 0).any(0)] = "exactly 0"
        kind[i, ~there.all(0)] = "absent"
    return steps, grid, kind, len(wanted)


def _edges(centres: npt.NDArray[Any]) -> Floats:
    """Cell edges half-way between the centres, the outer ones as far as the inner. [n] → [n + 1]."""
    c = np.asarray(centres, dtype=np.float64)
    if len(c) == 1:
        return np.asarray([c[0] - 0.5, c[0] + 0.5])
    middle = (c[:-1] + c[1:]) / 2
    return np.concatenate([[c[0] - (middle[0] - c[0])], middle, [c[-1] + (c[-1] - middle[-1])]])


def _step_edges(steps: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.int64] | None]:
    """Edges of the columns and, where they are not to scale, the columns that get a tick."""
    if len(steps) > 2:
        gaps = np.diff(steps)
        if np.median(gaps) * len(gaps) < 0.5 * (steps[-1] - steps[0]):
            ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).round().astype(np.int64))
            return np.arange(len(steps) + 1, dtype=np.float64) - 0.5, ticks
    return _edges(steps), None


def _limits(shown: np.ma.MaskedArray[Any, Any], *, log: bool) -> tuple[float, float]:
    values = np.asarray(shown.compressed(), dtype=np.float64)
    if not len(values):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if low == high:
        # A constant has no scale of its own: put it in the middle of one.
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return low, high


def _fill(ax: Axes, x: Floats, y: Floats, where: Mask, face: dict[str, Any]) -> None:
    """Hatched cells, one rectangle per run of neighbouring steps."""
    for row in range(where.shape[1]):
        padded = np.concatenate([[False], where[:, row], [False]]).astype(np.int8)
        starts, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
        runs = [(x[a], x[b] - x[a]) for a, b in zip(starts, ends, strict=True)]
        if runs:
            ax.broken_barh(runs, (y[row], y[row + 1] - y[row]), linewidth=0, zorder=2, **face)


def _legend(ax: Axes, used: list[str]) -> None:
    from matplotlib.patches import Patch

    words = {"exactly 0": "exactly 0 (underflow, or by construction)"}
    ax.legend(
        handles=[Patch(**_CELLS[name], linewidth=0, label=words.get(name, name)) for name in used],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(used),
        frameon=False,
        borderaxespad=0.3,
        handlelength=1.8,
        handleheight=1.2,
    )
