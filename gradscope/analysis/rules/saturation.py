"""Bounded activations whose outputs are at their bounds, where nothing passes backward.

The slope of tanh, sigmoid and softsign is a function of the output, so that the mean slope follows from
moments of the outputs, which a Record has. That of a hard clip is 0 or 1, and the share of outputs at its
bounds is in no moment: there the rule says that it could not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import Grid, Site, View, spans

__all__ = ["saturation"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Moments of outputs y: E y, E y², and κ = E y⁴/(E y²)²; NaN where not recorded."""

    mean: Floats
    square: Floats
    kurtosis: Floats

    @property
    def least_size(self) -> Floats:
        """A lower bound of E|y| for |y| ≤ 1.

        E y², because |y| ≥ y²; and √(E y²/κ), by Hölder's inequality E y² ≤ (E|y|)^⅔ (E y⁴)^⅓.
        """
        with np.errstate(all="ignore"):
            return np.fmax(self.square, np.sqrt(self.square / self.kurtosis))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slope:
    """φ′ of one bounded activation by its output y.

    Attributes:
        formula: φ′ of y.
        largest: its largest value.
        mean: moments of y → E φ′, or an upper bound of it.
        exact: whether it is E φ′ itself.
    """

    formula: str
    largest: float
    mean: Callable[[_Moments], Floats]
    exact: bool = True


_TANH: Final = _Slope(formula="1 − y²", largest=1.0, mean=lambda y: 1 - y.square)

#: Class name of the activation → its slope.
_SLOPES: Final[Mapping[str, _Slope]] = {
    "Tanh": _TANH,
    "Sigmoid": _Slope(formula="y(1 − y)", largest=0.25, mean=lambda y: y.mean - y.square),
    "Softsign": _Slope(
        formula="(1 − |y|)²",
        largest=1.0,
        mean=lambda y: 1 - 2 * y.least_size + y.square,
        exact=False,
    ),
}
#: Class names of activations that have bounds, and no slope in the moments of their outputs.
_UNKNOWN: Final = ("Hardtanh", "ReLU6", "Hardsigmoid", "LogSigmoid")
#: A float32 tanh of 9 or more is exactly 1; a bounded output that has reached the bound is this near.
_AT_BOUND: Final = 0.99


@register
@rule(
    name="saturation",
    title="saturated activation",
    citation="Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward networks",
    thresholds={
        "slope": Threshold(
            value=0.1,
            unit="1",
            source="mean slope over the largest one; a gradient loses 10 dB in each such layer",
        ),
        "steps": Threshold(
            value=3, unit="steps", source="last recorded steps, or all if there are fewer"
        ),
    },
    needs=[("activation", "l2"), ("activation", "count"), ("activation", "absmax")],
    explained_by=("non_finite", "update_ratio", "spike"),
)
def saturation(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Mean slope of a bounded activation, from its outputs, at most .1 of the largest.

    With y = tanh(x) the mean slope is E[1 − y²]; with a sigmoid E[y(1 − y)], of ¼ at most; both exactly.
    With softsign, E(1 − |y|)² is at most 1 − 2·max(E y², √(E y²/κ)) + E y², κ the kurtosis. Of a hard
    clip (Hardtanh, ReLU6, Hardsigmoid) and of LogSigmoid the outputs' moments do not tell it. An output
    of another class with a gradient, whose largest absolute value is in [.99, 1], is taken for a tanh's,
    unless a module of these classes is watched inside it.
    """
    absmax, l2, count = (view.grid("activation", s) for s in ("absmax", "l2", "count"))
    if not (l2.sites == count.sites == absmax.sites):
        yield limits.not_checked("l2, count and absmax are not of the same outputs")
        return
    mean, kurtosis = (_at(view.grid("activation", s), l2.sites) for s in ("mean", "kurtosis"))
    passed = _at(view.grid("output_grad", "l2"), l2.sites)
    ok = l2.ok & count.ok & absmax.ok & np.isfinite(l2.value) & (count.value > 0)
    with np.errstate(all="ignore"):
        square = np.where(ok, (l2.value / np.sqrt(count.value)) ** 2, np.nan)
    judged = False
    found: list[tuple[int, int, int, float]] = []  # first step, column, last step, slope
    hidden = [site.name for site in l2.sites if site.type in _UNKNOWN]
    named = [site.layer for site in l2.sites if site.type in _UNKNOWN or site.type in _SLOPES]
    for column, site in enumerate(l2.sites):
        slope = _SLOPES.get(site.type, _TANH)
        moments = _Moments(mean.value[:, column], square[:, column], kurtosis.value[:, column])
        relative = slope.mean(moments) / slope.largest
        usable = ok[:, column] & ~np.isnan(relative)
        if not slope.exact and (usable & kurtosis.ok[:, column]).any():
            usable &= kurtosis.ok[:, column]  # the bound is loose without it
        for rows in view.runs:
            present = rows[usable[rows]]
            if not len(present) or site.type in _UNKNOWN:
                continue
            high = absmax.value[present, column]
            bounded = bool(((high >= _AT_BOUND) & (high <= 1 + 1e-6)).all())
            guessed = site.type not in _SLOPES
            if guessed and any(layer.startswith(f"{site.layer}.") for layer in named):
                continue
            if guessed and not (bounded and passed.ok[present, column].any()):
                continue
            judged = True
            values = relative[present[-int(limits["steps"]) :]]
            if not values.max() <= limits["slope"]:
                continue
            above = np.flatnonzero(relative[present] > limits["slope"])
            since = int(present[int(above[-1]) + 1 if len(above) else 0])
            last = view.steps[int(present[-1])].step
            found.append((view.steps[since].step, column, last, float(np.median(values))))
    if hidden:
        yield limits.not_checked(
            f"{spans(list(dict.fromkeys(hidden)))}: the share of outputs at the bounds is not recorded, "
            "and the slope is not a function of what is"
        )
    if not judged:
        yield limits.not_checked(
            "no tanh, sigmoid or softsign whose slope can be had among the watched layers; "
            'layers="**" watches every module'
        )
    if not found:
        return
    found.sort()
    step, column, _, value = found[0]
    first = l2.sites[column]
    slope = _SLOPES.get(first.type)
    sites = [l2.sites[i] for _, i, _, _ in found]
    yield limits.finding(
        "slope",
        value=value,
        sites=sites,
        steps=(step, max(last for _, _, last, _ in found)),
        message=(
            f"The mean slope of {first.name} is {'' if slope is None or slope.exact else 'at most '}"
            f"{value:.2g} of the largest possible in the last recorded steps (threshold "
            f"{limits['slope']:g}), since step {step}, by {(slope or _TANH).formula} of its outputs y"
            + ("" if slope else ", which are taken for a tanh's")
            + ": nearly all of them are at the bounds. Outputs concerned: "
            f"{spans(list(dict.fromkeys(site.name for site in sites)))}."
        ),
        cause="Inputs far outside the linear range: weights too large, no norm before it, or a step that "
        "was too large.",
        remedy="Smaller initial weights (Xavier for tanh), a norm before the activation, a smaller "
        "learning rate, or an activation without bounds.",
    )


def _at(grid: Grid, sites: tuple[Site, ...]) -> Grid:
    """The same at other sites; absent where it has none of them."""
    column = {site: i for i, site in enumerate(grid.sites)}
    shape = (len(grid.ok), len(sites))
    value, ok = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)
    for i, site in enumerate(sites):
        if site in column:
            value[:, i], ok[:, i] = grid.value[:, column[site]], grid.ok[:, column[site]]
    return Grid(sites, value, ok)
