"""One layer of a wide random net as a map of lengths and correlations, and where it comes to rest.

The length map is followed from a start q_0, because GELU, SiLU and others may have several fixed points:
a root is solved for only between two values that the iteration cannot leave.

An activation that grows faster than linearly (ReLU², x³) has at most a resting place for short lengths:
from a start beyond it, q and with it χ grow without bound, and no factor per layer describes that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.meanfield.activations import Activation
from gradscope.analysis.meanfield.gaussian import (
    gaussian_mean,
    mean_of_conditional_variance,
    mean_of_product,
    square_in_range,
)

__all__ = ["CRITICAL_TOLERANCE", "RandomLayer", "fixed_correlation", "fixed_length", "log_root"]

Floats = npt.NDArray[np.float64]

#: |χ₁ − 1| up to which a net is called critical: more than quadrature and root finding leave open, and
#: a depth scale of 1e9 layers.
CRITICAL_TOLERANCE: Final = 1e-9
#: Least step of the search for q*, in ln q; the map itself is followed where it goes farther.
_STEP: Final = 0.05
#: Beyond these, q's fate is decided by the slopes of φ beside 0 and far out.
_SMALLEST: Final = 1e-12
_LARGEST: Final = 1e12
#: What the slopes are known to, with room for the quadrature.
_SLOPE_TOLERANCE: Final = 1e-11
#: What a larger |φ| is taken for where φ² would overflow: E φ² is then at least what comes out.
_LARGEST_VALUE: Final = 1e150
#: Smallest 1 − c* that is looked for.
_CLOSEST: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLayer:
    """h → W φ(h) + b with W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²), infinitely wide.

    Attributes:
        activation: φ.
        weight_variance: σ_w².
        bias_variance: σ_b².
    """

    activation: Activation
    weight_variance: float
    bias_variance: float

    def __post_init__(self) -> None:
        for name, value in (
            ("weight_variance", self.weight_variance),
            ("bias_variance", self.bias_variance),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is a variance, finite and ≥ 0; got {value}")

    def mean_square(self, q: float) -> float:
        """E φ(√q z)²: what the activation makes of the length q, 0 ≤ q < ∞."""
        phi, kinks = self.activation.phi, self.activation.kinks
        if self.activation.scale_free:
            return self.activation.mean_square_slope(far=False) * q
        return gaussian_mean(lambda h: phi(h) ** 2, q, kinks)

    def length(self, q: float) -> float:
        """The length map, σ_w² E φ(√q z)² + σ_b² (Poole et al. 2016, arXiv:1606.05340)."""
        return self.weight_variance * self.mean_square(q) + self.bias_variance

    def least_length(self, q: float) -> float:
        """The length map, or where φ² leaves float64 a lower bound of it, which is astronomical."""
        phi, kinks = self.activation.phi, self.activation.kinks
        if self.activation.scale_free or square_in_range(phi, q):
            return self.length(q)

        def clipped(h: Floats) -> Floats:
            with np.errstate(over="ignore"):
                return np.minimum(np.abs(phi(h)), _LARGEST_VALUE) ** 2

        return self.weight_variance * gaussian_mean(clipped, q, kinks) + self.bias_variance

    def chi(self, q: float) -> float:
        """χ = σ_w² E φ′(√q z)²: factor of ‖δ‖² across a layer of length q; q may be 0 or ∞.

        ∞ where φ′ grows without bound; NaN at 0 or ∞ where its limit is not known.
        """
        dphi, kinks = self.activation.dphi, self.activation.kinks
        if self.activation.scale_free or q == 0:
            return self.weight_variance * self.activation.mean_square_slope(far=False)
        if q == math.inf:
            return self.weight_variance * self.activation.mean_square_slope(far=True)
        return self.weight_variance * gaussian_mean(lambda h: dphi(h) ** 2, q, kinks)

    def length_slope(self, q: float) -> float:
        """Slope of the length map, σ_w² E[hφ(h)φ′(h)]/q; q may be 0 (where φ(0) = 0) or ∞."""
        if self.activation.scale_free or q == 0 or q == math.inf:
            return self.chi(q)
        phi, dphi = self.activation.phi, self.activation.dphi
        mean = gaussian_mean(lambda h: h * phi(h) * dphi(h), q, self.activation.kinks)
        return self.weight_variance * mean / q

    def correlation(self, c: float, q: float) -> float:
        """(σ_w² E φ(u)φ(v) + σ_b²)/(σ_w² E φ(u)² + σ_b²), for u, v ~ N(0, q) with correlation c."""
        if not -1 <= c <= 1:
            raise ValueError(f"a correlation is between −1 and 1; got {c}")
        length = self.length(q)
        if c >= 0:
            return 1.0 - self._lost(1.0 - c, q) / length
        phi, kinks = self.activation.phi, self.activation.kinks
        if c == -1:
            product = gaussian_mean(lambda h: phi(h) * phi(-h), q, (*kinks, *(-k for k in kinks)))
        else:
            product = mean_of_product(phi, q, c, kinks)
        return (self.weight_variance * product + self.bias_variance) / length

    def correlation_spread(self, distance: float, q: float) -> float:
        """(1 − f(c))/(1 − c) at c = 1 − distance, with f the correlation map; precise as c → 1."""
        return self._lost(distance, q) / self.length(q) / distance

    def correlation_slope(self, c: float, q: float) -> float:
        """χ_c = σ_w² E φ′(u)φ′(v) · q/(σ_w² E φ² + σ_b²), the correlation map's slope at c."""
        if c == 1:
            return q * self.chi(q) / self.length(q)
        product = mean_of_product(self.activation.dphi, q, c, self.activation.kinks)
        return q * self.weight_variance * product / self.length(q)

    def _lost(self, distance: float, q: float) -> float:
        if distance == 0:
            return 0.0
        phi, kinks = self.activation.phi, self.activation.kinks
        return self.weight_variance * mean_of_conditional_variance(phi, q, distance, kinks)


