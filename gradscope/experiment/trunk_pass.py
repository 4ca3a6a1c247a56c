"""One forward pass over a trunk, and backward passes through it that are read and changed on the way.

The graph of the forward pass is kept. A backward pass is linear, so one graph serves for all of them:
with what a branch lets through replaced, added to, or taken away; from the loss, or from the trunk's end
with a gradient of one's own. The forward pass is not changed for that, and no batch is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradscope.errors import MeasureError
from gradscope.experiment.graph_nodes import Edge, Operand, arrivals, dtypes_between, edge_of
from gradscope.experiment.named_branches import NamedTrunk
from gradscope.experiment.skip_proof import change_operands, prove
from gradscope.experiment.stream_reader import StreamForward, refuse_reentrant
from gradscope.experiment.sublayers import Located, locate

__all__ = ["AtBranch", "AtPosition", "TrunkPass"]

#: Given the number of a branch, or of a sublayer for its skip, and the gradient of its output; returns
#: what is let through in its place, None for nothing.
AtBranch = Callable[[int, Tensor], Tensor | None]
#: Given the number of a stream position and the gradient there; returns what goes on in its place.
AtPosition = Callable[[int, Tensor], Tensor]

_DTYPES: Final = (torch.float64, torch.float32)
_LOWER: Final = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """Where a branch's gradient is: at an operand of an addition, or, without a skip, at its output."""

    operand: Operand | None
    output: Edge | None


