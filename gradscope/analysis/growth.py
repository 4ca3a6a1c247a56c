"""Laws of growth of Δ with depth, fitted to several depths, each with the weight the data leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.profile import Interval

__all__ = ["LAWS", "Growth", "fit_growth"]

Floats = npt.NDArray[np.float64]

#: Laws of growth of Δ with the number of blocks L; each is a line in x(L), with or without an intercept
#: (what the first and last block do differently). Piecewise laws cannot be extrapolated and are not here.
LAWS: Final[Mapping[str, tuple[str, bool, Callable[[Floats], Floats] | None]]] = MappingProxyType(
    {
        "constant": ("a", True, None),
        "linear": ("b·L", False, lambda depth: depth),
        "linear + ends": ("a + b·L", True, lambda depth: depth),
        "three halves + ends": ("a + b·L^(3/2)", True, lambda depth: depth**1.5),
        "root + ends": ("a + b·√L", True, np.sqrt),
        "logarithm": ("b·ln(1 + L)", False, np.log1p),
        "logarithm + ends": ("a + b·ln(1 + L)", True, np.log1p),
    }
)

#: The variance of Δ over replicates grows as L^γ; γ = 1 is a random walk. Prior of γ: its mean and sd.
_GROWTH_PRIOR: Final = (1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Line:
    """One law, fitted: centre and standard error of the mean at any depth."""

    x: Callable[[Floats], Floats] | None
    intercept: bool
    coefficients: Floats
    covariance: Floats

    def at(self, depth: float) -> tuple[float, float]:
        row = _design(np.asarray([depth]), self.x, self.intercept)[0]
        return float(row @ self.coefficients), math.sqrt(max(0.0, float(row @ self.covariance @ row)))


def _design(depths: Floats, x: Callable[[Floats], Floats] | None, intercept: bool) -> Floats:
    columns = [np.ones_like(depths)] if intercept else []
    columns += [x(depths)] if x is not None else []
    return np.column_stack(columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Growth:
    """Δ over depths, all laws fitted.

    Attributes:
        quantity: the quantity's name.
        kind: what a replicate is.
        depths: [K] ascending.
        lines: law → its line.
        weights: law → its weight.
        degrees: degrees of freedom of the spread over replicates.
        spread: function depth → standard deviation of Δ over replicates.
    """

    quantity: str
    kind: str
    depths: Floats
    lines: Mapping[str, _Line]
    weights: Mapping[str, float]
    degrees: float
    spread: Callable[[float], float]

    def quantile(self, depth: float, probability: float, *, single: bool) -> float:
        """Quantile of the mixture over laws, each Student's t."""
        from scipy.optimize import brentq
        from scipy.special import stdtr, stdtrit

        parts: list[tuple[float, float, float]] = []
        for name, weight in self.weights.items():
            centre, error = self.lines[name].at(depth)
            if single:
                error = math.hypot(error, self.spread(depth))
            if weight > 1e-6:
                parts.append((weight, centre, error))
        total = sum(weight for weight, _, _ in parts)
        reach = float(stdtrit(self.degrees, probability))
        ends = [centre + reach * error for _, centre, error in parts]
        low, high = min(ends), max(ends)
        if high - low < 1e-12 * max(1.0, abs(low)):
            return low

        def below(value: float) -> float:
            return (
                sum(
                    weight
                    * (
                        float(stdtr(self.degrees, (value - centre) / error))
                        if error > 0
                        else float(value >= centre)
                    )
                    for weight, centre, error in parts
                )
                / total
                - probability
            )

        if below(low) >= 0:
            return low
        if below(high) <= 0:
            return high
        root: Any = brentq(below, low, high)
        return float(root)

    def interval_at(self, depth: float, confidence: float, *, single: bool) -> Interval:
        """The mixture's mean and its central interval."""
        total = sum(self.weights.values())
        centre = sum(w * self.lines[name].at(depth)[0] for name, w in self.weights.items()) / total
        tail = (1 - confidence) / 2
        return Interval(
            estimate=centre,
            low=self.quantile(depth, tail, single=single),
            high=self.quantile(depth, 1 - tail, single=single),
            confidence=confidence,
            count=int(self.degrees) + len(self.depths),
        )

    def notes(self, depth: float) -> tuple[str, ...]:
        """How far this is from what was measured."""
        notes: list[str] = []
        if self.kind != "initialisation":
            notes.append(f"replicates are of the kind {self.kind!r}: about these models, no architecture")
        if self.depths[0] <= depth <= self.depths[-1]:
            return tuple(notes)
        far = depth / self.depths[-1] if depth > self.depths[-1] else self.depths[0] / depth
        notes.append(f"extrapolated by a factor of {far:.2g} in depth")
        if len(self.depths) < 3:
            notes.append("two depths cannot tell laws with ends apart: measure a third")
        return tuple(notes)