def fixed_length(layer: RandomLayer, start: float) -> tuple[float, str]:
    """Where the length map, iterated from q_0 = start, comes to rest; why, if not at a number.

    Returns:
        q* and "". ∞ and the reason where q grows without bound. NaN and the reason where there is no
        single such point, or none was found.
    """
    activation = layer.activation
    if layer.weight_variance == 0:
        return layer.bias_variance, ""
    if activation.scale_free:
        return _scale_free_length(layer)

    at_zero = layer.bias_variance == 0 and float(activation.phi(np.zeros(1))[0]) == 0
    factor = layer.chi(0.0) if at_zero else math.inf

    def linear_to_zero(q: float, image: float) -> bool:
        """Whether below q the map is q times a factor ≤ 1, to rounding: then only 0 is left to go to."""
        return factor <= 1 + _SLOPE_TOLERANCE and abs(image / q - factor) <= _SLOPE_TOLERANCE

    q, image = start, layer.least_length(start)
    upward = image > q
    while True:
        if linear_to_zero(q, image):
            return 0.0, ""
        if image == q:
            return _stable(layer, q, q)
        if upward and q > _LARGEST:
            return _unbounded(layer)
        if not upward and at_zero and q < _SMALLEST:
            return 0.0, ""
        step = math.exp(_STEP if upward else -_STEP)
        following = max(image, q * step) if upward else min(image, q * step)
        # The map grows with q, so that following it jumps over no fixed point; the step may.
        if following == 0:
            return 0.0, ""
        image = layer.least_length(following)
        if image != following and (image > following) != upward:
            return _stable(layer, *sorted((q, following)))
        q = following


def _scale_free_length(layer: RandomLayer) -> tuple[float, str]:
    factor, bias = layer.chi(0.0), layer.bias_variance
    name = layer.activation.name
    if abs(factor - 1) <= _SLOPE_TOLERANCE:
        if bias > 0:
            return math.inf, f"q grows without bound, by σ_b² = {bias:g} per layer"
        return (
            math.nan,
            f"every q is a fixed point of {name} at this σ_w²: q stays what the input makes it",
        )
    if factor > 1:
        return math.inf, f"q grows without bound, by the factor σ_w² E φ² / q = {factor:.6g} per layer"
    return bias / (1 - factor), ""


