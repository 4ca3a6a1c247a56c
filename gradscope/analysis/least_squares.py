"""Generalised least squares of increments: whitening, Huber weights, and the fit of one family.

Replicates share the mean curve and have independent noise. Everything is in increments z [R, n], in
which the free level of each replicate has cancelled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.families import Family, Positions
from gradscope.analysis.walk import noise_covariance

__all__ = ["Fitted", "Problem", "fit_family", "huber_weights", "mean_increments", "shrunk_covariance"]

Floats = npt.NDArray[np.float64]

#: Residual increments beyond so many robust standard deviations lose weight (Huber 1964, Annals of
#: Mathematical Statistics 35:73). At 2, independent Gaussian increments lose 1 % of their information.
HUBER_BEND: Final = 2.0

#: Consistency factor of the median absolute deviation for the standard deviation of a Gaussian.
_MAD_TO_SD: Final = 1.482602218505602


#: A knot is looked for at no more positions than this, evenly spaced: nets of hundreds of layers.
_MOST_KNOTS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Increments and their noise, made white.

    Attributes:
        z: [R, n] increments.
        at: the n + 1 positions.
        whiten: [R, n, n], inverse Cholesky factors of Cov(z_r)/s².
        white: [R, n], the increments, whitened.
        log_determinant: Σ_r ln det(Cov(z_r)/s²).
        floor: smallest residual variance that means anything: rounding of the values.
    """

    z: Floats
    at: Positions
    whiten: Floats
    white: Floats
    log_determinant: float
    floor: float

    @classmethod
    def of(
        cls, z: Floats, at: Positions, *, ratio: float, weights: Floats, covariance: Floats | None = None
    ) -> Problem:
        """With the random-walk covariance of that noise ratio, or with a covariance that is given.

        A weight w < 1 takes an increment for a draw with the variance 1/w times larger.
        """
        gaps = np.diff(at.s)
        base = noise_covariance(gaps, ratio) if covariance is None else covariance
        extra = (1 / weights - 1) * np.diag(base)
        factors = np.linalg.cholesky(base[None] + extra[:, :, None] * np.eye(len(gaps)))
        identity = np.broadcast_to(np.eye(len(gaps)), factors.shape)
        whiten: Floats = np.asarray(np.linalg.solve(factors, identity), dtype=np.float64)
        rounding = 4 * np.finfo(np.float64).eps * max(1.0, float(np.max(np.abs(np.cumsum(z, axis=1)))))
        return cls(
            z=z,
            at=at,
            whiten=whiten,
            white=np.einsum("rij,rj->ri", whiten, z),
            log_determinant=2 * float(np.sum(np.log(np.diagonal(factors, axis1=1, axis2=2)))),
            floor=rounding**2,
        )

    @property
    def size(self) -> int:
        """R·n."""
        return self.z.size

    def solve(self, x: Floats, fixed: Floats) -> tuple[Floats, float]:
        """Coefficients b and the sum of squares of z − fixed − x·b, whitened. x [n, p], fixed [n]."""
        u = (self.white - self.whiten @ fixed if fixed.any() else self.white).ravel()
        if x.shape[1] == 0:
            return np.zeros(0), float(u @ u)
        design = (self.whiten @ x).reshape(-1, x.shape[1])
        coefficients: Floats = np.asarray(np.linalg.lstsq(design, u, rcond=None)[0], dtype=np.float64)
        residual = u - design @ coefficients
        return coefficients, float(residual @ residual)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """One family fitted to one problem.

    Attributes:
        family: the family.
        coefficients: [len(linear)] b.
        shape: the shape's numbers.
        mean: [n] increments of the fitted curve.
        square: whitened sum of squares.
        deviance: −2 ln likelihood, up to a constant that all families share.
        knots: shape values within the 95 % likelihood region, where the search is over knots.
    """

    family: Family
    coefficients: Floats
    shape: tuple[float, ...]
    mean: Floats
    square: float
    deviance: float
    knots: tuple[float, ...] = ()


def mean_increments(
    family: Family, at: Positions, coefficients: Floats, shape: Sequence[float]
) -> Floats:
    """[n] increments of the family's curve along the pass."""
    x, fixed = _design(family, at, shape)
    return x @ coefficients + fixed


def _design(family: Family, at: Positions, shape: Sequence[float]) -> tuple[Floats, Floats]:
    columns = np.diff(family.basis(at, shape), axis=0)
    free = len(family.linear)
    return columns[:, :free], columns[:, free:].sum(1)