def fit_growth(depths: Floats, delta: Sequence[Floats], quantity: str, kind: str) -> Growth:
    """Fit every law to Δ of all replicates at all depths.

    Weighted least squares, Var Δ ∝ L^γ; weights exp(−BIC/2), flattened where no law fits (Birge's ratio).

    Args:
        depths: [K] numbers of blocks, ascending.
        delta: K arrays, Δ of the replicates at each depth, nats.
        quantity: the quantity's name.
        kind: what a replicate is.
    """
    counts = np.asarray([len(d) for d in delta], dtype=np.float64)
    means = np.asarray([d.mean() for d in delta])
    squares = np.asarray([float(np.sum((d - d.mean()) ** 2)) for d in delta])
    degrees = float(np.sum(counts - 1))
    exponent, uncertainty, centre = _variance_exponent(depths, squares, counts)
    relative = (depths / depths[-1]) ** exponent  # Var Δ at each depth, over that at the deepest
    variance = float(np.sum(squares / relative)) / degrees
    floor = (4 * np.finfo(np.float64).eps * max(1.0, float(np.max(np.abs(means))))) ** 2
    variance = max(variance, floor)
    size = float(np.sum(counts))
    lines: dict[str, _Line] = {}
    bic: dict[str, float] = {}
    misfit: dict[str, float] = {}
    for name, (_, intercept, x) in LAWS.items():
        design = _design(depths, x, intercept)
        if design.shape[1] > len(depths):
            continue
        weights = counts / (variance * relative)
        information = design.T @ (weights[:, None] * design)
        covariance = np.linalg.inv(information)
        coefficients = covariance @ design.T @ (weights * means)
        residual = means - design @ coefficients
        misfit[name] = float(np.sum(weights * residual**2))
        lines[name] = _Line(x=x, intercept=intercept, coefficients=coefficients, covariance=covariance)
        bic[name] = misfit[name] + design.shape[1] * math.log(size)
    # No law is exact. Where even the best misses the means by more than the spread allows, its misses
    # are errors of the laws: all uncertainties grow by as much (Birge's ratio), and weights flatten.
    rooms = {name: len(depths) - line.coefficients.size for name, line in lines.items()}
    ratios = [misfit[name] / rooms[name] for name in lines if rooms[name] > 0]
    exact = any(room == 0 for room in rooms.values())
    inflation = max(1.0, min(ratios)) if ratios and not exact else 1.0
    scores = {n: misfit[n] / inflation + (bic[n] - misfit[n]) for n in lines}
    best = min(scores.values())
    shares = {name: math.exp(-(score - best) / 2) for name, score in scores.items()}
    total = sum(shares.values())
    return Growth(
        quantity=quantity,
        kind=kind,
        depths=depths,
        lines={
            name: _Line(
                x=line.x,
                intercept=line.intercept,
                coefficients=line.coefficients,
                covariance=line.covariance * inflation,
            )
            for name, line in lines.items()
        },
        weights={name: share / total for name, share in shares.items()},
        degrees=degrees,
        # The mean of s² over the exponent's uncertainty, which grows with the distance extrapolated.
        spread=lambda depth: math.sqrt(
            variance
            * (depth / depths[-1]) ** exponent
            * math.exp(0.5 * (uncertainty * math.log(depth / centre)) ** 2)
        ),
    )


def _variance_exponent(depths: Floats, squares: Floats, counts: Floats) -> tuple[float, float, float]:
    """γ of Var Δ ∝ L^γ, its standard error, and the depth about which it turns.

    Regression of ln s² on ln L, with a prior around the random walk's 1; Var(ln s²) = ψ′((R − 1)/2) for
    Gaussian Δ.
    """
    from scipy.special import polygamma

    prior, width = _GROWTH_PRIOR
    x = np.log(depths)
    weights = 1 / np.asarray(polygamma(1, (counts - 1) / 2), dtype=np.float64)
    centre = float(np.average(x, weights=weights))
    if (squares <= 0).any():
        return prior, width, math.exp(centre)
    y = np.log(squares / (counts - 1))
    information = float(np.sum(weights * (x - centre) ** 2)) + 1 / width**2
    product = float(np.sum(weights * (x - centre) * y)) + prior / width**2
    return product / information, math.sqrt(1 / information), math.exp(centre)
