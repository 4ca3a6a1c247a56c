"""Massive activations: single elements far above all others."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import View

__all__ = ["massive_activations"]


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
