"""Means over Gaussian pre-activations by adaptive quadrature: E f(√q z) and pairs with correlation c.

Gauss–Hermite quadrature spreads its nodes over the width √q of the Gaussian. An activation changes
within a few units of its argument, so at large q a saturating one looks like a step to it and converges
as slowly as one. Here the range is cut into panels at the kinks, at distances of 1/2 to 32 around them
and at fixed multiples of the Gaussian's width; each panel is halved until halving changes nothing.

scipy's ``quad`` does the same for one integral at a time. The correlation map needs, for each of its
values, an inner integral at each of about a thousand outer nodes: they are batched here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.errors import QuantityError

__all__ = [
    "gaussian_mean",
    "integral",
    "mean_of_conditional_variance",
    "mean_of_product",
    "square_in_range",
]

Floats = npt.NDArray[np.float64]
Function = Callable[[Floats], Floats]

#: Half the range of z. The density is at its smallest normal float64 at 37.6: nothing lies beyond.
_RANGE: Final = 37.5
#: Half the range of the inner and outer integrals of pairs; the density is e^(−72) = 5e-32 of its peak.
_PAIR_RANGE: Final = 12.0
#: Cuts in units of the Gaussian's width.
_WIDTHS: Final = (-8.0, -3.0, -1.0, 0.0, 1.0, 3.0, 8.0)
#: Cuts in units of the activation's argument, around 0 and around every kink.
_DISTANCES: Final = (-32.0, -8.0, -2.0, -0.5, 0.0, 0.5, 2.0, 8.0, 32.0)
#: Change by halving, relative to ∫|f|, below which a panel is done. A halved panel's own error is smaller
#: by orders of magnitude for a smooth integrand.
_TOLERANCE: Final = 1e-12
_PAIR_TOLERANCE: Final = 1e-10
#: Conditional means, and deviations from them, are not resolved below this share of √E f².
_ROUNDING: Final = 1e-12
#: A jump inside a panel costs one halving per factor of two of precision.
_MOST_HALVINGS: Final = 60
#: More panels than any smooth function with kinks needs; a noisy function would double them for ever.
_MOST_PANELS: Final = 1_000_000
#: √q z in place of 0 where only the limit from each side is wanted.
_BESIDE_ZERO: Final = 1e-150

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)

Integrand = Callable[[Floats, npt.NDArray[np.int64]], Floats]


def _integrate(f: Integrand, edges: Floats, tolerance: float, floor: Floats | float = 0.0) -> Floats:
    """∫ f(x, j) dx of J functions at once, panel by panel.

    Args:
        f: (x [N, 16], number j of the function of each row [N]) → [N, 16].
        edges: [J, P + 1], ascending; empty panels are allowed.
        tolerance: largest change of a panel by halving, relative to ∫|f|.
        floor: [J], a change that is rounding and no longer pursued.

    Returns:
        [J].

    Raises:
        QuantityError: a panel does not converge, or f is not finite.
    """
    count = len(edges)
    floor = np.broadcast_to(floor, count)

    def rule(low: Floats, high: Floats, row: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        half = 0.5 * (high - low)
        values = f(low[:, None] + half[:, None] * (_NODES + 1.0), row)
        return half * (values @ _WEIGHTS), half * (np.abs(values) @ _WEIGHTS)

    def per_function(row: npt.NDArray[np.int64], values: Floats) -> Floats:
        return np.bincount(row, values, minlength=count).astype(np.float64)

    low, high = edges[:, :-1].ravel(), edges[:, 1:].ravel()
    row = np.repeat(np.arange(count), edges.shape[1] - 1)
    some = high > low
    low, high, row = low[some], high[some], row[some]
    whole, size = rule(low, high, row)
    total, done_size = np.zeros(count), np.zeros(count)
    scale = per_function(row, size)
    for _ in range(_MOST_HALVINGS):
        middle = 0.5 * (low + high)
        left, left_size = rule(low, middle, row)
        right, right_size = rule(middle, high, row)
        halves, halves_size = left + right, left_size + right_size
        scale = np.maximum(scale, done_size + per_function(row, halves_size))
        done = np.abs(halves - whole) <= tolerance * scale[row] + floor[row]
        total += per_function(row[done], halves[done])
        done_size += per_function(row[done], halves_size[done])
        if done.all():
            return total
        rest = ~done
        low, high = (
            np.concatenate([low[rest], middle[rest]]),
            np.concatenate([middle[rest], high[rest]]),
        )
        row = np.concatenate([row[rest], row[rest]])
        whole = np.concatenate([left[rest], right[rest]])
        if len(low) > _MOST_PANELS:
            break
    raise QuantityError(
        f"a Gaussian mean of the activation does not converge near z = {low[0]:.6g}: it jumps or has a "
        "singularity there. Name such points in the activation: Activation(..., kinks=(…,))."
    )


def _edges(mean: Floats, width: float, kinks: Sequence[float], reach: float) -> Floats:
    """Panels in z for the argument mean + width·z, one row per mean. [J] → [J, P + 1]."""
    marks = np.unique([k + d for k in (0.0, *kinks) for d in _DISTANCES])
    with np.errstate(over="ignore"):
        inside = (marks - mean[:, None]) / width
    fixed = np.broadcast_to([-reach, *_WIDTHS, reach], (len(mean), len(_WIDTHS) + 2))
    return np.sort(np.clip(np.concatenate([inside, fixed], axis=1), -reach, reach), axis=1)


def _density(z: Floats) -> Floats:
    return np.exp(-0.5 * z * z) / np.sqrt(2.0 * np.pi)


def _finite(values: Floats, at: Floats) -> Floats:
    """The values, or an error that says where one is not finite."""
    if not np.isfinite(values).all():
        where = np.broadcast_to(at, values.shape)[~np.isfinite(values)][0]
        raise QuantityError(
            f"the activation, its derivative or their product is not finite at {where:.6g}: it overflows "
            "there, or phi and dphi do not take arrays."
        )
    return values


def integral(function: Function, low: float, high: float) -> tuple[float, float]:
    """∫ f(x) dx and ∫ |f(x)| dx from low to high, without a weight.

    Raises:
        QuantityError: the first does not converge.
    """

    def f(x: Floats, _: npt.NDArray[np.int64]) -> Floats:
        return _finite(function(x), x)

    edges = np.linspace(low, high, 9)[None]
    return (
        float(_integrate(f, edges, _TOLERANCE)[0]),
        float(_integrate(lambda x, row: np.abs(f(x, row)), edges, _PAIR_TOLERANCE)[0]),
    )


def gaussian_mean(function: Function, q: float, kinks: Sequence[float] = ()) -> float:
    """E f(√q z), z ~ N(0, 1).

    Relative error about 1e-12 of E|f|. For q = 0 the limit from above, ½[f(0−) + f(0+)].

    Args:
        function: f, of arrays.
        q: the variance, ≥ 0.
        kinks: points where f or its derivative jumps.

    Raises:
        QuantityError: the mean does not converge or f overflows.
    """
    if q == 0:
        beside = np.asarray([-_BESIDE_ZERO, _BESIDE_ZERO])
        return float(np.mean(_finite(function(beside), beside)))
    width = float(np.sqrt(q))

    def f(z: Floats, _: npt.NDArray[np.int64]) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            return _finite(function(width * z), width * z) * _density(z)

    return float(_integrate(f, _edges(np.zeros(1), width, kinks, _RANGE), _TOLERANCE)[0])


def square_in_range(function: Function, q: float) -> bool:
    """Whether f(√q z)² is a finite float64 at both ends of what `gaussian_mean` integrates over."""
    with np.errstate(all="ignore"):
        ends = function(np.sqrt(q) * np.asarray([-_RANGE, _RANGE])) ** 2
    return bool(np.isfinite(ends).all())


def _conditional(
    function: Callable[[Floats, npt.NDArray[np.int64]], Floats],
    mean: Floats,
    width: float,
    kinks: Sequence[float],
    floor: Floats | float = 0.0,
) -> Floats:
    """E_w f(mean_j + width·w, j) for each j. [J] → [J]."""

    def f(w: Floats, row: npt.NDArray[np.int64]) -> Floats:
        return function(mean[row, None] + width * w, row) * _density(w)

    return _integrate(f, _edges(mean, width, kinks, _PAIR_RANGE), 0.1 * _PAIR_TOLERANCE, floor)


def _over_common_part(inner: Function, common: float, width: float, kinks: Sequence[float]) -> float:
    """E_z inner(common·z): the outer integral, over what two correlated arguments share."""

    def f(z: Floats, _: npt.NDArray[np.int64]) -> Floats:
        return inner(common * z.ravel()).reshape(z.shape) * _density(z)

    # The conditional mean changes where the argument crosses a kink, smoothed over the width.
    blurred = tuple(k + s * width for k in (0.0, *kinks) for s in (-8.0, -2.0, 2.0, 8.0))
    return float(
        _integrate(f, _edges(np.zeros(1), common, (*kinks, *blurred), _PAIR_RANGE), _PAIR_TOLERANCE)[0]
    )


def mean_of_conditional_variance(
    function: Function, q: float, distance: float, kinks: Sequence[float] = ()
) -> float:
    """½ E [f(u) − f(v)]² = E f² − E f(u)f(v), for u, v ~ N(0, q) with correlation c = 1 − distance.

    As E_z Var_w f(√(qc)·z + √(q(1 − c))·w), which keeps its relative precision as c → 1, where the
    difference of the two means would have none left.

    Args:
        function: f, of arrays.
        q: the variance, > 0.
        distance: 1 − c, in (0, 1].
        kinks: points where f or its derivative jumps.
    """
    common, width = float(np.sqrt(q * (1.0 - distance))), float(np.sqrt(q * distance))
    # Where f is saturated, f − centre is rounding: its square is not worth a relative precision.
    floor = _ROUNDING**2 * gaussian_mean(lambda h: function(h) ** 2, q, kinks)

    def variance(m: Floats) -> Floats:
        centre = _conditional(lambda u, _: function(u), m, width, kinks, np.sqrt(floor))
        return _conditional(lambda u, row: (function(u) - centre[row, None]) ** 2, m, width, kinks, floor)

    if common == 0:
        return float(variance(np.zeros(1))[0])
    return _over_common_part(variance, common, width, kinks)


def mean_of_product(function: Function, q: float, c: float, kinks: Sequence[float] = ()) -> float:
    """E f(u)·f(v), for u, v ~ N(0, q) with correlation c in (−1, 1).

    As E_z G(z)·G(±z) with G(z) = E_w f(√(q|c|)·z + √(q(1 − |c|))·w), the sign that of c.
    """
    common, width = float(np.sqrt(q * abs(c))), float(np.sqrt(q * (1.0 - abs(c))))
    floor = _ROUNDING * float(np.sqrt(gaussian_mean(lambda h: function(h) ** 2, q, kinks)))

    def given(m: Floats) -> Floats:
        return _conditional(lambda u, _: function(u), m, width, kinks, floor)

    if common == 0:
        return float(given(np.zeros(1))[0]) ** 2
    if c > 0:
        return _over_common_part(lambda m: given(m) ** 2, common, width, kinks)
    both = (*kinks, *(-k for k in kinks))
    return _over_common_part(lambda m: given(m) * given(-m), common, width, both)
