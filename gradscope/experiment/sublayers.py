"""The sublayers of a residual stream, as the autograd graph of one forward pass proposes them.

Between two stream positions the graph shows pieces (`gradscope.experiment.stream_graph`). One that ends
in an addition with an operand straight from its beginning looks like a skip with branches; what has
weights and no such operand is a layer without a skip. `gradscope.experiment.skip_proof` decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from torch import nn
from torch.autograd.graph import Node

from gradscope.experiment.branch_outline import has_norm, has_scale, has_weights, outline
from gradscope.experiment.graph_nodes import (
    Edge,
    Operand,
    arrivals,
    changes_a_view,
    hands_on,
    is_opaque,
    is_scale,
    leading_to,
    uses_of,
)
from gradscope.experiment.stream_graph import Piece, Region, add_operands
from gradscope.experiment.stream_reader import StreamForward, refuse_reentrant
from gradscope.layers import named_layers

__all__ = ["Located", "Sublayer", "locate"]

_NORM: Final = {
    (True, True): "peri-norm",
    (True, False): "pre-norm",
    (False, True): "res-post-norm",
    (False, False): "no-norm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer:
    """One step of the residual stream: a skip with its branches, or a layer without a skip.

    Attributes:
        block: the block between whose input and output it lies.
        call: which call of that block, from 0.
        index: its place in the block, from 0 in forward order.
        branches: for each of its branches, the module whose output it is, "" where it is none's; without
            a skip, the layer itself.
        kind: ``pre-norm`` x + F(LN x), ``post-norm`` LN(x + F(x)), ``peri-norm`` x + LN(F(LN x)),
            ``res-post-norm`` x + LN(F(x)), ``no-norm`` x + F(x), ``scaled`` (a factor on the skip, as
            DeepNorm's α, or on the branch, as ReZero and LayerScale have it), ``gated`` (a factor on the
            skip that depends on the data), or ``none``: no skip.
        norm: where its norms are, also where ``kind`` says something else: ``pre-norm``, ``post-norm``,
            ``peri-norm``, ``res-post-norm`` or ``no-norm``; "" without a skip.
        skip: whether there is a skip, and that is proved.
        skip_coefficient: what the skip multiplies by: 1, or α; NaN where it is another factor for each
            element; 0 without a skip.
        proof: how that was proved, or why it could not be.
        status: ``ok``, or ``unproved`` where it is not known what the sublayer is.
    """

    block: str
    call: int
    index: int
    branches: tuple[str, ...]
    kind: str
    norm: str
    skip: bool = False
    skip_coefficient: float = 0.0
    proof: str = ""
    status: str = "ok"


@dataclass(slots=True, eq=False)
class Located:
    """A sublayer in the graph of one forward pass.

    Attributes:
        sublayer: what is known of it.
        position: the number of the stream position that it leads to, 1 for the first block's output.
        output: the tensor behind it.
        source: the tensor in front of it.
        branches: for each branch, the addition that takes it, and as which operand: a gradient that is
            changed there is changed for this use alone. Empty without a skip, where the layer's own
            output stands for it.
        skips: the same for the skip.
        constant: whether the skip has nothing on it but views and factors that come from no data.
        hopeless: whether its status is already known to stay ``unproved``.
        behind: what lies on the stream between it and the next sublayer, in forward order.
    """

    sublayer: Sublayer
    position: int
    output: Edge
    source: Edge
    branches: tuple[Operand, ...] = ()
    skips: tuple[Operand, ...] = ()
    constant: bool = True
    hopeless: bool = False
    behind: list[Piece] = field(default_factory=list[Piece])

    def give_up(self, reason: str) -> None:
        """It stays unproved, whatever numbers say; the first reason is kept."""
        if not self.hopeless:
            self.sublayer = replace(self.sublayer, kind="none", proof=reason, status="unproved")
            self.hopeless = True


def locate(forward: StreamForward, model: nn.Module) -> list[Located]:
    """The sublayers that the graph proposes, in forward order. Those with skips are not proved yet.

    Raises:
        MeasureError: reentrant checkpointing hides the graph.
    """
    edges = [position.edge for position in forward.positions]
    start, first = forward.value.grad_fn, edges[0]
    if start is None or first is None or None in edges:
        refuse_reentrant(forward.value)
    if start is None or first is None:
        return []
    alive = leading_to([start], first)
    known = {edge for edge in edges if edge is not None}
    modules = named_layers(model)
    found: list[Located] = []
    for number, (source, output) in enumerate(pairwise(edges), 1):
        if source is None or output is None:
            continue
        region = Region(output, source, alive, known - {source})
        if any(node.name() == "CheckpointFunctionBackward" for p in region.pieces for node in p.nodes):
            refuse_reentrant(forward.value)
        items = _Reader(forward, modules, region, number).read()
        for item in items:
            if isinstance(item, Located):
                found.append(item)
            elif found:
                found[-1].behind.append(item)
    for item in found:
        if item.skips:
            norm = "post-norm" if has_norm(forward, item.behind) else item.sublayer.norm
            scaled = item.sublayer.kind == "scaled" or has_scale(forward, item.behind[::-1])
            item.sublayer = replace(item.sublayer, kind="scaled" if scaled else norm, norm=norm)
    _mark_ways_past(forward, found, known)
    _mark_other_uses(found, alive)
    return found


def _mark_ways_past(forward: StreamForward, found: Sequence[Located], known: set[Edge]) -> None:
    """Where a path around the branches skips a whole stream position, nothing is proved there."""
    edges = [position.edge for position in forward.positions]
    branches = {operand for item in found for operand in item.branches}
    for number, (source, output) in enumerate(pairwise(edges), 1):
        if source is None or output is None:
            continue
        reached = arrivals(output, known - {output}, branches)
        if any(edge in known and edge != source for edge in reached):
            block = forward.positions[number].block
            reason = f"a path leads around the input of {block}, to an earlier position of the stream"
            for item in found:
                # A layer may then have its skip outside of its block, as the others seem to.
                if item.position == number or not item.skips:
                    item.give_up(reason)


def _mark_other_uses(found: Sequence[Located], alive: Collection[Node]) -> None:
    """A branch whose output is used elsewhere too is more than what is added to the stream."""
    outputs = {operand: _chain_of(operand) for item in found for operand in item.branches}
    uses = uses_of({edge for chain in outputs.values() for edge in chain}, alive)
    for item in found:
        # A layer without a skip is its output, and has no operand here.
        for name, operand in zip(item.sublayer.branches, item.branches, strict=False):
            if any(uses[edge] > 1 for edge in outputs[operand]):
                item.give_up(f"the output of {name or 'a branch'} is used elsewhere too")


def _chain_of(operand: Operand) -> list[Edge]:
    """The tensor that an addition takes, and those that it is only another shape or dtype of."""
    node, number = operand[0].next_functions[operand[1]]
    found: list[Edge] = []
    while node is not None:
        found.append((node, number))
        if not hands_on(node):
            break
        node, number = node.next_functions[0]
    return found


class _Reader:
    """Sorts what lies between two stream positions into sublayers and moves of the stream."""

    def __init__(
        self, forward: StreamForward, modules: Mapping[str, nn.Module], region: Region, number: int
    ) -> None:
        self.forward = forward
        self.modules = modules
        self.region = region
        self.number = number
        at, trunk = forward.positions[number], forward.trunk
        self.block, self.call = at.block, at.call
        self.proposed = trunk.branches[trunk.blocks.index(at.block)]

    def read(self) -> list[Located | Piece]:
        if not self.region.cuts:
            reason = f"no path leads from the output of {self.block} back to the position before it"
            return [self._unproved(self.region.output, self.region.source, reason)]
        change = self.region.change_behind_the_source()
        if change is not None:
            return [self._unproved(self.region.output, self.region.source, _reason(change))]
        found: list[Located | Piece] = []
        chain: list[Piece] = []
        for piece in reversed(self.region.pieces):
            skip = self._skip(piece)
            if skip is None:
                chain.append(piece)
            else:
                found += [*self._chain(chain), skip]
                chain = []
        found += self._chain(chain)
        sublayers = [item for item in found if isinstance(item, Located)]
        for index, item in enumerate(sublayers):
            branches = item.sublayer.branches
            if len(sublayers) == 1 and not item.skips and branches[0] not in self.proposed:
                branches = (self.block,)
            item.sublayer = replace(item.sublayer, index=index, branches=branches)
        return found

    def _skip(self, piece: Piece) -> Located | None:
        operands = add_operands(self.region, piece, self.forward.outputs.__contains__)
        if operands is None or not operands.skips or not operands.branches:
            return None
        seen = [
            outline(self.forward, self.modules, self.region, piece, operand)
            for operand in operands.branches
        ]
        called = list(dict.fromkeys(name for names in self.forward.outputs.values() for name in names))
        order = sorted(range(len(seen)), key=lambda i: _place(called, seen[i].module))
        norm = _NORM[any(o.norm_before for o in seen), any(o.norm_behind for o in seen)]
        sublayer = self._sublayer(
            tuple(seen[i].module for i in order),
            kind="scaled" if any(o.scaled for o in seen) else norm,
            norm=norm,
            proof="proposed by the graph alone",
            status="unproved",
        )
        return Located(
            sublayer,
            self.number,
            piece.head,
            piece.tail,
            tuple(operands.branches[i] for i in order),
            tuple(operand for operand, _ in operands.skips),
            all(_is_constant(node) for _, chain in operands.skips for node in chain),
        )

    def _chain(self, pieces: Sequence[Piece]) -> list[Located | Piece]:
        """The layers among pieces without a skip, and the moves of the stream around them."""
        found: list[Located | Piece] = []
        run: list[Piece] = []
        for piece in pieces:
            run.append(piece)
            suspect = self.region.suspect(piece)
            if suspect is not None and has_weights(self.forward, piece):
                found += [*run[:-1], self._unproved(piece.head, piece.tail, _reason(suspect))]
                run = []
            elif any(has_weights(self.forward, p) for p in run):
                names = self.forward.outputs.get(piece.head, ())
                name = next((name for name in names if name in self.proposed), None)
                if name is not None:
                    found.append(self._layer(run, name))
                    run = []
        # What comes behind the last weights only moves the stream.
        heavy = max((i + 1 for i, p in enumerate(run) if has_weights(self.forward, p)), default=0)
        if heavy:
            names = self.forward.outputs.get(run[heavy - 1].head, ())
            found.append(self._layer(run[:heavy], min(names, key=lambda n: n.count("."), default="")))
        return [*found, *run[heavy:]]

    def _layer(self, run: Sequence[Piece], name: str) -> Located:
        proof = "every path crosses the layer"
        sublayer = self._sublayer((name,), kind="none", norm="", proof=proof)
        return Located(sublayer, self.number, run[-1].head, run[0].tail)

    def _unproved(self, output: Edge, source: Edge, reason: str) -> Located:
        sublayer = self._sublayer(("",), kind="none", norm="", proof=reason, status="unproved")
        return Located(sublayer, self.number, output, source, hopeless=True)

    def _sublayer(
        self, branches: tuple[str, ...], *, kind: str, norm: str, proof: str, status: str = "ok"
    ) -> Sublayer:
        return Sublayer(
            block=self.block,
            call=self.call,
            index=0,
            branches=branches,
            kind=kind,
            norm=norm,
            proof=proof,
            status=status,
        )


def _place(called: Sequence[str], name: str) -> int:
    return called.index(name) if name in called else len(called)


def _is_constant(node: Node) -> bool:
    """Whether an operation on the skip hands it on, or multiplies it by constants and parameters."""
    if not is_scale(node):
        return hands_on(node)
    return sum(n is not None and not _is_parameter(n) for n, _ in node.next_functions) <= 1


def _is_parameter(node: Node) -> bool:
    while hands_on(node):
        node = next(n for n, _ in node.next_functions if n is not None)
    return "AccumulateGrad" in node.name()


def _reason(node: Node) -> str:
    name = node.name()
    if changes_a_view(node):
        return "a view of the stream is changed in place (CopySlices), which hides what is added there"
    if is_opaque(node):
        return f"{name} is a fused kernel or a custom function, and what is added inside of it is hidden"
    return f"{name} joins a path with weights and one without, and the latter is no skip"
