"""A forward pass in which the trunk's input moves, and what its change meets of the gradient on the way.

Forward-mode differentiation carries, next to every value, its change. The change u_l at a stream
position, or at an operand of an addition, is multiplied there with the gradient that the backward pass
left at the same place; nothing else of it is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscope.collect.tensors import tensors_in
from gradscope.errors import MeasureError
from gradscope.experiment.additions import Addition, Additions
from gradscope.experiment.batches import first_float, replaced
from gradscope.experiment.graph_nodes import Operand
from gradscope.experiment.products import inner
from gradscope.experiment.stream_reader import StreamForward
from gradscope.layers import named_layers

__all__ = ["AdditionNumbers", "ForwardModeFailed", "Products", "attention_by_formula", "forward_mode"]


class ForwardModeFailed(Exception):
    """Something in the model cannot be differentiated forwards; never leaves the package."""


class AdditionNumbers(Additions):
    """The number of each addition of a pass, by its node in the graph."""

    def __init__(self) -> None:
        super().__init__(after=self._note)
        self.by_node: dict[Node, int] = {}

    def _note(self, addition: Addition, result: Any) -> None:
        if isinstance(result, Tensor) and result.grad_fn is not None:
            self.by_node[result.grad_fn] = addition.number


@contextmanager
def attention_by_formula() -> Generator[None]:
    """Attention by its formula, where torch would choose a fused kernel without forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Products:
    """⟨u, δ⟩ at the operands and the stream positions that were asked for, [] float64 each.

    Attributes:
        operands: by operand; 0 where nothing moves.
        stream: by number of the stream position.
    """

    def __init__(self, operands: Mapping[Operand, Tensor], stream: Mapping[int, Tensor]) -> None:
        self.operands = dict(operands)
        self.stream = dict(stream)


def forward_mode(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: Any,
    forward: StreamForward,
    direction: Tensor,
    numbers: AdditionNumbers,
    *,
    operands: Mapping[Operand, Tensor],
    stream: Mapping[int, Tensor],
) -> Products:
    """Move h_0 in one direction and multiply what becomes of it with the given gradients.

    Args:
        model: the model of ``forward``.
        loss: its loss.
        batch: its batch.
        forward: the pass whose graph the operands are of.
        direction: of h_0's shape.
        numbers: the additions of ``forward``.
        operands: the gradient at each operand.
        stream: the gradient at stream positions, by their number; h_0 is 0.

    Raises:
        ForwardModeFailed: an operation has no forward mode, or the pass was another one.
    """
    if forward.between:
        raise ForwardModeFailed("the skips lie outside of the blocks")
    wanted: dict[int, list[Operand]] = {}
    for operand in operands:
        number = numbers.by_node.get(operand[0])
        if number is None:
            raise ForwardModeFailed("an addition happens inside of a function of torch")
        wanted.setdefault(number, []).append(operand)
    found: dict[Operand, Tensor] = {}
    along: dict[int, Tensor] = {}
    nothing = torch.zeros((), dtype=torch.float64, device=direction.device)

    def meet(value: Any, gradient: Tensor) -> Tensor:
        change = forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) else None
        return nothing if change is None else inner(change, gradient)

    def add(addition: Addition) -> None:
        for operand in wanted.get(addition.number, ()):
            # At once: an addition in place changes what its first operand holds.
            found[operand] = meet(addition.operands[operand[1]], operands[operand])

    hooks = _StreamHooks(
        forward, direction, lambda at, value: along.update({at: meet(value, stream[at])})
    )
    additions = Additions(before=add)
    try:
        # Torch compiles its own formulas at the first use, by something that it calls deprecated.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
            import_module("torch._decomp.decompositions_for_jvp")
        with forward_ad.dual_level(), torch.no_grad(), hooks.on(model), additions:
            loss(model, batch)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, (MeasureError, torch.OutOfMemoryError)):
            raise
        raise ForwardModeFailed(str(error).partition("\n")[0]) from error
    if additions.count != numbers.count or hooks.calls != len(forward.positions) - 1:
        raise ForwardModeFailed("the model runs differently without gradients")
    return Products(found, along)


class _StreamHooks:
    """Put a direction onto h_0, and show the stream positions of a forward pass."""

    def __init__(
        self, forward: StreamForward, direction: Tensor, show: Callable[[int, Tensor], None]
    ) -> None:
        self.forward = forward
        self.direction = direction
        self.show = show
        self.calls = 0
        self._entered = False

    @contextmanager
    def on(self, model: nn.Module) -> Generator[None]:
        modules, trunk = named_layers(model), self.forward.trunk
        first = self.forward.positions[0].block
        entry = trunk.parts[trunk.blocks.index(first)][0] if trunk.parts else first
        with ExitStack() as stack:
            hook = modules[entry].register_forward_pre_hook(self._enter, with_kwargs=True)
            stack.callback(hook.remove)
            for block in trunk.blocks:
                stack.callback(modules[block].register_forward_hook(self._leave).remove)
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._entered:
            return None
        self._entered = True
        start = self.forward.positions[0]
        h = next(
            t for t in tensors_in((args, kwargs)) if (t.shape, t.dtype) == (start.shape, start.dtype)
        )
        moving = forward_ad.make_dual(h.detach().clone(), self.direction)
        self.show(0, moving)
        return replaced((args, kwargs), h, moving)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        value = first_float(output)
        if value is None or not self._entered:
            return
        self.calls += 1
        self.show(self.calls, value)
