"""The mean-field theory of a wide plain net at initialisation: its fixed point, χ₁ and depth scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from gradscope.analysis.meanfield.activations import Activation, Function, find_activation
from gradscope.analysis.meanfield.fixed_point import (
    CRITICAL_TOLERANCE,
    RandomLayer,
    fixed_correlation,
    fixed_length,
    log_root,
)
from gradscope.analysis.meanfield.gaussian import square_in_range
from gradscope.errors import QuantityError

__all__ = ["MeanField", "critical_line", "critical_weight_variance", "mean_field"]

Floats = npt.NDArray[np.float64]
Phase = Literal["ordered", "critical", "chaotic", "unknown"]

#: Where a critical point is looked for, and how finely (q, on a logarithmic grid).
_LENGTHS: Final = np.geomspace(1e-7, 1e9, 129)
_SMALL_LENGTH: Final = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanField:
    """What mean-field theory says of a wide plain net h_{l+1} = W φ(h_l) + b at initialisation.

    ‖δ‖² is multiplied by χ₁ in each layer towards the input, once the lengths have reached q*.

    Attributes:
        activation: φ.
        weight_variance: σ_w² = fan_in · Var W.
        bias_variance: σ_b².
        q_star: the length q = E h² at which layers come to rest. 0 and ∞ are limits; NaN: see `reasons`.
        chi_1: χ₁ = σ_w² E φ′(√q* z)²: the factor of ‖δ‖² per layer, and the slope of the correlation
            map at c = 1. ∞ where q* is and φ grows faster than linearly.
        chi_q: slope of the length map at q*.
        c_star: the correlation that two inputs come to have: the correlation map's stable fixed point.
        chi_c: slope of the correlation map at c*.
        increment: r = ½ ln χ₁, nats per layer: of ln‖δ‖, towards the input; < 0 is vanishing.
        gradient_depth_scale_layers: ξ_∇ = 1/|ln χ₁|: ‖δ‖² changes by the factor e over it and the norm
            by e^½. ∞ at criticality.
        correlation_depth_scale_layers: ξ_c = 1/|ln χ_c|, over which c − c* falls by e; ∞: more slowly
            than any exponential.
        length_depth_scale_layers: ξ_q = 1/|ln χ_q|, over which q − q* falls by e.
        phase: ``ordered`` (χ₁ < 1, gradients vanish), ``critical`` (χ₁ = 1 within 1e-9), ``chaotic``
            (χ₁ > 1, gradients explode), or ``unknown``. For activations that are not bounded this says
            nothing about correlations: those of ReLU nets tend to 1 for every σ_w².
        reasons: name of each attribute that is NaN or that has no finite value → why.
    """

    activation: Activation
    weight_variance: float
    bias_variance: float
    q_star: float
    chi_1: float
    chi_q: float
    c_star: float
    chi_c: float
    increment: float
    gradient_depth_scale_layers: float
    correlation_depth_scale_layers: float
    length_depth_scale_layers: float
    phase: Phase
    reasons: Mapping[str, str]

    @property
    def layer(self) -> RandomLayer:
        """The layer's maps of lengths and correlations, at any q and c."""
        return RandomLayer(
            activation=self.activation,
            weight_variance=self.weight_variance,
            bias_variance=self.bias_variance,
        )

    @property
    def reason(self) -> str:
        """`reasons` in one line; empty where every number is finite."""
        by_text: dict[str, list[str]] = {}
        for name, text in self.reasons.items():
            by_text.setdefault(text, []).append(name)
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_text.items())

    def __str__(self) -> str:
        lines = [
            f"{self.activation.name}, σ_w² = {self.weight_variance:g}, σ_b² = {self.bias_variance:g}: "
            f"{self.phase}",
            f"  χ₁ = {self.chi_1:.6g}, {self.increment:+.4g} nats per layer, "
            f"ξ_∇ = {self.gradient_depth_scale_layers:.4g} layers",
            f"  q* = {self.q_star:.6g} (ξ_q = {self.length_depth_scale_layers:.4g}), "
            f"c* = {self.c_star:.6g} (ξ_c = {self.correlation_depth_scale_layers:.4g})",
        ]
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join(lines)


