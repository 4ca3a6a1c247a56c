"""How far replicates of a depth lie apart, at depths that were measured and at others.

The variance of Δ over replicates is taken to grow as a power of the depth, σ²·(L/L_K)^γ: γ = 1 for a
random walk over depth, 2 where each net has a rate of its own, 0 where only the ends differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Spread", "fit_spread"]

Floats = npt.NDArray[np.float64]

#: γ before anything is measured: Gaussian with this mean and standard deviation, on these nodes.
_PRIOR: Final = (1.5, 1.0)
_NODES: Final = np.linspace(-1.5, 4.5, 13)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """The variance of Δ over replicates, averaged over γ.

    Attributes:
        deepest: L_K, the deepest depth that was measured.
        degrees: ν, degrees of freedom of σ².
        weight: [J] of every node of γ.
        variance: [J] σ² at the deepest depth, given γ.
    """

    deepest: float
    degrees: float
    weight: Floats
    variance: Floats

    def at(self, depths: Floats) -> Floats:
        """[J, P] the variance at any depths, given γ."""
        return self.variance[:, None] * (depths / self.deepest) ** _NODES[:, None]


def fit_spread(depths: Floats, delta: Sequence[Floats]) -> Spread:
    """The posterior of γ and σ² from the replicates about the mean of their depth.

    With s_k the sum of squares at depth k and ρ_k = (L_k/L_K)^γ,
    p(γ | s) ∝ p(γ)·Π ρ_k^(−(n_k − 1)/2)·(Σ s_k/ρ_k)^(−ν/2), under p(σ²) ∝ 1/σ².

    Args:
        depths: [K] ascending.
        delta: K arrays, Δ of the replicates at each depth.
    """
    degrees = np.asarray([len(d) - 1 for d in delta], dtype=np.float64)
    squares = np.asarray([float(np.sum((d - d.mean()) ** 2)) for d in delta])
    relative = np.log(depths / depths[-1])[None, :] * _NODES[:, None]  # [J, K] ln ρ
    pooled = np.sum(squares * np.exp(-relative), axis=1)
    mean, deviation = _PRIOR
    height = -0.5 * ((_NODES - mean) / deviation) ** 2
    if (pooled > 0).all():
        height = height - relative @ degrees / 2 - degrees.sum() / 2 * np.log(pooled)
    weight = np.exp(height - height.max())
    return Spread(
        deepest=float(depths[-1]),
        degrees=float(degrees.sum()),
        weight=weight / weight.sum(),
        variance=pooled / degrees.sum(),
    )