class TrunkPass:
    """A forward pass with its graph.

    Args:
        model: the model that is run.
        loss: ``loss(model, batch)``.
        batch: what the loss takes.
        trunk: the trunk by name; None for the one that the loss hangs on.
        named: a trunk whose branches the caller names, who vouches for them; None: they are found.

    Attributes:
        forward: what was seen of the forward pass.
        located: the sublayers, in forward order, proposed by the graph; empty where branches are named.
        branches: for each branch, the number of the stream position that it leads to, in forward order.

    Raises:
        MeasureError: no trunk or branch, no gradient path, a path from the loss past the trunk's end, or
            a stream that is neither float32 nor float64.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batch: Any,
        *,
        trunk: str | None = None,
        named: NamedTrunk | None = None,
    ) -> None:
        self.forward = StreamForward(model, loss, batch, trunk=trunk, named=named)
        self.located: list[Located] = [] if named else locate(self.forward, model)
        self._check_stream()
        if named is not None:
            self._check_named(named)
            uses = [(_Use(None, call.edge), call.position) for call in self.forward.named_calls]
        else:
            uses = [
                (_Use(operand, None if operand else item.output), item.position)
                for item in self.located
                for operand in (item.branches or (None,))
            ]
        if not uses:
            raise MeasureError(
                f"No residual branch was found in the blocks of {self.forward.trunk.name}: nothing with "
                "weights in them lets a gradient through. print(gradscope.architecture(model, batch)) "
                "says more."
            )
        self._uses = [use for use, _ in uses]
        self.branches = tuple(position for _, position in uses)
        self._check_end()

    @property
    def last(self) -> int:
        """The number of the last stream position, the trunk's end."""
        return len(self.forward.positions) - 1

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """For each branch, the addition that takes it; None without a skip, and for named branches."""
        return tuple(use.operand for use in self._uses)

    def prove(self, *, may_name: bool = True) -> None:
        """Prove all skips that were found; named branches are the caller's word.

        Args:
            may_name: whether the caller takes ``modules=``, which a refusal then advises.

        Raises:
            MeasureError: one cannot be proved, with the reason.
        """
        prove(self.forward, self.located)
        self.forward.norms.clear()  # and the values that they were given
        for item in self.located:
            sublayer = item.sublayer
            if sublayer.status != "ok":
                advice = (
                    " If you know which modules' outputs are added to the stream, name them: "
                    'modules=["blocks.*.attention", "blocks.*.mlp"]'
                )
                raise MeasureError(
                    f"It is not known what is a residual branch in {sublayer.block}, sublayer "
                    f"{sublayer.index}: {sublayer.proof}. print(gradscope.architecture(model, batch)) "
                    f"says more.{advice if may_name else ''}"
                )

    def let_go(self) -> None:
        """Free the graph; there are no more backward passes then."""
        self.forward.let_go()
        self.located.clear()
        self._uses.clear()

    def gradient(
        self,
        seed: Tensor | None = None,
        *,
        at_branch: AtBranch | None = None,
        at_skip: AtBranch | None = None,
        at_position: AtPosition | None = None,
    ) -> Tensor | None:
        """The gradient at the trunk's input, or None where none arrives.

        Args:
            seed: the gradient at the trunk's end from which this backward pass begins; None: it begins at
                the loss.
            at_branch: called with the number of each branch and the gradient of its output.
            at_skip: called with the number of each sublayer that has a skip, and the gradient of that.
            at_position: called with each stream position and the gradient there, the last one first.
        """
        first = self.forward.positions[0].edge
        assert first is not None
        with ExitStack() as stack:
            # Hooks of one tensor run in this order: a position is read before the layer that ends there.
            if at_position is not None:
                for number in range(self.last, 0, -1):
                    edge = self.forward.positions[number].edge
                    if edge is not None:
                        _change_output(stack, edge, _numbered(at_position, number))
            operands: dict[Operand, Any] = {}
            if at_branch is not None:
                for number, use in enumerate(self._uses):
                    if use.operand is not None:
                        operands[use.operand] = _numbered(at_branch, number)
                    elif use.output is not None:
                        _change_output(stack, use.output, _numbered(at_branch, number))
            if at_skip is not None:
                for number, item in enumerate(self.located):
                    operands |= dict.fromkeys(item.skips, _numbered(at_skip, number))
            change_operands(stack, operands)
            end = self.forward.positions[-1].edge
            root = self.forward.value if seed is None or end is None else GradientEdge(*end)
            found = self._differentiate(root, first, seed)
        return found if found is None or at_position is None else at_position(0, found)

    def _differentiate(self, root: Any, first: Edge, seed: Tensor | None) -> Tensor | None:
        try:
            return torch.autograd.grad(
                [root],
                [GradientEdge(*first)],
                None if seed is None else [seed],
                retain_graph=True,
                allow_unused=True,
            )[0]
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise MeasureError(
                "The model checkpoints activations with use_reentrant=True, which hides its graph. "
                "Write use_reentrant=False, or turn checkpointing off for the measurement."
            ) from error

    def _check_stream(self) -> None:
        positions = self.forward.positions
        for number, position in enumerate(positions):
            if position.dtype not in _DTYPES:
                raise MeasureError(
                    f"The {self.forward.position_name(number)} is "
                    f"{str(position.dtype).removeprefix('torch.')}: the gradient is divided among paths "
                    "that partly cancel, which takes float64 or float32. Write model.double(), outside "
                    "of autocast."
                )
        start, first = edge_of(self.forward.value), positions[0].edge
        edges = [p.edge for p in positions] + [call.edge for call in self.forward.named_calls]
        if None in edges:
            refuse_reentrant(self.forward.value)
        if start is None or first is None or first not in arrivals(start, {first}):
            raise MeasureError(
                f"No gradient path from the loss to the {self.forward.position_name(0)}: something "
                "between them is detached, or runs under no_grad."
            )

        end = positions[-1].edge
        lower = {} if end is None else dtypes_between(end, first) & set(_LOWER)
        if lower:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in lower))
            raise MeasureError(
                f"Between the {self.forward.position_name(0)} and the "
                f"{self.forward.position_name(self.last)} something computes in {names}: the gradient is "
                "divided among paths that partly cancel, which takes float64 or float32. Write "
                "model.double(), outside of autocast."
            )

    def _check_named(self, named: NamedTrunk) -> None:
        _, names = named
        called = {call.name for call in self.forward.named_calls}
        missing = [name for name in names if name not in called]
        if missing:
            raise MeasureError(
                f"{len(missing)} of {len(names)} branches were not called in the forward pass, "
                f"{missing[0]} among them. Was the model called that loss(model, batch) is given, and "
                "are the branches called as modules, not through .forward()? Otherwise leave them out "
                "of modules=."
            )

    def _check_end(self) -> None:
        """Path lengths are counted from the trunk's end, so all paths must come through it."""
        start = edge_of(self.forward.value)
        edges = [p.edge for p in self.forward.positions]
        known = {edge for edge in edges if edge is not None}
        if start is not None and arrivals(start, known) - {edges[-1]}:
            raise MeasureError(
                f"The loss depends on the {self.forward.position_name(0)} past the end of the trunk, the "
                f"{self.forward.position_name(self.last)}: through an auxiliary loss on an earlier "
                "position, a skip around the trunk, or a second forward pass. The lengths of such paths "
                "are not defined. Write a loss on the trunk's last output alone."
            )


def _numbered(function: Callable[[int, Tensor], Any], number: int) -> Callable[[Tensor], Any]:
    return lambda gradient: function(number, gradient)


def _change_output(stack: ExitStack, edge: Edge, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace the gradient of a tensor in all backward passes, until the stack is closed."""

    def hook(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        given = gradients[edge[1]]
        if given is None:
            return gradients
        new = change(given)
        # Zeros in the place of nothing: a later change may let something through again.
        new = torch.zeros_like(given) if new is None else new
        return (*gradients[: edge[1]], new, *gradients[edge[1] + 1 :])

    stack.callback(edge[0].register_prehook(hook).remove)
