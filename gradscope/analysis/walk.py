"""Increments of a log-profile as a random walk seen through noise.

Over depth the logarithm of a gradient's norm is a random walk: every layer multiplies it by a random
factor (Hanin 2018, arXiv:1801.03744), so that neighbouring values agree and far ones do not. Between
positions, with gaps g_i (1 for neighbouring layers), the increments z_i = y_{i+1} − y_i then have

    Cov(z) = σ_r² diag(g) + σ_m² D Dᵀ = σ_r² (diag(g) + ρ D Dᵀ),

D the difference matrix, σ_r² the variance per layer of the walk, σ_m² that of noise which does not
accumulate, ρ = σ_m²/σ_r². A level, the same for all depths, has cancelled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "NOISE_RATIOS",
    "Noise",
    "independent_variance",
    "long_run_variance",
    "noise_covariance",
    "noise_ratio",
]

Floats = npt.NDArray[np.float64]

#: Values of ρ = σ_m²/σ_r² that are tried; ∞ is noise alone, a curve without any walk.
NOISE_RATIOS: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The two standard deviations of a profile's noise.

    Attributes:
        walk: σ_r, nats per √layer: accumulates over depth.
        measurement: σ_m, nats per position: does not.
    """

    walk: float
    measurement: float

    @classmethod
    def of(cls, scale: float, ratio: float) -> Noise:
        """From the scale s and ρ, with Cov(z) = s²·(diag(g) + ρDDᵀ), or s²·DDᵀ for ρ = ∞."""
        if math.isinf(ratio):
            return cls(walk=0.0, measurement=scale)
        return cls(walk=scale, measurement=scale * math.sqrt(ratio))


def noise_covariance(gaps: Floats, ratio: float) -> Floats:
    """Cov(z)/σ_r² of the increments; Cov(z)/σ_m² for ratio = ∞. [n] → [n, n]."""
    n = len(gaps)
    second = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    return second if math.isinf(ratio) else np.diag(gaps) + ratio * second


@lru_cache(maxsize=256)
def _modes(gaps: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Eigenvalues and scaled eigenvectors that make every Cov(z) diagonal at once.

    Cov(z) = G^½(I + ρM)G^½ with M = G^−½DDᵀG^−½ = QΛQᵀ, so Qᵀ G^−½ z has variances 1 + ρΛ.
    """
    root = np.sqrt(np.asarray(gaps))
    values, vectors = np.linalg.eigh(noise_covariance(np.asarray(gaps), math.inf) / np.outer(root, root))
    return values, vectors / root[:, None]


def noise_ratio(z: Floats, gaps: Floats) -> float:
    """ρ by restricted maximum likelihood over `NOISE_RATIOS`.

    With several replicates the mean increment at every depth is free: what replicates have in common
    cannot pass for noise. With one replicate only the mean over all depths is.

    Args:
        z: [R, n] increments.
        gaps: [n] their lengths in layers.
    """
    replicates, n = z.shape
    values, vectors = _modes(tuple(gaps.tolist()))
    u = z @ vectors  # [R, n]
    best, chosen = math.inf, 0.0
    for ratio in NOISE_RATIOS:
        variance = values if math.isinf(ratio) else 1.0 + ratio * values
        if replicates > 1:
            residual, degrees = u - u.mean(0), (replicates - 1) * n
            score = (replicates - 1) * float(np.sum(np.log(variance)))
        else:
            x = gaps @ vectors
            information = float(np.sum(x * x / variance))
            residual, degrees = u - x * (float(np.sum(u[0] * x / variance)) / information), n - 1
            score = float(np.sum(np.log(variance))) + math.log(information)
        square = float(np.sum(residual**2 / variance))
        if square == 0.0 or degrees == 0:
            return 0.0  # no spread at all: nothing to smooth
        score += degrees * math.log(square / degrees)
        if score < best:
            best, chosen = score, ratio
    return chosen


def long_run_variance(z: Sequence[float] | Floats) -> float:
    """Variance of the sum of n increments about their mean, by Newey and West, or more.

    n·[γ_0 + 2 Σ_{k≤m} (1 − k/(m+1)) γ_k], m = ⌊4(n/100)^(2/9)⌋ (Newey & West 1987, Econometrica 55:703;
    1994, Review of Economic Studies 61:631), autocovariances with n − 1 in the denominator. Negative
    autocorrelation would make the estimate smaller; it is then the one for independent increments,
    because a too small variance turns chance into a verdict.
    """
    x = np.asarray(z, dtype=np.float64)
    n = len(x)
    if n < 2:
        return math.nan
    x = x - x.mean()
    lags = min(int(4 * (n / 100) ** (2 / 9)), n - 1)
    independent = float(x @ x) / (n - 1)
    total = independent + 2 * sum(
        (1 - k / (lags + 1)) * float(x[k:] @ x[:-k]) / (n - 1) for k in range(1, lags + 1)
    )
    return n * max(total, independent)


def independent_variance(z: Floats, gaps: Floats) -> tuple[float, float]:
    """Variance over replicates of the sum of increments, if all but neighbouring ones are uncorrelated.

    Σ_i S_ii + 2 Σ_i S_i,i+1, S the covariance over replicates of the increments, each replicate's own
    line taken out first (so that the estimate is independent of the replicates' spread of Δ) and what
    this takes away given back. Neighbours are counted because noise that does not accumulate makes them
    cancel: increments of a walk seen through noise are correlated with their neighbours and no others.

    Args:
        z: [R, n] increments.
        gaps: [n] their lengths in layers.

    Returns:
        The variance, which is NaN or below 0 where noise hides it, and its degrees of freedom
        (Satterthwaite 1946, Biometrics Bulletin 2:110): few where one increment has most of the variance.
    """
    replicates, n = z.shape
    length = float(gaps.sum())
    room = length - float(gaps @ gaps + 2 * gaps[1:] @ gaps[:-1]) / length
    if n < 3 or replicates < 2 or room <= 0:
        return math.nan, 0.0
    centred = z - z.mean(0)
    residual = centred - centred.sum(1, keepdims=True) * gaps / length
    own = np.sum(residual**2, axis=0) / (replicates - 1)  # [n]
    neighbours = np.sum(residual[:, 1:] * residual[:, :-1], axis=0) / (replicates - 1)  # [n − 1]
    total = float(own.sum() + 2 * neighbours.sum())
    scales = np.sqrt(own)
    across = float(scales[1:] @ scales[:-1])
    correlation = float(neighbours.sum()) / across if across > 0 else 0.0
    band = np.eye(n) + correlation * (np.eye(n, k=1) + np.eye(n, k=-1))
    weighted = (np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)) @ (band * np.outer(scales, scales))
    square = float(np.sum(weighted * weighted.T))
    degrees = (replicates - 1) * total * total / square if square > 0 else 0.0
    return total * length / room, degrees
