"""Plots of a Record (``gradscope.plot``): every function takes data and an ``ax``, and returns it.

Nothing is ever shown, saved or set globally. What is exactly 0 stands as a hollow mark on the floor
of a logarithmic axis, what is not finite as a cross at its top, and what is absent is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis import Profile, find_quantity, profile
from gradscope.errors import QuantityError
from gradscope.record import Record
from gradscope.show import style
from gradscope.show.decay import decay
from gradscope.show.heatmap import heatmap
from gradscope.show.paths import contributions, counterfactual, path_lengths
from gradscope.show.style import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "against_depth",
    "contributions",
    "counterfactual",
    "decay",
    "depth",
    "heatmap",
    "loss_curves",
    "path_lengths",
    "ratio_against_depth",
]

Floats = npt.NDArray[np.float64]

#: The quantity of the branches that belongs on the same axis as one of the stream.
_BRANCHES: Final = {"grad_l2": "branch_grad_l2", "act_var": "branch_act_var"}
_KINDS: Final = {"initialisation": "initialisations", "batch": "batches", "run": "runs"}
_INPUT_TO_LOSS: Final = r"input $\leftarrow$ depth $l$ [blocks] $\rightarrow$ loss"


def depth(
    records: Record | Sequence[Record] | Mapping[str, Record],
    quantity: str = "grad_l2",
    *,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
    step: int | None = None,
    normalize: bool | None = None,
    trunk: str | None = None,
    band: Band = "range",
    branches: bool = False,
    legend: bool = True,
) -> Axes:
    """A quantity against depth, one line per Record.

    The line is the mean over replicates (of ln y for logarithmic quantities), drawn where all of
    them have a value; the legend says what the band is.

    Args:
        records: one Record, several, or a mapping label → Record.
        quantity: a name in `gradscope.analysis.QUANTITIES`.
        ax: axes to draw on; None makes a new figure.
        labels: one per Record, where no mapping is given.
        step: the step's number; None: for each Record the last that has the quantity.
        normalize: divide each profile by its value at the last layer. None: exactly where levels
            cannot be compared, that is for gradients of several Records, or over several batches,
            whose loss denominator is unknown.
        trunk: the trunk's name, where a Record has several.
        band: ``range`` over replicates, or 95 % ``interval`` of the mean.
        branches: also mark the branch outputs (for ``grad_l2`` and ``act_var``).
        legend: whether to draw the legend (several panels can share one).

    Returns:
        The axes.

    Raises:
        QuantityError: a Record does not give the quantity, or ``normalize=False`` would compare
            levels that are known only up to a factor.
    """
    named = _named(records, labels)
    asked = find_quantity(quantity)
    if branches and quantity not in _BRANCHES:
        raise QuantityError(f"branches=True goes with {' or '.join(_BRANCHES)}, not with {quantity!r}.")
    profiles = {label: profile(r, quantity, trunk=trunk, step=step) for label, r in named.items()}
    relative = [label for label, p in profiles.items() if p.unit == "relative"]
    incomparable = bool(relative) and (
        len(profiles) > 1 or any(p.kind == "batch" and len(p.value) > 1 for p in profiles.values())
    )
    if incomparable and normalize is False:
        raise QuantityError(
            f"the levels of {quantity!r} cannot be compared: the loss's denominator is unknown for "
            f"{', '.join(map(repr, relative))}. Set loss_denominator= in gradscope.measure or "
            "scope.step, or leave normalize=None to draw each profile relative to its last layer."
        )
    if normalize and not asked.log:
        raise QuantityError(
            f"normalize=True needs a positive quantity; {quantity!r} may be 0 or negative."
        )
    normalized = incomparable if normalize is None else normalize
    marks = style.Marks()
    with style.context():
        ax = style.axes(ax, 6.8, 3.4)
        for label, p in profiles.items():
            divisor = _last_level(p) if normalized else np.ones((len(p.value), 1))
            style.series(
                ax,
                p.depth,
                p.value / divisor,
                marks,
                label=label if p.ok.any() else f"{label} (absent: {p.status[0, -1]})",
                log=asked.log,
                band=band,
                present=p.ok,
                of=_KINDS.get(p.kind, "replicates"),
            )
            if branches:
                _mark_branches(ax, named[label], _BRANCHES[quantity], p, divisor, marks)
        ax.set_xlabel(_INPUT_TO_LOSS)
        unit = next(iter(profiles.values())).unit
        name = f"{asked.label}, relative to the last layer" if normalized else asked.label
        ax.set_ylabel(style.axis_label(name, "1" if normalized else unit))
        style.integer_ticks(ax.xaxis)
        style.finish(ax, log=asked.log)
        if legend:
            names = len(profiles) > 1 or _is_labelled(records, labels)
            style.legend(ax, marks, names=names, band=band)
    return ax


def against_depth(
    points: Mapping[str, tuple[Sequence[float] | Floats, npt.ArrayLike]],
    *,
    label: str,
    log: bool = False,
    ax: Axes | None = None,
    band: Band = "range",
    of: str = "seeds",
    legend: bool = True,
) -> Axes:
    """One number per model against the model's depth L, one line per family of models.

    Args:
        points: label → (depths [n], values [S, n]), S replicates; NaN is drawn as not finite.
        label: the y axis, as ``name [unit]``.
        log: logarithmic y axis; then the line is the mean of ln y, and exact zeros are marked.
        ax: axes to draw on; None makes a new figure.
        band: ``range`` over replicates, or 95 % ``interval`` of the mean.
        of: what the replicates are, for the legend.
        legend: whether to draw the legend (several panels can share one).

    Returns:
        The axes; x is logarithmic to base 2 where the depths span a factor of 4 or more.
    """
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        marks = _draw_points(ax, points, label, log=log, band=band, of=of)
        if legend:
            style.legend(ax, marks, names=True, band=band)
    return ax


def ratio_against_depth(
    points: Mapping[str, tuple[Sequence[float] | Floats, npt.ArrayLike]],
    *,
    ax: Axes | None = None,
    threshold_nats: float | None = 3.0,
    band: Band = "range",
    of: str = "seeds",
    legend: bool = True,
) -> Axes:
    """First-to-last gradient ratio against the number of blocks.

    Args:
        points: label → (depths [n], ratios [S, n]) with one ratio g_first/g_last per replicate.
        ax: axes to draw on; None makes a new figure.
        threshold_nats: half width of the grey band around 1, inside which a gradient counts as
            preserved: 3 nats from the 6ξ rule (Schoenholz et al. 2017, arXiv:1611.01232). None: no band.
        band: ``range`` over replicates, or 95 % ``interval`` of the mean of ln.
        of: what the replicates are, for the legend.
        legend: whether to draw the legend (several panels can share one).

    Returns:
        The axes.
    """
    label = "First-to-last gradient ratio\n$g_\\mathrm{first}/g_\\mathrm{last}$ [1]"
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        ax.axhline(1.0, color="0.45", linewidth=0.8, zorder=0)
        span = None
        if threshold_nats is not None:
            ends = math.exp(-threshold_nats), math.exp(threshold_nats)
            span = ax.axhspan(*ends, color="0.92", linewidth=0, zorder=-1)
            span.set_label(f"within {threshold_nats:g} nats of 1")
        marks = _draw_points(ax, points, label, log=True, band=band, of=of)
        if legend:
            style.legend(ax, marks, names=True, band=band, also=[span] if span else [])
    return ax


def loss_curves(
    curves: Mapping[str, tuple[Sequence[float] | Floats, npt.ArrayLike]],
    *,
    ax: Axes | None = None,
    unit: str = "nats per token",
    window: int = 1,
    band: Band = "range",
    of: str = "seeds",
    looks: Sequence[int] | None = None,
    legend: bool = True,
) -> Axes:
    """Loss against step, one line per model.

    Args:
        curves: label → (steps [n], losses [S, n]) for S replicates; a loss that is NaN or infinite
            breaks the line off with a cross.
        ax: axes to draw on; None makes a new figure.
        unit: unit of the loss.
        window: length in recorded steps of a trailing running mean, stated on the axis; 1: none.
        band: ``range`` over replicates, or 95 % ``interval`` of the mean.
        of: what the replicates are, for the legend.
        looks: number of each model's colour, marker and line style, so that a model looks the same in
            several pictures; None: the next ones on these axes.
        legend: whether to draw the legend (several panels can share one).

    Returns:
        The axes.
    """
    if window < 1:
        raise ValueError(f"window is a number of steps from 1 on; got {window}")
    marks = style.Marks()
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        numbers = [None] * len(curves) if looks is None else looks
        for number, (name, (x, y)) in zip(numbers, curves.items(), strict=True):
            at, values = _points(name, x, y)
            values, few = _trailing_mean(values, window), len(at) <= 30
            style.series(
                ax,
                at,
                values,
                marks,
                label=name,
                log=False,
                band=band,
                markers=few,
                of=of,
                number=number,
            )
        ax.set_xlabel("step [optimizer steps]")
        mean = f", mean of {window} recorded steps" if window > 1 else ""
        ax.set_ylabel(style.axis_label(f"loss{mean}", unit))
        style.finish(ax, log=False)
        if legend:
            style.legend(ax, marks, names=True, band=band)
    return ax


# -- parts ---------------------------------------------------------------------------------


def _named(
    records: Record | Sequence[Record] | Mapping[str, Record], labels: Sequence[str] | None
) -> dict[str, Record]:
    if isinstance(records, Mapping):
        if labels is not None:
            raise ValueError("labels= goes with a list of Records; a mapping already names them")
        return dict(records)
    listed = [records] if isinstance(records, Record) else list(records)
    if not listed:
        raise ValueError("no Record to draw")
    if labels is None:
        words = [str(r.header.get("model", "model")) for r in listed]
        labels = [w if words.count(w) == 1 else f"{w} ({i})" for i, w in enumerate(words, start=1)]
    if len(labels) != len(listed) or len(set(labels)) != len(listed):
        raise ValueError(f"{len(listed)} Records need as many different labels; got {list(labels)}")
    return dict(zip(labels, listed, strict=True))


def _is_labelled(
    records: Record | Sequence[Record] | Mapping[str, Record], labels: Sequence[str] | None
) -> bool:
    return labels is not None or isinstance(records, Mapping)


def _last_level(p: Profile) -> Floats:
    """[R, 1], each replicate's value at the last depth where all have a positive one."""
    with np.errstate(invalid="ignore"):
        usable = np.flatnonzero((p.ok & np.isfinite(p.value) & (p.value > 0)).all(0))
    if not len(usable):
        if not p.ok.any():
            return np.ones((len(p.value), 1))
        raise QuantityError(
            f"{p.quantity} of trunk {p.trunk!r} has no depth where every replicate is positive and "
            "finite, so its profile cannot be drawn relative to the last layer."
        )
    if usable[-1] != len(p.depth) - 1:
        raise QuantityError(
            f"{p.quantity} of trunk {p.trunk!r} is absent, 0 or not finite at the last layer (depth "
            f"{p.depth[-1]:g}), so its profile cannot be drawn relative to that. Set loss_denominator= "
            "to draw levels, or choose another step=."
        )
    return p.value[:, usable[-1]][:, None]


