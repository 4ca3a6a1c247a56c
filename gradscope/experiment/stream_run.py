"""The residual stream of a forward pass without gradients: what enters and leaves every block.

In most models a block holds its skips, and what it returns is the stream. In others the model adds it
to the stream itself, ``x = x + block(x)``: then the stream is what enters the next block. Which of them
it is can be seen from the values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradscope.collect.arguments import valid_positions
from gradscope.collect.tensors import tensors_in
from gradscope.errors import MeasureError
from gradscope.experiment.batches import first_float, loss_or_own, part_of, replaced, sample_count
from gradscope.experiment.depth_methods import DepthRequest
from gradscope.experiment.untouched import (
    refuse_coupled_samples,
    shared_copy,
    undisturbed,
    unwrapped,
)
from gradscope.layers import Trunk, find_trunks, named_layers
from gradscope.layers.tensor_axes import channels_first, token_axis

__all__ = ["StreamRun", "run_stream"]

#: Given the number of a block's call, what entered the block and what it returns; returns what takes the
#: place of the latter, or None.
Change = Callable[[int, Tensor, Tensor], Tensor | None]

#: How far what enters a block may be from what the one before returned, in units of the dtype's rounding.
_ROUNDINGS: Final = 8


@dataclass(slots=True, eq=False)
class _Calls:
    """The calls of a trunk's blocks, in the order in which they ended."""

    trunk: Trunk
    blocks: list[str] = field(default_factory=list[str])
    inputs: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    branches: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])


@dataclass(frozen=True, slots=True, eq=False)
class StreamRun:
    """What a forward pass showed.

    Attributes:
        request: what was asked about.
        model: the copy that is run.
        trunk: the trunk that was read.
        blocks: the name of each block call, [L].
        stream: h_0, ..., h_L, [L + 1] tensors.
        branches: the outputs of each block call's branches, by its number.
        output: what the model returned; None where the loss did not call the model itself.
        outside: whether the model adds what blocks return to the stream.
        feature_axis: which axis of the stream holds the features.
        tokens_second: whether the stream is [batch, tokens, features].
        valid: which of its positions count, of the stream's first two axes; None: all.
    """

    request: DepthRequest
    model: nn.Module
    trunk: Trunk
    blocks: tuple[str, ...]
    stream: list[Tensor]
    branches: dict[int, list[Tensor]]
    output: Any
    outside: bool
    feature_axis: int
    tokens_second: bool
    valid: Tensor | None

    def features_last(self, h: Tensor) -> Tensor:
        """A tensor of the stream in float64, with its features on the last axis."""
        return h.double().movedim(self.feature_axis, -1)

    def counted(self, values: Tensor) -> Tensor:
        """Those of values by position [batch, tokens] that are not of padding; all others as they are."""
        if self.valid is None or values.shape != self.valid.shape:
            return values
        return values[self.valid]

    def without(self, skipped: int, until: int | None = None) -> tuple[list[Tensor], Any]:
        """The stream and the output with one block call skipped, or skipped before a token only."""

        def change(number: int, before: Tensor, after: Tensor) -> Tensor | None:
            if number != skipped:
                return None
            kept = torch.zeros_like(after) if self.outside else before.clone()
            if until is not None:
                kept[:, until:] = after[:, until:]
            return kept

        return self._again(change)

    def ending_with(self, h: Tensor) -> Any:
        """The output with this at the end of the trunk.

        Raises:
            MeasureError: its shape is another one.
        """

        def change(number: int, before: Tensor, after: Tensor) -> Tensor | None:
            if number != len(self.blocks) - 1:
                return None
            if after.shape != h.shape:
                raise MeasureError(
                    "The stream changes its width: its inner positions fit no final norm and head."
                )
            return h - before if self.outside else h.clone()

        return self._again(change)[1]

    def _again(self, change: Change) -> tuple[list[Tensor], Any]:
        (calls,), output, _ = _passed(self.request, self.model, (self.trunk,), change)
        if tuple(calls.blocks) != self.blocks:
            raise MeasureError(
                f"The blocks of {self.trunk.name} are called in another order, or not as often, in a "
                "second pass: what a changed block does cannot be told from that."
            )
        return _stream_of(calls, self.outside), output


def run_stream(request: DepthRequest) -> StreamRun:
    """Run a copy of the model without gradients.

    Raises:
        MeasureError: no trunk, or the one that was named did not run; the samples influence each other,
            or are treated at random; what happens to the stream between two blocks is not known; or a
            mask that does not fit.
        ValueError: a mask that is not [batch, tokens].
    """
    model = unwrapped(request.model)
    refuse_coupled_samples(model)
    twin = shared_copy(model)
    trunks = find_trunks(twin)
    names = [trunk.name for trunk in trunks]
    if not trunks:
        raise MeasureError(f"No trunk found in {type(model).__name__}: no container of repeated blocks.")
    if request.trunk is not None:
        if request.trunk not in names:
            raise MeasureError(f'trunk="{request.trunk}" is none of the trunks: {", ".join(names)}.')
        trunks = (trunks[names.index(request.trunk)],)
    found, output, valid = _passed(request, twin, trunks)
    if not found:
        raise MeasureError(
            f"The blocks of {', '.join(trunk.name for trunk in trunks)} were not called in the forward "
            "pass of the loss."
        )
    calls = found[-1]
    outside = _added_outside(calls)
    stream, modules = _stream_of(calls, outside), named_layers(twin)
    first = calls.blocks[0]
    tokens_second = token_axis(first, modules) == 1
    return StreamRun(
        request=request,
        model=twin,
        trunk=calls.trunk,
        blocks=tuple(calls.blocks),
        stream=stream,
        branches=calls.branches,
        output=output,
        outside=outside,
        feature_axis=1 if stream[-1].dim() in channels_first(first, modules) else -1,
        tokens_second=tokens_second,
        valid=_valid(request, valid, stream, tokens_second),
    )


