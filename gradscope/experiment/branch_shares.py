"""What each residual branch adds to effective depth, and what follows from it.

`gradscope.experiment.contributions` measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Branch", "BranchContributions"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One use of a residual branch in the forward pass.

    Attributes:
        block: the block that it belongs to.
        call: which call of that block, from 0.
        depth: l, the number of the stream position behind that call of the block, from 1.
        sublayer: its place among the sublayers of the block, from 0.
        module: the module whose output it is; "" where it is no module's.
    """

    block: str
    call: int
    depth: int
    sublayer: int
    module: str

    @property
    def name(self) -> str:
        """The module's name inside of the block, or else the number of the sublayer."""
        inner = self.module.removeprefix(f"{self.block}.")
        return inner or f"sublayer {self.sublayer}"

    def __str__(self) -> str:
        where = self.module or f"{self.block}, sublayer {self.sublayer}"
        return where + (f", call {self.call + 1}" if self.call else "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BranchContributions:
    """e_i = 1 − ⟨g, g_without_i⟩/‖g‖² of every branch i; their sum is the effective depth D.

    g is the gradient at the trunk's input, and g_without_i the same with nothing let back through branch
    i. The e_i may be negative, where a branch works against the gradient of all others, and above 1.
    Without a skip around it, a branch has e_i = 1: nothing gets past it.

    Attributes:
        branches: the branches, in forward order.
        value: e_i, [n] float64; NaN where `status` is not ``ok``.
        reading_point: where g was read.
        algorithm: ``forward mode``, all in one pass, or ``one backward pass per branch``. Both run
            attention by its formula, because the fused kernels have no forward mode.
        stream_difference: the largest |⟨u_l, δ_l⟩/‖g‖² − 1| over the stream positions l, with u_l what
            becomes of g, taken as a change of h_0, and δ_l the gradient there: 0 up to rounding. NaN for
            one backward pass per branch, which has no such check.
        status: ``ok``, or why there are no values.
    """

    branches: tuple[Branch, ...]
    value: Array
    reading_point: str
    algorithm: str
    stream_difference: float
    status: str = "ok"

    @property
    def total(self) -> float:
        """D = Σ e_i, in branches."""
        return math.fsum(self.value.tolist())

    @property
    def share(self) -> Array:
        """e_i/D, [n]; sums to 1, with negative parts where e_i is negative. NaN where D is 0."""
        total = self.total
        return self.value / total if total else np.full_like(self.value, math.nan)

    @property
    def by_block(self) -> dict[str, float]:
        """Σ e_i over the branches of each block, all of its calls together."""
        found: dict[str, list[float]] = {}
        for branch, value in zip(self.branches, self.value.tolist(), strict=True):
            found.setdefault(branch.block, []).append(value)
        return {block: math.fsum(values) for block, values in found.items()}

    @property
    def participation(self) -> float:
        """exp(−Σ p_i ln p_i) with p_i = e_i⁺/Σ e_j⁺: how many branches take part, in [1, n].

        Negative e_i count as 0. NaN where no e_i is positive.
        """
        positive = np.maximum(self.value, 0.0)
        if not positive.sum() > 0:
            return math.nan
        p = positive[positive > 0] / positive.sum()
        return float(np.exp(-np.sum(p * np.log(p))))

    @property
    def depth_score(self) -> float:
        """Σ l·e_l/Σ e_l with l the number of the block, from 1: where the contributions lie, in blocks.

        With negative e_i it may leave [1, L]. NaN where the sum is 0.
        """
        total = self.total
        depth = np.asarray([branch.depth for branch in self.branches], dtype=np.float64)
        return math.fsum((depth * self.value).tolist()) / total if total else math.nan

    def __str__(self) -> str:
        if self.status != "ok":
            return f"no branch contributions at the {self.reading_point}: {self.status}"
        lines = [f"{len(self.branches)} branches, {self.total:.4g} in sum at the {self.reading_point}"]
        lines += [
            f"{value:10.4g} {branch}"
            for branch, value in zip(self.branches, self.value.tolist(), strict=True)
        ]
        return "\n".join(lines)
