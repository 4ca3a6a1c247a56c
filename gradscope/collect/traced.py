"""Statistics inside of compiled code: hooks that torch.compile traces into the graph of the model.

Where a layer is called inside of a compiled graph, its hook runs once, while the graph is traced. What it
does there becomes part of the graph: the moments of the output and, in a tensor hook, those of its
gradient are written into a table of numbers that the recorder reads after the forward and after the
backward pass. Nothing else is left in the graph: no graph break, no value that is looked at, and one more
graph in all, for steps that are not recorded, because `Traced.on` is a Python flag.

What a graph has done is known from data alone: assigning to an attribute inside of a graph would be
refused under checkpointing, and a number of its own at each layer would be guarded, so that equal blocks
could no longer share one graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradscope.collect import hook_guards
from gradscope.collect.passes import Call, Pass, Slot, TrunkPass
from gradscope.collect.setting import device_of
from gradscope.layers import Layer
from gradscope.statistics import ACTIVATION, GRADIENT, Value, one_pass, robust_moments

__all__ = ["COMPILED", "Traced", "TracedSite", "settle"]

#: Status of what cannot be had where a layer is called inside of a compiled graph.
COMPILED: Final = "compiled"
_OVERFLOW: Final = "not supported: called more often in a compiled graph than before"
_MASKED: Final = "not supported: a mask in a compiled graph"
#: The numbers of a call: those of the table's statistics, the time of the call, and its number from 1.
_NUMBERS: Final = ("l2", "count", "tokens", "mean", "variance", "absmax", "zeros", "nonfinite")
_CLOCK: Final = len(_NUMBERS)
_CALL: Final = _CLOCK + 1

#: The dtype of every layer that was traced into a graph in this process: noted while tracing.
_traced: list[torch.dtype] = []


class _Shared:
    """What all sites of a recorder share: whether to measure, and the clock, [1], of their calls."""

    __slots__ = ("clock", "on")

    def __init__(self) -> None:
        self.on = False
        self.clock: Tensor | None = None


class TracedSite:
    """The numbers of one layer's calls, and what its hook does while it is traced.

    Attributes:
        shared: what all sites share.
        channels_first: see `gradscope.layers.Layer`.
        forward: one row per call since the forward began, the newest first, [calls, numbers]; of more
            calls than rows the last ones are there. None while nothing is compiled.
        backward: the same for the gradients.
    """

    __slots__ = ("backward", "channels_first", "forward", "shared")

    def __init__(self, shared: _Shared, channels_first: tuple[int, ...]) -> None:
        self.shared = shared
        self.channels_first = channels_first
        self.forward: Tensor | None = None
        self.backward: Tensor | None = None

    def measure(self, output: Any) -> None:
        """Traced: write the moments of an output, and in the backward pass those of its gradient."""
        if torch.compiler.is_exporting() or not torch.is_grad_enabled() or not self.shared.on:
            return
        x = _carrying(output, 4)
        clock, forward, backward = self.shared.clock, self.forward, self.backward
        if x is not None and clock is not None and forward is not None and backward is not None:
            axis = 1 if x.dim() in self.channels_first else -1
            _measure_in_graph(x, axis, forward, backward, clock)

    def make_rows(self, calls: int, device: torch.device) -> None:
        """Rows for so many calls; a graph that has others is made again."""
        self.forward, self.backward = (
            torch.zeros((calls, _CALL + 1), dtype=torch.float64, device=device) for _ in range(2)
        )
        for rows in (self.forward, self.backward):
            torch._dynamo.mark_static(rows)  # another number of rows is another graph, and no variable


def _carrying(value: Any, depth: int) -> Tensor | None:
    """The first tensor of a structure that requires grad, as `gradscope.collect.probes` walks it."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.requires_grad and value.numel() else None
    if depth and isinstance(value, (tuple, list, dict)):
        items: Any = value.values() if isinstance(value, dict) else value
        for item in items:
            found = _carrying(item, depth - 1)
            if found is not None:
                return found
    return None


def _measure_in_graph(x: Tensor, axis: int, forward: Tensor, backward: Tensor, clock: Tensor) -> Tensor:
    """One node of the graph for torch.compile's front end; its back end sees what is in it.

    Traced by the front end, a hook on a tensor would spoil what it knows of the model's own objects (of
    torch 2.13: those of a key-value cache).
    """
    from torch.fx.experimental.proxy_tensor import _get_proxies

    _traced.append(x.dtype)

    def hook(grad: Tensor) -> None:
        _write(backward, grad, axis, clock.new_ones(1))

    clock.add_(1)
    _write(forward, x.detach(), axis, clock)
    # What a backward pass writes to is handed to it like a tensor that was saved for it, and such a one
    # must not change: the rows do, when another backward pass writes to them before this one.
    for proxy in _get_proxies(backward):
        proxy.node.meta["saved_tensor_with_no_vc_check"] = True
    x.register_hook(hook)  # pyright: ignore[reportUnknownMemberType]
    return forward


