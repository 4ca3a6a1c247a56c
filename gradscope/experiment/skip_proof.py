"""The proof of a skip: what comes back of a gradient when the branches let nothing through.

The graph only proposes a skip (`gradscope.experiment.sublayers`). Here the gradients of the branches'
outputs are taken away and a random cotangent is sent from the end of the sublayer to its beginning. It
must arrive as it is (a unit skip), as a multiple of itself (a scaled one), or, twice with the same factor
for each element, scaled element by element (a gated one). A norm that follows on the stream must hand a
cotangent on exactly as that norm alone does. Each proof is local: it costs the operations of one
sublayer's skip, and none of its branches' weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradscope.experiment.graph_nodes import Edge, Operand, changes_a_view
from gradscope.experiment.stream_reader import NormCall, StreamForward
from gradscope.experiment.sublayers import Located

__all__ = ["change_operands", "prove", "skip_between"]

#: Largest relative difference that counts as rounding, by dtype; in others, such as bfloat16, the last.
_TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 1e-5}
_HALF_TOLERANCE: Final = 1e-2
#: The same for a norm, which models in float64 often compute in float32 all the same.
_NORM_TOLERANCE: Final = 1e-5


def prove(forward: StreamForward, located: Sequence[Located]) -> None:
    """Decide about every proposed skip, in place: its coefficient and how that was proved, or why not.

    The graph of the forward pass is kept.
    """
    for number, item in enumerate(located):
        if not item.skips or item.hopeless:
            continue
        coefficient, proof = skip_between(item.output, item.source, item.branches, seed=number)
        if coefficient is not None and item.sublayer.norm == "post-norm":
            wrong = _norm_behind(forward, item, number)
            if wrong:
                coefficient, proof = None, wrong
        old = item.sublayer
        if coefficient is None:
            item.sublayer = replace(old, kind="none", proof=proof)
            continue
        kind = old.kind
        if coefficient != 1:
            kind = "scaled" if item.constant else "gated"
        item.sublayer = replace(
            old, kind=kind, skip=True, skip_coefficient=coefficient, proof=proof, status="ok"
        )


def change_operands(stack: ExitStack, change: Mapping[Operand, Any]) -> None:
    """Replace the gradients of single operands in all backward passes, until the stack is closed.

    Args:
        stack: what takes the hooks off again.
        change: by operand, a function of the gradient that an addition gives to it.
    """
    by_node: dict[Node, dict[int, Any]] = {}
    for (node, place), function in change.items():
        by_node.setdefault(node, {})[place] = function
    for node, functions in by_node.items():

        def hook(inputs: Any, outputs: Any, functions: dict[int, Any] = functions) -> Any:
            return tuple(
                functions[i](g) if i in functions and g is not None else g for i, g in enumerate(inputs)
            )

        stack.callback(node.register_hook(hook).remove)


def _nothing(gradient: Tensor) -> None:
    return None


def skip_between(
    output: Edge, source: Edge, branches: Sequence[Operand], *, seed: int = 0
) -> tuple[float | None, str]:
    """What multiplies a gradient on its way from one tensor to an earlier one, past all branches.

    Args:
        output: where the gradient begins.
        source: where it arrives.
        branches: the operands that nothing is let through.
        seed: of the random gradient.

    Returns:
        The factor and how it was proved: NaN for another factor for each element; None where it is no
        factor, and what came back instead.
    """
    probe = _Probe(output, source, branches, seed)
    v, back = probe.send()
    if back is None or not back.any():
        return None, "nothing came back of a gradient without the branches"
    if back.numel() != v.numel():
        shapes = f"{tuple(v.shape)} one of shape {tuple(back.shape)}"
        return None, f"of a gradient of shape {shapes} came back"
    v, u = v.double().flatten(), back.double().flatten()
    if torch.linalg.vector_norm(u - v) <= probe.tolerance * torch.linalg.vector_norm(v):
        return 1.0, "a random gradient came back as it was"
    alpha = float(u @ v / (v @ v))
    if torch.linalg.vector_norm(u - alpha * v) <= probe.tolerance * torch.linalg.vector_norm(u):
        return alpha, f"a random gradient came back times {alpha:.6g}"
    if changes_a_view(output[0]):
        return None, "a view of the stream is changed in place (CopySlices), and not by an addition"
    off = float(torch.linalg.vector_norm(u - alpha * v) / torch.linalg.vector_norm(v))
    factor = torch.where(v == 0, torch.zeros_like(v), u / v)
    v, back = probe.send()
    assert back is not None  # the same graph as before
    v, u = v.double().flatten(), back.double().flatten()
    # Element by element, as a quotient of two rounded numbers says little in sum.
    if ((u - factor * v).abs() <= 10 * probe.tolerance * u.abs()).all():
        return math.nan, "two random gradients came back with the same factor for each element"
    return None, (
        "a random gradient came back neither as it was nor as a multiple of itself (relative difference "
        f"{off:.1e})"
    )


class _Probe:
    """Random gradients from one tensor to another, without the branches."""

    def __init__(self, output: Edge, source: Edge, branches: Sequence[Operand], seed: int) -> None:
        self.output, self.source, self.branches = output, source, branches
        about, before = _about(output), _about(source)
        self.shape, self.dtype, self.device = torch.Size(about.shape), about.dtype, about.device
        self.tolerance = max(_TOLERANCE.get(at.dtype, _HALF_TOLERANCE) for at in (about, before))
        self._random = torch.Generator().manual_seed(seed)

    def send(self) -> tuple[Tensor, Tensor | None]:
        """A random gradient, and what comes back of it."""
        sent = torch.randn(self.shape, generator=self._random, dtype=torch.float32).to(
            self.device, self.dtype
        )
        with ExitStack() as stack:
            change_operands(stack, dict.fromkeys(self.branches, _nothing))
            return sent, _between(self.output, self.source, sent)


def _about(edge: Edge) -> Any:
    node: Any = edge[0]
    return node._input_metadata[edge[1]]


def _norm_behind(forward: StreamForward, item: Located, seed: int) -> str:
    """Why the norm on the stream behind an addition is not what it seems; "" where it is."""
    for piece in item.behind:
        call = forward.norms.get(piece.head)
        if call is None:
            continue
        probe = _Probe(piece.head, call.source, (), seed)
        sent, found = probe.send()
        own = _alone(call, sent).double()
        off = math.inf
        if found is not None:
            off = float(torch.linalg.vector_norm(found.double() - own) / torch.linalg.vector_norm(own))
        if not off <= max(probe.tolerance, _NORM_TOLERANCE):
            return f"the norm behind the addition does not act as that norm alone ({off:.1e})"
    return ""


def _between(output: Edge, source: Edge, cotangent: Tensor) -> Tensor | None:
    if output == source:
        return cotangent
    return torch.autograd.grad(
        [GradientEdge(*output)],
        [GradientEdge(*source)],
        [cotangent],
        retain_graph=True,
        allow_unused=True,
    )[0]


def _alone(call: NormCall, cotangent: Tensor) -> Tensor:
    x = call.input.detach().requires_grad_()
    return torch.autograd.grad(call.module.forward(x), [x], [cotangent])[0]