def fit_family(family: Family, problem: Problem) -> Fitted | None:
    """Generalised least squares, with the shape searched. None where there are too few increments."""
    if problem.z.shape[1] < family.size or (problem.size <= family.size + 1):
        return None

    def deviance_of(square: float) -> float:
        variance = max(square / problem.size, problem.floor)
        return problem.size * math.log(variance) + problem.log_determinant

    def square_at(shape: Sequence[float]) -> float:
        return problem.solve(*_design(family, problem.at, shape))[1]

    knots: tuple[float, ...] = ()
    if family.search == "knots":
        # The knot stands on a position that both lines share, with three points on each side.
        inner = problem.at.s[2:-2]
        candidates = [float(s) for s in inner[:: max(1, -(-len(inner) // _MOST_KNOTS))]]
        if not candidates:
            return None
        squares = [square_at((knot,)) for knot in candidates]
        best = min(squares)
        shape: tuple[float, ...] = (candidates[squares.index(best)],)
        limit = deviance_of(best) + 3.841458820694124  # 95 % of chi-squared, one degree of freedom
        knots = tuple(
            k for k, square in zip(candidates, squares, strict=True) if deviance_of(square) <= limit
        )
    elif family.search == "continuous":
        shape = _searched(family, square_at)
    else:
        shape = ()
    coefficients, square = problem.solve(*_design(family, problem.at, shape))
    return Fitted(
        family=family,
        coefficients=coefficients,
        shape=shape,
        mean=mean_increments(family, problem.at, coefficients, shape),
        square=square,
        deviance=deviance_of(square),
        knots=knots,
    )


_GRID: Final = 9


def _searched(family: Family, square_at: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
    """The shape with the least sum of squares: a grid, then a local search from its best point."""
    from scipy.optimize import minimize, minimize_scalar

    logs = [(math.log(low), math.log(high)) for low, high in family.bounds]
    grids = [np.linspace(low, high, _GRID) for low, high in logs]
    points = list(itertools.product(*grids))
    squares = [float(square_at([math.exp(v) for v in point])) for point in points]
    start = points[int(np.argmin(squares))]
    if len(logs) == 1:
        width = (logs[0][1] - logs[0][0]) / (_GRID - 1)
        inside = (max(logs[0][0], start[0] - width), min(logs[0][1], start[0] + width))
        found: Any = minimize_scalar(
            lambda v: square_at([math.exp(v)]), bounds=inside, method="bounded", options={"xatol": 1e-4}
        )
        candidates = [(float(found.x),), start]
    else:
        result: Any = minimize(
            lambda v: square_at([math.exp(x) for x in v]),
            start,
            method="Nelder-Mead",
            bounds=logs,
            options={"maxfev": 150, "xatol": 1e-3, "fatol": 1e-9},
        )
        candidates = [tuple(float(x) for x in result.x), start]
    best = min(candidates, key=lambda c: float(square_at([math.exp(v) for v in c])))
    return tuple(math.exp(v) for v in best)


def huber_weights(z: Floats, at: Positions, families: Sequence[Family], ratio: float) -> Floats:
    """Weights in (0, 1] of every increment [R, n]: below 1 only where *no* family explains it.

    Each family is fitted by iteratively reweighted least squares; the residuals' scale is the smallest
    median absolute deviation among them. A bad increment is a permanent step in the profile, so the
    increment is weighted and never a layer dropped.
    """
    gaps = np.diff(at.s)
    unit = np.sqrt(np.diagonal(noise_covariance(gaps, ratio)))
    ones = np.ones_like(z)
    residuals: list[Floats] = []
    for family in families:
        weights, residual = ones, None
        for _ in range(5):
            fitted = fit_family(family, Problem.of(z, at, ratio=ratio, weights=weights))
            if fitted is None:
                break
            residual = (z - fitted.mean) / unit
            weights = _huber(residual, _MAD_TO_SD * float(np.median(np.abs(residual))))
            if family.search != "none":
                break  # a shape that is searched anew would chase the outlier that it is to reveal
        if residual is not None:
            residuals.append(residual)
    if not residuals:
        return ones
    scale = min(_MAD_TO_SD * float(np.median(np.abs(r))) for r in residuals)
    return np.max([_huber(r, scale) for r in residuals], axis=0)


def _huber(residual: Floats, scale: float) -> Floats:
    size = np.abs(residual)
    if scale == 0.0:
        return np.ones_like(residual)
    return np.minimum(1.0, HUBER_BEND * scale / np.maximum(size, HUBER_BEND * scale))


def shrunk_covariance(z: Floats, gaps: Floats, ratio: float) -> Floats:
    """Empirical covariance of the increments over replicates, shrunk to the random walk's. [n, n].

    (1 − λ)S + λT, T = s²(diag(g) + ρDDᵀ) with the same trace, and λ that minimises the expected squared
    error (Ledoit & Wolf 2003, Journal of Empirical Finance 10:603; target without estimated correlation).
    """
    replicates, n = z.shape
    centred = z - z.mean(0)
    sample = centred.T @ centred / (replicates - 1)
    target = noise_covariance(gaps, ratio)
    if np.trace(sample) == 0:
        return target  # replicates without any spread: the walk's covariance, up to its scale
    target = target * (np.trace(sample) / np.trace(target))
    products = np.einsum("ri,rj->rij", centred, centred)
    variance = float(np.sum(np.var(products, axis=0, ddof=1))) * replicates / (replicates - 1) ** 2
    distance = float(np.sum((sample - target) ** 2))
    shrink = 1.0 if distance == 0 else min(1.0, max(1 / n, variance / distance))
    return (1 - shrink) * sample + shrink * target
