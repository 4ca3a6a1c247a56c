"""A residual branch from outside: whose output it is, and which norms and scales it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from gradscope.experiment.graph_nodes import Operand, is_norm
from gradscope.experiment.stream_graph import Piece, Region
from gradscope.experiment.stream_reader import StreamForward

__all__ = ["Outline", "has_norm", "has_scale", "has_weights", "outline"]

# What a norm that is written out consists of: a mean, and a division by its root.
_MEAN: Final = ("MeanBackward", "SumBackward", "VarBackward", "StdBackward", "NormBackward")
_ROOT: Final = ("RsqrtBackward", "SqrtBackward", "StdBackward", "NormBackward")


@dataclass(frozen=True, slots=True)
class Outline:
    """The outside of a branch.

    Attributes:
        module: the module whose output it is, "" where it is none's.
        norm_before: whether it begins with a norm.
        norm_behind: whether it ends with one, scales apart.
        scaled: whether a factor that does not come from the stream stands behind all weights.
    """

    module: str
    norm_before: bool
    norm_behind: bool
    scaled: bool


def outline(
    forward: StreamForward,
    modules: Mapping[str, nn.Module],
    region: Region,
    piece: Piece,
    operand: Operand,
) -> Outline:
    """The outline of the branch that an addition takes as one of its operands."""
    output = next(edge for place, edge in region.uses(operand[0]) if place == operand[1])
    branch = region.part(output, piece.tail)
    behind: list[Piece] = []
    for part in branch.pieces:
        behind.append(part)
        if has_weights(forward, part):
            break
    before: list[Piece] = []
    for part in reversed(branch.pieces):
        if has_weights(forward, part) or part in behind:
            break
        before.append(part)
    tail = behind[:-1] if behind and has_weights(forward, behind[-1]) else behind
    return Outline(
        module=_module(forward, modules, behind),
        norm_before=has_norm(forward, before[::-1]),
        norm_behind=has_norm(forward, tail),
        scaled=has_scale(forward, tail),
    )


def has_weights(forward: StreamForward, piece: Piece) -> bool:
    """Whether a matrix, a convolution or something that cannot be seen lies on it, norm modules apart."""
    call = forward.norms.get(piece.head)
    return piece.heavy and (call is None or call.source != piece.tail)


def has_norm(forward: StreamForward, pieces: Iterable[Piece]) -> bool:
    """Whether a norm is among these pieces, as a module, as one operation, or written out."""
    return any(_is_norm(forward, piece) for piece in pieces)


def has_scale(forward: StreamForward, pieces: Sequence[Piece]) -> bool:
    """Whether a factor that belongs to no norm is among these pieces, later ones first."""
    return any(piece.scale for piece in _without_norms(forward, pieces))


def _is_norm(forward: StreamForward, piece: Piece) -> bool:
    if piece.head in forward.norms or any(is_norm(node) for node in piece.nodes):
        return True
    names = [node.name() for node in piece.nodes]
    return any(n.startswith(_ROOT) for n in names) and any(n.startswith(_MEAN) for n in names)


def _without_norms(forward: StreamForward, pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, later ones first, but for what belongs to a norm, such as its weight."""
    until = None
    for piece in pieces:
        if until is None and piece.head in forward.norms:
            until = forward.norms[piece.head].source
        if until is None:
            yield piece
        if piece.tail == until:
            until = None


def _module(forward: StreamForward, modules: Mapping[str, nn.Module], pieces: Sequence[Piece]) -> str:
    """The module with weights whose output is closest to the branch's, the outermost of several."""
    named = [
        (place, name)
        for place, piece in enumerate(pieces)
        for name in forward.outputs.get(piece.head, ())
    ]
    if not named:
        return ""

    def rank(found: tuple[int, str]) -> tuple[bool, int, int]:
        place, name = found
        mixes = any(p.dim() >= 2 for p in modules[name].parameters())
        return not mixes, name.count("."), place

    return min(named, key=rank)[1]
