"""The autograd graph between two positions of a residual stream: what every path crosses, what is added.

A *vertex* that every path between the two positions crosses is a cut. Between neighbouring cuts lies a
*piece*: one operation on the stream itself (a norm, a scale, a view), or a bundle of paths that begin at
one tensor and meet in another. A bundle that meets in an addition, one of whose operands comes straight
from its beginning, looks like a skip with branches. It only looks so: `gradscope.experiment.sublayers`
proves it with numbers. Nothing here computes anything.

Paths are read backwards, as gradients flow: from the later position to the earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch.autograd.graph import Node

from gradscope.experiment.graph_nodes import (
    Edge,
    Operand,
    adds,
    adds_a_product,
    changes_a_view,
    hands_on,
    is_heavy,
    is_opaque,
    is_scale,
)

__all__ = ["AddOperands", "Edge", "Operand", "Piece", "Region", "add_operands"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What lies between two neighbouring cuts.

    Attributes:
        head: the later of the two tensors.
        tail: the earlier one, from which all paths begin.
        nodes: the operations in between, that of the head first.
    """

    head: Edge
    tail: Edge
    nodes: tuple[Node, ...]

    @property
    def single(self) -> bool:
        """Whether it is one operation with one way through it."""
        return len(self.nodes) == 1

    @property
    def heavy(self) -> bool:
        """Whether a matrix, a convolution or something that cannot be seen lies on it."""
        return any(
            is_heavy(node) or (is_opaque(node) and not changes_a_view(node)) for node in self.nodes
        )

    @property
    def scale(self) -> bool:
        """Whether it multiplies the stream by something that does not come from it."""
        return self.single and is_scale(self.nodes[0])


class Region:
    """All paths of the graph from one tensor back to another.

    Args:
        output: where the paths are followed from.
        source: where they lead to.
        alive: the nodes that lead to the source or to something in front of it.
        positions: tensors at which a path stops, if it comes to one of them past the source.

    Attributes:
        cuts: the tensors that every path crosses, from the output to the source, both counted in;
            empty where no path leads from one to the other.
        pieces: what lies between them.
    """

    def __init__(
        self, output: Edge, source: Edge, alive: Collection[Node], positions: Collection[Edge]
    ) -> None:
        self.output = output
        self.source = source
        self._alive = alive
        self._positions = positions
        self._uses: dict[Node, list[tuple[int, Edge]]] = {}
        order = [] if output == source else self._follow()
        self.cuts: tuple[Edge, ...] = (source,) if output == source else self._find_cuts(order)
        self.pieces: tuple[Piece, ...] = self._between(order)

    def uses(self, node: Node) -> list[tuple[int, Edge]]:
        """The operands of a node through which paths lead on, and the tensors that these are."""
        return self._uses.get(node, [])

    def _follow(self) -> list[Node]:
        """All nodes on the way, later ones first."""
        reaching: set[Node] = set()
        seen: set[Node] = set()
        order: list[Node] = []
        stack: list[tuple[Node, bool]] = [(self.output[0], False)]
        while stack:
            node, done = stack.pop()
            if done:
                uses: list[tuple[int, Edge]] = []
                for place, (n, i) in enumerate(node.next_functions):
                    if n is None:
                        continue
                    if (n, i) == self.source or (n in reaching and (n, i) not in self._positions):
                        uses.append((place, (n, i)))
                if uses:
                    self._uses[node] = uses
                    reaching.add(node)
                    order.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            stack.append((node, True))
            stack += [
                (n, False)
                for n, i in node.next_functions
                if n is not None
                and n in self._alive
                and (n, i) != self.source
                and (n, i) not in self._positions
            ]
        return order[::-1]

    def _find_cuts(self, order: list[Node]) -> tuple[Edge, ...]:
        if not order or order[0] is not self.output[0]:
            return ()
        to: dict[Node, int] = {}
        for node in reversed(order):
            to[node] = sum(1 if edge == self.source else to[edge[0]] for _, edge in self._uses[node])
        since: dict[Node, int] = dict.fromkeys(order, 0)
        since[order[0]] = 1
        outputs: dict[Node, set[int]] = {order[0]: {self.output[1]}}
        for node in order:
            for _, edge in self._uses[node]:
                if edge != self.source:
                    since[edge[0]] += since[node]
                    outputs.setdefault(edge[0], set()).add(edge[1])
        every = to[order[0]]
        found = [
            (node, next(iter(outputs[node])))
            for node in order
            if since[node] * to[node] == every and len(outputs[node]) == 1
        ]
        return (*found, self.source)

    def _between(self, order: list[Node]) -> tuple[Piece, ...]:
        place = {node: i for i, node in enumerate(order)}
        ends = [place[node] for node, _ in self.cuts[:-1]] + [len(order)]
        return tuple(
            Piece(head, tail, tuple(order[ends[i] : ends[i + 1]]))
            for i, (head, tail) in enumerate(zip(self.cuts, self.cuts[1:], strict=False))
        )

    def part(self, output: Edge, source: Edge) -> Region:
        """The paths between two of its tensors."""
        return Region(output, source, self._uses.keys(), self._positions)

    def straight(self, piece: Piece, start: Operand) -> tuple[list[Node], Edge]:
        """From one operand on, the operations that have one way through them, up to the piece's tail.

        Returns:
            these operations, and the tensor where that ends: the piece's tail, or where paths part.
        """
        chain: list[Node] = []
        edge = next(edge for place, edge in self.uses(start[0]) if place == start[1])
        while edge != piece.tail:
            onward = self.uses(edge[0])
            if len(onward) != 1 or is_heavy(edge[0]) or is_opaque(edge[0]):
                break
            chain.append(edge[0])
            edge = onward[0][1]
        return chain, edge

    def change_behind_the_source(self) -> Node | None:
        """An in-place change of what the source is a view of: a way past the source, if there is one.

        Autograd then leads what was there before to that base, not to the view.
        """
        bases: set[Node] = set()
        node: Node | None = self.source[0]
        while node is not None and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
            if node is not None:
                bases.add(node)
        changes = (node for node in self._uses if changes_a_view(node))
        return next((node for node in changes if node.next_functions[0][0] in bases), None)

    def suspect(self, piece: Piece) -> Node | None:
        """An operation at which a path without weights runs beside one with weights, if there is one.

        Such a path is no proof of a skip, and its absence is none of a chain: x·σ(Wx), F(x) + mean(x).
        """
        if not any(is_heavy(node) for node in piece.nodes):
            unseen = (n for n in piece.nodes if is_opaque(n) and not changes_a_view(n))
            return next(unseen, None)
        seen: set[Node] = set()
        stack = [piece.head[0]]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            for place, edge in self.uses(node):
                passes = not is_heavy(node) or (place == 0 and adds_a_product(node))
                if passes and edge == piece.tail:
                    return piece.head[0] if not is_opaque(node) else node
                if passes:
                    stack.append(edge[0])
        return None


