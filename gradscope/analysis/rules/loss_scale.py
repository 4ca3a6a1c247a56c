"""Steps that a gradient scaler skips."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import View

__all__ = ["skipped_steps"]


@register
@rule(
    name="skipped_steps",
    title="the gradient scaler keeps skipping steps",
    citation="Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740",
    thresholds={
        "share": Threshold(
            value=0.1,
            unit="1",
            source="dynamic loss scaling skips one step in about 2000 once it has settled (PyTorch)",
        ),
        "settling": Threshold(
            value=20, unit="steps", source="from 2^16 down to 1 takes at most 16 halvings"
        ),
        "least": Threshold(value=3, unit="steps", source="fewer are chance"),
    },
)
def skipped_steps(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Share of recorded steps that the gradient scaler skipped, after its scale has settled.

    A scaler halves its factor at every overflow and skips that step; that settles within 16 steps. One
    that goes on skipping sees gradients that are not finite at any scale.
    """
    seen = [not math.isnan(scale) for scale in view.loss_scale.tolist()]
    if not any(seen) and not any("skipped step" in step.statuses for step in view.steps):
        yield limits.not_checked("no gradient scaler was seen, and no step that one had skipped")
        return
    longest = 0
    for rows in view.runs:
        later = [row for row in rows.tolist() if view.steps[row].step >= limits["settling"]]
        longest = max(longest, len(later))
        skipped = [row for row in later if "skipped step" in view.steps[row].statuses]
        share = len(skipped) / len(later) if later else 0.0
        if len(skipped) >= limits["least"] and share > limits["share"]:
            steps = view.span(skipped)
            yield limits.finding(
                "share",
                value=share,
                steps=steps,
                message=(
                    f"{len(skipped)} of {len(later)} recorded steps from step {limits['settling']:g} on "
                    f"were skipped by the gradient scaler, {share:.0%} (threshold "
                    f"{limits['share']:.0%}), the first at step {steps[0]}."
                ),
                cause="The gradients are not finite at any loss scale: the forward or backward pass "
                "overflows by itself.",
                remedy="Find the layer: run one batch in float32 and look for non-finite values. "
                "bfloat16 has float32's range and needs no scaler.",
            )
    if longest < limits["least"]:
        yield limits.not_checked(
            f"needs {limits['least']:g} recorded steps from step {limits['settling']:g} on, when a "
            f"scaler has settled; there are {longest}"
        )
