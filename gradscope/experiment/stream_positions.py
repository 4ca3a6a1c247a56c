"""The positions of a residual stream: outputs of blocks, or, with the skips outside of these, inputs.

In most models a block holds its skips, and its output is the stream. In others the model adds a block's
output to the stream itself, ``x = x + block(x)``, or keeps the parts of a block in a list,
``x = attention(x) + x``. Then the stream is what enters each block, and it ends at the last addition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradscope.experiment.graph_nodes import Edge, arrivals, edge_of, leading_to
from gradscope.experiment.stream_graph import Region, add_operands

__all__ = ["Position", "positions_between"]


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """One tensor of the stream: h_0, or what is behind a call of a block.

    Attributes:
        block: the block that it is behind; for h_0, the block that it enters.
        call: which call of that block, from 0.
        edge: where it stands in the graph; None where no gradient leads through it.
        shape: its shape.
        dtype: its dtype.
    """

    block: str
    call: int
    edge: Edge | None
    shape: torch.Size
    dtype: torch.dtype


def positions_between(
    value: Tensor,
    outputs: Sequence[Position],
    inputs: Sequence[Position],
    is_module_output: Callable[[Edge], bool],
) -> list[Position] | None:
    """The stream by the inputs of the blocks, where it is not their outputs; None where it is.

    Args:
        value: the loss.
        outputs: h_0 and the outputs of all calls of blocks.
        inputs: the inputs of all calls of blocks.
        is_module_output: whether a tensor is the output of a module inside of a block.
    """
    start, first = edge_of(value), inputs[0].edge
    if start is None or first is None or any(at.edge is None for at in inputs):
        return None
    by_output = [at.edge for at in outputs]
    alike = len(outputs) == len(inputs) + 1 and all(
        behind.edge == before.edge for behind, before in zip(outputs[1:], inputs[1:], strict=False)
    )
    if alike and arrivals(start, set(_known(by_output))) <= {by_output[-1]}:
        return None
    alive = leading_to([start[0]], first)
    if len(outputs) == len(inputs) + 1 and _in_a_row([*by_output, start], alive):
        return None
    last = inputs[-1]
    assert last.edge is not None
    end = _end(
        Region(start, last.edge, alive, {e for e in _known([at.edge for at in inputs[:-1]])}),
        is_module_output,
    )
    if end is None or not _in_a_row([*(at.edge for at in inputs), end, start], alive):
        return None
    about: Any = end[0]
    about = about._input_metadata[end[1]]
    behind = [replace(after, block=before.block, call=before.call) for before, after in pairwise(inputs)]
    shape = torch.Size(about.shape)
    return [inputs[0], *behind, Position(last.block, last.call, end, shape, about.dtype)]


def _known(edges: Sequence[Edge | None]) -> list[Edge]:
    return [edge for edge in edges if edge is not None]


def _in_a_row(edges: Sequence[Edge | None], alive: Collection[Any]) -> bool:
    """Whether from each of these tensors one comes to that before it, and to none before that."""
    if any(edge is None for edge in edges):
        return False
    known = _known(edges)
    return all(
        arrivals(behind, set(known) - {behind}, among=alive) == {before}
        for before, behind in pairwise(known)
        if before != behind
    )


def _end(region: Region, is_module_output: Callable[[Edge], bool]) -> Edge | None:
    """The last addition to the stream behind the last block's input."""
    found: Edge | None = None
    for piece in reversed(region.pieces):
        operands = add_operands(region, piece, is_module_output)
        if operands is not None and operands.skips and operands.branches:
            found = piece.head
        elif piece.heavy:
            break
    return found
