"""Δ, the change of ln amplitude from where a pass starts to where it ends, and what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.analysis.curve import Curve
from gradscope.analysis.profile import Interval, interval
from gradscope.analysis.walk import long_run_variance

__all__ = ["Change", "DepthScale", "end_to_end"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthScale:
    """ξ̂ = 1/(2|r̄|) in layers: over so many layers the *squared* norm changes by a factor e.

    The norm itself changes by e^(±d/2ξ). Signals pass about 6ξ layers in trainable nets (Schoenholz et
    al. 2017, arXiv:1611.01232).

    Attributes:
        estimate: ξ̂; ∞ where the mean increment is exactly 0.
        low: lower end of the interval.
        high: upper end; ∞ where the interval of the mean increment contains 0: no change is possible too.
        confidence: coverage of [low, high].
    """

    estimate: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, increment: Interval) -> DepthScale:
        """By inversion of the interval of the mean increment per layer."""
        low, high = increment.low, increment.high
        if math.isnan(low) or math.isnan(high):
            ends = (math.nan, math.nan)
        elif low <= 0 <= high:
            ends = (_inverted(max(-low, high)), math.inf)
        else:
            ends = (_inverted(max(abs(low), abs(high))), _inverted(min(abs(low), abs(high))))
        return cls(
            estimate=_inverted(abs(increment.estimate)),
            low=ends[0],
            high=ends[1],
            confidence=increment.confidence,
        )

    def __str__(self) -> str:
        estimate, low, high = (
            "∞" if math.isinf(x) else f"{x:.3g}" for x in (self.estimate, self.low, self.high)
        )
        if math.isnan(self.low):
            return f"{estimate} layers (no interval)"
        return f"{estimate} layers [{low}, {high}]"


def _inverted(increment: float) -> float:
    if math.isnan(increment):
        return math.nan
    return math.inf if increment == 0 else 1 / (2 * increment)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """Δ of one curve: per replicate by one and the same estimator, then Student's t over replicates.

    Attributes:
        delta: Δ = y(end of the pass) − y(its start), nats; negative is vanishing.
        per_replicate: [R] the same of each replicate.
        length: layers between the two ends.
        error: standard error of Δ.
        degrees: degrees of freedom of its t distribution.
        ends: depth of the start and of the end of the pass.
    """

    delta: Interval
    per_replicate: Floats
    length: float
    error: float
    degrees: float
    ends: tuple[float, float]

    @property
    def increment(self) -> Interval:
        """r̄ = Δ/length, nats per layer."""
        d = self.delta
        return Interval(
            estimate=d.estimate / self.length,
            low=d.low / self.length,
            high=d.high / self.length,
            confidence=d.confidence,
            count=d.count,
        )

    @property
    def depth_scale(self) -> DepthScale:
        """ξ̂ = 1/(2|r̄|), by inversion."""
        return DepthScale.of(self.increment)

    def probability_below(self, threshold: float) -> float:
        """P(T ≤ (Δ̂ − threshold)/error): the p-value of "Δ is at least the threshold"."""
        from scipy.special import stdtr

        distance = self.delta.estimate - threshold
        if self.error == 0:
            return float(distance >= 0)
        return float(stdtr(self.degrees, distance / self.error))


def end_to_end(curve: Curve, confidence: float = 0.95) -> Change | None:
    """Δ between the first and the last position that every replicate has, with its interval.

    Each replicate's Δ is the difference of its end values, whatever the curve does in between: a slope
    times the length would be wrong for every curve that is no line, and smoothed ends for every curve
    whose first or last block differs from its neighbours. The interval is Student's t over replicates;
    with one replicate, that of the sum of its increments with their long-run variance (Newey and West),
    which knows nothing of other seeds. None where fewer than two positions are complete.
    """
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a coverage between 0 and 1, such as .95; got {confidence}")
    complete = curve.take(curve.complete)
    if len(complete.depth) < 2:
        return None
    z = np.diff(complete.y, axis=1)
    gaps = np.diff(complete.distance)
    ends = float(complete.depth[0]), float(complete.depth[-1])
    length = float(gaps.sum())
    per_replicate: Floats = z.sum(1)
    if len(z) > 1:
        delta = interval(per_replicate, confidence)
        error = float(np.std(per_replicate, ddof=1)) / math.sqrt(len(z))
        degrees = float(len(z) - 1)
    else:
        residual = (z[0] - float(per_replicate[0]) * gaps / length) / np.sqrt(gaps)
        error = math.sqrt(long_run_variance(residual) * length / len(gaps))
        degrees = float(len(gaps) - 1)
        centre = float(per_replicate[0])
        half = float(stdtrit(degrees, 0.5 + confidence / 2)) * error if degrees > 0 else math.nan
        delta = Interval(
            estimate=centre, low=centre - half, high=centre + half, confidence=confidence, count=1
        )
    return Change(
        delta=delta,
        per_replicate=per_replicate,
        length=length,
        error=error,
        degrees=degrees,
        ends=ends,
    )
