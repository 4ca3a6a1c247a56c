"""One forward and backward pass over a trunk, of the batch itself or of its copies with tags.

The copies carry what the gradient is made of. Two of them carry the pair (g, ġ), and every branch output
maps it to (g, ġ + g) (`gradscope.experiment.effective_depth`). Or copy k carries c_k, the part of the
gradient along all paths that crossed k branches so far, and every branch output shifts copy k to k + 1;
the last copy is a guard that stays as it is (`gradscope.experiment.paths`). At the end of the trunk all
but the first copy start from 0.
"""

from __future__ import annotations

import math
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
    def forward(ctx: Any, x: Tensor, dim: int, copies: int) -> Tensor:
        ctx.dim = dim
        return x.clone()  # not a view: what follows may be an in-place operation

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, dot = grads[0].chunk(2, ctx.dim)
        return torch.cat((g, dot + g), ctx.dim), None, None


class _LengthTag(torch.autograd.Function):
    """Identity on a branch output whose backward moves the copies' (c_0, ..., c_K) to (0, c_0, ...).

    The last copy, behind c_K, is left as it is: 0, unless the samples of a batch influence each other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, copies: int) -> Tensor:
        ctx.dim, ctx.copies = dim, copies
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows = grads[0].shape[ctx.dim]
        size = rows // ctx.copies
        shorter = grads[0].narrow(ctx.dim, 0, rows - 2 * size)
        guard = grads[0].narrow(ctx.dim, rows - size, size)
        return torch.cat((torch.zeros_like(guard), shorter, guard), ctx.dim), None, None


class _TrunkEnd(torch.autograd.Function):
    """Identity on the trunk's last tensor whose backward maps the copies' (g, g, ...) to (g, 0, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, copies: int) -> Tensor:
        ctx.dim, ctx.copies = dim, copies
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows = grads[0].shape[ctx.dim]
        size = rows // ctx.copies
        rest = grads[0].narrow(ctx.dim, size, rows - size)
        return torch.cat((grads[0].narrow(ctx.dim, 0, size), torch.zeros_like(rest)), ctx.dim), None, None


