"""How many paths of each length an unrolled residual network has."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PathLengths", "path_lengths"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLengths:
    """The 2ⁿ paths through n residual branches, counted by length. Exact.

    Attributes:
        branches: the number n of branches.
        count: [n + 1] whole numbers; ``count[k]`` paths cross exactly k of the branches.
    """

    branches: int
    count: tuple[int, ...]

    @property
    def probability(self) -> npt.NDArray[np.float64]:
        """[n + 1] share of all paths that cross exactly k branches: Binomial(n, ½) at k."""
        return np.asarray([c / 2**self.branches for c in self.count], dtype=np.float64)

    @property
    def mean(self) -> float:
        """Mean length of a path, n/2 branches."""
        return self.branches / 2

    def share(self, low: int, high: int) -> float:
        """Share of all paths that cross at least ``low`` and at most ``high`` branches.

        Exactly 0 where no path is that short or that long.

        Raises:
            TypeError: an end that is not a whole number.
            ValueError: ``low`` above ``high``.
        """
        low, high = operator.index(low), operator.index(high)
        if low > high:
            raise ValueError(
                f"share(low={low}, high={high}) holds no length: write share({high}, {low}); both ends "
                "are counted in"
            )
        # Summed as whole numbers, rounded once.
        return sum(self.count[max(low, 0) : max(high + 1, 0)]) / 2**self.branches


def path_lengths(branches: int) -> PathLengths:
    """The number of paths of each length in an unrolled residual network (Veit et al. 2016).

    Each branch is crossed or skipped: n branches make 2ⁿ paths, C(n, k) of them of length k
    (arXiv:1605.06431). Holds where every branch has a skip around it; without skips there is one path,
    of length n. A transformer block has two branches, attention and feed-forward.

    This counts paths, whatever they carry. In the residual networks of that paper short paths are few
    and carry most of the gradient; `gradscope.effective_depth` measures that of a given model.

    >>> path_lengths(3).count
    (1, 3, 3, 1)
    >>> f"{path_lengths(54).share(19, 35):.3f}"
    '0.980'

    Args:
        branches: the number n of residual branches, 0 or more.

    Raises:
        TypeError: ``branches`` is no whole number.
        ValueError: ``branches`` is negative.
    """
    n = operator.index(branches)
    if n < 0:
        raise ValueError(f"path_lengths(branches={n}): the number of residual branches is 0 or more")
    count = [1]
    for k in range(n):
        count.append(count[-1] * (n - k) // (k + 1))  # C(n, k + 1), in whole numbers throughout
    return PathLengths(branches=n, count=tuple(count))
