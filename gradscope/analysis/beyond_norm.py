"""Quantities that say what the norm does not: whether a signal of the right size still carries anything.

A norm that is preserved over depth may belong to tokens that have all become one, to gradients that
have nothing to do with each other, or to blocks that change nothing. With h the stream and F what is
added to it, by a block (h_{l+1} = h_l + F(h_l), absent without a proven unit skip) or by a branch.
"""

from __future__ import annotations

import numpy as np

from gradscope.analysis.quantities import quantity, underflown, with_unit_skip
from gradscope.analysis.trunk import Trunk, Values, combine, ratio

__all__: list[str] = []

_CSORDAS = "Csordás et al. 2025, arXiv:2505.13898"

# -- tokens ----------------------------------------------------------------------------------


@quantity(
    label="token cosine",
    unit="1",
    source="rank collapse: Dong et al. 2021, arXiv:2103.03404",
    log=False,
    forward=True,
)
def token_cosine(trunk: Trunk) -> Values:
    """Mean cosine between different tokens of one sequence at h_l; 1 is rank collapse."""
    return trunk.at_stream("activation", "token_cosine")


@quantity(
    label="rank residual",
    unit="1",
    source="rank collapse: Dong et al. 2021, arXiv:2103.03404",
    forward=True,
)
def rank_residual(trunk: Trunk) -> Values:
    """‖X − 1x̄ᵀ‖_F/‖X‖_F of the tokens of each sequence at h_l, over all sequences together.

    0 where all tokens of a sequence are one. Attention without skips drives it down
    super-exponentially: ln r_{l+1} ≈ 3 ln r_l + c, until the activations' rounding.
    """
    centred = trunk.at_stream("activation", "token_centred_l2")
    return ratio(centred, trunk.at_stream("activation", "l2"), "zero activation")


@quantity(
    label="input presence", unit="1", source="mean over tokens of cos(h_l, h_0)", log=False, forward=True
)
def input_presence(trunk: Trunk) -> Values:
    """Mean over tokens of cos(h_l, h_0): how much of the input is still in the stream."""
    return trunk.at_stream("activation", "input_cosine")


# -- samples ---------------------------------------------------------------------------------


@quantity(
    label="gradient correlation of samples",
    unit="1",
    source="shattered gradients: Balduzzi et al. 2017, arXiv:1702.08591",
    log=False,
)
def gradient_correlation(trunk: Trunk) -> Values:
    """E⟨δ(x), δ(x')⟩/E‖δ‖² over pairs of different samples x, x' of a batch, at h_l.

    1 where all samples pull alike, towards 0 where gradients are shattered, like white noise. Token t
    of one sample meets token t of the other. Under accumulation, pairs within a micro-batch.
    """
    dot = trunk.at_stream("output_grad", "sample_dot")
    l2, count = trunk.at_stream("output_grad", "l2"), trunk.at_stream("output_grad", "count")
    value = combine(lambda d, a: d / a / a, dot, l2).without(l2.value == 0, "zero gradient")
    return value.without(underflown(l2.value, l2.value, count.value), "underflow")


# -- what a block does to the stream ---------------------------------------------------------


def _pairs(trunk: Trunk, statistic: str) -> Values:
    return trunk.pairs(trunk.at_stream("activation", statistic))[0]


@quantity(
    label="Block Influence",
    unit="1",
    source="Men et al. 2024 (ShortGPT), arXiv:2403.03853",
    over="pairs",
    log=False,
    forward=True,
)
def block_influence(trunk: Trunk) -> Values:
    """1 − mean over tokens of cos(h_l, h_{l+1}): low where a block hardly turns the stream."""
    return combine(lambda cosine: 1.0 - cosine, _pairs(trunk, "cosine_next"))


@quantity(
    label="angular distance",
    unit="1",
    source="Gromov et al. 2024, arXiv:2403.17887",
    over="pairs",
    log=False,
    forward=True,
)
def angular_distance(trunk: Trunk) -> Values:
    """arccos(cos(h_l, h_{l+1}))/π, mean over all tokens (Gromov et al. take the last one only).

    0 for one direction, ½ for a right angle, 1 for opposite ones.
    """
    return combine(lambda angle: angle / np.pi, _pairs(trunk, "angle_next"))


@quantity(
    label="relative contribution of the block",
    unit="1",
    source=_CSORDAS,
    over="pairs",
    forward=True,
)
def relative_contribution(trunk: Trunk) -> Values:
    """Mean over tokens of ‖F‖/‖h_l‖, with F = h_{l+1} − h_l; only where the unit skip is proven."""
    return with_unit_skip(trunk, _pairs(trunk, "relative_contribution"))


@quantity(
    label="residual cosine of the block",
    unit="1",
    source=_CSORDAS,
    over="pairs",
    log=False,
    forward=True,
)
def residual_cosine(trunk: Trunk) -> Values:
    """Mean over tokens of cos(F, h_l), with F = h_{l+1} − h_l; only where the unit skip is proven.

    Below 0 the block erases, about 0 it writes something new, above 0 it refines.
    """
    return with_unit_skip(trunk, _pairs(trunk, "residual_cosine"))


# -- branches --------------------------------------------------------------------------------


@quantity(
    label="branch-to-stream ratio",
    unit="1",
    source="relative contribution: Csordás et al. 2025, arXiv:2505.13898",
    over="branches",
    forward=True,
)
def branch_ratio(trunk: Trunk) -> Values:
    """‖F‖_F/‖h_k‖_F over valid positions, h_k the stream at the input of the branch's block.

    Absent where the branch's output has another number of elements than the stream.
    """
    branch, count = trunk.at_branches("activation", "l2"), trunk.at_branches("activation", "count")
    stream = trunk.at_block_input(trunk.at_stream("activation", "l2"), branch.places)
    size = trunk.at_block_input(trunk.at_stream("activation", "count"), branch.places)
    other_shape = count.ok & size.ok & (count.value != size.value)
    value = ratio(branch, stream, "zero stream")
    return value.without(other_shape, "not supported: other shape than the stream")


@quantity(
    label="relative contribution of the branch",
    unit="1",
    source=_CSORDAS,
    over="branches",
    forward=True,
)
def branch_contribution(trunk: Trunk) -> Values:
    """Mean over tokens of ‖F‖/‖h_k‖, F a branch's output and h_k the stream at its block's input.

    The mean of ratios, where `branch_ratio` is the ratio of norms over all tokens. Csordás et al. take
    what the earlier branches of the block added into the stream of a later one; here it is h_k for all.
    """
    return trunk.at_branches("activation", "relative_contribution")


@quantity(
    label="residual cosine of the branch",
    unit="1",
    source=_CSORDAS,
    over="branches",
    log=False,
    forward=True,
)
def branch_cosine(trunk: Trunk) -> Values:
    """Mean over tokens of cos(F, h_k), with F and h_k as for `branch_contribution`."""
    return trunk.at_branches("activation", "residual_cosine")
