"""What if a skip, or a branch, were cut: in the backward pass, and in the forward pass.

*Backward*, the activations stay as they are, and nothing of the gradient is let back through what is cut:
how much of it came that way. *Forward*, what is cut adds nothing to the stream either, and everything
behind it is computed anew: what the loss, and the gradient, would be. The weights are the same in both.

All backward cuts are passes over one kept graph. For a forward cut the model runs once more with one
operand of one addition replaced by zeros: the addition that the graph of the first pass has proved to
join the skip and the branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradscope.errors import MeasureError
from gradscope.experiment.additions import Addition, Additions
from gradscope.experiment.batches import loss_or_own, own_batch
from gradscope.experiment.forward_mode import AdditionNumbers
from gradscope.experiment.graph_nodes import Operand
from gradscope.experiment.products import cosine, l2
from gradscope.experiment.progress import counted
from gradscope.experiment.stream_reader import StreamForward
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.untouched import (
    refuse_coupled_samples,
    shared_copy,
    undisturbed,
    unwrapped,
)

__all__ = ["Counterfactual", "Cut", "counterfactual"]

Array = npt.NDArray[np.float64]
_HIDDEN: Final = "the addition is in place, or inside of a function of torch"
_NOT_MET: Final = "the addition was not met again in the pass with the cut"
_SAME: Final = 1e-5  # two runs of one model differ by rounding, on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One skip or branch, and what becomes of the model without it.

    Attributes:
        block: the block.
        call: which call of that block, from 0.
        sublayer: its place in the block, from 0.
        depth: l, the number of the stream position behind that call of the block, from 1.
        what: ``skip`` or ``branch``.
        module: of a branch, the module whose output it is; "" where it is none's.
        gradient_ratio: ‖g_cut‖/‖g‖ at the trunk's input with the backward pass cut there.
        gradient_cosine: cos(g_cut, g); NaN where nothing is left.
        loss_change: the loss with the forward pass cut there, minus the loss; NaN where absent.
        forward_ratio: ‖g‖ of that model at the trunk's input, divided by ‖g‖; NaN where absent.
        status: ``ok``, or why the forward cut is absent.
    """

    block: str
    call: int
    sublayer: int
    depth: int
    what: str
    module: str
    gradient_ratio: float
    gradient_cosine: float
    loss_change: float = math.nan
    forward_ratio: float = math.nan
    status: str = "ok"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counterfactual:
    """The gradient with and without skips, and every single cut.

    Attributes:
        trunk: the trunk's name.
        reading_point: the trunk's input, where g is.
        positions: names of the stream positions, [P].
        gradient_l2: ‖δ_l‖ at each stream position, as it is, [P] float64.
        without_skips_l2: the same with the backward pass through all skips cut: what the branches alone
            let through, [P] float64.
        loss: the loss as it is.
        cuts: one for each skip and each branch, in forward order.
    """

    trunk: str
    reading_point: str
    positions: tuple[str, ...]
    gradient_l2: Array
    without_skips_l2: Array
    loss: float
    cuts: tuple[Cut, ...]

    def __str__(self) -> str:
        kept, left = self.gradient_l2, self.without_skips_l2
        ratio = left[0] / kept[0] if kept[0] > 0 else math.nan
        lines = [
            f"gradient at the {self.reading_point}: {kept[0]:.3g}, and {left[0]:.3g} without skips "
            f"({ratio:.2g} of it); from the end of {self.trunk} ({kept[-1]:.3g}) the same weights",
            f"{'cut, [sublayer]':<44} {'backward: ×':>12} {'cosine':>8} "
            f"{'forward: loss':>14} {'gradient ×':>11}",
        ]
        for cut in self.cuts:
            call = f", call {cut.call + 1}" if cut.call else ""
            module = cut.module.removeprefix(f"{cut.block}.")
            name = f"{cut.block}{call} [{cut.sublayer}] {cut.what} {module}".rstrip()
            forward = (
                f"{cut.loss_change:>+14.4g} {cut.forward_ratio:>11.4g}"
                if cut.status == "ok"
                else f"  {cut.status}"
            )
            lines.append(f"{name:<44} {cut.gradient_ratio:>12.4g} {cut.gradient_cosine:>8.3f} {forward}")
        return "\n".join(lines)


def counterfactual(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    trunk: str | None = None,
    forward: bool = True,
    progress: bool = True,
) -> Counterfactual:
    """What if this block's skip, or branch, were cut? For every one, and for all skips at once.

    The skips and branches are found and proved as by `gradscope.architecture`. It costs about 2/3 of a
    forward and backward pass for every cut, and with ``forward`` one more.

    ::

        print(gradscope.counterfactual(model, batch, loss))

    Args:
        model: the model, usually in ``model.eval()``; a copy that shares its parameters is run.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)`` → scalar tensor. None: ``model(**batch).loss``.
        trunk: which trunk, by name, where there are several.
        forward: whether to cut the forward pass as well.
        progress: whether to say on a terminal how far it is.

    Returns:
        The gradient over depth with and without skips, and every cut. What cannot be cut forward is
        absent, with the reason in its ``status``.

    Raises:
        MeasureError: a skip cannot be proved, active dropout, or what `gradscope.effective_depth` refuses
            of the stream.
    """
    model = unwrapped(model)
    refuse_coupled_samples(model)
    loss = loss_or_own(loss, batch)
    with undisturbed(model):
        twin = shared_copy(model)
        numbers = _Numbers()
        with numbers:
            run = TrunkPass(twin, loss, own_batch(batch), trunk=trunk)
        run.prove(may_name=False)
        kept: dict[int, Tensor] = {}
        norms = _profile(run, kept)
        g = kept[0]
        if not torch.isfinite(g).all() or not g.any():
            raise MeasureError(
                f"The gradient at the {run.forward.position_name(0)} is 0 or not finite: there is "
                "nothing to compare a cut with."
            )
        left = _profile(run, {}, at_skip=lambda number, gradient: None)
        value = float(run.forward.value.detach())
        again = _Again(twin, loss, batch, run.forward.trunk.name, numbers.count)
        found: list[Cut] = []
        plan = _plan(run)
        for cut, operand, backward in counted(plan, "counterfactual", show=progress):
            cut_g = run.gradient(**backward)
            cut_g = torch.zeros_like(g) if cut_g is None else cut_g
            found.append(
                Cut(
                    **cut,
                    gradient_ratio=l2(cut_g) / l2(g),
                    gradient_cosine=cosine(cut_g, g),
                    **(_forward(again, numbers, operand, value, l2(g)) if forward else _NOT_ASKED),
                )
            )
    return Counterfactual(
        trunk=run.forward.trunk.name,
        reading_point=run.forward.position_name(0),
        positions=tuple(run.forward.position_name(i) for i in range(run.last + 1)),
        gradient_l2=norms,
        without_skips_l2=left,
        loss=value,
        cuts=tuple(found),
    )


