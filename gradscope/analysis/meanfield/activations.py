"""Activations for mean-field theory: φ, φ′ and the points where φ′ jumps, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.arguments import meant
from gradscope.analysis.meanfield.gaussian import integral
from gradscope.errors import QuantityError

__all__ = ["ACTIVATIONS", "Activation", "find_activation", "leaky_relu"]

Floats = npt.NDArray[np.float64]
Function = Callable[[Floats], Floats]

#: Where φ′ is looked at for its limit far out, and beside 0, where it may jump; uneven, so that an
#: oscillation is seen.
_FAR: Final = (1e8, 1.3e11, 2.9e14, 1.7e19, 1e24)
_BESIDE_ZERO: Final = (1e-75, 1.3e-90, 2.9e-110, 1.7e-130, 1e-150)
#: Slopes this close to each other have reached their limit.
_CONSTANT: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An activation function, elementwise.

    Attributes:
        name: what messages call it.
        phi: φ, from and to float64 arrays of any shape.
        dphi: φ′, likewise; at a kink any value.
        kinks: every point where φ′ jumps; also a point where φ bends within much less than 1. The
            quadrature is cut there. A jump of φ itself has no mean-field χ and is refused.
        scale_free: whether φ(ax) = aφ(x) for all a > 0 (linear, ReLU, leaky ReLU): then χ₁ does not
            depend on q.
    """

    name: str
    phi: Function
    dphi: Function
    kinks: tuple[float, ...] = ()
    scale_free: bool = False

    def slopes(self, *, far: bool) -> tuple[float, float]:
        """Limit of φ′ on the negative and the positive side: far out, or beside 0.

        ±∞ where φ′ grows without bound (x³ far out), 0 where it falls without bound, NaN where neither
        it nor anything else can be told from where it was looked at (an oscillation, a logarithm's
        logarithm).
        """
        at = np.asarray(_FAR if far else _BESIDE_ZERO)
        with np.errstate(all="ignore"):
            return _limit(self.dphi(-at)), _limit(self.dphi(at))

    def mean_square_slope(self, *, far: bool) -> float:
        """½[φ′(−)² + φ′(+)²] beside 0 (the limit of E φ′(√q z)² as q → 0) or far out (as q → ∞)."""
        negative, positive = self.slopes(far=far)
        if math.isinf(negative) or math.isinf(positive):
            return math.inf
        return 0.5 * (negative**2 + positive**2)


def _limit(slopes: Floats) -> float:
    """What five values on the way to a limit tell of it."""
    size = np.abs(slopes)
    if np.isnan(size).any():
        return math.nan
    first, last = float(size[0]), float(size[-1])
    if np.isfinite(slopes).all() and np.ptp(slopes) <= _CONSTANT * first:
        return float(slopes[-1])
    if (size[1:] >= size[:-1]).all() and last >= 2 * first:
        return math.copysign(math.inf, float(slopes[-1]))
    return 0.0 if (size[1:] <= size[:-1]).all() and last <= first / 2 else math.nan


def leaky_relu(slope: float) -> Activation:
    """max(x, 0) + slope·min(x, 0); slope = 0 is ReLU, −1 the modulus (Maas et al. 2013).

    Args:
        slope: φ′ for x < 0.
    """
    return Activation(
        name="relu" if slope == 0 else f"leaky_relu({slope:g})",
        phi=lambda x: np.where(x > 0, x, slope * x),
        dphi=lambda x: np.where(x > 0, 1.0, slope),
        kinks=(0.0,),
        scale_free=True,
    )


def _sech2(x: Floats) -> Floats:
    """1/cosh², without the cancellation of 1 − tanh² and the overflow of cosh²."""
    e = np.exp(-2.0 * np.abs(x))
    return 4.0 * e / (1.0 + e) ** 2


def _sigmoid(x: Floats) -> Floats:
    from scipy.special import expit

    return expit(x)


def _sigmoid_slope(x: Floats) -> Floats:
    return 0.25 * _sech2(0.5 * x)


def _erf(x: Floats) -> Floats:
    from scipy.special import erf

    return erf(x)


def _normal_cdf(x: Floats) -> Floats:
    from scipy.special import ndtr

    return ndtr(x)


def _squared(x: Floats) -> Floats:
    """x², cut off where e^(−x²/2) has long been 0, so that nothing overflows."""
    return np.minimum(np.abs(x), 1e3) ** 2


def _erf_slope(x: Floats) -> Floats:
    return (2.0 / math.sqrt(math.pi)) * np.exp(-_squared(x))


def _normal_density(x: Floats) -> Floats:
    return np.exp(-0.5 * _squared(x)) / np.sqrt(2.0 * np.pi)


def _gelu_slope(x: Floats) -> Floats:
    return _normal_cdf(x) + np.clip(x, -1e3, 1e3) * _normal_density(x)


#: The approximation's argument √(2/π)(x + a·x³), Hendrycks & Gimpel 2016, arXiv:1606.08415.
_GELU_CUBIC: Final = 0.044715


def _gelu_tanh(x: Floats) -> Floats:
    y = np.clip(x, -1e3, 1e3)
    return x * _sigmoid(np.sqrt(8.0 / np.pi) * (y + _GELU_CUBIC * y**3))