def _write(rows: Tensor, x: Tensor, axis: int, clock: Tensor) -> None:
    if x.device.type == "cpu" and one_pass.available():
        numbers = _measure_op()(x, axis)
    else:
        numbers = _numbers(x, axis, clock)
    # A copy, no view: what a backward pass needs of the forward's values is saved, and must not change.
    old = rows.clone()
    newest = torch.cat((numbers, clock, old[0, _CALL:] + 1))[None]
    rows.copy_(torch.cat((newest, old[:-1])))


def _numbers(x: Tensor, axis: int, like: Tensor) -> Tensor:
    """The `_NUMBERS` of a tensor, by operations that a graph can hold; as float64 where ``like`` is."""
    if x.dtype != torch.float64:
        x = x.float()
    count = x.numel()
    moments = robust_moments(x)
    moments["tokens"] = count / (x.shape[axis] if x.dim() > 1 else count)
    return torch.stack(
        [
            value if isinstance(value, Tensor) else like.new_full((), value)
            for value in (moments[name] for name in _NUMBERS)
        ]
    )


@functools.cache
def _measure_op() -> Callable[[Tensor, int], Tensor]:
    """An operation of torch's, made on first use, that reads a tensor on a CPU once.

    What the graph's back end makes of `_numbers` there are several passes in double precision.
    """

    def measure(x: Tensor, axis: int) -> Tensor:
        found = one_pass.moments(x)
        if found is None:
            return _numbers(x, axis, torch.empty((), dtype=torch.float64))
        count = found[1]
        tokens = count / (x.shape[axis] if x.dim() > 1 else count)
        return torch.tensor([*found[:2], tokens, *found[2:]], dtype=torch.float64)

    def empty(x: Tensor, axis: int) -> Tensor:
        return x.new_empty(len(_NUMBERS), dtype=torch.float64)

    op = torch.library.custom_op("gradscope::measure", measure, mutates_args=())
    op.register_fake(empty)
    return op


class Traced:
    """All sites of a recorder, and what was written at them.

    Args:
        layers: the watched layers.
        trunks: names of the trunks, in the order in which negative sites count them.

    Attributes:
        sites: one for each layer.
        inputs: one for each trunk, of the input of the block that is defined first.
    """

    def __init__(self, layers: Sequence[Layer], trunks: Sequence[str]) -> None:
        self._shared = _Shared()
        self._before = len(_traced)
        self._layers = layers
        self.sites = [TracedSite(self._shared, layer.channels_first) for layer in layers]
        first: dict[str, int] = {}
        for number, layer in enumerate(layers):
            if layer.is_block:
                first.setdefault(layer.trunk, number)
        self._first = [first[trunk] for trunk in trunks]
        self.inputs = [TracedSite(self._shared, layers[n].channels_first) for n in self._first]

    @property
    def seen(self) -> bool:
        """Whether any layer was traced since the watch began, of this model or another."""
        return len(_traced) > self._before

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What dtypes they had."""
        return set(_traced[self._before :])

    def input_of(self, site: int) -> TracedSite | None:
        """Where the input of a block is written, if it is the trunk's."""
        return self.inputs[self._first.index(site)] if site in self._first else None

    def begin(self, model: nn.Module | None, *, recording: bool) -> None:
        """A forward of the model begins."""
        self._shared.on = recording
        if "torch._dynamo" not in sys.modules or model is None:
            return  # nothing is compiled: nothing is held
        hook_guards.apply(model)
        clock, device = self._shared.clock, device_of(model)
        if clock is None or device != clock.device:
            torch.compiler.allow_in_graph(_measure_in_graph)
            self._shared.clock = torch.zeros(1, dtype=torch.float64, device=device)
            for site in (*self.sites, *self.inputs):
                site.make_rows(1, device)
        elif self.seen:
            for site in (*self.sites, *self.inputs):
                if site.forward is not None:
                    site.forward.zero_()  # of a forward that was cut off

    def stop(self) -> None:
        """From now on nothing is measured."""
        self._shared.on, self._shared.clock = False, None
        for site in (*self.sites, *self.inputs):
            site.forward = site.backward = None

    def collect(self, p: Pass) -> None:
        """A forward came to its end: take what its compiled graphs may have written."""
        if not self.seen or self._shared.clock is None:
            return
        for t, site in enumerate(self.inputs):
            trunk = self._layers[self._first[t]].trunk
            if not p.trunks.get(trunk) or not p.trunks[trunk].calls:
                self._take(p, -1 - t, site, p.trunks.setdefault(trunk, TrunkPass()))
        for number, site in enumerate(self.sites):
            if not p.counts.get(number):  # else its hooks were called, beside of any graph
                layer = self._layers[number]
                state = p.trunks.setdefault(layer.trunk, TrunkPass()) if layer.is_block else None
                self._take(p, number, site, state)

    def _take(self, p: Pass, number: int, site: TracedSite, state: TrunkPass | None) -> None:
        call = Call(number, 0, [])
        slot = Slot(
            self._first[-1 - number] if number < 0 else number,
            [float("nan")] * len(ACTIVATION),
            {},
            stream=state is not None,
            trunk=state,
            owner=p,
        )
        slot.error = COMPILED  # until a gradient has come
        slot.traced = None if site.forward is None else site.forward.clone()
        slot.source = site
        call.slots.append(slot)
        p.calls.append(call)
        if state is not None:
            state.calls.append(call)

    def take_gradients(self, passes: Sequence[Pass], backward: int) -> None:
        """A backward pass came to its end: take what its compiled graphs may have written."""
        mine = [(p, s) for p in passes for c in p.calls for s in c.slots if s.source is not None]
        alone = len({id(p) for p, _ in mine}) == 1
        for _, slot in mine:
            site: TracedSite = slot.source
            slot.repeated = slot.repeated or slot.backward not in (None, backward)
            slot.backward = backward
            if alone and site.backward is not None:
                slot.traced_gradient = site.backward.clone()
            else:
                slot.error = "not supported: one backward pass through several compiled forwards"
        for _, slot in mine:
            if slot.source.backward is not None:
                slot.source.backward.zero_()


