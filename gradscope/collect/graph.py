"""What the autograd graph proves about a block: a unit skip, and which outputs are its branches.

A graph edge is (node, input number), as `torch.autograd.graph.get_gradient_edge` gives it. These
walks only read the graph; they hold nodes for the length of a forward pass at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["Edge", "edge_of", "has_unit_skip", "is_branch", "sole_successors"]

type_node = Any  # torch.autograd.graph.Node has no public constructor to annotate with
Edge = tuple[type_node, int]

_ADD: Final = "AddBackward0"
_SUBTRACT: Final = "SubBackward0"
_COMPILED: Final = "CompiledFunction"
#: What FSDP2 puts around the inputs of a module, to hear of its backward: each comes out as it went in.
_FSDP: Final = "RegisterPostBackwardFunctionBackward"
# Operations that hand a gradient on element by element, unchanged.
_RELABEL: Final = frozenset(
    {
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "UnsqueezeBackward0",
        "ToCopyBackward0",
        "CloneBackward0",
        "AliasBackward0",
    }
)
_NORM: Final = frozenset(
    {"NativeLayerNormBackward0", "FusedRmsNormBackward0", "NativeGroupNormBackward0"}
)
_SCALE: Final = frozenset({"MulBackward0", "DivBackward0"})
# A walk through a block's adds visits few nodes; a graph that needs more is not such a block.
_MOST_NODES: Final = 2000


def edge_of(tensor: Tensor) -> Edge | None:
    """The graph edge of a tensor that requires grad, also of a leaf; None for a constant."""
    if not tensor.requires_grad:
        return None
    if tensor.grad_fn is not None:
        return _behind_fsdp((tensor.grad_fn, tensor.output_nr))
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _behind_fsdp(edge: Edge) -> Edge:
    while edge[0].name() == _FSDP:
        node, number = edge[0].next_functions[edge[1]]
        if node is None:
            break
        edge = node, number
    return edge


def _next(edge: Edge) -> list[Edge]:
    return [_behind_fsdp((n, i)) for n, i in edge[0].next_functions if n is not None]


def has_unit_skip(output: Edge, source: Edge) -> bool | None:
    """Whether output = source + (something), with coefficient exactly 1, by adds alone.

    None where the walk ends at compiled code, in which nothing can be seen.

    Exactly one path of additions leads from the output to the source, and nothing on it scales: two
    such paths would be 2 x, a path through any other operation proves nothing.
    """
    paths = 0
    stack = [(output, True)]
    visited = 0
    while stack and visited < _MOST_NODES:
        edge, plain = stack.pop()
        visited += 1
        if edge == source:
            if not plain:
                return False
            paths += 1
            continue
        name = edge[0].name()
        if name.startswith(_COMPILED):
            return None
        if name not in (_ADD, _SUBTRACT):
            continue
        for place, (node, number) in enumerate(edge[0].next_functions):
            if node is not None:
                # alpha, and the sign, belong to the second operand only.
                same = place == 0 or (name == _ADD and _alpha(edge[0]) == 1)
                stack.append((_behind_fsdp((node, number)), plain and same))
    return paths == 1 and not stack


def _alpha(node: Any) -> float:
    return getattr(node, "_saved_alpha", 1)


def is_branch(branch: Edge, output: Edge, source: Edge) -> bool:
    """Whether a module's output is added to the stream between a block's input and its output.

    From the block's output, through adds, relabellings, norms and multiplications by constants
    (DeepNorm's alpha on the stream), the walk must reach the branch right behind an add (relabellings
    apart); and the branch must not itself carry the stream on:
    no walk of the same kind leads from it to the block's input.
    """
    if branch == output or branch == source:
        return False
    stack: list[tuple[Edge, bool]] = [(output, False)]
    seen: set[tuple[Edge, bool]] = set()
    reached = False
    while stack and len(seen) < _MOST_NODES:
        edge, added = stack.pop()
        if (edge, added) in seen:
            continue
        seen.add((edge, added))
        if edge == branch:
            reached = reached or added
        if edge == branch or edge == source:
            continue  # what is before the block is none of its branches
        name = edge[0].name()
        if name == _ADD:
            stack.extend((e, True) for e in _next(edge))
        elif name in _RELABEL:
            stack.extend((e, added) for e in _next(edge))
        elif name in _NORM or _is_constant_multiple(edge):
            stack.extend((e, False) for e in _next(edge)[:1])
    return reached and not _carries(branch, source)


def _is_constant_multiple(edge: Edge) -> bool:
    # Seen by the missing edge of the other operand. The operand itself is not looked at: under
    # checkpointing or offloading, reading a saved tensor would run the user's unpacking.
    return edge[0].name() in _SCALE and len(_next(edge)) == 1


def _carries(start: Edge, source: Edge) -> bool:
    stack, seen = [start], set[Edge]()
    while stack and len(seen) < _MOST_NODES:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge == source:
            return True
        name = edge[0].name()
        if name == _ADD or name in _RELABEL:
            stack.extend(_next(edge))
        elif name in _NORM or _is_constant_multiple(edge):
            stack.extend(_next(edge)[:1])
    return False


def sole_successors(
    outputs: Iterable[Edge], streams: Mapping[str, Sequence[Edge | None]]
) -> dict[str, list[bool]]:
    """For each stream position, whether the next position is its only consumer.

    Walks the whole graph once, region by region: from the model's outputs back to the nearest
    stream positions, and from each position back to the nearest ones before it. A position that is
    reached from any region but that of its successor has another consumer.

    Args:
        outputs: edges of the model's outputs.
        streams: by trunk, the edges of h_0 .. h_L in forward order; None where one is a constant.

    Returns:
        by trunk, one flag for each of h_0 .. h_{L-1}.
    """
    owner: dict[Edge, tuple[str, int]] = {}
    for trunk, edges in streams.items():
        for i, edge in enumerate(edges):
            if edge is not None:
                owner[edge] = (trunk, i)
    sole = {trunk: [True] * max(len(edges) - 1, 0) for trunk, edges in streams.items()}

    def region(starts: Iterable[Edge], successor: tuple[str, int] | None) -> None:
        stack = list(starts)
        seen: set[Edge] = set()
        while stack:
            edge = stack.pop()
            if edge in seen:
                continue
            seen.add(edge)
            place = owner.get(edge)
            if place is not None:
                trunk, i = place
                if i < len(sole[trunk]) and successor != (trunk, i + 1):
                    sole[trunk][i] = False
                continue
            stack.extend(_next(edge))

    region(outputs, None)
    for trunk, edges in streams.items():
        for i, edge in enumerate(edges):
            if edge is not None:
                region(_next(edge), (trunk, i))
    return sole