def _gelu_tanh_slope(x: Floats) -> Floats:
    y = np.clip(x, -1e3, 1e3)
    inner = np.sqrt(2.0 / np.pi) * (y + _GELU_CUBIC * y**3)
    bent = np.sqrt(2.0 / np.pi) * (1.0 + 3.0 * _GELU_CUBIC * y**2)
    return _sigmoid(2.0 * inner) + 0.5 * y * _sech2(inner) * bent


def _silu_slope(x: Floats) -> Floats:
    return _sigmoid(x) + np.clip(x, -1e3, 1e3) * _sigmoid_slope(x)


def _exp_below_zero(x: Floats) -> Floats:
    return np.exp(np.minimum(x, 0.0))


#: λ and α of Klambauer et al. 2017, arXiv:1706.02515: q = 1 is a fixed point at σ_w² = 1.
_SELU: Final = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)


def _selu(x: Floats) -> Floats:
    scale, alpha = _SELU
    return scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def _selu_slope(x: Floats) -> Floats:
    scale, alpha = _SELU
    return scale * np.where(x > 0, 1.0, alpha * _exp_below_zero(x))


def _linear() -> Activation:
    return Activation(name="linear", phi=lambda x: x, dphi=np.ones_like, scale_free=True)


def _made(name: str, phi: Function, dphi: Function, *kinks: float) -> Activation:
    return Activation(name=name, phi=phi, dphi=dphi, kinks=kinks)


#: Every activation by name. Parameters are torch's defaults; `leaky_relu` takes another slope.
ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "linear": _linear(),
        "relu": leaky_relu(0.0),
        "leaky_relu": leaky_relu(0.01),
        "tanh": _made("tanh", np.tanh, _sech2),
        "hardtanh": _made(
            "hardtanh",
            lambda x: np.clip(x, -1.0, 1.0),
            lambda x: np.where(np.abs(x) < 1, 1.0, 0.0),
            -1.0,
            1.0,
        ),
        "erf": _made("erf", _erf, _erf_slope),
        "sin": _made("sin", np.sin, np.cos),
        "sigmoid": _made("sigmoid", _sigmoid, _sigmoid_slope),
        "softplus": _made("softplus", lambda x: np.logaddexp(0.0, x), _sigmoid),
        # The exact form, x·P(z < x).
        "gelu": _made("gelu", lambda x: x * _normal_cdf(x), _gelu_slope),
        "gelu_tanh": _made("gelu_tanh", _gelu_tanh, _gelu_tanh_slope),
        "silu": _made("silu", lambda x: x * _sigmoid(x), _silu_slope),
        "elu": _made(
            "elu", lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))), _exp_below_zero, 0.0
        ),
        "selu": _made("selu", _selu, _selu_slope, 0.0),
    }
)

_OTHER_NAMES: Final = {"identity": "linear", "swish": "silu", "gelu_new": "gelu_tanh"}


def find_activation(activation: str | Activation | tuple[Function, Function]) -> Activation:
    """The activation of that name, or a user's own, checked.

    Args:
        activation: a name in `ACTIVATIONS` (``identity``, ``swish`` and ``gelu_new`` are other names),
            an `Activation`, or a pair (φ, φ′) of functions of arrays.

    Raises:
        QuantityError: no such name, or a φ′ that is not the derivative of φ.
    """
    if isinstance(activation, str):
        known = ACTIVATIONS.get(_OTHER_NAMES.get(activation, activation))
        if known is None:
            raise QuantityError(
                f"no activation {activation!r}. {meant(activation, (*ACTIVATIONS, *_OTHER_NAMES))}The "
                f"activations are {', '.join(ACTIVATIONS)}. One's own: "
                "Activation(name=…, phi=…, dphi=…, kinks=(…,))."
            )
        return known
    if isinstance(activation, tuple):
        phi, dphi = activation
        activation = Activation(name=getattr(phi, "__name__", "phi"), phi=phi, dphi=dphi)
    if not isinstance(activation, Activation):
        raise TypeError(
            "an activation is a name, an Activation or a pair (phi, dphi) of functions; got an object of "
            f"type {type(activation).__name__}."
        )
    if activation not in ACTIVATIONS.values():
        _check(activation)
    return activation


def _check(activation: Activation) -> None:
    """∫φ′ must be the difference of φ between any two points; also across the kinks."""
    points = np.unique([-16.0, -4.0, -1.0, 0.0, 1.0, 4.0, 16.0, *activation.kinks])
    values: Any = activation.phi(points)
    if np.shape(values) != points.shape or np.shape(activation.dphi(points)) != points.shape:
        raise QuantityError(
            f"phi and dphi of {activation.name!r} must map an array to one of the same shape; "
            f"{points.shape} became {np.shape(values)} and {np.shape(activation.dphi(points))}. Use "
            "functions of numpy."
        )
    for low, high, rise in zip(points, points[1:], np.diff(values), strict=False):
        area, size = integral(activation.dphi, float(low), float(high))
        if not abs(area - rise) <= 1e-6 * max(size, abs(rise)):
            raise QuantityError(
                f"dphi of {activation.name!r} is not the derivative of phi: between {low:g} and {high:g} "
                f"phi rises by {rise:.6g} and the integral of dphi is {area:.6g}. Either dphi is wrong, "
                "or phi jumps there, and then mean-field theory has no χ for it."
            )
    if activation.scale_free and not np.allclose(
        activation.phi(points * 3.0), 3.0 * values, rtol=1e-9, atol=0
    ):
        raise QuantityError(f"{activation.name!r} is not scale-free: φ(3x) differs from 3φ(x).")
