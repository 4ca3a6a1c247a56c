"""Rules on the size of activations: at the bounds of their function, or far above all others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import View, spans

__all__ = ["massive_activations", "saturation"]

#: Class names of bounded activations, by the largest slope of the function: tanh 1, sigmoid ¼.
_BOUNDED: Final = {"Tanh": 1.0, "Softsign": 1.0, "Hardtanh": 1.0, "Sigmoid": 0.25, "Hardsigmoid": 0.25}
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
    """Mean slope of a tanh or sigmoid, from its outputs, at most .1 of the largest.

    With y = tanh(x) the mean slope is E[1 − y²] = 1 − l2²/count, exactly; with y = σ(x) it is
    E[y(1 − y)] = mean − l2²/count, of ¼ at most. Judged are modules of these classes, and any other
    output whose largest absolute value is in [.99, 1], which is then taken for a tanh's.
    """
    l2, count, absmax = (view.grid("activation", s) for s in ("l2", "count", "absmax"))
    mean = view.grid("activation", "mean")
    if not (l2.sites == count.sites == absmax.sites):
        yield limits.not_checked("l2, count and absmax are not of the same outputs")
        return
    ok = l2.ok & count.ok & absmax.ok & np.isfinite(l2.value) & (count.value > 0)
    with np.errstate(all="ignore"):
        square = np.where(ok, (l2.value / np.sqrt(count.value)) ** 2, np.nan)
    judged = False
    found: list[tuple[int, int, int, float]] = []  # first step, column, last step, slope
    for column, site in enumerate(l2.sites):
        largest = _BOUNDED.get(site.type, 1.0)
        sigmoid = largest < 1
        if sigmoid and mean.sites != l2.sites:
            yield limits.not_checked(f"{site.name} is a sigmoid, whose slope needs the mean")
            continue
        slope = ((mean.value[:, column] if sigmoid else 1.0) - square[:, column]) / largest
        for rows in view.runs:
            present = rows[ok[rows, column]]
            high = absmax.value[present, column]
            bounded = bool(len(high)) and bool(((high >= _AT_BOUND) & (high <= 1 + 1e-6)).all())
            if site.type not in _BOUNDED and not bounded:
                continue
            judged = True
            values = slope[present[-int(limits["steps"]) :]]
            if not len(values) or not values.max() <= limits["slope"]:
                continue
            above = np.flatnonzero(slope[present] > limits["slope"])
            since = int(present[int(above[-1]) + 1 if len(above) else 0])
            last = view.steps[int(present[-1])].step
            found.append((view.steps[since].step, column, last, float(np.median(values))))
    if not judged:
        yield limits.not_checked(
            'no tanh or sigmoid among the watched layers; layers="**" watches every module'
        )
    if not found:
        return
    found.sort()
    step, column, _, value = found[0]
    sites = [l2.sites[i] for _, i, _, _ in found]
    yield limits.finding(
        "slope",
        value=value,
        sites=sites,
        steps=(step, max(last for _, _, last, _ in found)),
        message=(
            f"The mean slope of {l2.sites[column].name} is {value:.2g} of the largest possible in the "
            f"last recorded steps (threshold {limits['slope']:g}), since step {step}: nearly all of its "
            "outputs are at the bounds. Outputs concerned: "
            f"{spans(list(dict.fromkeys(site.name for site in sites)))}."
        ),
        cause="Inputs far outside the linear range: weights too large, no norm before it, or a step that "
        "was too large.",
        remedy="Smaller initial weights (Xavier for tanh), a norm before the activation, a smaller "
        "learning rate, or an activation without bounds.",
    )


@register
@rule(
    name="massive_activations",
    title="massive activations",
    severity="note",
    citation="Sun et al. 2024, Massive activations in large language models, arXiv:2402.17762",
    thresholds={
        "absmax": Threshold(
            value=100.0, unit="activation", source="Sun et al. 2024: magnitude above 100"
        ),
        "energy": Threshold(
            value=0.01,
            unit="1",
            source="one element with 1 % of all energy. Sun et al. ask for 1000 times the median, which "
            "a Record does not hold; the largest of n Gaussian elements has 2 ln(n)/n of the energy",
        ),
        "elements": Threshold(
            value=10_000, unit="elements", source="with fewer, chance reaches 1 %: 2 ln(1e4)/1e4 = .2 %"
        ),
    },
    needs=[("activation", "l2"), ("activation", "absmax"), ("activation", "count")],
)
def massive_activations(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """A single element above 100 that holds at least 1 % of the energy of the whole output.

    The share is (max/rms)²/count. max/rms is at most √count, where one element is all there is, and
    about √(2 ln count) for a Gaussian, so that its share of the energy, and not max/rms, has one
    threshold for all sizes. A note: large language models have them and work; they spoil quantisation
    and low precision.
    """
    l2, absmax, count = (view.grid("activation", s) for s in ("l2", "absmax", "count"))
    if not (l2.sites == count.sites == absmax.sites):
        yield limits.not_checked("l2, count and absmax are not of the same outputs")
        return
    ok = l2.ok & absmax.ok & count.ok & np.isfinite(l2.value)
    large = count.value >= limits["elements"]
    if not (ok & large).any():
        yield limits.not_checked(f"no watched output has {limits['elements']:g} elements or more")
        return
    with np.errstate(all="ignore"):
        share = (absmax.value / l2.value) ** 2
        hit = ok & large & (absmax.value > limits["absmax"]) & (share >= limits["energy"])
    for rows in view.runs:
        seen = rows[hit[rows].any(1)]
        if not len(seen):
            continue
        row = int(seen[-1])
        columns = np.flatnonzero(hit[row])
        first = int(columns[0])
        ratio = math.sqrt(float(share[row, first] * count.value[row, first]))
        yield limits.finding(
            "energy",
            value=float(share[row, first]),
            sites=[l2.sites[i] for i in columns],
            steps=view.span(seen),
            message=(
                f"At step {view.steps[row].step} one element of {l2.sites[first].name} is "
                f"{absmax.value[row, first]:.3g} (threshold {limits['absmax']:g}), {ratio:.3g} times the "
                f"rms (at most √count = {math.sqrt(float(count.value[row, first])):.3g}), and holds "
                f"{share[row, first]:.1%} of the energy (threshold {limits['energy']:.0%}); the first of "
                f"{len(columns)} outputs."
            ),
            cause="A few fixed features act as a bias, often at the first token or at delimiters.",
            remedy="Nothing for training in float32 or bfloat16. For float16 or quantisation: keep these "
            "layers in higher precision.",
        )
