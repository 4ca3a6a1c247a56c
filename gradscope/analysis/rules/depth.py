"""Rules on the whole depth: gradients and activations that vanish or explode."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradscope.analysis.finding import Finding, Limits, NotChecked, register, rule
from gradscope.analysis.rules.trend import NATS, POOLED, SIX_XI, trends
from gradscope.analysis.view import Site, View

__all__ = ["exploding", "forward_exploding", "forward_vanishing", "vanishing"]


def _verdicts(
    view: View, limits: Limits, quantity: str, word: str, cause: str, remedy: str
) -> Iterator[Finding | NotChecked]:
    for item in trends(view, limits, quantity, "nats"):
        if isinstance(item, NotChecked):
            yield item
            continue
        found = item.verdict
        side = -limits["nats"] if word == "vanishing" else limits["nats"]
        outside = found.delta.low > side if word == "vanishing" else found.delta.high < side
        if found.word == "inconclusive" and not outside:  # else it is another word that stays open
            known = "" if math.isnan(found.delta.estimate) else f", Δ = {found.delta.estimate:.3g} nats"
            yield limits.not_checked(
                f"{quantity} over {found.trunk}: inconclusive{known}. {found.reason}"
            )
        if found.word != word or item.first_block is not None:
            continue  # `one_layer_off` names the first block
        curve = found.curve
        site = Site(found.trunk, float(curve.depth[-1]), curve.layers[-1], "", 0)
        if site.depth == 0:
            site = site._replace(type="Stream")
        detail = f" ({found.detail})" if found.detail else ""
        yield limits.finding(
            "nats",
            value=found.delta.estimate,
            limit=side,
            sites=[site],
            trunk=found.trunk,
            steps=item.steps,
            message=(
                f"{found.reason} Over the {found.length:g} layers of {found.trunk}, "
                f"{'least' if word == 'vanishing' else 'most'} at {site.name}, up to step "
                f"{item.steps[1]}{detail}: Δ = {found.delta} nats (threshold {side:g}). About "
                f"{found.claim}."
            ),
            cause=cause,
            remedy=remedy,
        )


@register
@rule(
    name="vanishing",
    title="vanishing gradient",
    severity="critical",
    citation=SIX_XI,
    thresholds={"nats": NATS, "steps": POOLED},
    explained_by=("non_finite", "underflow", "dead_layer", "saturation", "dead_units", "one_layer_off"),
)
def vanishing(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """The gradient's norm falls by more than e³ from the loss to the input: `verdict` of ``grad_l2``.

    Judged over the last ten recorded steps with finite values, whose logarithms are averaged; ``steps``
    reaches back to the first step if the verdict was the same there. Inconclusive ones are no finding,
    and neither is what the first block does alone: `one_layer_off` names it.
    """
    yield from _verdicts(
        view,
        limits,
        "grad_l2",
        "vanishing",
        "Every layer multiplies the gradient by less than one: no skips, weights too small, saturated or "
        "dead units.",
        "Skip connections, normalisation, and an initialisation that keeps the variance (He for ReLU, "
        "Xavier for tanh).",
    )


@register
@rule(
    name="exploding",
    title="exploding gradient",
    severity="critical",
    citation=SIX_XI,
    thresholds={"nats": NATS, "steps": POOLED},
    explained_by=("non_finite", "one_layer_off"),
)
def exploding(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """The gradient's norm grows by more than e³ from the loss to the input: `verdict` of ``grad_l2``."""
    yield from _verdicts(
        view,
        limits,
        "grad_l2",
        "exploding",
        "Every layer multiplies the gradient by more than one: weights too large, or branches without a "
        "norm.",
        "Smaller initial weights, normalisation, branches scaled by 1/√depth; clipping hides it only.",
    )


@register
@rule(
    name="forward_vanishing",
    title="vanishing activations",
    citation=SIX_XI,
    thresholds={"nats": NATS, "steps": POOLED},
    explained_by=("dead_layer", "dead_units", "one_layer_off"),
)
def forward_vanishing(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """The activation's rms falls by more than e³ over the trunk: `verdict` of ``act_mean_square``."""
    yield from _verdicts(
        view,
        limits,
        "act_mean_square",
        "vanishing",
        "Every layer multiplies the activation by less than one.",
        "An initialisation that keeps the variance, or normalisation.",
    )


@register
@rule(
    name="forward_exploding",
    title="exploding activations",
    citation=SIX_XI,
    thresholds={"nats": NATS, "steps": POOLED},
    explained_by=("one_layer_off", "update_ratio"),
)
def forward_exploding(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """The activation's rms grows by more than e³ over the trunk: `verdict` of ``act_mean_square``.

    The linear growth of a pre-norm stream's variance, ½ ln(1 + L) nats, stays far below.
    """
    yield from _verdicts(
        view,
        limits,
        "act_mean_square",
        "exploding",
        "Every layer multiplies the activation by more than one: the variance grows exponentially.",
        "Normalise each branch's input or output, or scale the branches by 1/√depth.",
    )
