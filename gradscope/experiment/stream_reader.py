"""One forward pass of a model whose residual stream is read: its positions, and every module's output.

Hooks note where in the autograd graph the trunk's input, the output of each block and the outputs of the
modules stand. They change nothing but for two things: a trunk input that requires no
gradient is replaced by a leaf that does, and the outputs of modules that the caller names as branches are
replaced by copies, so that each has a node of its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor, nn
from torch.autograd.graph import Node

from gradscope.collect.tensors import tensors_in
from gradscope.errors import MeasureError
from gradscope.experiment.batches import first_float, replaced
from gradscope.experiment.graph_nodes import Edge, arrivals, edge_of
from gradscope.experiment.stream_positions import Position, positions_between
from gradscope.layers import Trunk, find_trunks, named_layers
from gradscope.layers.naming import CONTAINERS

__all__ = ["NormCall", "Position", "StreamForward", "refuse_reentrant"]

_NORM_CLASS: Final = re.compile(r"norm", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class NormCall:
    """One call of a norm module.

    Attributes:
        module: the norm.
        input: what it was given.
        source: where that stands in the graph.
    """

    module: nn.Module
    input: Tensor
    source: Edge


@dataclass(frozen=True, slots=True, eq=False)
class NamedCall:
    """One call of a module that the caller names as a branch.

    Attributes:
        name: the module's name.
        edge: where its output stands in the graph; None where no gradient leads through it.
        position: the number of the stream position that it leads to.
    """

    name: str
    edge: Edge | None
    position: int


@dataclass(slots=True, eq=False)
class _TrunkCalls:
    inputs: list[Position] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    outputs: dict[Edge, str] = field(default_factory=dict)
    entered: Counter[str] = field(default_factory=Counter[str])
    left: Counter[str] = field(default_factory=Counter[str])
    within: str = ""
    last_input: Tensor | None = None
    last_output: Tensor | None = None
    between: bool = False
    constant: bool = False

    @property
    def ran(self) -> bool:
        return len(self.positions) > 1


class StreamForward:
    """A forward pass under hooks, and what they saw.

    Args:
        model: the model that is run; it has the hooks for as long as the forward pass takes.
        loss: ``loss(model, batch)``.
        batch: what the loss takes.
        trunk: the name of the trunk that is meant; None for the one that the loss hangs on.
        named: the trunk and the modules whose outputs the caller says are its branches.

    Attributes:
        trunks: the names of all trunks.
        trunk: the trunk that is read.
        positions: its stream positions, h_0 first.
        between: whether the skips lie outside of the blocks: the stream is then what enters them.
        end: the values at one of the last of them, and its number.
        outputs: all modules that hold no block, by where their outputs stand in the graph; also the
            blocks, where the stream is what enters them.
        norms: norm modules and what they were given, by where their outputs stand in the graph.
        named_calls: the calls of named branches.
        value: the loss.

    Raises:
        MeasureError: no trunk, several of which none was chosen, an empty stream, or a loss that is no
            scalar.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batch: Any,
        *,
        trunk: str | None = None,
        named: tuple[Trunk, Sequence[str]] | None = None,
    ) -> None:
        self.outputs: dict[Edge, list[str]] = {}
        self.norms: dict[Edge, NormCall] = {}
        self.named_calls: list[NamedCall] = []
        self._open = True
        trunks = find_trunks(model, parts=True) if named is None else (named[0],)
        _check_trunks(model, trunks, trunk)
        seen = [_TrunkCalls() for _ in trunks]
        modules = named_layers(model)
        blocks = {block for each in trunks for block in each.blocks}
        with ExitStack() as stack:

            def hook(module: nn.Module, function: Callable[..., Any], before: bool = False) -> None:
                add = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(add(function, with_kwargs=True).remove)

            # A named branch may be its own block: it gets its node before the block's output is read.
            for name in () if named is None else named[1]:
                hook(modules[name], self._branch(name, seen[0]))
            for each, calls in zip(trunks, seen, strict=True):
                for k, block in enumerate(each.blocks):
                    parts = _parts(modules[block])
                    for part in parts:  # a list of modules is not called itself
                        hook(part, self._enter(block, calls, first=False), before=True)
                    if not parts:
                        first = each.parts[k][0] if each.parts else block
                        hook(modules[first], self._enter(block, calls), before=True)
                    hook(modules[block], self._leave(block, calls))
            for name, module in modules.items() if named is None else ():
                if name not in blocks and not any(b.startswith(f"{name}.") for b in blocks) and name:
                    hook(module, self._note(name))
            value = loss(model, batch)
            self._open = False  # what checkpointing computes again in the backward pass is no other call
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MeasureError(
                f"loss(model, batch) returned {got}, not a scalar tensor. Reduce it: .mean()"
            )
        self.value = value
        for calls in seen if named is None else ():
            self._settle(calls)
        number = self._chosen(trunks, seen, trunk)
        self.trunks = tuple(each.name for each in trunks)
        self.trunk = trunks[number]
        chosen = seen[number]
        self.positions: list[Position] = chosen.positions
        self.between = chosen.between
        if chosen.between and chosen.constant:
            raise MeasureError(
                f"The {self.position_name(0)} requires no gradient, and the skip around that block is "
                "outside of it, where no gradient can be read. Let it require one: "
                "loss=lambda model, batch: model(batch.requires_grad_()).square().mean()"
            )
        if not math.prod(self.positions[0].shape):
            raise MeasureError(
                f"The {self.position_name(0)} is empty, of shape {tuple(self.positions[0].shape)}: give "
                "a batch that is not."
            )
        last = len(self.positions) - 1
        self.end = (chosen.last_input, last - 1) if chosen.between else (chosen.last_output, last)

    def let_go(self) -> None:
        """Free the graph."""
        self.value = self.value.detach()
        self.positions = [replace(position, edge=None) for position in self.positions]
        self.outputs.clear()
        self.norms.clear()
        self.named_calls.clear()

    def position_name(self, position: int) -> str:
        """What a stream position is called: ``input of blocks.0``, ``output of blocks.3``."""
        at = self.positions[position]
        if position == 0:
            return f"input of {at.block}"
        often = sum(p.block == at.block for p in self.positions[1:]) > 1
        what = "stream behind" if self.between else "output of"
        return f"{what} {at.block}" + (f", call {at.call + 1}" if often else "")

    def _enter(self, block: str, trunk: _TrunkCalls, first: bool = True) -> Callable[..., Any]:
        """A hook before a block, or, unless ``first``, before one of the parts that are a block."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self._open or (not first and trunk.within == block):
                return None
            # Among named arguments a mask may come first, which requires no gradient.
            floats = [t for t in tensors_in(kwargs) if t.is_floating_point()]
            named = next((t for t in floats if t.requires_grad), floats[0] if floats else None)
            h = first_float(args)
            h = named if h is None else h
            if h is None:
                return None
            h_0 = not trunk.inputs
            leaf = h.detach().requires_grad_() if h_0 and not h.requires_grad else h
            at = Position(block, trunk.entered[block], edge_of(leaf), h.shape, h.dtype)
            trunk.within, trunk.last_input = block, h.detach()
            trunk.entered[block] += 1
            trunk.inputs.append(at)
            if h_0:
                trunk.positions.append(at)
                trunk.constant = not h.requires_grad
            if leaf is h:
                return None
            return replaced((args, kwargs), h, leaf.clone())  # a leaf allows no in-place operation

        return hook

    def _leave(self, block: str, trunk: _TrunkCalls) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = first_float(output)
            if not self._open or value is None or not trunk.positions:
                return
            call, edge = trunk.left[block], edge_of(value)
            trunk.left[block] += 1
            trunk.positions.append(Position(block, call, edge, value.shape, value.dtype))
            trunk.last_output = value.detach()
            if edge is not None:
                trunk.outputs[edge] = block

        return hook

    def _settle(self, trunk: _TrunkCalls) -> None:
        """Read the stream at the inputs of the blocks where their skips are outside of them."""
        if not trunk.inputs:
            return
        ends = {*self.outputs, *trunk.outputs}
        found = positions_between(self.value, trunk.positions, trunk.inputs, ends.__contains__)
        if found is not None:
            trunk.positions, trunk.between = found, True
            for edge, name in trunk.outputs.items():
                self.outputs.setdefault(edge, []).append(name)

    def _note(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._open:
                return
            edges = [edge for tensor in tensors_in(output) if (edge := edge_of(tensor)) is not None]
            for edge in edges:
                self.outputs.setdefault(edge, []).append(name)
            if edges and not module._modules and _NORM_CLASS.search(type(module).__name__):
                x = first_float((args, kwargs))
                source = None if x is None else edge_of(x)
                if x is not None and source is not None:
                    self.norms[edges[0]] = NormCall(module, x.detach(), source)

        return hook

    def _branch(self, name: str, trunk: _TrunkCalls) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._open:
                return None
            value = first_float(output)
            if value is None:
                raise MeasureError(f"The branch {name} returned no float tensor.")
            own = value.clone()  # not a view: what follows may be an in-place operation
            self.named_calls.append(NamedCall(name, edge_of(own), len(trunk.positions)))
            return replaced(output, value, own)

        return hook

    def _chosen(self, trunks: Sequence[Trunk], seen: Sequence[_TrunkCalls], name: str | None) -> int:
        """The number of the trunk that is meant, among those that ran."""
        if name is not None:
            number = next(i for i, each in enumerate(trunks) if each.name == name)
            if not seen[number].ran:
                raise MeasureError(f"The trunk {name} did not run in the forward pass of the loss.")
            return number
        ran = [i for i, calls in enumerate(seen) if calls.ran]
        if not ran:
            raise MeasureError(
                f"None of the blocks of {', '.join(each.name for each in trunks)} was called. Was the "
                "model called that loss(model, batch) is given, and are its blocks called as modules, "
                "not through .forward()?"
            )
        owner = {p.edge: i for i in ran for p in seen[i].positions if p.edge is not None}
        start = edge_of(self.value)
        if len(ran) == 1 or start is None:
            return ran[-1]
        reached = sorted({owner[edge] for edge in arrivals(start, owner)})
        if len(reached) > 1:
            names = [trunks[i].name for i in reached]
            raise MeasureError(
                f"The loss hangs on {len(names)} trunks of its own, {', '.join(names)}: say which one is "
                f'meant, trunk="{names[0]}".'
            )
        return reached[0] if reached else ran[-1]


def _parts(block: nn.Module) -> list[nn.Module]:
    """The modules that a list of modules holds, lists in it resolved; none for any other block."""
    if not isinstance(block, CONTAINERS) or type(block).forward is not nn.Module.forward:
        return []
    found: list[nn.Module] = []
    for child in block.children():
        found += _parts(child) or [child]
    return found


def _check_trunks(model: nn.Module, trunks: Sequence[Trunk], name: str | None) -> None:
    if not trunks:
        raise MeasureError(
            f"No trunk found in {type(model).__name__}: no container of repeated blocks, and no stack of "
            "weight layers. Name the modules whose outputs are added to the stream: "
            'modules=["blocks.*.attention", "blocks.*.mlp"]'
        )
    if name is not None and name not in [each.name for each in trunks]:
        raise MeasureError(
            f'trunk="{name}" is none of the trunks of {type(model).__name__}: '
            f"{', '.join(each.name for each in trunks)}."
        )


def refuse_reentrant(value: Tensor) -> None:
    """Refuse a graph that reentrant checkpointing hides.

    Raises:
        MeasureError: it does, with the line that helps.
    """
    seen: set[Node] = set()
    stack: list[Node] = [] if value.grad_fn is None else [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise MeasureError(
                "The model checkpoints activations with use_reentrant=True, which hides its graph. Write "
                "use_reentrant=False, or turn checkpointing off for the measurement."
            )
        stack += [n for n, _ in node.next_functions if n is not None]
