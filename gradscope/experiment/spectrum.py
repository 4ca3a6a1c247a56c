"""What is known of a gradient that is divided by path length, and what follows from it.

`gradscope.experiment.paths` measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.errors import MeasureError
from gradscope.experiment.trunk_samples import Checks

__all__ = ["CarryingRange", "PathSpectrum"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryingRange:
    """The fewest neighbouring path lengths that hold a given share of the path energy Σ_k‖c_k‖².

    Attributes:
        low: the shortest of these lengths.
        high: the longest, counted in.
        energy_share: Σ‖c_k‖² over them, as a share of that over all lengths.
        path_share: Σ C(n, k)/2ⁿ over them: the share of all paths, if each of the n branches can be
            crossed or skipped on its own (`gradscope.path_lengths`). Parallel branches, or branches
            without a skip, have fewer paths.
    """

    low: int
    high: int
    energy_share: float
    path_share: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PathSpectrum:
    """The gradient of one model on one batch, divided by the number of branches that it crosses.

    Position 0 of the stream is `reading_point`, h_0, and position l the output of the l-th call of a
    block. From a later position on there are fewer branches to cross: at the last one, c_0 = g.

    Attributes:
        branches: n, the number of calls of residual branches in one forward pass.
        granularity: what one branch is, such as ``2 branches per block``: the lengths count these.
        positions: names of the stream positions, [P].
        norm_at: ‖c_k‖ at each stream position, of the loss as given on the batch as given,
            [P, K + 1] float64. NaN where no gradient arrives.
        weight_at: w_k = ⟨c_k, g⟩/‖g‖² at each stream position, with the g of that position,
            [P, K + 1] float64. NaN where that g is 0 or not finite.
        gradient_l2: ‖g‖ at h_0.
        chunks: in how many parts the samples were run, so that they fit into ``max_bytes``.
        checks: what was verified.
        status: ``ok``, or why there is no spectrum; all norms and weights are NaN then.
    """

    branches: int
    granularity: str
    positions: tuple[str, ...]
    norm_at: Array
    weight_at: Array
    gradient_l2: float
    chunks: int
    checks: Checks
    status: str = "ok"

    @property
    def reading_point(self) -> str:
        """Where the spectrum is read unless a position is said."""
        return self.positions[0]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The path lengths k = 0, ..., K, in branches, [K + 1]."""
        return np.arange(self.norm_at.shape[1])

    @property
    def norm(self) -> Array:
        """‖c_k‖ at h_0, [K + 1]."""
        return self.norm_at[0]

    @property
    def weight(self) -> Array:
        """w_k = ⟨c_k, g⟩/‖g‖² at h_0, [K + 1]; may be negative. Sums to 1 in a whole spectrum."""
        return self.weight_at[0]

    @property
    def tail(self) -> float:
        """1 − Σ_k w_k, the weight of all paths longer than K; 0 up to rounding in a whole spectrum."""
        return 1 - math.fsum(self.weight.tolist())

    @property
    def whole_status(self) -> str:
        """``ok``, or why what sums over all lengths is absent (NaN): D, κ, Σ|w_k|, the energy's mean."""
        if self.status != "ok" or self.norm_at.shape[1] == self.branches + 1:
            return self.status
        longest = self.norm_at.shape[1] - 1
        return (
            f"the spectrum is cut off at length {longest} of {self.branches}, and what longer paths add "
            "is not known; write max_length=None"
        )

    @property
    def effective_depth(self) -> float:
        """D = Σ_k k·w_k, in branches: what `gradscope.effective_depth` measures. NaN where cut off."""
        return self._whole(math.fsum((self.lengths * self.weight).tolist()))

    @property
    def cancellation(self) -> float:
        """κ = Σ_k‖c_k‖²/‖g‖²: 1 for orthogonal parts, above it where they cancel. NaN where cut off."""
        return self._whole(float(np.square(self.norm / self.gradient_l2).sum()))

    @property
    def absolute(self) -> float:
        """Σ_k|w_k|: 1 if no length works against the gradient, else more. NaN where cut off."""
        return self._whole(math.fsum(np.abs(self.weight).tolist()))

    @property
    def gradient_energy(self) -> float:
        """Σ_k k‖c_k‖²/Σ_k‖c_k‖², the mean length by energy, in [0, n]. NaN where cut off."""
        if self.whole_status != "ok":
            return math.nan
        return math.fsum((self.lengths * self._energy_share()).tolist())

    def carrying_range(self, share: float = 0.95) -> CarryingRange:
        """The smallest range of lengths that holds ``share`` of the energy Σ_k‖c_k‖² at h_0.

        Of several equally small ones, that which holds the most.

        Raises:
            ValueError: ``share`` is not in (0, 1].
            MeasureError: there is no whole spectrum.
        """
        if not 0 < share <= 1:
            raise ValueError(f"carrying_range({share}): a share lies above 0 and is at most 1, like 0.95")
        if self.whole_status != "ok":
            raise MeasureError(f"No carrying range: {self.whole_status}.")
        energy = self._energy_share().tolist()
        # Against what all lengths sum to in floating point, so that share=1 can be reached.
        wanted = share * math.fsum(energy)
        n = self.branches
        best = (
            (size, max((math.fsum(energy[low : low + size]), -low) for low in range(n + 2 - size)))
            for size in range(1, n + 2)
        )
        # The widest range holds everything, so there is one.
        size, (held, start) = next((size, found) for size, found in best if found[0] >= wanted)
        low, high = -start, -start + size - 1
        paths = sum(math.comb(n, k) for k in range(low, high + 1))
        return CarryingRange(low=low, high=high, energy_share=held, path_share=paths / 2**n)

    def __str__(self) -> str:
        if self.status != "ok":
            return f"no path spectrum at the {self.reading_point}: {self.status}"
        of = f"path spectrum of {self.branches} branches at the {self.reading_point}"
        if self.whole_status != "ok":
            return f"{of}: lengths 0 to {self.norm_at.shape[1] - 1}; longer paths weigh {self.tail:.3g}"
        carrying = self.carrying_range()
        return (
            f"{of}: effective depth {self.effective_depth:.4g}; {carrying.energy_share:.3g} of the "
            f"energy on lengths {carrying.low} to {carrying.high}"
        )

    def _whole(self, value: float) -> float:
        return value if self.whole_status == "ok" else math.nan

    def _energy_share(self) -> Array:
        unit = self.norm / self.norm.max()  # squares of a vanished gradient would underflow
        return np.square(unit) / np.square(unit).sum()