def mean_field(
    activation: str | Activation | tuple[Function, Function],
    weight_variance: float,
    bias_variance: float = 0.0,
    *,
    q_0: float = 1.0,
) -> MeanField:
    """Mean-field theory of a wide plain net with Gaussian (or any i.i.d.) weights at initialisation.

    q = σ_w² E φ(√q z)² + σ_b², χ₁ = σ_w² E φ′(√q* z)² (Poole et al. 2016, arXiv:1606.05340; Schoenholz
    et al. 2017, arXiv:1611.01232). All means by adaptive quadrature, to about 1e-11.

    ::

        mean_field("tanh", 1.0, 0.05).gradient_depth_scale_layers    # 3.627
        mean_field("tanh", weight_variance_of("torch", 400, 400), bias_variance_of("torch", 400, 400))

    Args:
        activation: a name in `ACTIVATIONS`, an `Activation`, or a pair (φ, φ′) of functions of arrays.
        weight_variance: σ_w² = fan_in · Var W.
        bias_variance: σ_b².
        q_0: where the iteration of the length map starts: it matters only where an activation has
            several fixed points (GELU, SiLU).

    Raises:
        QuantityError: no such activation, a φ′ that is not φ's derivative, or a φ that overflows.
    """
    if not (math.isfinite(q_0) and q_0 > 0):
        raise ValueError(f"q_0 is the variance of the first pre-activations, finite and > 0; got {q_0}")
    layer = RandomLayer(
        activation=find_activation(activation),
        weight_variance=float(weight_variance),
        bias_variance=float(bias_variance),
    )
    q, why = fixed_length(layer, float(q_0))
    known = not math.isnan(q) or layer.activation.scale_free
    chi_1 = layer.chi(q) if known else math.nan
    chi_q = layer.length_slope(q) if known else math.nan
    if known and math.isnan(chi_1):
        known, why = False, why or "the slope of φ has no known limit at q*"
    c, chi_c, why_no_correlation = fixed_correlation(layer, q, chi_1)
    reasons: dict[str, str] = {}
    if why:
        reasons["q_star"] = why
    if not known:
        reasons |= dict.fromkeys(
            ("chi_1", "chi_q", "increment", "gradient_depth_scale_layers", "length_depth_scale_layers"),
            why,
        )
    elif chi_1 == math.inf:
        reasons |= dict.fromkeys(
            ("chi_1", "chi_q", "increment"),
            "φ′ grows with q: gradients grow faster than by any factor per layer",
        )
    elif chi_1 == 0:
        reasons["increment"] = "χ₁ = 0: gradients fall faster than by any factor per layer"
    elif abs(chi_1 - 1) <= CRITICAL_TOLERANCE:
        reasons["gradient_depth_scale_layers"] = "critical: no exponential change"
    if known and abs(abs(chi_q) - 1) <= CRITICAL_TOLERANCE:
        reasons["length_depth_scale_layers"] = "q does not approach q* exponentially"
    if why_no_correlation:
        reasons |= dict.fromkeys(
            ("c_star", "chi_c", "correlation_depth_scale_layers"), why_no_correlation
        )
    elif abs(chi_c - 1) <= CRITICAL_TOLERANCE:
        reasons["correlation_depth_scale_layers"] = "c does not approach c* exponentially"
    return MeanField(
        activation=layer.activation,
        weight_variance=layer.weight_variance,
        bias_variance=layer.bias_variance,
        q_star=q,
        chi_1=chi_1,
        chi_q=chi_q,
        c_star=c,
        chi_c=chi_c,
        increment=0.5 * math.log(chi_1) if chi_1 > 0 else (-math.inf if chi_1 == 0 else math.nan),
        gradient_depth_scale_layers=_depth_scale(chi_1),
        correlation_depth_scale_layers=_depth_scale(chi_c),
        length_depth_scale_layers=_depth_scale(chi_q),
        phase=_phase(chi_1),
        reasons=MappingProxyType(reasons),
    )


def _depth_scale(factor: float) -> float:
    """1/|ln|factor||: ∞ for ±1, 0 for 0 and ∞."""
    size = abs(factor)
    if math.isnan(size):
        return math.nan
    if abs(size - 1) <= CRITICAL_TOLERANCE:
        return math.inf
    return 1.0 / abs(math.log(size)) if 0 < size < math.inf else 0.0


def _phase(chi_1: float) -> Phase:
    if math.isnan(chi_1):
        return "unknown"
    if abs(chi_1 - 1) <= CRITICAL_TOLERANCE:
        return "critical"
    return "ordered" if chi_1 < 1 else "chaotic"


