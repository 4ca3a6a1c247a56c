"""The nodes of an autograd graph: what kind of operation one is, and which of them lead where.

A gradient flows from a node to its ``next_functions``, against the order of the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

__all__ = [
    "Edge",
    "Operand",
    "adds",
    "adds_a_product",
    "arrivals",
    "changes_a_view",
    "dtypes_between",
    "edge_of",
    "hands_on",
    "is_heavy",
    "is_norm",
    "is_opaque",
    "is_scale",
    "leading_to",
    "uses_of",
]

#: A tensor of the graph: the node that computed it, and which of its outputs it is.
Edge = tuple[Node, int]
#: A use of a tensor: the node that takes it, and as which operand.
Operand = tuple[Node, int]

# y += x on a view y: what was in y is the first operand.
_IN_PLACE: Final = "torch::autograd::CopySlices"
_ADD: Final = frozenset({"AddBackward0", "SubBackward0", _IN_PLACE})
_NORM: Final = re.compile(r"LayerNorm|RmsNorm|GroupNorm|BatchNorm|InstanceNorm")
# Operations that mix the features or tokens with each other by weights.
_HEAVY: Final = re.compile(r"[Mm][mv]Back|Conv|Attention|Linear|Rnn|Lstm|Gru|Fft|DotBackward")
# What the operations of torch itself are called; a custom function or a fused kernel is not.
_KNOWN: Final = re.compile(r"Backward\d+$|^CopyBackwards$")
# They add their first operand as it is to the product of the others.
_ADDS_A_PRODUCT: Final = re.compile(r"^(Addmm|Baddbmm|Addbmm|Addmv|Addr)Backward")
_SCALE: Final = frozenset({"MulBackward0", "DivBackward0", "NegBackward0"})
# They hand the elements on as they are.
_HANDS_ON: Final = re.compile(
    r"(View|UnsafeView|ReshapeAlias|T|Transpose|Permute|Squeeze|Unsqueeze|ToCopy|Clone|Alias|Expand)Backward"
)


def edge_of(tensor: Tensor) -> Edge | None:
    """Where a tensor stands in the graph, also a leaf; None for a constant."""
    if not tensor.requires_grad:
        return None
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def adds(node: Node) -> bool:
    """Whether it adds or subtracts, also in place on a view."""
    return node.name() in _ADD


def adds_a_product(node: Node) -> bool:
    """Whether it adds its first operand to the product of the others."""
    return _ADDS_A_PRODUCT.match(node.name()) is not None


def changes_a_view(node: Node) -> bool:
    """Whether it stands for an in-place change of a view; what change that was is not said."""
    return node.name() == _IN_PLACE


def is_opaque(node: Node) -> bool:
    """Whether it is a custom function or a fused kernel, whose inside cannot be seen."""
    return _KNOWN.search(node.name()) is None


def is_heavy(node: Node) -> bool:
    """Whether it multiplies by a matrix, convolves or attends."""
    return _HEAVY.search(node.name()) is not None


def is_norm(node: Node) -> bool:
    """Whether it is a norm in one operation."""
    return _NORM.search(node.name()) is not None


def hands_on(node: Node) -> bool:
    """Whether it hands the elements of its operand on as they are, perhaps in another shape or dtype."""
    return _HANDS_ON.match(node.name()) is not None


def is_scale(node: Node) -> bool:
    """Whether it multiplies or divides element by element."""
    return node.name() in _SCALE


def leading_to(starts: Iterable[Node], goal: Edge) -> set[Node]:
    """All nodes from which a gradient flows on to the goal, behind these starts."""
    alive: set[Node] = set()
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in starts]
    while stack:
        node, done = stack.pop()
        if done:
            if any(
                n is not None and ((n, i) == goal or (n in alive and n is not goal[0]))
                for n, i in node.next_functions
            ):
                alive.add(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        if node is not goal[0]:
            stack += [(n, False) for n, _ in node.next_functions if n is not None and n not in seen]
    return alive


def dtypes_between(output: Edge, source: Edge) -> set[torch.dtype]:
    """The dtypes of all tensors that a gradient crosses on its way from one to the other."""
    found: set[torch.dtype] = set()
    for node in leading_to([output[0]], source):
        about: Any = getattr(node, "_input_metadata", ())
        found |= {tensor.dtype for tensor in about}
    return found


def uses_of(tensors: Collection[Edge], nodes: Iterable[Node]) -> dict[Edge, int]:
    """How often these nodes take each of these tensors."""
    found = dict.fromkeys(tensors, 0)
    for node in nodes:
        for n, i in node.next_functions:
            if n is not None and (n, i) in found:
                found[n, i] += 1
    return found


def arrivals(
    start: Edge,
    stops: Collection[Edge],
    without: Collection[Operand] = (),
    among: Collection[Node] | None = None,
) -> set[Edge]:
    """The tensors among ``stops`` at which one arrives first, backwards from ``start``.

    Args:
        start: where all ways begin; it is no stop itself.
        stops: where they end.
        without: uses of tensors that no way goes through.
        among: the nodes that ways go through; None for all.
    """
    found: set[Edge] = set()
    seen: set[Node] = {start[0]}
    stack = [start[0]]
    while stack:
        node = stack.pop()
        for place, (n, i) in enumerate(node.next_functions):
            if n is None or (node, place) in without:
                continue
            if (n, i) in stops:
                found.add((n, i))
            elif n not in seen and (among is None or n in among):
                seen.add(n)
                stack.append(n)
    return found
