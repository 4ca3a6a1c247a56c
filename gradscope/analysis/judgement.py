"""The rules of a verdict: on an interval of Δ, on bounds from exact zeros, on numbers that are broken."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, Literal, NamedTuple

import numpy as np

from gradscope.analysis.change import Change
from gradscope.analysis.curve import Curve
from gradscope.analysis.profile import Interval, interval

__all__ = ["FLAT", "THRESHOLD", "Judgement", "Word", "by_bound", "by_interval", "not_finite"]

Word = Literal["vanishing", "exploding", "preserved", "inconclusive"]

#: Nats of amplitude. Signals pass about 6ξ layers in trainable nets, and over 6ξ the squared norm
#: changes by e^6 (Schoenholz et al. 2017, arXiv:1611.01232).
THRESHOLD: Final = 3.0

#: A change that is known to be smaller than a factor of two is called flat.
FLAT: Final = math.log(2)


class Judgement(NamedTuple):
    """A word with its evidence.

    Attributes:
        word: the verdict's word.
        detail: what kind of it, or empty.
        reason: why, in words.
        delta: Δ with its interval, or its bounds.
        length: layers between its ends.
        p: one-sided p-value of the word, or of the nearest one.
    """

    word: Word
    detail: str
    reason: str
    delta: Interval
    length: float
    p: float


def by_interval(curve: Curve, change: Change, threshold: float) -> Judgement:
    """The rule on an interval, with the p-value of the word it gives or comes nearest to."""
    low, high = change.delta.low, change.delta.high
    vanishing = change.probability_below(-threshold)
    exploding = _complement(change, threshold)
    inside = max(_complement(change, -threshold), change.probability_below(threshold))
    signal = "activation" if curve.forward else "gradient"
    span = f"the interval of Δ, [{low:.3g}, {high:.3g}] nats,"
    if math.isnan(low) or math.isnan(high):
        reason = "Δ has no interval: too few increments."
        return Judgement("inconclusive", "", reason, change.delta, change.length, 1.0)
    if high < -threshold:
        factor = math.exp(min(-change.delta.estimate, 700.0))
        reason = f"The {signal} falls by a factor of {factor:.3g}: {span} lies below −{threshold:g}."
        return Judgement("vanishing", "", reason, change.delta, change.length, vanishing)
    if low > threshold:
        factor = math.exp(min(change.delta.estimate, 700.0))
        reason = f"The {signal} grows by a factor of {factor:.3g}: {span} lies above {threshold:g}."
        return Judgement("exploding", "", reason, change.delta, change.length, exploding)
    if low > -threshold and high < threshold:
        flat = low > -FLAT and high < FLAT
        inner = "±ln 2" if flat else f"±{threshold:g}"
        return Judgement(
            "preserved",
            "flat" if flat else "drifting",
            f"{_capital(span)} lies inside {inner}.",
            change.delta,
            change.length,
            inside,
        )
    crossed = " and ".join(f"{side:g}" for side in (-threshold, threshold) if low <= side <= high)
    more = "Measure 5 or more replicates." if change.delta.count < 5 else "Measure more replicates."
    if curve.kind == "run" and change.delta.count == 1:
        more = (
            "A run is one replicate; gradscope.measure(..., replicates=5) gives more, at initialisation."
        )
    return Judgement(
        "inconclusive",
        "",
        f"{_capital(span)} contains {crossed}. {more}",
        change.delta,
        change.length,
        min(vanishing, exploding, inside),
    )


def _complement(change: Change, threshold: float) -> float:
    """1 − P(T ≤ (Δ̂ − threshold)/error), without cancellation."""
    from scipy.special import stdtr

    distance = threshold - change.delta.estimate
    if change.error == 0:
        return float(distance >= 0)
    return float(stdtr(change.degrees, distance / change.error))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def not_finite(curve: Curve, confidence: float) -> Judgement | None:
    """No word where a value is NaN, or infinite with finite ones further on: the numbers are broken."""
    nan = (np.isnan(curve.y) & ~curve.absent).any(0)
    infinite = np.isposinf(curve.y).any(0)
    beyond = np.flatnonzero(np.isfinite(curve.y).any(0))
    passing = infinite & (np.arange(infinite.size) < (beyond[-1] if beyond.size else 0))
    broken = np.flatnonzero(nan | passing)
    if not broken.size:
        return None
    nothing = Interval(
        estimate=math.nan, low=math.nan, high=math.nan, confidence=confidence, count=curve.replicates
    )
    depths = ", ".join(f"{curve.depth[i]:g}" for i in broken[:6])
    reason = (
        f"NaN or infinite at depth {depths}, so that nothing else can be trusted. "
        "gradscope.diagnose(record) names the first layer and step; or measure in float64."
    )
    length = float(curve.distance[-1])
    return Judgement("inconclusive", "", reason, nothing, length, 1.0)


def by_bound(curve: Curve, threshold: float, confidence: float) -> Judgement | None:
    """A verdict from exact zeros or infinities at the end of the pass; None where there are none.

    What an exact zero stands for is below the dtype's smallest number: Δ is at most the bound's, in
    every replicate that has one; the others are compared at the same position.
    """
    measured = np.flatnonzero(curve.measured)
    if len(measured) < 2:
        return None
    first, last = int(measured[0]), int(measured[-1])
    start, end = curve.y[:, first], curve.y[:, last]
    length = float(curve.distance[last] - curve.distance[first])
    places = f"depth {curve.depth[last]:g}"
    if np.isneginf(start).any():
        reason = (
            f"Exactly 0 at depth {curve.depth[first]:g}, where the pass starts: there is nothing to "
            "follow (zero by construction, or nothing reaches the loss)."
        )
        nothing = Interval(
            estimate=math.nan, low=math.nan, high=math.nan, confidence=confidence, count=len(start)
        )
        return Judgement("inconclusive", "", reason, nothing, length, 1.0)
    if not np.isfinite(start).all() or np.isfinite(end).all():
        return None
    nothing = Interval(
        estimate=math.nan, low=math.nan, high=math.nan, confidence=confidence, count=curve.replicates
    )
    if np.isposinf(end).any():
        share = int(np.isposinf(end).sum())
        if share < len(end):
            reason = f"Overflow at {places} in {share} of {len(end)} replicates only. Measure in float64."
            return Judgement("inconclusive", "", reason, nothing, length, 1.0)
        delta = replace(nothing, estimate=math.inf, low=math.inf, high=math.inf)
        reason = f"The norm overflows at {places} in every replicate."
        return Judgement("exploding", "overflow", reason, delta, length, 0.0)
    zeros = int(np.isneginf(end).sum())
    if np.isnan(curve.zero_bound[np.isneginf(end)]).any():
        reason = (
            f"Exactly 0 at {places} in {zeros} of {len(end)} replicates, and what a zero may hide is not "
            "known (no dtype beside the values). Measure in float64."
        )
        return Judgement("inconclusive", "", reason, nothing, length, 1.0)
    bound = np.where(np.isneginf(end), curve.zero_bound, end) - start
    # One replicate bounds itself; several are judged as always, each by its bound.
    found = interval(bound, confidence)
    highest = found.high if len(bound) > 1 else float(bound[0])
    delta = replace(nothing, estimate=-math.inf, low=-math.inf, high=highest)
    if highest >= -threshold:
        reason = (
            f"Exactly 0 at {places} in {zeros} of {len(end)} replicates, but a zero hides up to "
            f"e^{highest:.3g} of the value where the pass starts. Measure in float64."
        )
        return Judgement("inconclusive", "", reason, delta, length, 1.0)
    finite = np.where(np.isfinite(curve.y), curve.y, np.inf)
    nearest = float(np.max(np.min(finite, axis=1) - curve.zero_bound))
    reached = nearest < _NEAR_FLOOR
    how = (
        "after a decay to the floor of the dtype"
        if reached
        else "next to values far above the dtype's floor: a layer passes nothing on"
    )
    reason = f"Exactly 0 at {places} in {zeros} of {len(end)} replicates, {how}: Δ < {highest:.3g} nats."
    return Judgement("vanishing", "underflow" if reached else "cut", reason, delta, length, 0.0)


#: Exact zeros count as underflow if the smallest value before them is within so many nats of the
#: dtype's floor: one layer may lose ten nats at the strongest decay in use (N(0, .02) without norms).
_NEAR_FLOOR: Final = 20.0