def _passed(
    request: DepthRequest, twin: nn.Module, trunks: Sequence[Trunk], change: Change | None = None
) -> tuple[list[_Calls], Any, Tensor | None]:
    """The calls of the trunks that ran, the one that ended last at the end; the output; the mask."""
    loss = loss_or_own(request.loss, request.batch)
    # Its own each time: a loss may take something out of its batch, or write to it.
    samples = sample_count(request.batch, request.batch_dim)
    batch = part_of(request.batch, request.batch_dim, 0, samples)
    modules = named_layers(twin)
    ran: list[_Calls] = []
    output: list[Any] = []
    valid: list[Tensor] = []

    def masked(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = None if request.mask is None else valid_positions(request.mask, module, args, kwargs)
        if found is not None:
            valid.append(found)

    with undisturbed(twin), torch.no_grad(), ExitStack() as stack:
        for trunk in trunks:
            calls = _Calls(trunk)
            entered: dict[str, list[list[Tensor]]] = defaultdict(list)
            for number, name in enumerate(trunk.blocks):
                for branch in trunk.branches[number]:
                    stack.callback(modules[branch].register_forward_hook(_added(calls)).remove)
                first = trunk.parts[number][0] if trunk.parts else name
                enter, leave = _enter(entered[name]), _leave(name, entered[name], calls, ran, change)
                handle = modules[first].register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(modules[name].register_forward_hook(leave).remove)
        stack.callback(twin.register_forward_pre_hook(masked, with_kwargs=True).remove)
        handle = twin.register_forward_hook(lambda module, args, value: output.append(value))
        stack.callback(handle.remove)
        loss(twin, batch)
    return ran, output[-1] if output else None, valid[-1] if valid else None


def _valid(
    request: DepthRequest, found: Tensor | None, stream: list[Tensor], tokens_second: bool
) -> Tensor | None:
    if request.mask is None:
        return None
    if found is None:
        raise MeasureError("There is no mask in the forward pass of the loss: leave out mask=.")
    shape = tuple(stream[-1].shape)
    valid = found if tokens_second else found.T
    if len(shape) != 3 or any(h.shape[:2] != valid.shape for h in stream):
        raise MeasureError(
            f"The mask [batch, tokens] is {tuple(found.shape)}, and the stream {shape}: which positions "
            "are padding is not known. Give a batch without padding."
        )
    if not bool(valid.any()):
        raise MeasureError("The mask leaves no position.")
    return valid


def _enter(entered: list[list[Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        floats = [t.detach().clone() for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        entered.append(floats)

    return hook


def _leave(
    name: str, entered: list[list[Tensor]], calls: _Calls, ran: list[_Calls], change: Change | None
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, value: Any) -> Any:
        h = first_float(value)
        floats = entered.pop() if entered else []
        if h is None or not floats:
            return None
        # Among named arguments a mask may come first.
        before = next((t for t in floats if (t.shape, t.dtype) == (h.shape, h.dtype)), floats[0])
        new = change(len(calls.blocks), before, h.detach()) if change is not None else None
        calls.blocks.append(name)
        calls.inputs.append(before)
        calls.outputs.append((h if new is None else new).detach().clone())
        if calls in ran:
            ran.remove(calls)
        ran.append(calls)
        return None if new is None else replaced(value, h, new)

    return hook


def _added(calls: _Calls) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        value = first_float(output)
        if value is not None:
            calls.branches.setdefault(len(calls.blocks), []).append(value.detach().clone())

    return hook


def _stream_of(calls: _Calls, outside: bool) -> list[Tensor]:
    if outside:
        return [*calls.inputs, calls.inputs[-1] + calls.outputs[-1]]
    return [calls.inputs[0], *calls.outputs]


def _added_outside(calls: _Calls) -> bool:
    """Whether what enters each block is what entered the one before plus what that returned.

    Raises:
        MeasureError: it is neither that nor what the one before returned.
    """
    kinds: set[bool] = set()
    for number in range(1, len(calls.inputs)):
        now, before, returned = calls.inputs[number], calls.inputs[number - 1], calls.outputs[number - 1]
        if now.shape != returned.shape or _near(now, returned):
            kinds.add(False)
        elif before.shape == returned.shape and _near(now, before + returned):
            kinds.add(True)
        else:
            kinds |= {False, True}
        if len(kinds) > 1:
            raise MeasureError(
                f"What enters {calls.blocks[number]} is neither what {calls.blocks[number - 1]} returned "
                "nor that added to its own input. Something else happens to the stream between them, or "
                "the loss runs the model more than once: where the stream runs is not known."
            )
    return kinds == {True}


def _near(a: Tensor, b: Tensor) -> bool:
    allowed = _ROUNDINGS * max(torch.finfo(t.dtype).eps for t in (a, b))
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).norm()) <= allowed * float(b.norm())