def settle(p: Pass, layers: Sequence[Layer]) -> bool:
    """The rows are on the host: turn them into calls; whether any gradient came.

    Calls that no graph has written are taken away, those of several are told apart, and the stream is
    put into the order of the clock.
    """
    taken = [call for call in p.calls if call.slots and call.slots[0].source is not None]
    if not taken:
        return False
    when: dict[int, float] = {}
    reached = False
    for call in taken:
        p.calls.remove(call)
        state = call.slots[0].trunk
        if state is not None:
            state.calls.remove(call)
        calls = _told_apart(call.slots[0])
        # Of a trunk's input only the first call counts, whose block comes first.
        for each in calls if call.site >= 0 else calls[:1]:
            each.site, each.index = call.site, len([c for c in p.calls if c.site == call.site])
            when[id(each)] = each.time
            if p.valid is not None:
                each.error = _MASKED
            reached = reached or any(slot.gradient is not None for slot in each.slots)
            p.calls.append(each)
            if state is not None:
                state.calls.append(each)
        if call.site >= 0:
            count = sum(c.site == call.site for c in p.calls)
            p.counts[call.site] = max(p.counts.get(call.site, 0), count)
    for state in p.trunks.values():
        if any(id(call) in when for call in state.calls):
            state.calls.sort(key=lambda call: (call.site >= 0, when.get(id(call), 0.0)))
            blocks = [call for call in state.calls if call.site >= 0]
            for entry in [call for call in state.calls if call.site < 0 and id(call) in when]:
                if not blocks or blocks[0].site != entry.slots[0].site:
                    entry.error = COMPILED  # another block ran first: this is not the trunk's input
    _place_branches(p, layers, when)
    return reached


def _told_apart(slot: Slot) -> list[Call]:
    """One call for each that the graph has written, in their order."""
    rows: Any = slot.traced
    gradients: Any = slot.traced_gradient or []
    calls = int(rows[0][_CALL])
    if calls > len(rows):
        slot.source.make_rows(calls, slot.source.forward.device)  # from the next forward on
    found: list[Call] = []
    for index in range(calls):
        call = Call(0, index, [])
        part = Slot(slot.site, slot.values, {}, stream=slot.stream, trunk=slot.trunk, owner=slot.owner)
        part.error, part.repeated, part.backward = slot.error, slot.repeated, slot.backward
        part.traced = []
        place = calls - 1 - index  # the newest is first
        if place >= len(rows):
            call.error = _OVERFLOW
        else:
            call.time = rows[place][_CLOCK]
            part.values, part.absent = _values(rows[place], ACTIVATION)
            # The last call's gradient comes first; if not all came, whose they are is not known.
            whole = index < len(gradients) and gradients[0][_CALL] == calls
            if whole and part.error == COMPILED:
                part.gradient, part.gradient_absent = _values(gradients[index], GRADIENT)
                part.error = None
        call.slots.append(part)
        found.append(call)
    return found


def _values(row: Sequence[float], columns: Sequence[str]) -> tuple[list[Value], dict[int, str]]:
    numbers: dict[str, Value] = dict(zip(_NUMBERS, row, strict=False))
    absent = {i: COMPILED for i, name in enumerate(columns) if name not in numbers}
    if "variance" in columns and numbers["count"] == 1:
        absent[columns.index("variance")] = "one element"
    return [numbers.get(name, float("nan")) for name in columns], absent


def _place_branches(p: Pass, layers: Sequence[Layer], when: dict[int, float]) -> None:
    """During which call of its block each call of a branch was: they are spread evenly."""
    blocks = {(x.trunk, x.block): site for site, x in enumerate(layers) if x.is_block}
    for call in p.calls:
        if id(call) in when and call.site >= 0 and layers[call.site].branch is not None:
            block = blocks.get((layers[call.site].trunk, layers[call.site].block))
            if block is not None:
                calls = max(p.counts.get(block, 0), 1)
                call.block_call = call.index * calls // p.counts[call.site]
