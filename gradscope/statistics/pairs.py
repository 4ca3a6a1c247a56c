"""Kernels of two tensors: neighbouring stream positions, or a stream position and a branch.

With h the stream and F what is added to it: F = h_{l+1} - h_l from one block to the next, the
difference itself; or the output of a branch, with h the input of its block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from gradscope.record import STATISTICS
from gradscope.statistics import one_pass
from gradscope.statistics.sample import Absent, Sample, Value, directions

__all__ = ["BRANCH", "PAIR_KERNELS", "SLOW_PAIR", "Pair", "measure_branch", "measure_pair", "pair_kernel"]


class Pair:
    """h, what comes after it, and F.

    Args:
        stream: h.
        following: h_{l+1}; None where F is a branch.
        branch: F where it is a branch.

    Attributes:
        stream: h as a `Sample`, which knows the positions that count.
    """

    def __init__(
        self, stream: Sample, following: Sample | None = None, branch: Sample | None = None
    ) -> None:
        self.stream = stream
        self._following = following
        self._branch = branch

    @cached_property
    def change(self) -> Tensor:
        """F, float64 [positions, features]."""
        added = self._branch or self._following
        assert added is not None
        change = added.positions().double()
        return change if self._branch is not None else change - self.stream.positions().double()

    @cached_property
    def here(self) -> tuple[Tensor, Tensor]:
        """The `directions` of h."""
        return directions(self.stream.positions())

    @cached_property
    def after(self) -> tuple[Tensor, Tensor]:
        """The `directions` of h_{l+1}."""
        assert self._following is not None
        return directions(self._following.positions())

    @cached_property
    def rows(self) -> one_pass.PairRows | None:
        """What all statistics follow from, in one pass; None where it is not taken.

        The angle is atan2(|F - p h|, |h| (1 + p)) with p = <F, h>/|h|^2, from what F adds across h and
        along it, so that a small angle keeps its digits.
        """
        added = self._branch or self._following
        if added is None or not (self.stream.plain and added.plain):
            return None
        found = one_pass.pair_rows(self.stream.x, added.x, branch=self._branch is not None)
        return found if found is not None and all(map(math.isfinite, found)) else None

    @cached_property
    def positions(self) -> int:
        """How many there are."""
        return self.stream.x.numel() // self.stream.x.shape[-1]


PAIR_KERNELS: Final[dict[str, Callable[[Pair], Value]]] = {}


def pair_kernel(name: str) -> Callable[[Callable[[Pair], Value]], Callable[[Pair], Value]]:
    """Register the function that computes one statistic of the table from a `Pair`."""
    if name not in STATISTICS:
        raise KeyError(f"{name!r} is not in gradscope.record.STATISTICS")

    def register(function: Callable[[Pair], Value]) -> Callable[[Pair], Value]:
        PAIR_KERNELS[name] = function
        return function

    return register


@pair_kernel("cosine_next")
def cosine_next(pair: Pair) -> Value:
    """Mean over tokens of cos(h_l, h_{l+1}). [N, d], [N, d] -> []. Unit: 1.

    One minus it is Block Influence (Men et al. 2024, ShortGPT, arXiv:2403.03853). Absent where a token
    of either is exactly zero.
    """
    if pair.rows is not None:
        return pair.rows.cosine / pair.positions
    (a, zero), (b, zero_next) = pair.here, pair.after
    return pair.stream.unless_zero(pair.stream.mean(torch.linalg.vecdot(a, b)), zero, zero_next)


@pair_kernel("angle_next")
def angle_next(pair: Pair) -> Value:
    """Mean over tokens of the angle between h_l and h_{l+1}. [N, d], [N, d] -> []. Unit: rad.

    Divided by pi, the angular distance (Gromov et al. 2024, arXiv:2403.17887, who take the last token
    only). As 2 atan2(|u - v|, |u + v|) of the directions: an arc cosine loses half of the digits of a
    small angle, and is NaN where rounding takes the cosine past 1.
    """
    if pair.rows is not None:
        return pair.rows.angle / pair.positions
    (a, zero), (b, zero_next) = pair.here, pair.after
    apart, along = (torch.linalg.vector_norm(x, dim=-1) for x in (a - b, a + b))
    return pair.stream.unless_zero(pair.stream.mean(2 * torch.atan2(apart, along)), zero, zero_next)


@pair_kernel("relative_contribution")
def relative_contribution(pair: Pair) -> Value:
    """Mean over tokens of |F|/|h|. [N, d], [N, d] -> []. Unit: 1.

    Csordas et al. 2025, arXiv:2505.13898. Absent where a token of h is exactly zero.
    """
    if pair.rows is not None:
        return pair.rows.ratio / pair.positions
    h = pair.stream.positions()
    largest, largest_change = (x.abs().amax().double() for x in (h, pair.change))
    scale = torch.where(largest_change > 0, largest_change, 1.0)
    change = torch.linalg.vector_norm(pair.change / scale, dim=-1)
    stream = torch.linalg.vector_norm(h.double() / largest, dim=-1)
    mean = pair.stream.mean(change / stream) * (scale / largest)
    return pair.stream.unless_zero(mean, (h == 0).all(-1))


@pair_kernel("residual_cosine")
def residual_cosine(pair: Pair) -> Value:
    """Mean over tokens of cos(F, h). [N, d], [N, d] -> []. Unit: 1.

    Below 0 what is added erases, about 0 it is new, above 0 it refines (Csordas et al. 2025,
    arXiv:2505.13898). Absent where a token of either is exactly zero, as with a zero branch.
    """
    if pair.rows is not None:
        return pair.rows.change_cosine / pair.positions
    (a, zero), (b, zero_change) = pair.here, directions(pair.change)
    return pair.stream.unless_zero(pair.stream.mean(torch.linalg.vecdot(a, b)), zero, zero_change)


#: The slow statistics of two stream positions, and those that branches have too.
SLOW_PAIR: Final = tuple(n for n in STATISTICS if n in PAIR_KERNELS)
BRANCH: Final = tuple(n for n in SLOW_PAIR if STATISTICS[n].where == "axis")


def measure_pair(
    before: Tensor,
    after: Tensor,
    wanted: Collection[str],
    *,
    feature_axis: int = -1,
    token_axis: int = 1,
    valid: Tensor | None = None,
) -> dict[str, Value | Absent]:
    """Those of `SLOW_PAIR` that are wanted, of h_l and h_{l+1} of one shape; the axes as in `measure`."""
    return _measured(SLOW_PAIR, before, after, wanted, feature_axis, token_axis, valid, branch=False)


def measure_branch(
    stream: Tensor,
    output: Tensor,
    wanted: Collection[str],
    *,
    feature_axis: int = -1,
    token_axis: int = 1,
    valid: Tensor | None = None,
) -> dict[str, Value | Absent]:
    """Those of `BRANCH` that are wanted, of a block's input and the output of one of its branches."""
    return _measured(BRANCH, stream, output, wanted, feature_axis, token_axis, valid, branch=True)


def _measured(
    names: tuple[str, ...],
    stream: Tensor,
    other: Tensor,
    wanted: Collection[str],
    feature_axis: int,
    token_axis: int,
    valid: Tensor | None,
    *,
    branch: bool,
) -> dict[str, Value | Absent]:
    names = tuple(n for n in names if n in wanted)
    if not names:
        return {}
    here, there = (
        Sample.of(x, feature_axis=feature_axis, token_axis=token_axis, valid=valid)
        for x in (stream, other)
    )
    for sample in (here, there):
        if isinstance(sample, Absent):
            return dict.fromkeys(names, sample)
    assert isinstance(here, Sample) and isinstance(there, Sample)
    pair = Pair(here, branch=there) if branch else Pair(here, there)
    return {name: PAIR_KERNELS[name](pair) for name in names}