def critical_weight_variance(
    activation: str | Activation | tuple[Function, Function], bias_variance: float = 0.0
) -> float:
    """σ_w² with χ₁ = 1 at this σ_b²: gradients neither vanish nor explode exponentially.

    Along the line q is the parameter: σ_w² = 1/E φ′(√q z)² and σ_b² = q − σ_w² E φ(√q z)² (Schoenholz et
    al. 2017, arXiv:1611.01232; Hayou et al. 2019, arXiv:1902.06853). Without biases, and with φ(0) = 0,
    q* is 0 and σ_w² = 1/φ′(0)²: 1 for tanh. For ReLU χ₁ = σ_w²/2 whatever q: the answer is 2 for every
    σ_b², although q has a fixed point only at σ_b² = 0.

    Raises:
        QuantityError: there is no such σ_w²: no length q has χ₁ = 1 at this σ_b² (softplus), its fixed
            point is not stable, so that no net comes to rest there (GELU and SiLU at small σ_b²,
            whatever grows faster than linearly), or there are several.
    """
    if not (math.isfinite(bias_variance) and bias_variance >= 0):
        raise ValueError(f"bias_variance is a variance, finite and ≥ 0; got {bias_variance}")
    found = find_activation(activation)
    unit = RandomLayer(activation=found, weight_variance=1.0, bias_variance=0.0)
    if found.scale_free:
        return 1.0 / unit.chi(0.0)
    if bias_variance == 0 and float(found.phi(np.zeros(1))[0]) == 0 and unit.chi(0.0) > 0:
        # q → 0 from above if the length map lies below the diagonal there.
        if unit.mean_square(_SMALL_LENGTH) / unit.chi(0.0) <= _SMALL_LENGTH * (1 + 1e-12):
            return 1.0 / unit.chi(0.0)
        raise _no_critical_point(found, bias_variance, "the fixed point q* = 0 is not stable")
    points = _critical_lengths(unit, bias_variance)
    slopes = [unit.length_slope(q) / unit.chi(q) for q in points]
    stable = [q for q, slope in zip(points, slopes, strict=True) if abs(slope) <= 1 + CRITICAL_TOLERANCE]
    if len(stable) != 1:
        if stable:
            why = f"q* = {', '.join(f'{q:.4g}' for q in stable)} all have it, each at its own σ_w²"
        elif points:
            why = f"the fixed point q* = {points[0]:.4g} that has it is not stable"
        else:
            why = f"no q* was found to have it, between {_LENGTHS[0]:g} and {_LENGTHS[-1]:g}"
        raise _no_critical_point(found, bias_variance, why)
    return 1.0 / unit.chi(stable[0])


def _critical_lengths(unit: RandomLayer, bias_variance: float) -> list[float]:
    """Every q on the grid's range with q − E φ²/E φ′² = σ_b². ``unit`` has σ_w² = 1."""

    def excess(q: float) -> float:
        slope = unit.chi(q)
        # Where the slope underflows, no σ_w² is finite: E φ²/E φ′² has grown without bound.
        return (q - unit.mean_square(q) / slope - bias_variance) if slope > 0 else -math.inf

    both = (unit.activation.phi, unit.activation.dphi)
    # Where a square leaves float64, nothing can be computed any more.
    grid = list(takewhile(lambda q: all(square_in_range(f, q) for f in both), _LENGTHS.tolist()))
    values = np.asarray([excess(q) for q in grid])
    changes = np.flatnonzero((values[:-1] < 0) != (values[1:] < 0))
    return [log_root(excess, grid[i], grid[i + 1]) for i in changes]


def _no_critical_point(activation: Activation, bias_variance: float, why: str) -> QuantityError:
    if activation.mean_square_slope(far=True) == math.inf:
        why += f"; {activation.name} grows faster than linearly, and so does χ with q"
    return QuantityError(
        f"{activation.name} has no critical σ_w² (χ₁ = 1) at σ_b² = {bias_variance:g}: {why}. Look at "
        "mean_field(activation, weight_variance, bias_variance) over weight variances."
    )


def critical_line(
    activation: str | Activation | tuple[Function, Function], bias_variances: Iterable[float]
) -> Floats:
    """The critical σ_w² at each of the σ_b²: the line between order and chaos in (σ_b², σ_w²). [n] → [n].

    Raises:
        QuantityError: it does not exist at one of them; see `critical_weight_variance`.
    """
    found = find_activation(activation)
    return np.asarray([critical_weight_variance(found, b) for b in bias_variances], dtype=np.float64)
