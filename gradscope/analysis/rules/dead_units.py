"""Units that are exactly zero for nearly every input, as after a dying ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import View, spans

__all__ = ["dead_units"]

#: Class names whose outputs are exactly zero where a unit is off.
_RELU_LIKE: Final = ("ReLU", "ReLU6", "Threshold", "Hardswish", "Hardshrink", "Softshrink", "SquaredReLU")
#: An unnamed output with this share of zeros ends in something like a ReLU (one half at He's
#: initialisation); dropout at the usual rates makes fewer.
_RELU_SHARE: Final = 0.25
#: Class names whose outputs are sparse by construction, in parts of their names.
_SPARSE: Final = (
    "Dropout",
    "DropPath",
    "Embedding",
    "Softmax",
    "Mask",
    "Router",
    "Gate",
    "Expert",
    "MoE",
)


@register
@rule(
    name="dead_units",
    title="most units are dead",
    citation="dying ReLU: Lu et al. 2019, arXiv:1903.06733",
    thresholds={
        "share": Threshold(
            value=0.9, unit="1", source="ReLU under He initialisation gives one half (arXiv:1502.01852)"
        ),
        "steps": Threshold(
            value=3, unit="steps", source="last recorded steps, or all if there are fewer"
        ),
    },
    needs=[("activation", "zeros"), ("activation", "count")],
    explained_by=("dead_layer", "non_finite", "update_ratio", "spike"),
)
def dead_units(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Share of exactly zero activations, zeros/count, at least .9 in the last three recorded steps.

    Left out: trunk inputs, dropout, embeddings, routers and the like, which are sparse by construction,
    and outputs that are zero everywhere, which `dead_layer` reports. The statistic does not tell a unit
    that is never active from units that are seldom active.
    """
    zeros, count = view.grid("activation", "zeros"), view.grid("activation", "count")
    if zeros.sites != count.sites:
        yield limits.not_checked("zeros and count are not of the same outputs")
        return
    ok = zeros.ok & count.ok & (count.value > 0)
    with np.errstate(all="ignore"):
        share = np.where(ok, zeros.value / count.value, np.nan)
    visible = [
        i
        for i, site in enumerate(zeros.sites)
        if site.type in _RELU_LIKE or (np.nan_to_num(share[:, i]) > _RELU_SHARE).any()
    ]
    if not visible:
        yield limits.not_checked(
            'no watched output has zeros, as ReLU\'s has; layers="**" watches every module'
        )
        return
    found: list[tuple[int, int, int, float]] = []  # first step, column, last step, share
    for rows in view.runs:
        for column in visible:
            site = zeros.sites[column]
            if site.type == "Stream" or any(word in site.type for word in _SPARSE):
                continue
            present = rows[ok[rows, column]][-int(limits["steps"]) :]
            values = share[present, column]
            if not len(values) or values.min() < limits["share"] or values.min() == 1:
                continue
            first = int(rows[_since(share[rows, column], limits["share"])])
            last = view.steps[int(present[-1])].step
            found.append((view.steps[first].step, column, last, float(np.median(values))))
    if not found:
        return
    found.sort()
    step, column, _, median = found[0]
    sites = [zeros.sites[i] for _, i, _, _ in found]
    yield limits.finding(
        "share",
        value=median,
        sites=sites,
        steps=(step, max(last for _, _, last, _ in found)),
        message=(
            f"{median:.1%} of the outputs of {zeros.sites[column].name} are exactly 0 in the last "
            f"recorded steps (threshold {limits['share']:.0%}), since step {step}. Outputs concerned: "
            f"{spans(list(dict.fromkeys(site.name for site in sites)))}."
        ),
        cause="Biases far below zero, a step that was too large, or inputs that are all of one sign or "
        "zero.",
        remedy="A smaller learning rate or a warm-up, He initialisation with zero biases, a norm before "
        "the activation, or a leaky activation. If the layer is sparse on purpose: "
        'thresholds={"dead_units": {"share": 1}}.',
    )


def _since(share: npt.NDArray[np.float64], threshold: float) -> int:
    """First index of the last stretch at or above the threshold, absent values taken as part of it."""
    below = np.flatnonzero(share < threshold)
    return int(below[-1]) + 1 if len(below) else 0
