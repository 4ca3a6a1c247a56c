"""Samples of one forward pass and of what comes back through it.

The sampler is told which pass is open and what the hooks saw; it measures tensors at once, keeps
scalars, and lets go of the tensors. What it does hold, and for how long, is documented in
`gradscope.collect.passes.TrunkPass`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from gradscope import statistics
from gradscope.collect import graph, probes
from gradscope.collect.passes import LAST, PAIR, Call, Pass, Slot, TrunkPass
from gradscope.collect.quick import quick_way
from gradscope.collect.tensors import (
    all_tensors_in,
    first_tensor,
    is_plain,
    tensors_in,
    version_of,
    writes_of,
)
from gradscope.layers import Layer
from gradscope.statistics import ACTIVATION, BRANCH, GRADIENT, SLOW_PAIR, Absent, Value

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

__all__ = ["Sampler"]

_ACTIVATION_PAIR: Final = tuple(ACTIVATION.index(n) for n in PAIR)
_GRADIENT_PAIR: Final = tuple(GRADIENT.index(n) for n in PAIR)
_SLOW_PAIR: Final = tuple(ACTIVATION.index(n) for n in SLOW_PAIR)
_NOT_PLAIN: Final = "not supported: a sparse or nested tensor"
_BRANCH: Final = tuple(ACTIVATION.index(n) for n in BRANCH)


class Sampler:
    """Turns what hooks see into the calls and slots of a `Pass`.

    Args:
        recorder: told of gradients by the hooks that are put on tensors.
        layers: the watched layers; sites are their indices.
        trunks: names of the trunks that have watched blocks.
        linear: sites whose output is that of an `nn.Linear`.
        wanted: the chosen statistics.
        input_gradient: make a float trunk input require grad (for models that nobody else uses).

    Attributes:
        masked: whether the mask had the shape of any tensor of this pass.
        slow: whether this step gets the slow statistics and the proofs on the graph.
        quick: the quick way for what most hooks see, see `quick_way`; None where there is none.
        verified: for each branch, whether the graph showed that its output is added to the stream.
        added: for each call of a block, whether it showed that of the block's own output: the skip is
            outside of the block.
    """

    def __init__(
        self,
        recorder: Recorder,
        layers: Sequence[Layer],
        trunks: Sequence[str],
        *,
        linear: frozenset[int],
        wanted: Collection[str],
        input_gradient: bool,
    ) -> None:
        self._recorder = weakref.ref(recorder)
        self._layers = layers
        self._trunks = list(trunks)
        self._linear = linear
        self._wanted = wanted
        self._input_gradient = input_gradient
        self._proofs: dict[tuple[int, int], bool | None] = {}
        self._recomputed: dict[int, list[Call]] = {}
        self.slow = False
        self.masked = False
        self.verified: dict[int, bool] = {}
        self.added: dict[tuple[int, int], bool] = {}
        #: Every dtype that an activation came in: under autocast not the parameters'.
        self.dtypes: set[torch.dtype] = set()
        #: What an active autocast computes in: inside a module whose output is float32, too.
        self.autocast_dtypes: set[torch.dtype] = set()
        block = {(x.trunk, x.block): s for s, x in enumerate(layers) if x.is_block}
        self._block_of_branch = {
            s: block.get((x.trunk, x.block)) for s, x in enumerate(layers) if x.branch is not None
        }
        self.quick = quick_way(
            recorder,
            layers,
            parents=self._block_of_branch,
            linear=linear,
            wanted=wanted,
            proofs=self._proofs,
            recomputed=self._recomputed,
            dtypes=self.dtypes,
            on_autocast=self._note_autocast,
        )

    def begin_step(self, *, slow: bool) -> None:
        """A step begins, with slow statistics or without."""
        self.slow = slow
        if self.quick is not None:
            self.quick.set_slow(slow)

    def begin_forward(self, p: Pass) -> None:
        """A recorded forward of the watched model begins in this thread."""
        if self.quick is None:
            return
        if p.valid is None and p.error is None:
            self.quick.begin(p, self.slow)
        else:
            self.quick.end()

    def end_forward(self) -> None:
        """The forward has come to its end."""
        if self.quick is not None:
            self.quick.end()

    def _note_autocast(self, tensor: Tensor) -> None:
        if torch.is_autocast_enabled(tensor.device.type):
            self.autocast_dtypes.add(torch.get_autocast_dtype(tensor.device.type))

    # -- forward -------------------------------------------------------------------------------------

    def block_input(
        self, p: Pass, site: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, grad_mode: bool
    ) -> Any:
        """A block is about to run: the first of its trunk in a pass sees the trunk's input h_0.

        Returns:
            new (args, kwargs) where the input was made to require grad, else None.
        """
        trunk = self._layers[site].trunk
        if trunk in p.trunks:
            if self.slow:
                p.trunks[trunk].reading = self._reading(p.trunks[trunk], site, args, kwargs)
            return None
        state = p.trunks[trunk] = TrunkPass()
        source = first_tensor(args, kwargs)
        if source is None:
            return None
        changed = None
        if self._input_gradient and grad_mode and not source.requires_grad:
            with torch.enable_grad():
                # Not a leaf: the block may change its input in place.
                replaced = source.detach().requires_grad_(True).clone()
            changed = _replace(args, kwargs, source, replaced)
            source = replaced
        if self.slow and "input_cosine" in self._wanted:
            state.input = source.detach()
        call = Call(-1 - self._trunks.index(trunk), 0, [])
        call.slots.append(self._sample(site, source, p, state))
        p.calls.append(call)
        self._join_stream(call, source, state, None)
        state.reading = site
        return changed

    @staticmethod
    def _reading(
        state: TrunkPass, site: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int | None:
        """The site, where the block's input is the stream position that is held."""
        source, held = first_tensor(args, kwargs), state.held_activation
        if source is None or held is None or not (is_plain(source) and is_plain(held[0])):
            return None
        same = source.shape == held[0].shape and source.data_ptr() == held[0].data_ptr()
        return site if same and version_of(source) == held[1] else None

    def output(
        self,
        p: Pass,
        site: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        *,
        grad_mode: bool,
    ) -> None:
        """A watched layer has run."""
        layer = self._layers[site]
        block = self._block_of_branch.get(site)
        call = Call(
            site,
            p.counts.get(site, 0),
            [],
            block_call=p.counts.get(block, 0) if block is not None else 0,
            pending=not grad_mode,
        )
        p.counts[site] = call.index + 1
        p.calls.append(call)
        state = p.trunks.setdefault(layer.trunk, TrunkPass()) if layer.is_block else None
        tensors = all_tensors_in(output)
        # One that carries gradient is wanted; without any, the first one's activation is.
        carrying = [t for t in tensors if t.requires_grad] or tensors[:1]
        for i, tensor in enumerate(carrying):
            # The stream follows the primary tensor only.
            call.slots.append(self._sample(site, tensor, p, state if i == 0 else None))
        if not carrying:
            return
        if state is not None:
            self._join_stream(call, carrying[0], state, first_tensor(args, kwargs))
        elif layer.branch is not None:
            trunk = p.trunks.get(layer.trunk)
            self._compare_with_stream(call.slots[0], carrying[0], trunk, block)
            edge = graph.edge_of(carrying[0])
            if self.slow and block is not None and trunk is not None and edge is not None:
                trunk.branch_edges[site] = edge

    def _compare_with_stream(
        self, slot: Slot, output: Tensor, state: TrunkPass | None, block: int | None
    ) -> None:
        """A branch beside the input of its block, which is still held for the block's own pair."""
        held = state.held_activation if state is not None else None
        if not self.slow:
            reason = "not sampled"
        elif state is None or held is None or block is None or state.reading != block:
            reason = "not supported: the input of its block is no watched stream position"
        elif not (is_plain(held[0]) and is_plain(output)):
            reason = _NOT_PLAIN
        elif held[0].shape != output.shape:
            reason = "not supported: other shape than the stream"
        elif version_of(held[0]) != held[1]:
            reason = "not supported: modified in place"
        else:
            axes = self._axes(slot, output)
            self._put(slot, statistics.measure_branch(held[0], output, self._wanted, **axes))
            return
        slot.absent.update(dict.fromkeys(_BRANCH, reason))

    def _axes(self, slot: Slot, tensor: Tensor) -> dict[str, Any]:
        layer = self._layers[slot.site]
        return {
            "feature_axis": layer.feature_axis(tensor.dim()),
            "token_axis": layer.token_axis,
            "valid": slot.owner.valid if slot.owner is not None else None,
        }

    @staticmethod
    def _put(slot: Slot, values: Mapping[str, Value | Absent]) -> None:
        for name, value in values.items():
            column = ACTIVATION.index(name)
            if isinstance(value, Absent):
                slot.absent[column] = value.why
            else:
                slot.values[column] = value

    def recomputed(self, p: Pass, site: int, output: Any) -> None:
        """A forward inside a backward: recomputation, which is never a second sample.

        Under re-entrant checkpointing the first forward ran without grad, and only the recomputed
        tensors carry gradient: they take the hooks.
        """
        waiting = [c for c in p.calls if c.site == site and c.pending]
        tensors = [t for t in tensors_in(output) if t.requires_grad]
        if not waiting or not tensors:
            return
        call = waiting[-1]  # the backward pass recomputes the last call first
        call.pending = False
        together = self._recomputed.setdefault(site, [])
        together.append(call)
        if len(together) > 1:
            # Recomputed in one piece, and so in forward order: which is which cannot be told here.
            for each in together:
                for slot in each.slots:
                    slot.error = "not supported: called several times in one re-entrant checkpoint"
        for tensor, slot in zip(tensors, call.slots, strict=False):
            self._hook(tensor, slot)

    def _sample(self, site: int, tensor: Tensor, p: Pass, state: TrunkPass | None) -> Slot:
        """Measure a tensor now and put a hook on it for its gradient."""
        layer = self._layers[site]
        if not is_plain(tensor):
            nothing = dict.fromkeys(range(len(ACTIVATION)), _NOT_PLAIN)
            return Slot(site, [math.nan] * len(ACTIVATION), nothing, owner=p, error=_NOT_PLAIN)
        known = p.aliases.get(id(tensor))
        version = version_of(tensor)
        if state is None and known is not None and known[0]() is tensor and known[1] == version:
            # Not for a branch that hands a stream position on: both have relations of their own.
            if layer.branch is None or not known[2].stream:
                return known[2]
        if p.valid is not None and tensor.shape[:-1] in (p.valid.shape, p.valid.shape[::-1]):
            self.masked = True
        values, absent = statistics.measure(
            tensor,
            ACTIVATION,
            feature_axis=layer.feature_axis(tensor.dim()),
            token_axis=layer.token_axis,
            valid=p.valid,
            input=state.input if state is not None else None,
            slow=self.slow,
            stream=state is not None,
            wanted=self._wanted,
        )
        self.dtypes.add(tensor.dtype)
        if torch._C._is_any_autocast_enabled():
            self._note_autocast(tensor)
        slot = Slot(site, values, absent, stream=state is not None, trunk=state, owner=p)
        if tensor.requires_grad:
            self._hook(tensor, slot)
        p.aliases[id(tensor)] = (weakref.ref(tensor), version, slot)
        return slot

    def _hook(self, tensor: Tensor, slot: Slot) -> None:
        recorder = self._recorder()
        if recorder is None:
            return
        probe = probes.GradientProbe(recorder, slot, tensor.shape)
        if slot.owner is not None and not slot.owner.root_open:
            slot.owner.graph.append(weakref.ref(probe))
        base = tensor._base
        if base is not None:
            linear = slot.site in self._linear and base.requires_grad
            if linear and base.numel() == tensor.numel():
                # On [batch, tokens, features] a Linear returns a view of a tensor that nobody else has.
                # An in-place operation on a view (a ReLU) leaves its graph node behind, but not its
                # base's.
                tensor = base
            elif type(tensor) is Tensor and slot.owner is not None:
                slot.writes = writes_of(tensor)
                slot.owner.views.append(slot)
        handle = probes.put_on(tensor, probe)
        if tensor.is_leaf:
            slot.handles = (*slot.handles, handle)  # a leaf outlives its graph, and its hook would too

    # -- the stream ----------------------------------------------------------------------------------

    def _join_stream(self, call: Call, tensor: Tensor, state: TrunkPass, source: Tensor | None) -> None:
        """Put a call on the trunk's stream: the pair with the position before it, and its proofs."""
        slot = call.slots[0]
        held, state.held_activation = state.held_activation, None
        state.reading = None
        previous = state.calls[-1] if state.calls else None
        slot.absent.update(dict.fromkeys(_ACTIVATION_PAIR, LAST))
        slot.absent.update(dict.fromkeys(_SLOW_PAIR, LAST if self.slow else "not sampled"))
        if held is not None:
            before, version, earlier = held
            earlier.successor = slot
            columns = _ACTIVATION_PAIR + (_SLOW_PAIR if self.slow else ())
            for column in columns:
                del earlier.absent[column]
            if not (is_plain(before) and is_plain(tensor)):
                earlier.absent.update(dict.fromkeys(columns, _NOT_PLAIN))
            elif before.shape != tensor.shape:
                earlier.absent.update(dict.fromkeys(columns, "not supported: the width changes"))
            elif not tensor.numel():
                earlier.absent.update(dict.fromkeys(columns, statistics.EMPTY))
            elif version_of(before) != version:
                earlier.absent.update(dict.fromkeys(columns, "not supported: modified in place"))
            else:
                dot, difference = _ACTIVATION_PAIR
                product, distance = statistics.relate(before, tensor)
                earlier.values[dot], earlier.values[difference] = product, distance
                if self.slow:
                    axes = self._axes(slot, tensor)
                    self._put(earlier, statistics.measure_pair(before, tensor, self._wanted, **axes))
        state.calls.append(call)
        state.held_activation = (tensor.detach(), version_of(tensor), slot)
        if self.slow:
            self._prove(call, graph.edge_of(tensor), previous, source, state)
        elif previous is not None:
            previous.unit_skip = self._proofs.get((call.site, call.index))

    def _prove(
        self, call: Call, edge: Any, previous: Call | None, source: Tensor | None, state: TrunkPass
    ) -> None:
        if previous is not None:
            before = state.edges[-1] if state.edges else None
            read = graph.edge_of(source) if source is not None else None
            if before is not None and read is not None and state.read is not None:
                self.added[previous.site, previous.index] = graph.is_branch(before, read, state.read)
            state.read = read
            if edge is None or before is None or read is None:
                previous.unit_skip = None
            else:
                adds = before == read and graph.has_unit_skip(edge, before)
                # Not proven before the forward's end shows that nothing else reads the position.
                previous.unit_skip = False if adds is False else None
                if adds:
                    state.unproven.append(len(state.calls) - 2)
                for site, branch in state.branch_edges.items():
                    self.verified[site] = graph.is_branch(branch, edge, read)
            self._proofs[call.site, call.index] = previous.unit_skip
        state.branch_edges = {}
        state.edges.append(edge)

    def prove_sole_consumers(self, p: Pass, output: Any) -> None:
        """Grant the unit skip to the positions that only the next block reads.

        An output in which no tensor can be seen proves nothing.
        """
        streams = {t: list(s.edges) for t, s in p.trunks.items() if s.unproven}
        outputs = [e for t in tensors_in(output) if (e := graph.edge_of(t)) is not None]
        if not outputs:
            return
        for trunk, flags in graph.sole_successors(outputs, streams).items():
            state = p.trunks[trunk]
            for i in state.unproven:
                after = state.calls[i + 1]
                state.calls[i].unit_skip = self._proofs[after.site, after.index] = flags[i]
            state.unproven = []

    # -- backward ------------------------------------------------------------------------------------

    def gradient(self, slot: Slot, grad: Tensor, p: Pass, backward: int) -> None:
        """The gradient with respect to a sampled tensor has come."""
        self._recomputed.clear()
        if slot.backward is not None:
            slot.repeated = slot.repeated or slot.backward != backward
            return
        slot.backward = backward
        layer = self._layers[slot.site]
        slot.gradient, absent = statistics.measure(
            grad,
            GRADIENT,
            feature_axis=layer.feature_axis(grad.dim()),
            token_axis=layer.token_axis,
            valid=p.valid,
            slow=self.slow,
            stream=slot.stream,
            wanted=self._wanted,
        )
        slot.gradient_absent = absent
        state = slot.trunk
        if not slot.stream or state is None:
            return
        if slot.written:
            state.held_gradient = None  # nothing is related to what is a part of a gradient
            return
        held, state.held_gradient = state.held_gradient, (grad.detach(), grad._version, slot)
        if slot.successor is None:
            reason = LAST
        elif held is None or held[2] is not slot.successor or slot.successor.backward != backward:
            reason = "not supported: the next position's gradient did not come just before"
        elif held[0].shape != grad.shape:
            reason = "not supported: the width changes"
        elif not grad.numel():
            reason = statistics.EMPTY
        elif held[0]._version != held[1]:
            reason = "not supported: modified in place"
        else:
            dot, difference = _GRADIENT_PAIR
            slot.gradient[dot], slot.gradient[difference] = statistics.relate(grad, held[0])
            return
        absent.update(dict.fromkeys(_GRADIENT_PAIR, reason))


def _replace(args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor) -> Any:
    return (
        tuple(new if a is old else a for a in args),
        {k: new if v is old else v for k, v in kwargs.items()},
    )
