"""Plots of what experiments found about a model's paths: cuts, path lengths, contributions.

They take the results by their attributes: the experiments need torch, and drawing does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from gradscope.show import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["contributions", "counterfactual", "path_lengths"]

Floats = npt.NDArray[np.float64]


class _Cuts(Protocol):
    @property
    def gradient_l2(self) -> Floats: ...
    @property
    def without_skips_l2(self) -> Floats: ...


class _Spectrum(Protocol):
    @property
    def branches(self) -> int: ...
    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    @property
    def norm(self) -> Floats: ...


class _Shares(Protocol):
    @property
    def branches(self) -> Sequence[Any]: ...
    @property
    def value(self) -> Floats: ...


def counterfactual(result: _Cuts, *, ax: Axes | None = None) -> Axes:
    """The gradient over depth, as it is and with the backward pass through all skips cut.

    Args:
        result: what `gradscope.counterfactual` returned.
        ax: axes to draw on; None makes a new figure.

    Returns:
        The axes; y is logarithmic, and what is exactly 0 stands on its floor.
    """
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        marks = style.Marks()
        depth = np.arange(len(result.gradient_l2), dtype=np.float64)
        for label, values in (
            ("with skips", result.gradient_l2),
            ("the same weights, skips cut", result.without_skips_l2),
        ):
            style.series(ax, depth, values[None, :], marks, label=label, log=True)
        ax.set_xlabel(r"input $\leftarrow$ depth $l$ [blocks] $\rightarrow$ loss")
        ax.set_ylabel(style.axis_label(r"gradient norm $\Vert\delta_l\Vert$", "loss / activation"))
        style.integer_ticks(ax.xaxis)
        style.finish(ax, log=True)
        style.legend(ax, marks, names=True)
    return ax


def path_lengths(spectrum: _Spectrum, *, ax: Axes | None = None) -> Axes:
    """The share of the path energy at every path length, beside the share of all paths.

    Args:
        spectrum: what `gradscope.path_spectrum` returned.
        ax: axes to draw on; None makes a new figure.
    """
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        marks = style.Marks()
        n, k = spectrum.branches, spectrum.lengths.astype(np.float64)
        largest = float(spectrum.norm.max())
        energy = np.square(spectrum.norm / largest) if largest > 0 else spectrum.norm
        whole = float(energy.sum())
        share = energy / whole if whole > 0 else np.full_like(energy, math.nan)
        paths = np.array([math.comb(n, int(length)) / 2**n for length in spectrum.lengths])
        what = "of the path energy" if len(k) == n + 1 else "of the energy of the lengths shown"
        style.series(ax, k, share[None, :], marks, label=what, log=False)
        style.series(ax, k, paths[None, :], marks, label="of all paths", log=False)
        ax.set_xlabel(f"path length $k$ [branches of {n}]")
        ax.set_ylabel(style.axis_label("share", "1"))
        style.integer_ticks(ax.xaxis)
        style.finish(ax, log=False)
        style.legend(ax, marks, names=True)
    return ax


def contributions(shares: _Shares, *, ax: Axes | None = None) -> Axes:
    """What each branch adds to effective depth, one bar per branch in forward order.

    Args:
        shares: ``effective_depth(..., branches=True).contributions``.
        ax: axes to draw on; None makes a new figure.
    """
    with style.context():
        ax = style.axes(ax, 6.4, 3.4)
        places = [branch.sublayer for branch in shares.branches]
        at = np.arange(len(places))
        for number, place in enumerate(sorted(set(places))):
            mine = np.array([p == place for p in places])
            color, _, _ = style.look(number)
            names = {b.name for b, p in zip(shares.branches, places, strict=True) if p == place}
            label = names.pop() if len(names) == 1 else f"sublayer {place}"
            ax.bar(at[mine], shares.value[mine], color=color, label=label)
        ax.axhline(0.0, color="black", linewidth=0.8)
        depths = [branch.depth for branch in shares.branches]
        firsts = [i for i, depth in enumerate(depths) if i == 0 or depth != depths[i - 1]]
        every = max(1, -(-len(firsts) // 12))
        ax.set_xticks(firsts[::every], [str(depths[i]) for i in firsts[::every]])
        ax.set_xlabel("block")
        ax.set_ylabel(style.axis_label("contribution to effective depth $e_i$", "branches"))
        ax.legend()
    return ax