_NOT_ASKED: Final[dict[str, Any]] = {"status": "not asked for"}


def _profile(run: TrunkPass, kept: dict[int, Tensor], **cuts: Any) -> Array:
    """‖δ_l‖ at every stream position, 0 where nothing arrives; ``kept`` gets the gradients themselves."""
    norms = np.zeros(run.last + 1)

    def keep(position: int, gradient: Tensor) -> Tensor:
        norms[position] = l2(gradient)
        kept[position] = gradient
        return gradient

    run.gradient(at_position=keep, **cuts)
    norms.flags.writeable = False
    return norms


def _plan(run: TrunkPass) -> list[tuple[dict[str, Any], Operand | None, dict[str, Any]]]:
    """For each cut: what it is, the operand that a forward cut takes away, and the backward cut."""
    plan: list[tuple[dict[str, Any], Operand | None, dict[str, Any]]] = []
    branch = 0
    for number, item in enumerate(run.located):
        about = item.sublayer
        where: dict[str, Any] = {
            "block": about.block,
            "call": about.call,
            "sublayer": about.index,
            "depth": item.position,
        }
        if item.skips:
            operand = item.skips[0] if len(item.skips) == 1 else None
            plan.append(({**where, "what": "skip", "module": ""}, operand, {"at_skip": _all_but(number)}))
        for place, module in enumerate(about.branches):
            operand = item.branches[place] if item.branches else None
            cut = {**where, "what": "branch", "module": module}
            plan.append((cut, operand, {"at_branch": _all_but(branch)}))
            branch += 1
    return plan


def _all_but(number: int) -> Callable[[int, Tensor], Tensor | None]:
    return lambda other, gradient: None if other == number else gradient


class _Numbers(AdditionNumbers):
    """The additions of the first pass, by number, with the sizes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[float, float]] = {}

    def _note(self, addition: Addition, result: Any) -> None:
        super()._note(addition, result)
        if isinstance(result, Tensor) and result.grad_fn is not None and not addition.in_place:
            self.sizes[addition.number] = _sizes(addition)


def _sizes(addition: Addition) -> tuple[float, float]:
    """‖·‖ of both operands; in front of a cut nothing has changed, so that they tell additions apart."""
    first, second = (l2(o.detach()) if isinstance(o, Tensor) else float(o) for o in addition.operands)
    return first, second


@dataclass(frozen=True, slots=True)
class _Again:
    """How the model is run once more, and how many additions it then has."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    batch: Any
    trunk: str
    additions: int


def _forward(
    again: _Again, numbers: _Numbers, operand: Operand | None, value: float, size: float
) -> dict[str, Any]:
    """Loss and gradient of the model with one operand of one addition replaced by zeros."""
    if operand is None:
        return {"status": "no single addition joins it to the stream"}
    number = numbers.by_node.get(operand[0])
    if number is None:
        return {"status": _HIDDEN}
    place = operand[1]
    trouble: list[str] = []
    hit: list[bool] = []

    def without(addition: Addition) -> tuple[Any, Any] | None:
        if addition.number != number:
            return None
        if addition.in_place:
            trouble.append(_HIDDEN)
            return None
        if not np.allclose(_sizes(addition), numbers.sizes[number], rtol=_SAME, atol=0.0):
            trouble.append(_NOT_MET)
            return None
        operands = list(addition.operands)
        operands[place] = torch.zeros_like(operands[place])
        return operands[0], operands[1]

    def seen(addition: Addition, result: Any) -> None:
        if addition.number == number and not trouble:
            other = addition.operands[1 - place]
            other = other * addition.alpha if place == 0 else other
            same = torch.equal(result, other.expand_as(result))
            # The second operand may have been subtracted.
            hit.append(same or torch.equal(result, -other.expand_as(result)))

    additions = Additions(before=without, after=seen)
    with additions:
        run = StreamForward(again.model, again.loss, own_batch(again.batch), trunk=again.trunk)
    if trouble:
        return {"status": trouble[0]}
    if hit != [True] or additions.count != again.additions:
        return {"status": _NOT_MET}
    edge = run.positions[0].edge
    found = None
    if edge is not None and run.value.requires_grad:
        (found,) = torch.autograd.grad(run.value, [GradientEdge(*edge)], allow_unused=True)
    change = float(run.value.detach()) - value
    ratio = 0.0 if found is None else l2(found) / size
    if not (math.isfinite(change) and math.isfinite(ratio)):
        return {"status": "the loss or the gradient with the cut is not finite"}
    return {"loss_change": change, "forward_ratio": ratio}