class TrunkRun:
    """One forward and backward pass: of the batch itself, or of its copies with tags.

    The pass of the copies follows the ``plain`` one: which dimension of an inner tensor holds the
    copies is the one that grew against it, and which call of a block is the last is known from it.

    Args:
        model: the model that is run; it is given hooks for as long as `gradient` takes.
        branches: names of its residual branches.
        blocks: the block that holds each branch, by name.
        plain: the run of the batch itself, for that of the copies; None for the run of the batch.
        copies: how many copies the batch of this run holds, next to those of ``plain``.
        by_length: whether the copies are moved on by one at each branch, rather than paired (g, ġ).
        read: called in the backward pass, from the last block to the first, with l, the gradient at
            the stream position l ≥ 1, which is the output of the l-th call of a block, and the
            dimension along which the copies lie there (0 in the run of the batch).

    Attributes:
        first_block: the block that was called first, whose input is h_0.
        input_shape: the shape of h_0.
        input_dim: the dimension of h_0 along which the copies lie.
        calls: name and output shape of each call of a branch, in forward order.
        block_calls: name and output shape of each call of a block, in forward order.
        copies_difference: the largest difference between the copies' forward values, relative to the
            largest value there; NaN in the run of the batch itself.
    """

    def __init__(
        self,
        model: nn.Module,
        branches: tuple[str, ...],
        blocks: Mapping[str, str],
        plain: TrunkRun | None,
        *,
        copies: int = 2,
        by_length: bool = False,
        read: Callable[[int, Tensor, int], None] | None = None,
    ) -> None:
        self.model = model
        self.branches = branches
        self.blocks = blocks
        self.plain = plain
        self.copies = copies
        self._branch_tag = _LengthTag if by_length else _BranchTag
        self._read = read
        self.first_block = ""
        self.input_shape = torch.Size()
        self.input_dim = 0
        self.calls: list[tuple[str, torch.Size]] = []
        self.block_calls: list[tuple[str, torch.Size]] = []
        self.copies_difference = math.nan
        self._input: GradientEdge | None = None
        self._dtype: torch.dtype | None = None
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
                hooks.callback(modules[block].register_forward_hook(self._leave(block)).remove)
            value = loss(self.model, batch)
            self._open = False  # recomputation in the backward pass is not another call
            self._check_loss(value)
            self._check_calls()
            assert self._input is not None
            if self.plain is not None:
                self._check_no_way_past_the_end(value)
                self._check_copies()
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

    def _enter(self, block: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._input is not None or not self._open:
                return None
            h = first_float((args, kwargs))
            if h is None:
                raise MeasureError(f"{block} was called without a float tensor: no gradient can be read.")
            if h.dtype not in TOLERANCE:
                raise MeasureError(_half(f"the input of {block}", h.dtype))
            self.first_block, self.input_shape, self._dtype = block, h.shape, h.dtype
            if self.plain is not None:
                self.input_dim = self._copied_dim(
                    f"the input of {block}", self.plain.input_shape, h.shape
                )
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
            where = f"the output of the branch {name}"
            return self._tag(self._branch_tag, where, expected, output, value)[0]

        return hook

    def _leave(self, block: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = first_float(output)
            if not self._open or value is None:
                return None
            self.block_calls.append((block, value.shape))
            position = len(self.block_calls)
            if self.plain is None:
                self._read_at(position, value, 0)
                return None
            if position > len(self.plain.block_calls):
                return None  # reported after the pass
            expected = self.plain.block_calls[position - 1][1]
            if self._read is not None:
                dim = self._copied_dim(f"the output of {block}", expected, value.shape)
                self._read_at(position, value, dim)
            if position < len(self.plain.block_calls):
                return None
            output, tagged = self._tag(_TrunkEnd, "the end of the trunk", expected, output, value)
            self._end = tagged.grad_fn
            return output

        return hook

    def _read_at(self, position: int, value: Tensor, dim: int) -> None:
        read = self._read
        if read is not None and value.requires_grad:
            # A hook of the tensor, that autograd calls also where the tensor is changed in place later.
            cast(Any, value).register_hook(lambda grad: read(position, grad, dim))

    def _tag(
        self,
        tag: type[torch.autograd.Function],
        where: str,
        shape: torch.Size,
        output: Any,
        value: Tensor,
    ) -> tuple[Any, Tensor]:
        dim = self._copied_dim(where, shape, value.shape)
        first, *others = value.detach().chunk(self.copies, dim)
        if first.numel():
            largest = first.abs().amax().double()
            off = torch.stack([(first - other).abs().amax() for other in others]).amax().double()
            self._differences.append(torch.where(off == 0, off, off / largest))
        apply: Callable[[Tensor, int, int], Tensor] = cast(Any, tag).apply
        tagged = apply(value, dim, self.copies)
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
            or len(self.block_calls) != len(self.plain.block_calls)
        ):
            raise MeasureError(
                "The copied batch did not call the same branches in the same order as the batch itself: "
                "something random is active, such as layer dropping. Write model.eval()."
            )

    def _check_copies(self) -> None:
        assert self._dtype is not None
        tolerance = TOLERANCE[self._dtype]
        off = float(torch.stack([d.cpu() for d in self._differences]).amax())
        if not off <= tolerance:
            raise MeasureError(
                f"Copies of the same samples gave different values in the forward pass (relative "
                f"{off:.1e}, allowed {tolerance:.0e}): the samples of a batch influence each other, or "
                "something random is active. Write model.eval(), and use a model without batch "
                "statistics, expert capacity limits and random layers."
            )
        self.copies_difference = off

    def _check_no_way_past_the_end(self, value: Tensor) -> None:
        """The copies start from 0 only if every path from the loss to h_0 crosses the trunk's end."""
        assert self._input is not None
        seen: set[Node] = set()
        waiting = [get_gradient_edge(value)[:2]] if value.requires_grad else []
        while waiting:
            node, index = waiting.pop()
            if (node, index) == (self._input.node, self._input.output_nr):
                raise MeasureError(
                    f"The loss depends on the input of {self.first_block} past the end of the trunk, "
                    f"the output of {self.blocks[self.calls[-1][0]]}: through an auxiliary loss on an "
                    "earlier position, a skip around the trunk, or a second forward pass. The lengths of "
                    "such paths are not defined. Write a loss on the trunk's last output alone."
                )
            if node is self._end or node in seen:
                continue
            seen.add(node)
            waiting += [(n, i) for n, i in node.next_functions if n is not None]

    def _copied_dim(self, where: str, single: torch.Size, copied: torch.Size) -> int:
        if len(single) == len(copied):
            dims = [i for i, (n, m) in enumerate(zip(single, copied, strict=True)) if n != m]
            if len(dims) == 1 and copied[dims[0]] == self.copies * single[dims[0]]:
                return dims[0]
        raise MeasureError(
            f"With {self.copies} copies of the batch, {where} went from shape {tuple(single)} to "
            f"{tuple(copied)}: not one dimension grew by that factor, so that the copies cannot be told "
            "apart. Is batch_dim= the dimension of the samples?"
        )


def _half(where: str, dtype: torch.dtype) -> str:
    return (
        f"{where} is {str(dtype).removeprefix('torch.')}: the gradient is divided among paths that "
        "partly cancel, which takes float64 or float32. Write model.double(), outside of autocast."
    )
