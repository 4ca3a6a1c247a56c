"""One forward and backward pass over a trunk, of the batch itself or of its two copies with tags.

The backward pass of the copies carries the pair (g, ġ): every branch output maps it to (g, ġ + g), and
ġ starts from 0 at the end of the trunk (`gradscope.experiment.effective_depth`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradscope.errors import MeasureError
from gradscope.experiment.batches import first_float, replaced
from gradscope.layers import named_layers

__all__ = ["TOLERANCE", "TrunkRun"]

#: Largest relative difference that counts as rounding, by the dtype of the stream.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float64: 1e-9, torch.float32: 1e-4}


class _BranchTag(torch.autograd.Function):
    """Identity on a branch output whose backward maps the copies' (g, ġ) to (g, ġ + g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return x.clone()  # not a view: what follows may be an in-place operation

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, dot = grads[0].chunk(2, ctx.dim)
        return torch.cat((g, dot + g), ctx.dim), None


class _TrunkEnd(torch.autograd.Function):
    """Identity on the trunk's last tensor whose backward maps the copies' (g, g) to (g, 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, _ = grads[0].chunk(2, ctx.dim)
        return torch.cat((g, torch.zeros_like(g)), ctx.dim), None


class TrunkRun:
    """One forward and backward pass: of the batch itself, or of its two copies with tags.

    The pass of the copies follows the ``plain`` one: which dimension of an inner tensor holds the
    copies is the one that doubled against it, and which call of a block is the last is known from it.

    Args:
        model: the model that is run; it is given hooks for as long as `gradient` takes.
        branches: names of its residual branches.
        blocks: the block that holds each branch, by name.
        plain: the run of the batch itself, for that of the copies; None for the run of the batch.

    Attributes:
        first_block: the block that was called first, whose input is h_0.
        input_shape: the shape of h_0.
        input_dim: the dimension of h_0 along which the copies lie.
        calls: name and output shape of each call of a branch, in forward order.
        block_shapes: the output shape of each call of a block, in forward order.
    """

    def __init__(
        self,
        model: nn.Module,
        branches: tuple[str, ...],
        blocks: Mapping[str, str],
        plain: TrunkRun | None,
    ) -> None:
        self.model = model
        self.branches = branches
        self.blocks = blocks
        self.plain = plain
        self.first_block = ""
        self.input_shape = torch.Size()
        self.input_dim = 0
        self.calls: list[tuple[str, torch.Size]] = []
        self.block_shapes: list[torch.Size] = []
        self._input: GradientEdge | None = None
        self._end: Node | None = None
        self._differences: list[Tensor] = []
        self._open = True

    def gradient(self, loss: Callable[[Any, Any], Tensor], batch: Any) -> Tensor | None:
        """The gradient of the loss at the trunk's input, or None where no path leads there."""
        modules = named_layers(self.model)
        with ExitStack() as hooks:
            for block in dict.fromkeys(self.blocks.values()):
                hooks.callback(
                    modules[block].register_forward_pre_hook(self._enter(block), with_kwargs=True).remove
                )
            # A branch may be its own block: its tag must come before the trunk's end.
            for name in self.branches:
                hooks.callback(modules[name].register_forward_hook(self._branch(name)).remove)
            for block in dict.fromkeys(self.blocks.values()):
                hooks.callback(modules[block].register_forward_hook(self._leave).remove)
            value = loss(self.model, batch)
            self._open = False  # recomputation in the backward pass is not another call
            self._check_loss(value)
            self._check_calls()
            assert self._input is not None
            if self.plain is not None:
                self._check_no_way_past_the_end(value)
            if not value.requires_grad:
                return None
            try:
                return torch.autograd.grad(value, (self._input,), allow_unused=True)[0]
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise MeasureError(
                    "The model checkpoints activations with use_reentrant=True, which hides its graph. "
                    "Write use_reentrant=False, or turn checkpointing off for the measurement."
                ) from error

    def copies_difference(self) -> float:
        """The largest relative difference between the copies' forward values."""
        return float(torch.stack([d.cpu() for d in self._differences]).amax())

    def _enter(self, block: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._input is not None or not self._open:
                return None
            h = first_float((args, kwargs))
            if h is None:
                raise MeasureError(f"{block} was called without a float tensor: no gradient can be read.")
            if h.dtype not in TOLERANCE:
                raise MeasureError(_half(f"the input of {block}", h.dtype))
            self.first_block, self.input_shape = block, h.shape
            if self.plain is not None:
                self.input_dim = _doubled_dim(f"the input of {block}", self.plain.input_shape, h.shape)
            if h.requires_grad:
                self._input = get_gradient_edge(h)
                return None
            leaf = h.detach().requires_grad_()
            self._input = get_gradient_edge(leaf)
            return replaced((args, kwargs), h, leaf.clone())  # a leaf allows no in-place operation

        return hook

    def _branch(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._open:
                return None
            value = first_float(output)
            if value is None:
                raise MeasureError(f"The branch {name} returned no float tensor.")
            self.calls.append((name, value.shape))
            if self.plain is None:
                if value.dtype not in TOLERANCE:
                    raise MeasureError(_half(f"the output of the branch {name}", value.dtype))
                return None
            if len(self.calls) > len(self.plain.calls):
                return None  # reported after the pass
            expected = self.plain.calls[len(self.calls) - 1][1]
            return self._tag(_BranchTag, f"the output of the branch {name}", expected, output, value)[0]

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        value = first_float(output)
        if not self._open or value is None:
            return None
        self.block_shapes.append(value.shape)
        if self.plain is None or len(self.block_shapes) != len(self.plain.block_shapes):
            return None
        shape = self.plain.block_shapes[-1]
        output, tagged = self._tag(_TrunkEnd, "the end of the trunk", shape, output, value)
        self._end = tagged.grad_fn
        return output

    def _tag(
        self,
        tag: type[torch.autograd.Function],
        where: str,
        shape: torch.Size,
        output: Any,
        value: Tensor,
    ) -> tuple[Any, Tensor]:
        dim = _doubled_dim(where, shape, value.shape)
        first, second = value.detach().chunk(2, dim)
        if first.numel():
            largest = first.abs().amax().double()
            off = (first - second).abs().amax().double()
            self._differences.append(torch.where(off == 0, off, off / largest))
        apply: Callable[[Tensor, int], Tensor] = cast(Any, tag).apply
        tagged = apply(value, dim)
        return replaced(output, value, tagged), tagged

    def _check_loss(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MeasureError(
                f"loss(model, batch) returned {got}, not a scalar tensor. Reduce it: .mean()"
            )

    def _check_calls(self) -> None:
        called = {name for name, _ in self.calls}
        missing = [name for name in self.branches if name not in called]
        if missing:
            raise MeasureError(
                f"{len(missing)} of {len(self.branches)} branches were not called in the forward pass, "
                f"{missing[0]} among them. Was the model called that loss(model, batch) is given, and "
                "are the branches called as modules, not through .forward()? Otherwise leave them out "
                "of branches=."
            )
        if self._input is None:
            block = self.blocks[self.calls[0][0]]
            raise MeasureError(
                f"{block} holds a branch but was not called itself, so that its input, h_0, was not "
                "seen. Make it a module whose forward runs the block, x = block(x)."
            )
        if self.plain is not None and (
            [name for name, _ in self.calls] != [name for name, _ in self.plain.calls]
            or len(self.block_shapes) != len(self.plain.block_shapes)
        ):
            raise MeasureError(
                "The copied batch did not call the same branches in the same order as the batch itself: "
                "something random is active, such as layer dropping. Write model.eval()."
            )

    def _check_no_way_past_the_end(self, value: Tensor) -> None:
        """ġ is 0 at the loss only if every path from there to h_0 crosses the trunk's end."""
        assert self._input is not None
        seen: set[Node] = set()
        waiting = [get_gradient_edge(value)[:2]] if value.requires_grad else []
        while waiting:
            node, index = waiting.pop()
            if (node, index) == (self._input.node, self._input.output_nr):
                raise MeasureError(
                    f"The loss depends on the input of {self.first_block} past the end of the trunk, "
                    f"the output of {self.blocks[self.calls[-1][0]]}: through an auxiliary loss on an "
                    "earlier position, a skip around the trunk, or a second forward pass. D along this "
                    "trunk is then not defined. Write a loss on the trunk's last output alone."
                )
            if node is self._end or node in seen:
                continue
            seen.add(node)
            waiting += [(n, i) for n, i in node.next_functions if n is not None]


def _doubled_dim(where: str, single: torch.Size, doubled: torch.Size) -> int:
    if len(single) == len(doubled):
        dims = [i for i, (n, m) in enumerate(zip(single, doubled, strict=True)) if n != m]
        if len(dims) == 1 and doubled[dims[0]] == 2 * single[dims[0]]:
            return dims[0]
    raise MeasureError(
        f"With the batch copied twice, {where} went from shape {tuple(single)} to {tuple(doubled)}: not "
        "one dimension doubled, so that the copies cannot be told apart. Is batch_dim= the dimension of "
        "the samples?"
    )


def _half(where: str, dtype: torch.dtype) -> str:
    return (
        f"{where} is {str(dtype).removeprefix('torch.')}: D is a difference of paths, and is measured in "
        "float64 or float32. Write model.double(), outside of autocast."
    )
