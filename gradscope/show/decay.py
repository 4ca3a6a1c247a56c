"""A decay fit over the points that it was fitted to (``gradscope.plot.decay``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from gradscope.analysis import DecayFit, find_quantity
from gradscope.errors import QuantityError
from gradscope.show import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["decay"]

_TOWARDS: Final = r"input $\leftarrow$ depth $l$ [blocks] $\rightarrow$ loss"
_LETTERS: Final = {"kappa": "κ", "kappa_1": "κ₁", "kappa_2": "κ₂", "beta": "β"}


def decay(
    fits: DecayFit | Mapping[str, DecayFit], *, ax: Axes | None = None, legend: bool = True
) -> Axes:
    """Every replicate's profile as points, and the fitted family as a line.

    Profiles stand relative to where their pass starts, which is 1: the loss end for a gradient, the
    input end for an activation (as amplitude, the square root of an energy).

    Args:
        fits: one fit, or label → fit; all of them gradients, or all activations.
        ax: axes to draw on; None makes a new figure.
        legend: whether to draw the legend.

    Returns:
        The axes; y is logarithmic.

    Raises:
        QuantityError: a fit that has no numbers, with its reason; or gradients and activations mixed.
    """
    named = {"": fits} if isinstance(fits, DecayFit) else dict(fits)
    if not named:
        raise ValueError("no fit to draw")
    for label, fit in named.items():
        if not fit.ok:
            raise QuantityError(f"{label or fit.quantity} has no fit to draw: {fit.status}")
    if len({fit.forward for fit in named.values()}) > 1:
        raise QuantityError("gradients and activations start at opposite ends: draw them apart")
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        for index, (label, fit) in enumerate(named.items()):
            color, marker, _ = style.look(index)
            start = fit.y[:, :1]
            for row in np.exp(fit.y - start):
                ax.plot(
                    fit.depth,
                    row,
                    linestyle="none",
                    marker=marker,
                    markersize=2.5,
                    color=color,
                    alpha=0.5,
                )
            rates = ", ".join(
                f"{_LETTERS.get(name, name)} = {found.estimate:.3g}"
                for name, found in fit.parameters.items()
            )
            words = f"{fit.family}{f' ({rates})' if rates else ''}"
            ax.plot(
                fit.depth,
                np.exp(fit.fitted - float(np.mean(start))),
                color=color,
                linewidth=1.4,
                label=f"{label}: {words}" if label else words,
            )
        first = next(iter(named.values()))
        ax.set_xlabel(_TOWARDS)
        end = "input end" if first.forward else "loss end"
        what = find_quantity(first.quantity).label
        ax.set_ylabel(style.axis_label(f"{what} (amplitude), relative to the {end}", "1"))
        style.integer_ticks(ax.xaxis)
        style.finish(ax, log=True)
        if legend:
            ax.legend()
    return ax
