r"""What every branch adds to the effective depth, all of them from one backward and one forward pass.

With g the gradient at the trunk's input h_0 and δ_i that at the output of branch i, the paths through
branch i carry A_iᵀ F_i'ᵀ δ_i back to h_0, where A_i is the derivative of the branch's input by h_0. So

    e_i = 1 − ⟨g, g_without_i⟩/‖g‖² = ⟨g, A_iᵀ F_i'ᵀ δ_i⟩/‖g‖² = ⟨F_i' u, δ_i⟩/‖g‖²,   u = A_i g.

The backward pass gives g and all δ_i. A forward pass in which h_0 moves in the direction of g
(forward-mode differentiation) gives the change F_i'u of every branch's output. What moves forward meets
what flows backward: ⟨u_l, δ_l⟩ = ‖g‖² at every stream position l, and that is checked.

Fused attention kernels have no forward mode, so both passes run attention by its formula. Where forward
mode is impossible all the same, each branch costs a backward pass of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.errors import GradscopeWarning
from gradscope.experiment.branch_shares import Branch, BranchContributions
from gradscope.experiment.forward_mode import (
    AdditionNumbers,
    ForwardModeFailed,
    forward_mode,
)
from gradscope.experiment.graph_nodes import Operand
from gradscope.experiment.products import inner
from gradscope.experiment.progress import counted
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.trunk_samples import ROUNDING, Gradients

__all__ = ["branch_contributions"]


def branch_contributions(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: Any,
    run: TrunkPass,
    gradients: Gradients,
    numbers: AdditionNumbers,
    *,
    progress: bool = True,
) -> BranchContributions:
    """e_i of all branches.

    Args:
        model: the model that ``run`` ran; it is run once more.
        loss: the loss.
        batch: the batch of ``run``.
        run: a pass under `attention_by_formula`, its skips proved, with its graph.
        gradients: its gradients.
        numbers: its additions.
        progress: whether to say on a terminal how far one backward pass per branch has come.
    """
    difference, algorithm = float("nan"), "forward mode"
    try:
        value, difference = _at_once(model, loss, batch, run, gradients, numbers)
    except ForwardModeFailed as failed:
        algorithm = "one backward pass per branch"
        value = _one_by_one(run, gradients, str(failed), progress)
    value.flags.writeable = False
    return BranchContributions(
        branches=_branches(run),
        value=value,
        reading_point=run.forward.position_name(0),
        algorithm=algorithm,
        stream_difference=difference,
    )


def _branches(run: TrunkPass) -> tuple[Branch, ...]:
    if run.forward.named_calls:
        seen: dict[str, int] = {}
        found: list[Branch] = []
        for call in run.forward.named_calls:
            block = run.forward.positions[min(call.position, run.last)].block
            inside = [b.sublayer for b in found if b.depth == call.position]
            found.append(
                Branch(
                    block=block,
                    call=seen.get(call.name, 0),
                    depth=call.position,
                    sublayer=len(inside),
                    module=call.name,
                )
            )
            seen[call.name] = seen.get(call.name, 0) + 1
        return tuple(found)
    return tuple(
        Branch(
            block=item.sublayer.block,
            call=item.sublayer.call,
            depth=item.position,
            sublayer=item.sublayer.index,
            module=module,
        )
        for item in run.located
        for module in item.sublayer.branches
    )


def _at_once(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: Any,
    run: TrunkPass,
    gradients: Gradients,
    numbers: AdditionNumbers,
) -> tuple[np.ndarray, float]:
    """All e_i from one forward pass, and the largest |⟨u_l, δ_l⟩/‖g‖² − 1|."""
    deltas = _deltas(run, gradients)
    g = gradients.stream[0]
    direction = g / g.abs().amax()  # what becomes of a vanished gradient would underflow
    products = forward_mode(
        model, loss, batch, run.forward, direction, numbers, operands=deltas, stream=gradients.stream
    )
    square = inner(direction, g)
    along = torch.stack(list(products.stream.values()))
    difference = float((along / square - 1).abs().amax())
    if not difference <= ROUNDING[g.dtype]:
        raise ForwardModeFailed(f"it and the backward pass differ by {difference:.1e}")
    # Without a skip nothing gets past the layer: e = 1, whatever it computes.
    shares = [
        1.0
        if operand is None
        else float(products.operands[operand] / square)
        if operand in products.operands
        else 0.0
        for operand in run.operands
    ]
    return np.asarray(shares), difference


def _deltas(run: TrunkPass, gradients: Gradients) -> dict[Operand, Tensor]:
    if run.forward.named_calls:
        raise ForwardModeFailed("where named branches enter the stream is not known")
    return {
        operand: gradients.branches[number]
        for number, operand in enumerate(run.operands)
        if operand is not None and number in gradients.branches
    }


def _one_by_one(run: TrunkPass, gradients: Gradients, why: str, progress: bool) -> np.ndarray:
    count = len(run.branches)
    warnings.warn(
        f"The branches' contributions cannot be had in one pass of forward-mode differentiation: {why}. "
        f"Instead there is a backward pass for each of {count} branches, about {count * 2 / 3:.0f} times "
        "the cost of one forward and backward pass.",
        GradscopeWarning,
        stacklevel=5,
    )
    g = gradients.stream[0]
    direction = g / g.abs().amax()
    square = inner(direction, g)
    found: list[float] = []
    for number in counted(range(count), "branch contributions", show=progress):
        rest = run.gradient(at_branch=_all_but(number))
        found.append(1.0 if rest is None else float(inner(direction, g - rest) / square))
    return np.asarray(found)


def _all_but(number: int) -> Callable[[int, Tensor], Tensor | None]:
    return lambda other, gradient: None if other == number else gradient