def _mark_branches(
    ax: Axes, record: Record, quantity: str, p: Profile, divisor: Floats, marks: style.Marks
) -> None:
    found = profile(record, quantity, trunk=p.trunk, step=int(p.steps[0]))
    color = ax.lines[-1].get_color()
    centre, _, _ = style.summary(
        np.where(found.ok, found.value, np.nan) / divisor, log=True, band="range"
    )
    marks.branch = True
    ax.plot(found.depth, centre, linestyle="none", marker=".", markersize=3.5, color=color, alpha=0.75)


def _draw_points(
    ax: Axes,
    points: Mapping[str, tuple[Sequence[float] | Floats, npt.ArrayLike]],
    label: str,
    *,
    log: bool,
    band: Band,
    of: str,
) -> style.Marks:
    marks = style.Marks()
    depths: set[float] = set()
    for name, (x, y) in points.items():
        at, values = _points(name, x, y)
        depths.update(at.tolist())
        style.series(ax, at, values, marks, label=name, log=log, band=band, of=of)
    ax.set_xlabel("number of blocks $L$ [blocks]")
    ax.set_ylabel(label)
    if depths:
        _depth_ticks(ax, sorted(depths))
    style.finish(ax, log=log)
    return marks


def _points(name: str, x: Sequence[float] | Floats, y: npt.ArrayLike) -> tuple[Floats, Floats]:
    at = np.asarray(x, dtype=np.float64)
    values = np.atleast_2d(np.asarray(y, dtype=np.float64))
    if values.ndim != 2 or values.shape[1:] != at.shape:
        raise ValueError(
            f"{name!r}: values of shape {values.shape} at {len(at)} points; [S, n] is needed, one row "
            "per replicate"
        )
    return at, values


def _trailing_mean(y: Floats, window: int) -> Floats:
    """Mean of the last ``window`` values (fewer at the start); NaN in, NaN out. [S, n] → [S, n]."""
    return np.stack([y[:, max(0, i - window + 1) : i + 1].mean(1) for i in range(y.shape[1])], axis=1)


def _depth_ticks(ax: Axes, depths: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    if depths[0] > 0 and depths[-1] / depths[0] >= 4:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
    if len(depths) <= 10:
        ax.set_xticks(depths, [f"{d:g}" for d in depths])
