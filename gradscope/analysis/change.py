"""Δ, the change of ln amplitude from where a pass starts to where it ends, and what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.arguments import check_coverage
from gradscope.analysis.curve import Curve
from gradscope.analysis.profile import Interval
from gradscope.analysis.walk import independent_variance, long_run_variance

__all__ = ["Change", "DepthScale", "end_to_end"]

Floats = npt.NDArray[np.float64]

#: From so many replicates on, the increments' own variance moderates that of Δ over replicates. With
#: fewer, replicates cannot show whether increments are correlated, and errors would go up to 5 %.
_LEAST_TO_MODERATE: Final = 5

#: What the increments' variance counts for, in degrees of freedom. More gives shorter intervals where
#: increments are independent, and more errors where they are not (see `_moderated`).
_PRIOR_WEIGHT: Final = 2.0

#: What it adds to the degrees of freedom of t: between the 2 of a prior that is as uncertain as it weighs
#: (Smyth) and the 5 that Satterthwaite's formula gives one that is exact, so that intervals of five
#: replicates cover 96 %.
_PRIOR_DEGREES: Final = 3.0

#: Replicates that differ by more than independent increments would in so many of 100 cases are taken to
#: say that increments are correlated: then their own spread alone counts.
_TOO_WIDE: Final = 0.02


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
    """Δ of one curve: per replicate by one and the same estimator, then a t interval over replicates.

    Attributes:
        delta: Δ = y(end of the pass) − y(its start), nats; negative is vanishing.
        per_replicate: [R] the same of each replicate.
        length: layers between the two ends.
        error: standard error of Δ.
        degrees: degrees of freedom of its t distribution: R − 1, and 3 more where the increments
            moderate the replicates' spread.
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
    whose first or last block differs from its neighbours. The interval is Student's t over replicates,
    from five replicates on moderated by the increments' variance (`_moderated`); with one replicate, that
    of the sum of its increments with their long-run variance (Newey and West), which knows nothing of
    other seeds. None where fewer than two positions are complete.
    """
    from scipy.special import stdtrit

    check_coverage(confidence)
    complete = curve.take(curve.complete)
    if len(complete.depth) < 2:
        return None
    z = np.diff(complete.y, axis=1)
    gaps = np.diff(complete.distance)
    ends = float(complete.depth[0]), float(complete.depth[-1])
    length = float(gaps.sum())
    per_replicate: Floats = z.sum(1)
    centre = float(np.mean(per_replicate))
    if len(z) > 1:
        variance, degrees = _moderated(z, gaps, float(np.var(per_replicate, ddof=1)))
        error = math.sqrt(variance / len(z))
    else:
        residual = (z[0] - centre * gaps / length) / np.sqrt(gaps)
        error = math.sqrt(long_run_variance(residual) * length / len(gaps))
        degrees = float(len(gaps) - 1)
    half = float(stdtrit(degrees, 0.5 + confidence / 2)) * error if degrees > 0 else math.nan
    delta = Interval(
        estimate=centre, low=centre - half, high=centre + half, confidence=confidence, count=len(z)
    )
    return Change(
        delta=delta,
        per_replicate=per_replicate,
        length=length,
        error=error,
        degrees=degrees,
        ends=ends,
    )


def _moderated(z: Floats, gaps: Floats, spread: float) -> tuple[float, float]:
    """Variance of Δ over replicates, and its degrees of freedom.

    Five replicates know their spread s² badly (ν = 4), while their increments, a random walk, say what
    it is if they are independent: s_0². Together they give the moderated variance, with t of ν + 3
    degrees of freedom (Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3:3),

        s̃² = (2 s_0² + ν s²)/(2 + ν),

    unless s²/s_0² is so large (F test at 2 %) that increments are correlated over depth; then s² alone,
    and Student's t. With five replicates the error of one side, nominal 2.5 %, is 1.9 % for independent
    increments and about 4 % for the worst correlation that all increments of a replicate share (one that
    makes Var Δ four times as large).
    """
    from scipy.special import fdtri

    degrees = float(len(z) - 1)
    if len(z) < _LEAST_TO_MODERATE:
        return spread, degrees
    expected, known = independent_variance(z, gaps)
    if not expected > 0 or known < 2 * degrees:
        return spread, degrees  # the increments know it no better
    if spread > expected * float(fdtri(degrees, known, 1 - _TOO_WIDE)):
        return spread, degrees
    variance = (_PRIOR_WEIGHT * expected + degrees * spread) / (_PRIOR_WEIGHT + degrees)
    return variance, degrees + _PRIOR_DEGREES
