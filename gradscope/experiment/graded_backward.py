r"""The parts of a gradient by path length, one backward pass after the other over one graph.

c_k is the gradient along all paths that cross exactly k residual branches. With b_k(i) the gradient that
arrives at the output of branch i along paths that have crossed k branches before it,

    pass 0 begins with g at the trunk's end and lets nothing through any branch: it leaves c_0 and b_0;
    pass k begins with 0 and lets b_{k−1}(i) through branch i in the place of what arrives there, which is
    b_k(i): it leaves c_k and b_k.

Each pass is exact at every position of the stream, and what is cut off behind the last of them changes
nothing. With whole blocks for branches, block l maps by J_l = s_l + (J_l − s_l), with the skip's factor
s_l, and at its input c_k = s·c_k' + Jᵀc_{k−1}' − s·c_{k−1}', the dashed ones being those at its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradscope.errors import MeasureError
from gradscope.experiment.skip_proof import skip_between
from gradscope.experiment.trunk_pass import TrunkPass

__all__ = ["block_skips", "by_blocks", "by_branches"]

#: Called with k, the number of a stream position, and c_k there.
Read = Callable[[int, int, Tensor], None]


def by_branches(run: TrunkPass, seed: Tensor, lengths: Iterable[int], read: Read) -> None:
    """All c_k with k ≤ K at all stream positions; those that are not read are 0.

    Args:
        run: the pass.
        seed: the gradient at the trunk's end.
        lengths: 0, 1, ..., K; where no paths are that long, there is no pass for them.
        read: takes them.
    """
    arrived: dict[int, Tensor] = {}
    for length in lengths:
        given, arrived = arrived, {}
        if length and not given:
            continue

        def at_branch(
            number: int,
            gradient: Tensor,
            given: dict[int, Tensor] = given,
            arrived: dict[int, Tensor] = arrived,
        ) -> Tensor | None:
            if gradient.any():
                arrived[number] = gradient
            return given.get(number)

        def at_position(number: int, gradient: Tensor, length: int = length) -> Tensor:
            read(length, number, gradient)
            return gradient

        begin = seed if length == 0 else torch.zeros_like(seed)
        run.gradient(begin, at_branch=at_branch, at_position=at_position)


def by_blocks(
    run: TrunkPass, seed: Tensor, lengths: Iterable[int], read: Read, *, skips: Sequence[float]
) -> None:
    """The same with each block as one branch.

    Args:
        run: the pass.
        seed: the gradient at the trunk's end.
        lengths: 0, 1, ..., K.
        read: takes the c_k.
        skips: s_l of each block, by `block_skips`.
    """
    positions = run.forward.positions
    shorter = {run.last: seed}
    for number in range(run.last - 1, -1, -1):
        part, shape = shorter[number + 1], positions[number].shape
        s = skips[number]  # of the block from this position to the next
        shorter[number] = s * part.reshape(shape) if s else part.new_zeros(shape)
    for number, part in shorter.items():
        read(0, number, part)
    for length in lengths:
        if length == 0 or not any(part.any() for number, part in shorter.items() if number):
            continue  # the skips alone, without a backward pass; or no paths that long
        here: dict[int, Tensor] = {}

        def at_position(
            number: int,
            gradient: Tensor,
            length: int = length,
            shorter: dict[int, Tensor] = shorter,
            here: dict[int, Tensor] = here,
        ) -> Tensor:
            if number == run.last:
                part = torch.zeros_like(gradient)
            else:
                part, s = gradient, skips[number]
                if s:
                    behind = here[number + 1] - shorter[number + 1]
                    part = part + s * behind.reshape(part.shape)
            here[number] = part
            read(length, number, part)
            return shorter[number]

        run.gradient(seed, at_position=at_position)
        shorter = here


def block_skips(run: TrunkPass) -> tuple[float, ...]:
    """The factor of each whole block's skip, proved; 0 for a block that is a layer without a skip.

    Raises:
        MeasureError: a block's skip is no factor.
    """
    found: list[float] = []
    positions = run.forward.positions
    for number in range(1, len(positions)):
        output, source = positions[number].edge, positions[number - 1].edge
        inside = [item for item in run.located if item.position == number]
        assert output is not None and source is not None
        if inside and not all(item.sublayer.skip for item in inside):
            found.append(0.0)  # every path through the block crosses the layer
            continue
        operands = [operand for item in inside for operand in item.branches]
        factor, proof = skip_between(output, source, operands)
        if factor is None or math.isnan(factor):
            norms = ", ".join(sorted({item.sublayer.kind for item in inside}))
            raise MeasureError(
                f"Whole blocks can be branches only where a block's skip is a factor, and that of "
                f'{positions[number].block} is not ({norms}): {proof}. Write granularity="sublayer".'
            )
        found.append(factor)
    return tuple(found)