@dataclass(frozen=True, slots=True, eq=False)
class AddOperands:
    """The operands of the additions at the head of a piece.

    Attributes:
        skips: those that lead straight to the piece's tail, each with the operations on the way.
        branches: all others.
    """

    skips: tuple[tuple[Operand, tuple[Node, ...]], ...]
    branches: tuple[Operand, ...]


def add_operands(
    region: Region, piece: Piece, is_module_output: Callable[[Edge], bool]
) -> AddOperands | None:
    """The operands that are added up where a piece ends; None where it does not end in an addition.

    An addition of additions is taken apart, as in x + attention(x) + mlp(x), but for one inside of a
    branch (a low-rank update added to a layer's output), which is a module's output and has no skip.
    """
    if not adds(piece.head[0]) or len(region.uses(piece.head[0])) < 2:
        return None
    skips: list[tuple[Operand, tuple[Node, ...]]] = []
    branches: list[Operand] = []
    for operand, chain, inner in _summands(region, piece, piece.head[0], is_module_output):
        if inner:
            branches.append(operand)
        else:
            skips.append((operand, chain))
    return AddOperands(tuple(skips), tuple(branches))


def _summands(
    region: Region, piece: Piece, add: Node, is_module_output: Callable[[Edge], bool]
) -> Iterator[tuple[Operand, tuple[Node, ...], bool]]:
    for place, _ in region.uses(add):
        operand = (add, place)
        chain, edge = region.straight(piece, operand)
        if edge == piece.tail:
            yield operand, tuple(chain), False
            continue
        factor = all(hands_on(node) or is_scale(node) for node in chain)
        if factor and adds(edge[0]) and len(region.uses(edge[0])) >= 2:
            inner = list(_summands(region, piece, edge[0], is_module_output))
            whole = is_module_output(edge) or changes_a_view(edge[0])  # by whatever, perhaps a product
            if any(not branch for _, _, branch in inner) or not whole:
                yield from ((o, (*chain, *c), b) for o, c, b in inner)
                continue
        yield operand, (), True
