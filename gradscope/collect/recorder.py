"""The life of a step: from the first forward after an optimizer's step to the next one.

The recorder is the only object that holds state. It holds no tensor beyond what `Pass` documents:
the pair of neighbouring stream tensors until the next hook of the trunk, and, on steps with slow
statistics, the trunk's input until the end of the forward pass (for `input_cosine`).
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradscope.collect import probes, scaling
from gradscope.collect.accumulation import Accumulation
from gradscope.collect.arguments import Mask, scalar_loss, valid_positions
from gradscope.collect.assembly import Assembler, Call, Pass, Slot
from gradscope.collect.findings import Findings
from gradscope.collect.parameters import Parameters, Readings
from gradscope.collect.sampling import Sampler
from gradscope.collect.schedule import Schedule
from gradscope.collect.setting import compiled_sites, describe, refusal
from gradscope.errors import GradscopeError, GradscopeWarning
from gradscope.layers import Layer, Selection, named_layers, select
from gradscope.record import STATISTICS, Record, RecordWriter, Step, thin
from gradscope.statistics import Value

__all__ = ["Recorder"]

#: Without any optimizer's step after so many backward passes, the user is told what to write.
BACKWARDS_BEFORE_QUESTION: Final = 50


class Recorder:
    """Attaches to a model, listens, and keeps the steps.

    Args:
        model: any module; referred to weakly.
        layers: what to watch, see `gradscope.layers.select`.
        statistics: names out of `STATISTICS`; None for all.
        schedule: the cadence.
        mask: see `Mask`.
        path: a file that every finished step is appended to.
        max_bytes: the memory that steps may take before older ones are thinned.
        warn: whether to warn when a step turns non-finite or a layer dies.
        update: whether to measure update norms on slow steps (a copy of the parameters then).
        input_gradient: make a float trunk input require grad (for models that nobody else uses).
        header: entries for the Record's header.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Selection | None = None,
        statistics: Iterable[str] | None = None,
        schedule: Schedule | None = None,
        mask: Mask | None = None,
        path: str | os.PathLike[str] | None = None,
        max_bytes: int = 256_000_000,
        warn: bool = True,
        update: bool = True,
        scaler: Any = None,
        input_gradient: bool = False,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        selected = select(model, layers)
        self.layers: tuple[Layer, ...] = tuple(layer for layer, _ in selected)
        wanted = _wanted(statistics)
        self.schedule = schedule or Schedule()
        self.header = {**describe(model, self.layers), **(header or {})}
        self.header["statistics"] = sorted(wanted)
        self.header["cadence"] = {"every": self.schedule.every, "slow_every": self.schedule.slow_every}
        self._model = weakref.ref(model)
        self._parameters = Parameters(model)
        self._assembler = Assembler(
            layers=self.layers,
            trunks=tuple(dict.fromkeys(x.trunk for x in self.layers if x.is_block)),
            parameters=self._parameters,
            wanted=wanted,
            update=update,
            compiled=compiled_sites(model, self.layers),
            refusal=refusal(),
        )
        self._sampler = Sampler(
            self,
            self.layers,
            self._assembler.trunks,
            linear=frozenset(s for s, (_, module) in enumerate(selected) if _ends_linear(module)),
            keep_input="input_cosine" in wanted,
            input_gradient=input_gradient,
        )
        self._assembler.verified = self._sampler.verified
        self._mask = mask
        self._mask_seen = False
        self._scaler = scaler
        self._max_bytes = max_bytes
        self._warn = warn
        self._update = update
        self._writer = None if path is None else RecordWriter(path, self.header)

        self.steps: list[Step] = []
        self.faults: Counter[str] = Counter()
        self.backwards = 0
        self.forwards = 0
        self.reached = False
        self.closed = False
        self.listening = True
        self.replicate = 0
        self.index = 0 if self._writer is None else self._writer.last_step + 1
        self._bytes = 0
        self._passes: list[Pass] = []
        self._pass: Pass | None = None
        self._recording = False
        self._begun: float | None = None
        self._stepped = False
        self._explicit = False
        self._overflows: list[Tensor | bool] = []
        self._scale: Tensor | None = None
        self._accumulation = Accumulation(self._parameters)
        self._running: set[int] = set()
        self._arrived: list[Slot] = []
        self._index_of: dict[int, int] = self._parameters.index()
        self._optimizers: list[int] = []
        self._in_closure = False
        self._optimizer_seen = False
        self._asked = False
        self._readings: Readings | None = None
        self._early: dict[int, dict[str, Value]] = {}
        self._before: dict[int, Tensor] = {}
        self._learning_rate: float | tuple[float, ...] | None = None
        self._loss: float | None = None
        self._denominator_varies = False
        self._cached: tuple[Any, Step] | None = None
        self._findings = Findings()
        self._said: set[str] = set()
        self._grad_mode = True
        self._handles: list[Any] = []
        self._attach(model, [module for _, module in selected])

    # -- attaching and detaching -------------------------------------------------------------------

    def _attach(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        keep = self._handles.append
        keep(model.register_forward_pre_hook(probes.RootStartProbe(self), with_kwargs=True))
        modules_by_name = named_layers(model)
        for site, (layer, module) in enumerate(zip(self.layers, modules, strict=True)):
            if layer.is_block:
                probe = probes.BlockInputProbe(self, site)
                entry = modules_by_name[layer.parts[0]] if layer.parts else module
                keep(entry.register_forward_pre_hook(probe, with_kwargs=True))
            keep(module.register_forward_hook(probes.ForwardProbe(self, site), with_kwargs=True))
        keep(model.register_forward_hook(probes.RootEndProbe(self), always_call=True))
        me = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            recorder = me()
            if recorder is not None:
                closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
                recorder.guarded(-1, recorder.on_optimizer_start, optimizer, closure is not None)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            recorder = me()
            if recorder is not None:
                recorder.guarded(-1, recorder.on_optimizer_end, optimizer)

        ours = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        self._handles.extend(ours)
        # Global hooks: a recorder that dies with its model, unclosed, must not leave them behind.
        scaling.listen(self)
        self._last_wills = (
            weakref.finalize(self, _remove, ours),
            weakref.finalize(self, scaling.restore),
        )

    def close(self, *, quiet: bool = False) -> None:
        """Finish the open step and take every hook away; a second call does nothing.

        Args:
            quiet: do not say that nothing came, because the caller says it better.
        """
        if self.closed:
            return
        self.closed = True
        self.listening = False
        try:
            self.guarded(-1, self._finish_step)
            if not quiet:
                self._say_if_nothing_came()
        finally:
            self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for will in self._last_wills:
            will.detach()
        scaling.silence(self)
        self._drop_tensors()
        self._passes.clear()
        self._pass = None
        if self._writer is not None:
            self._writer.close()

    def _drop_tensors(self) -> None:
        self._before = {}
        for p in self._passes:
            for state in p.trunks.values():
                state.input = state.held_activation = state.held_gradient = None
                state.edges, state.branch_edges = [], {}
            for call in p.calls:
                for slot in call.slots:
                    for handle in slot.handles:
                        handle.remove()
                    slot.handles.clear()
            p.aliases.clear()

    # -- faults --------------------------------------------------------------------------------------

    def guarded(self, site: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call a handler; an error in it is counted and warned of once, never raised."""
        mode = torch.is_grad_enabled()
        try:
            with torch.no_grad(), probes.unseen():
                # Handlers run without grad; what the user's code runs under is what they ask.
                self._grad_mode = mode
                return function(*args)
        except Exception as error:
            slot = next((a for a in args if isinstance(a, Slot)), None)
            self._fault(site, error, slot)
            return None

    def _fault(self, site: int, error: Exception, slot: Slot | None = None) -> None:
        where = self.layers[site].name if site >= 0 else "the model"
        kind = f"{type(error).__name__}: {error}"
        self.faults[f"{where}: {kind}"] += 1
        reason = f"error: {kind}"[:200]
        if slot is not None:
            slot.error = reason
        elif self._pass is not None:
            if site < 0:
                self._pass.error = reason
            else:
                calls = [c for c in self._pass.calls if c.site == site]
                if calls:
                    calls[-1].error = reason
                else:
                    self._pass.calls.append(Call(site, 0, [], error=reason))
                    self._pass.counts[site] = 1
        self._say(
            f"fault {type(error).__name__}",
            f"gradscope caught an error of its own at {where}: {kind}. Training goes on; the values "
            "that are missing for it have this as their status, and scope.faults counts it.",
        )

    def _say(self, key: str, message: str) -> None:
        if key in self._said:
            return
        self._said.add(key)
        try:
            warnings.warn(message, GradscopeWarning, stacklevel=2)
        except GradscopeWarning:
            # An "error" filter makes the warning raise; it must be heard, and must not end training.
            logging.getLogger("gradscope").warning(message)

    # -- forward -------------------------------------------------------------------------------------

    def on_root_start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the watched model begins."""
        if probes.backward_id() != -1 or probes.in_transform():
            return
        if self._pass is not None and self._pass.root_open:
            # The last forward never came to its end: an exception. Half a record is no record.
            self._forget(self._pass)
        if not self._grad_mode:
            return  # an evaluation: not of any step
        self._begin_pass()
        if self._pass is None:
            return
        self._pass.root_open = True
        self.forwards += 1
        if self._mask is not None:
            try:
                self._pass.valid = valid_positions(self._mask, self._model(), args, kwargs)
            except Exception as error:
                self._fault(-1, error)
                self._pass.error = f"error: mask: {error}"
            self._mask_seen = self._mask_seen or self._pass.valid is not None
            self._sampler.masked = self._pass.valid is None

    def _begin_pass(self) -> None:
        if self._asked and not (self._optimizer_seen or self._explicit) and self._begun is not None:
            self._stepped = True
        if self._stepped:
            self._end_step()
        done = [p for p in self._passes if p.begun]
        if self._in_closure and done:
            # A closure that is evaluated again moves the parameters within one step: the first
            # evaluation is the gradient at the parameters that the step starts from.
            self._pass = None
            self.listening = False
            return
        for p in [p for p in done if not p.complete]:
            self._forget(p)  # its backward was cut off by an exception
        for p in [p for p in self._passes if not p.begun and p.graph and not any(r() for r in p.graph)]:
            self._forget(p)  # its graph is gone: no backward will come (an evaluation with grad)
        # Outside of any backward pass nothing runs; what is still noted was cut off by an exception.
        self._running.clear()
        self._scale = None
        if not self._in_closure:
            self._optimizers.clear()
        if self._begun is None:
            self._open_step_now()
        self.listening = self._recording
        self._pass = Pass()
        if self._recording:
            self._passes.append(self._pass)

    def _open_step_now(self) -> None:
        self._begun = time.perf_counter()
        self._recording = self.schedule.records(self.index)
        self._sampler.slow = self._recording and self.schedule.slow(self.index)
        self._index_of = self._parameters.index()

    def _forget(self, p: Pass) -> None:
        if p in self._passes:
            self._passes.remove(p)
        for state in p.trunks.values():
            state.input = state.held_activation = state.held_gradient = None
            state.edges, state.branch_edges = [], {}
        p.calls.clear()
        if self._pass is p:
            self._pass = None

    def on_root_end(self, output: Any) -> None:
        """A forward of the watched model came to its end."""
        p = self._pass
        if p is None or not p.root_open or probes.backward_id() != -1 or not self._grad_mode:
            return
        if output is None and sys.exc_info()[1] is not None:
            self._forget(p)  # the forward raised: half a record is no record
            return
        p.root_open = False
        if not self._recording:
            return
        for tensor in probes.tensors_in(output):
            if tensor.requires_grad and not tensor.is_leaf:
                probe = probes.BackwardProbe(self, p)
                p.graph.append(weakref.ref(probe))
                tensor.register_hook(probe)
        if p.valid is not None and not self._sampler.masked:
            shape = list(p.valid.shape)
            p.error = f"error: the mask {shape} has the shape [batch, tokens] of no watched layer"
            self._say(
                "mask",
                f"mask= gave a tensor of shape {shape}, which is [batch, tokens] of no watched layer's "
                "output; nothing can be left out by it, and the step's values are absent. A tensor given "
                "as mask= must fit every batch; name the forward's argument instead: "
                'mask="attention_mask".',
            )
        p.loss = scalar_loss(output)
        if self._sampler.slow:
            self._sampler.prove_sole_consumers(p, output)
        for state in p.trunks.values():
            state.input = state.held_activation = None
            state.edges, state.branch_edges = [], {}
        p.aliases.clear()

    def _enclosing_pass(self) -> Pass | None:
        """The recorded pass that a layer called now belongs to; a new one outside of a forward."""
        if self._pass is None or not (self._pass.root_open or not self._pass.begun):
            self._begin_pass()
        return self._pass if self._recording else None

    def on_block_input(self, site: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block is about to run; returns new (args, kwargs), or None for the old ones."""
        if probes.backward_id() != -1 or probes.in_transform() or not self._heard():
            return None
        p = self._enclosing_pass()
        if p is None:
            return None
        return self._sampler.block_input(p, site, args, kwargs, grad_mode=self._grad_mode)

    def on_forward(self, site: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A watched layer has run."""
        if probes.in_transform():
            return
        backward = probes.backward_id()
        if backward != -1:
            mine = [q for q in self._passes if backward in q.begun] or self._passes
            if len(mine) == 1:
                self._sampler.recomputed(mine[0], site, output)
            return
        p = self._enclosing_pass() if self._heard() else None
        if p is not None:
            self._sampler.output(p, site, args, kwargs, output, grad_mode=self._grad_mode)

    def _heard(self) -> bool:
        # Without grad only what runs inside a forward with grad counts (re-entrant checkpointing, a
        # part of the model under no_grad); everything else is an evaluation.
        return self._grad_mode or (self._pass is not None and self._pass.root_open)

    # -- backward ------------------------------------------------------------------------------------

    def on_gradient(self, slot: Slot, grad: Tensor) -> None:
        """The gradient with respect to a sampled tensor has come."""
        p = slot.owner
        if p is None or not self.on_backward_start(p):
            return
        self.reached = True
        if slot.backward is None:
            self._arrived.append(slot)
        self._sampler.gradient(slot, grad, p, probes.backward_id())

    def on_backward_start(self, p: Pass) -> bool:
        """A gradient reaches a forward pass, perhaps the first one; whether the pass is recorded."""
        if self.closed or p not in self._passes:
            return False
        backward = probes.backward_id()
        if backward in p.begun:
            return True
        if backward not in self._running:
            if not self._running:
                self._settle_what_came_before(p)
                self._accumulation.begin()
            self._running.add(backward)
            self._await_end(backward)
        p.begun.add(backward)
        if self._scale is not None:
            p.scale = self._scale
        return p in self._passes

    def _settle_what_came_before(self, p: Pass) -> None:
        """Before the first backward pass through p: do the earlier ones still belong to this step?"""
        before = [q for q in self._passes if q.begun]
        if p in before or not before:
            return
        if self._stepped:
            # All forwards came first, and the optimizer steps after each backward pass.
            rest, newest = [q for q in self._passes if not q.begun], self._pass
            self._passes = before
            self._end_step()
            self._open_step_now()
            self._passes, self._pass = rest if self._recording else [], newest
        elif self._accumulation.cleared():
            for q in before:
                self._forget(q)
            self._readings = None

    def on_scaled_backward(self, scale: Tensor) -> None:
        """The backward pass of a scaled loss begins."""
        self._scale = scale
        me = weakref.ref(self)

        def end() -> None:
            recorder = me()
            if recorder is not None:
                recorder._scale = None

        probes.after_backward(end)

    def _await_end(self, backward: int) -> None:
        me = weakref.ref(self)

        def end() -> None:
            recorder = me()
            if recorder is not None:
                recorder.guarded(-1, recorder.on_backward_end, backward)

        # Queued twice: callbacks queued by others during this backward (DDP's final reduction) run
        # in order of queueing, so the second turn comes after all of them.
        probes.after_backward(lambda: probes.after_backward(end))

    def on_backward_end(self, backward: int) -> None:
        """A backward pass came to its end: gradients are final, and not yet clipped."""
        self._running.discard(backward)
        mine = [p for p in self._passes if backward in p.begun]
        for p in mine:
            p.ended.add(backward)
            for state in p.trunks.values():
                state.held_gradient = None
                if not p.root_open:
                    state.held_activation = state.input = None
                    state.edges, state.branch_edges = [], {}
        mine = [p for p in mine if p.complete]
        if not mine or self._running:
            return
        self.backwards += 1
        if not self.forwards and self._pass in mine:
            self._pass = None
        if self._accumulation.end() or self._early:
            for p in mine:
                p.accumulated = True
            self._read_gradients(mine[-1].scale)
        if self._optimizer_seen or self._explicit:
            return
        if self._asked:
            self._stepped = True
        elif self.backwards >= BACKWARDS_BEFORE_QUESTION:
            self._asked = True
            self._say(
                "no optimizer",
                f"gradscope has seen {self.backwards} backward passes and no optimizer of torch.optim "
                "that steps the watched parameters. Say where a step ends: scope.step() after each "
                "update. Until then every backward pass counts as one step.",
            )

    def _read_gradients(self, scale: Tensor | float | None) -> None:
        previous = self._readings
        readings = self._readings = self._parameters.read_gradients(scale)
        if previous is not None:
            readings.at_step, readings.weight = previous.at_step, previous.weight
            readings.update = previous.update
        for i, columns in self._early.items():
            readings.absent.pop(i, None)
            for column, value in columns.items():
                readings.gradient[column][i] = value
        self._early = {}

    # -- optimizer and scaler ------------------------------------------------------------------------

    def _held(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """The numbers of the watched parameters that an optimizer holds."""
        entries = self._parameters.entries
        held: list[int] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                i = self._index_of.get(id(parameter))
                if i is not None and entries[i].tensor() is parameter:
                    held.append(i)
        return sorted(held)

    def on_optimizer_start(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        """An optimizer is about to step."""
        held = self._held(optimizer)
        if not held:
            return
        self._optimizer_seen = True
        self._in_closure = closure
        self._optimizers.append(id(optimizer))
        if closure or not self._recording or not self._passes:
            return  # what a closure computes is read at the end of its first backward pass
        if probes.backward_id() != -1:
            self._read_early(held)
        if not self._sampler.slow:
            return
        if self._readings is None:
            self._readings = Readings()
        readings = self._readings
        norms = self._parameters.norms(held, gradient=True)
        # A fused optimizer divides by the scale itself, later.
        scale = getattr(optimizer, "grad_scale", None)
        readings.at_step.update({i: v if scale is None else v / scale for i, v in norms.items()})
        if not readings.weight:
            everything = list(range(len(self._parameters.entries)))
            readings.weight.update(self._parameters.norms(everything))
        if self._update:
            # Of nested optimizers (a wrapper that steps its base) the outer one's change counts.
            self._before.update(self._parameters.snapshot([i for i in held if i not in self._before]))

    def _read_early(self, held: list[int]) -> None:
        """An optimizer steps inside the backward pass, and may clear ``.grad``: read it now."""
        part = copy.copy(self._parameters)
        part.entries = [self._parameters.entries[i] for i in held]
        readings = part.read_gradients(None)
        for n, i in enumerate(held):
            if n not in readings.absent:
                self._early[i] = {column: values[n] for column, values in readings.gradient.items()}

    def on_optimizer_end(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""
        if not self._held(optimizer):
            return
        if id(optimizer) in self._optimizers:
            del self._optimizers[self._optimizers.index(id(optimizer)) :]
        if self._optimizers:
            return
        self._in_closure = False
        before, self._before = self._before, {}
        if before and self._readings is not None:
            self._readings.update.update(self._parameters.changes(before))
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself
        self._overflows.append(found.detach().clone() if isinstance(found, Tensor) else False)
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)
        if rates and self._learning_rate is None:
            self._learning_rate = rates[0] if len(set(rates)) == 1 else rates
        if not self._explicit:
            self._stepped = True
            self.listening = True

    def on_scaled(self, scaler: Any, scaled: Any) -> None:
        """A gradient scaler has scaled a loss, here or of another model: its backward will tell."""
        if (self._scaler is not None and scaler is not self._scaler) or scaler._scale is None:
            return
        scale = scaler._scale.detach().clone().reshape(())
        for tensor in probes.tensors_in(scaled):
            if tensor.requires_grad:
                tensor.register_hook(probes.ScaleProbe(self, scale))

    def on_scaler_step(self, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        """A gradient scaler has let an optimizer step, or not: the gradients overflowed."""
        if (self._scaler is not None and scaler is not self._scaler) or not self._held(optimizer):
            return
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return  # stepped, and was told to change nothing
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if any(v.item() for v in found.values()):
            self._optimizer_seen = True
            self._overflows.append(True)
            if not self._explicit:
                self._stepped = True
                self.listening = True

    # -- steps ---------------------------------------------------------------------------------------

    def end_step(self, loss: float | Tensor | None = None) -> None:
        """End the open step by the user's word; from now on optimizers no longer end steps."""
        self._explicit = True
        self._stepped = True
        if self._begun is not None:
            if loss is not None:
                self._loss = float(loss)
            self._finish_step()
        self._stepped = False
        self.listening = True

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The forward passes of the open step."""
        return tuple(self._passes)

    def note_parameters(self) -> None:
        """Read weight norms now, for measurements without an optimizer."""
        if self._readings is not None and self._sampler.slow:
            everything = list(range(len(self._parameters.entries)))
            self._readings.weight.update(self._parameters.norms(everything))

    def note_denominator(self, denominator: float) -> None:
        """Put the loss's denominator into the header; where it changes, take it out for good."""
        known = self.header["loss_denominator"]
        if self._denominator_varies or denominator == known:
            return
        if known is not None:
            self._denominator_varies = True
            self._say(
                "denominator",
                f"loss_denominator={denominator:g} differs from the {known:g} of an earlier step; the "
                "Record holds one for all steps, so it is left unknown, and absolute gradient levels "
                "cannot be compared across batches or runs. Ratios over depth do not depend on it.",
            )
        self.header["loss_denominator"] = None if known is not None else denominator
        if self._writer is not None:
            self._writer.amend({"loss_denominator": self.header["loss_denominator"]})

    def note_loss(self, loss: float | Tensor) -> None:
        """Put the loss beside the open step."""
        if self._begun is not None:
            self._loss = float(loss)

    def _end_step(self) -> None:
        """Finish the step inside of another handler, which an error here must not stop."""
        try:
            self._finish_step()
        except Exception as error:
            self._fault(-1, error)

    def _finish_step(self) -> None:
        try:
            step = self._build()
            if step is not None:
                step = self._judge(step)
        finally:
            self._reset_step()
        if step is None:
            return
        self.steps.append(step)
        self._bytes += step.nbytes
        while self._bytes > self._max_bytes and len(self.steps) > 3:
            kept = thin(self.steps)
            if len(kept) == len(self.steps):
                break
            self.steps = kept
            self._bytes = sum(s.nbytes for s in kept)
        if self._writer is not None:
            self._writer.write(step)

    def _reset_step(self) -> None:
        self._stepped = False
        self._overflows = []
        self._arrived = []
        self._early = {}
        self._drop_tensors()
        self._passes = []
        self._pass = None
        self._readings = None
        self._learning_rate = None
        self._loss = None
        self._cached = None
        if self._begun is not None:
            self.index += 1
        self._begun = None

    def _build(self) -> Step | None:
        # Without any call, what came back says at least that gradients are there (a compiled model).
        passes = [p for p in self._passes if not p.root_open and (p.calls or p.begun)]
        with_gradient = [p for p in passes if p.begun]
        # A forward that no gradient came back through (a sample drawn, a metric), or whose gradient
        # did not go to the parameters (a saliency map), is not of the step where another one is.
        complete = [p for p in with_gradient if p.complete]
        accumulated = [p for p in complete if p.accumulated]
        passes = accumulated or complete or ([] if with_gradient else passes)
        if self._optimizer_seen and self.steps and not self._stepped:
            if not accumulated or self._accumulation.cleared():
                return None  # after the last step: an evaluation, or gradients thrown away
        if not passes:
            return None
        fields: dict[str, Any] = {}
        if self._loss is not None:
            fields["loss"] = self._loss
        return self._assembler.step(
            passes,
            self._readings,
            skipped=bool(self._overflows) and all(bool(found) for found in self._overflows),
            step=self.index,
            replicate=self.replicate,
            wall_time_s=None if self._begun is None else time.perf_counter() - self._begun,
            learning_rate=self._learning_rate,
            **fields,
        )

    def _judge(self, step: Step) -> Step:
        """Mark and warn of what is worth it: the first non-finite value, layers that died."""
        finding = self._findings.of(step, self._order)
        if finding is None:
            return step
        if self._warn:
            kind = finding.split(":")[0]
            self._say(kind, f"gradscope, step {step.step}: {finding}")
        return replace(step, finding=finding)

    def _order(self, signal: str) -> list[tuple[str, str, int]]:
        """(layer, type, call) of the open step's samples in the order in which they came."""
        calls = [c for p in self._passes for c in p.calls]
        if signal == "output_grad":
            owner = {id(s): c for c in reversed(calls) for s in c.slots}
            calls = [owner[id(s)] for s in self._arrived if id(s) in owner]
        elif signal != "activation":
            return []
        named = [(self.layers[c.site], c.index) for c in calls if c.site >= 0]
        return [(layer.name, layer.type, index) for layer, index in named]

    # -- reading -------------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """What has been recorded so far; a step that is under way counts with what it has."""
        steps = list(self.steps)
        if not self.closed:
            open_step = self._open_step()
            if open_step is not None:
                steps.append(open_step)
        return Record(self.header, tuple(steps))

    def _open_step(self) -> Step | None:
        if not any(p.begun for p in self._passes):
            return None
        state = (len(self._passes), self.backwards, self._stepped, self._learning_rate, self._loss)
        if self._cached is None or self._cached[0] != state:
            step = self.guarded(-1, self._build)
            if step is None:
                return None
            self._cached = (state, step)
        return self._cached[1]

    def _say_if_nothing_came(self) -> None:
        watched = f"{len(self.layers)} layers watched"
        if self._mask is not None and self.forwards and not self._mask_seen and not self.faults:
            self._say(
                "no mask",
                f"mask={self._mask!r} was given, and none of {self.forwards} forward calls had it: "
                "padding, if there is any, is in the values. Pass the mask to the model under that name.",
            )
        if self._assembler.compiled and not self.reached:
            self._say(
                "compiled",
                f"{watched}, {len(self._assembler.compiled)} of them inside a compiled module, where "
                "hooks are not called: their values are absent as 'compiled'. Watch and train the model "
                "uncompiled for a while, or compile only what you do not watch.",
            )
        elif not self.forwards and not self.steps:
            self._say(
                "no forward",
                f"{watched}, 0 forward calls in grad mode. Either the model was never called, or only "
                "under torch.no_grad(), or it was compiled (hooks inside compiled code are not called). "
                "Run the uncompiled model's training loop inside `with gradscope.watch(model):`.",
            )
        elif not self.reached:
            calls = "1 forward call" if self.forwards == 1 else f"{self.forwards} forward calls"
            self._say(
                "no backward",
                f"{watched}, {calls}, 0 backward passes through them. Either "
                "loss.backward() was never called while the model was watched, or the loss does not "
                "depend on any watched layer (detached? another model's output?).",
            )


# -- helpers -----------------------------------------------------------------------------------------


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _ends_linear(module: nn.Module) -> bool:
    """Whether a module's output is that of an `nn.Linear`."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return type(module).forward is nn.Linear.forward


def _wanted(chosen: Iterable[str] | None) -> frozenset[str]:
    if chosen is None:
        return frozenset(STATISTICS)
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    unknown = [n for n in chosen if n not in STATISTICS]
    if unknown:
        raise GradscopeError(
            f"statistics= has no {', '.join(map(repr, unknown))}; choose from {', '.join(STATISTICS)}."
        )
    # The norms and counts behind every derived quantity are always kept.
    return frozenset(chosen) | {"l2", "count", "tokens"}
