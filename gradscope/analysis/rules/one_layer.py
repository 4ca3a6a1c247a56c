"""One layer that stands apart from all others of its trunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.history import History, history
from gradscope.analysis.quantities import find_quantity
from gradscope.analysis.rules.trend import NATS, POOLED, Trend, trends
from gradscope.analysis.verdict import Verdict
from gradscope.analysis.view import NO_AXIS, Site, View
from gradscope.errors import QuantityError

__all__ = ["one_layer_off"]

Floats = npt.NDArray[np.float64]


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
        "first_block": NATS,
        "steps": POOLED,
    },
    explained_by=("non_finite", "dead_layer", "underflow"),
)
def one_layer_off(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """A block whose factor on the gradient, or on the activation, stands apart from all others.

    r_l = ln(x_l/x_{l+1}), nats of amplitude, as the median over replicates and the last ten recorded
    steps, against the median of the other blocks: it must differ by at least 2 nats, and by more than
    Student's t (n − 2 degrees of freedom, 1 % over all n blocks) robust deviations of the others.

    The first block's input has a scale of its own, that of the embedding, and is not compared. It is
    named where it alone makes the whole trunk ``vanishing`` or ``exploding`` by 3 nats
    (`Verdict.without_first_block`): a note where gradient and activation jump together, as they do if
    only the scale of the input is at odds with that of the block's output; a warning where they do not,
    and where the jump has grown by 2 nats since the first recorded step.
    """
    if not view.trunks:
        yield limits.not_checked(NO_AXIS)
        return
    yield from _first_blocks(view, limits)
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


def _first_blocks(view: View, limits: Limits) -> Iterator[Finding]:
    by_trunk: dict[str, list[Trend]] = {}
    for quantity in ("grad_l2", "act_mean_square"):
        for item in trends(view, limits, quantity, "first_block"):
            if isinstance(item, Trend):  # the rules on the whole depth say why there is none
                by_trunk.setdefault(item.verdict.trunk, []).append(item)
    for trunk, items in by_trunk.items():
        named = [item for item in items if item.first_block is not None]
        if not named:
            continue
        jumps = [_first_jump(item.verdict) for item in items]
        before = [_first_jump(item.at_start) for item in items]
        grown = any(abs(a - b) >= limits["nats"] for a, b in zip(jumps, before, strict=True))
        together = len(jumps) == 2 and jumps[0] * jumps[1] > 0 and _within(jumps, factor=2.0)
        by_scale = together and not grown
        found = named[0].verdict
        layer = found.curve.layers[int(np.flatnonzero(found.curve.depth == 1)[0])]
        yield limits.finding(
            "first_block",
            value=found.delta.estimate,
            limit=math.copysign(limits["first_block"], found.delta.estimate),
            sites=[Site(trunk, 1.0, layer, "", 0)],
            trunk=trunk,
            steps=named[0].steps,
            title="the first block is off the curve",
            severity="note" if by_scale else None,
            message=" ".join(_first_block_said(item, layer, limits) for item in named),
            cause=_first_block_cause(layer, found.delta.estimate > 0, by_scale=by_scale, grown=grown),
            remedy=(
                "Nothing while training is stable. Else bring the embedding to the scale of the stream "
                "(unit variance: Takase et al. 2023, arXiv:2312.16903), or compare this block's weights "
                "with those of its neighbours."
                if by_scale
                else "Compare this block's weights and code with those of its neighbours."
            ),
        )


def _first_block_cause(layer: str, grows: bool, *, by_scale: bool, grown: bool) -> str:
    if by_scale:
        return (
            f"The input of {layer} is much {'smaller' if grows else 'larger'} than what the block puts "
            "out: an embedding with a scale of its own before a norm, which divides gradients by that "
            "scale. They reach only what stands before the trunk."
        )
    if grown:
        return (
            f"It was not so at the first recorded step: weights of {layer}, or the embedding before it, "
            "went astray in training."
        )
    return (
        "This block's own weights or code, or single positions whose input is next to zero (a padding "
        "token's embedding), which a norm divides by. The scale of its input as a whole does not explain "
        "it: gradient and activation do not jump together."
    )


def _first_block_said(item: Trend, layer: str, limits: Limits) -> str:
    found, others = item.verdict, item.first_block
    assert others is not None
    nats = _first_jump(found)
    return (
        f"{layer} multiplies the {'activation' if found.forward else 'gradient'} by "
        f"{math.exp(min(nats, 700.0)):.3g} ({nats:+.2g} nats). It alone makes it {found.word} over "
        f"{found.trunk}: Δ = {found.delta.estimate:.2g} with it (threshold {limits['first_block']:g}), "
        f"{others.delta.estimate:.2g} from its output on."
    )


def _first_jump(judged: Verdict) -> float:
    """What the first block adds to the logarithm along the pass; NaN where an end is not known."""
    curve = judged.curve
    ends = [np.flatnonzero(curve.depth == depth) for depth in (0, 1)]
    if not all(len(at) for at in ends):
        return math.nan
    h_0, h_1 = (float(np.mean(curve.y[:, at[0]])) for at in ends)
    return h_1 - h_0 if curve.forward else h_0 - h_1


def _within(nats: list[float], factor: float) -> bool:
    return max(map(abs, nats)) <= factor * min(map(abs, nats))


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
            f"{found.trunk}: {len(present)} blocks after the first can be compared; needs "
            f"{limits['layers']:g}"
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
