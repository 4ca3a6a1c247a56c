"""Mixtures of Student's t distributions, many at once: their means, probabilities and quantiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Mixture", "least_kept"]

Floats = npt.NDArray[np.float64]

#: A quantile is found to this share of the components' range.
_SHARP: Final = 1e-9


def least_kept(weight: Floats, dropped: float) -> float:
    """The weight below which components have no more than this share together."""
    ascending = np.sort(weight)
    lost = np.cumsum(ascending) / ascending.sum()
    return float(ascending[np.searchsorted(lost, dropped, side="right")])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """P mixtures of the same C components.

    Attributes:
        weight: [C], their sum is 1.
        centre: [C, P].
        scale: [C, P], positive.
        degrees: degrees of freedom of every component.
    """

    weight: Floats
    centre: Floats
    scale: Floats
    degrees: float

    @property
    def mean(self) -> Floats:
        """[P]."""
        return self.weight @ self.centre

    def below(self, value: Floats | float) -> Floats:
        """[P] the probability of a value below this one."""
        from scipy.special import stdtr

        return self.weight @ stdtr(self.degrees, (value - self.centre) / self.scale)

    def quantile(self, probability: float) -> Floats:
        """[P] each between the least and the largest of the components' own."""
        from scipy.optimize import brentq
        from scipy.special import stdtr, stdtrit

        reach = float(stdtrit(self.degrees, probability))
        found = np.empty(self.centre.shape[1])
        for at, (centre, scale) in enumerate(zip(self.centre.T, self.scale.T, strict=True)):
            ends = centre + reach * scale
            low, high = float(ends.min()), float(ends.max())

            def excess(value: float, centre: Floats = centre, scale: Floats = scale) -> float:
                below: Floats = stdtr(self.degrees, (value - centre) / scale)
                return float(self.weight @ below) - probability

            if excess(low) >= 0 or excess(high) <= 0:  # all components agree, up to rounding
                found[at] = (low + high) / 2
            else:
                root: Any = brentq(excess, low, high, xtol=_SHARP * (high - low))
                found[at] = root
        return found

    def with_spread(self, weight: Floats, variance: Floats, dropped: float) -> Mixture:
        """Components [C] times variances [J, P] that are added to theirs; the least are dropped."""
        joint = np.outer(self.weight, weight).ravel()
        keep = np.flatnonzero(joint >= least_kept(joint, dropped))
        each, which = np.divmod(keep, len(weight))
        return Mixture(
            weight=joint[keep] / joint[keep].sum(),
            centre=self.centre[each],
            scale=np.sqrt(self.scale[each] ** 2 + variance[which]),
            degrees=self.degrees,
        )