def _unbounded(layer: RandomLayer) -> tuple[float, str]:
    factor = layer.chi(math.inf)
    if factor == math.inf:
        name = layer.activation.name
        return math.inf, f"{name} grows faster than linearly: from this start q grows without bound"
    if factor > 1 + _SLOPE_TOLERANCE:
        return math.inf, f"q grows without bound, in the end by the factor {factor:.6g} per layer"
    return math.nan, f"no fixed point of q was found below {_LARGEST:g}"


def log_root(function: Callable[[float], float], low: float, high: float) -> float:
    """The x in [low, high] with function(x) = 0, to 1e-13 of itself; the ends' values differ in sign."""
    from scipy.optimize import brentq

    first, last = math.log(low), math.log(high)

    def x(t: float) -> float:
        # At the ends, not exp(log(end)): a root may lie within a rounding of one.
        return low if t <= first else high if t >= last else math.exp(t)

    found: Any = brentq(lambda t: function(x(t)), first, last, xtol=1e-13)
    return x(float(found))


def _stable(layer: RandomLayer, low: float, high: float) -> tuple[float, str]:
    q = low
    if low < high:
        q = log_root(lambda x: layer.length(x) / x - 1.0, low, high)
    slope = layer.length_slope(q)
    if abs(slope) > 1 + CRITICAL_TOLERANCE:
        why = f"the fixed point q = {q:.6g} is not stable: the length map's slope there is {slope:.6g}"
        return math.nan, why
    return q, ""


def fixed_correlation(layer: RandomLayer, q: float, chi_1: float) -> tuple[float, float, str]:
    """The stable fixed point c* ≥ 0 of the correlation map at the length q = q*, and its slope there.

    The map is a power series in c with coefficients ≥ 0, so that it is convex on [0, 1], has the fixed
    point 1, where its slope is χ₁, and exactly one more in [0, 1) where χ₁ > 1 (Poole et al. 2016).

    Returns:
        c*, χ_c*, and "" or why they are NaN.
    """
    if math.isnan(chi_1) or layer.weight_variance == 0:
        known = layer.weight_variance == 0 and layer.bias_variance > 0
        return (1.0, 0.0, "") if known else (math.nan, math.nan, "there is no length q* to correlate at")
    if not (math.isfinite(q) and q > 0):
        return _scale_free_correlation(layer, q)
    if chi_1 <= 1 + CRITICAL_TOLERANCE:
        return 1.0, chi_1, ""
    if _decorrelated(layer, q):
        return 0.0, layer.correlation_slope(0.0, q), ""
    if layer.correlation_spread(_CLOSEST, q) <= 1:
        return math.nan, math.nan, f"c* is closer to 1 than {_CLOSEST:g}"
    # f(c) = c where 1 − f(c) = 1 − c; over ln(1 − c), so that c* near 1 is found as well as any other.
    distance = log_root(lambda d: layer.correlation_spread(d, q) - 1.0, _CLOSEST, 1.0)
    c = 1.0 - distance
    return c, layer.correlation_slope(c, q), ""


def _decorrelated(layer: RandomLayer, q: float) -> bool:
    """Whether f(0) = 0: an odd φ without biases, up to the rounding of E φ = 0."""
    mean = gaussian_mean(layer.activation.phi, q, layer.activation.kinks)
    return layer.bias_variance == 0 and layer.weight_variance * mean**2 <= 1e-24 * q


def _scale_free_correlation(layer: RandomLayer, q: float) -> tuple[float, float, str]:
    """The correlation map where q → 0 or ∞, or where every q is fixed: that of φ's two slopes."""
    negative, positive = layer.activation.slopes(far=q == math.inf)
    if not (math.isfinite(negative) and math.isfinite(positive)):
        return math.nan, math.nan, "there is no length q* to correlate at"
    if negative == positive == 0:
        why = "φ is flat at its limit: what correlations do there depends on how it gets there"
        return math.nan, math.nan, why
    if negative == positive:
        return (
            math.nan,
            math.nan,
            "in the limit the layers are linear and keep every correlation: c depends on the input",
        )
    # The map has slope 1 at c = 1 and lies above the diagonal: c → 1 algebraically (Hayou et al. 2019,
    # arXiv:1902.06853).
    return 1.0, 1.0, ""
