"""Rules on the profile over depth: one layer off the curve, vanishing and exploding signals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.history import History, history
from gradscope.analysis.quantities import find_quantity
from gradscope.analysis.verdict import THRESHOLD, Verdict, verdict
from gradscope.analysis.view import Site, View
from gradscope.errors import QuantityError

__all__ = ["exploding", "forward_exploding", "forward_vanishing", "one_layer_off", "vanishing"]

Floats = npt.NDArray[np.float64]

_SIX_XI: Final = "Schoenholz et al. 2017, arXiv:1611.01232 (signals pass about 6ξ layers: 3 nats)"
_NATS: Final = Threshold(value=THRESHOLD, unit="nats", source=_SIX_XI)
_POOLED: Final = Threshold(
    value=10, unit="steps", source="last recorded steps of a run: one batch alone is noisy"
)
_NO_AXIS: Final = (
    'no depth axis: no trunk of repeated blocks was found; say which layers are the blocks: layers="….*"'
)


# -- one layer off the curve -----------------------------------------------------------------------


@register
@rule(
    name="one_layer_off",
    title="one layer is off the curve",
    citation="log-gradients over depth are sums of increments (Hanin 2018, arXiv:1801.03744); robust z "
    "by the median absolute deviation (Rousseeuw & Croux 1993)",
    thresholds={
        "nats": Threshold(value=2.0, unit="nats", source="a factor of 7 in one layer"),
        "probability": Threshold(
            value=0.01, unit="1", source="of any false one among all layers (Bonferroni, Student's t)"
        ),
        "layers": Threshold(value=6, unit="layers", source="fewer do not say what the others do"),
        "steps": _POOLED,
    },
    explained_by=("non_finite", "dead_layer", "underflow"),
)
def one_layer_off(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """A block whose factor on the gradient, or on the activation, stands apart from all others.

    r_l = ln(x_l/x_{l+1}), nats of amplitude, as the median over replicates and the last ten recorded
    steps, against the median of the other blocks: it must differ by at least 2 nats, and by more than
    Student's t (n − 2 degrees of freedom, 1 % over all n blocks) robust deviations of the others. The
    first block is not judged: its input is the embedding, which has a scale of its own.
    """
    if not view.trunks:
        yield limits.not_checked(_NO_AXIS)
    for trunk in view.trunks:
        found: dict[tuple[str, ...], Finding] = {}
        for quantity in ("grad_l2", "act_mean_square"):
            try:
                results = list(_off(limits, history(view.record, quantity, trunk=trunk)))
            except QuantityError as error:
                yield limits.not_checked(f"{quantity} over {trunk}: {error}")
                continue
            yield from (item for item in results if isinstance(item, NotChecked))
            for item in results:
                if isinstance(item, Finding):
                    first = found.get(item.layers)
                    message = f"{first.message} {item.message}" if first else item.message
                    found[item.layers] = replace(first or item, message=message)
        yield from found.values()


def _off(limits: Limits, found: History) -> Iterator[Finding | NotChecked]:
    from scipy.special import stdtrit

    with np.errstate(all="ignore"):
        y = np.where(found.ok & (found.value > 0) & np.isfinite(found.value), np.log(found.value), np.nan)
    y /= find_quantity(found.quantity).power
    usable = np.flatnonzero((~np.isnan(y)).sum(1) >= 2)
    steps = sorted(set(found.steps[usable].tolist()))[-int(limits["steps"]) :]
    rows = usable[np.isin(found.steps[usable], steps)]
    r = y[rows, :-1] - y[rows, 1:]  # [rows, blocks], block l + 1 between depth l and l + 1
    # Only neighbours: over a gap the factor is that of several blocks.
    inside = (found.depth[:-1] >= 1) & (np.diff(found.depth) == 1)
    present = np.flatnonzero(inside & ~np.isnan(r).all(0)) if len(rows) else np.empty(0, np.int64)
    if len(present) < limits["layers"]:
        yield limits.not_checked(
            f"{found.quantity} over {found.trunk}: {len(present)} blocks after the first have a factor; "
            f"needs {limits['layers']:g}"
        )
        return
    middle = np.nanmedian(r[:, present], axis=0)
    n = len(present)
    t = float(stdtrit(n - 2, 1 - limits["probability"] / (2 * n)))
    worst: tuple[float, int, float] | None = None
    for i in range(n):
        others = np.delete(middle, i)
        centre = float(np.median(others))
        deviation = 1.4826 * float(np.median(np.abs(others - centre)))
        off = float(middle[i]) - centre
        if (
            abs(off) >= limits["nats"]
            and abs(off) > t * deviation
            and (worst is None or abs(off) > worst[0])
        ):
            worst = abs(off), i, off
    if worst is None:
        return
    _, i, off = worst
    column = int(present[i])
    layer, depth = found.layers[column + 1], float(found.depth[column + 1])
    backward = not find_quantity(found.quantity).forward
    # Along its pass the gradient goes from l + 1 to l, the activation from l to l + 1.
    nats = off if backward else -off
    factor = math.exp(min(abs(nats), 700.0))
    yield limits.finding(
        "nats",
        value=nats,
        limit=math.copysign(limits["nats"], nats),
        sites=[Site(found.trunk, depth, layer, "", 0)],
        trunk=found.trunk,
        steps=(int(steps[0]), int(steps[-1])),
        message=(
            f"{layer} multiplies the {'gradient' if backward else 'activation'} by {factor:.3g} times "
            f"{'more' if nats > 0 else 'less'} than the other blocks of {found.trunk} in the median: "
            f"{nats:+.2g} nats (threshold ±{limits['nats']:g}) over {len(rows)} entries."
        ),
        cause="This block differs from its neighbours: its initialisation, a scale or a missing norm or "
        "skip, or its parameters went astray in training.",
        remedy="Compare this block's weights and code with those of its neighbours.",
    )


# -- verdicts over the whole depth -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Judged:
    verdict: Verdict
    steps: tuple[int, int]


def _judged(view: View, limits: Limits, quantity: str) -> Iterator[_Judged | NotChecked]:
    """The verdict of each trunk over its last steps with finite values, and since when it holds."""
    if not view.trunks:
        yield limits.not_checked(_NO_AXIS)
    for trunk in view.trunks:
        try:
            found = history(view.record, quantity, trunk=trunk)
            finite = found.ok.any(1) & ~(found.ok & ~np.isfinite(found.value)).any(1)
            if not finite.any():
                yield limits.not_checked(f"{quantity} over {trunk}: no step with finite values")
                continue
            numbers = sorted(set(found.steps[finite].tolist()))
            pooled = int(limits["steps"]) if found.kind == "run" else 1
            first, last = (
                verdict(view.record, quantity, trunk=trunk, step=steps, threshold=limits["nats"])
                for steps in (numbers[:1], numbers[-pooled:])
            )
        except QuantityError as error:
            yield limits.not_checked(f"{quantity} over {trunk}: {error}")
            continue
        since = numbers[0] if first.word == last.word else numbers[-1]
        yield _Judged(last, (int(since), int(numbers[-1])))


def _verdicts(
    view: View, limits: Limits, quantity: str, word: str, cause: str, remedy: str
) -> Iterator[Finding | NotChecked]:
    for item in _judged(view, limits, quantity):
        if isinstance(item, NotChecked):
            yield item
            continue
        found = item.verdict
        side = -limits["nats"] if word == "vanishing" else limits["nats"]
        outside = found.delta.low > side if word == "vanishing" else found.delta.high < side
        if found.word == "inconclusive" and not outside:  # else it is another word that stays open
            yield limits.not_checked(
                f"{found.trunk}: inconclusive, Δ = {found.delta} nats. {found.reason}"
            )
        if found.word != word:
            continue
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
                f"{word}{detail} over the {found.length:g} layers of {found.trunk}, at {site.name} most, "
                f"up to step {item.steps[1]}: Δ = {found.delta} nats (threshold {limits['nats']:g}). "
                f"{found.reason} About {found.claim}."
            ),
            cause=cause,
            remedy=remedy,
        )


@register
@rule(
    name="vanishing",
    title="vanishing gradient",
    severity="critical",
    citation=_SIX_XI,
    thresholds={"nats": _NATS, "steps": _POOLED},
    explained_by=("non_finite", "underflow", "dead_layer", "saturation", "dead_units", "one_layer_off"),
)
def vanishing(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """The gradient's norm falls by more than e³ from the loss to the input: `verdict` of ``grad_l2``.

    Judged over the last ten recorded steps with finite values, whose logarithms are averaged; ``steps``
    reaches back to the first step if the verdict was the same there. Inconclusive ones are no finding.
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
    citation=_SIX_XI,
    thresholds={"nats": _NATS, "steps": _POOLED},
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
    citation=_SIX_XI,
    thresholds={"nats": _NATS, "steps": _POOLED},
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
    citation=_SIX_XI,
    thresholds={"nats": _NATS, "steps": _POOLED},
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
