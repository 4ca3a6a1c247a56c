"""The life of a step: from the first forward after an optimizer's step to the next one.

The recorder is the only object that holds state. It holds no tensor beyond what `Pass` documents:
the pair of neighbouring stream tensors until the next hook of the trunk, and, on steps with slow
statistics, the trunk's input until the end of the forward pass (for `input_cosine`).
"""

from __future__ import annotations

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
            keep_input="input_cosine" in wanted,
            input_gradient=input_gradient,
        )
        self._assembler.verified = self._sampler.verified
        self._mask = mask
        self._scaler = scaler
        self._max_bytes = max_bytes
        self._warn = warn
        self._update = update
        self._writer = None if path is None else RecordWriter(path, self.header)

        self.steps: list[Step] = []
        self.faults: Counter[str] = Counter()
        self.backwards = 0
        self.forwards = 0
        self.closed = False
        self.listening = True
        self.replicate = 0
        self.index = 0 if self._writer is None else self._writer.last_step + 1
        self._bytes = 0
        self._first_index = self.index
        self._passes: list[Pass] = []
        self._pass: Pass | None = None
        self._recording = False
        self._begun: float | None = None
        self._stepped = False
        self._explicit = False
        self._skipped = False
        self._scaled = False
        self._in_optimizer = False
        self._optimizer_seen = False
        self._asked = False
        self._readings: Readings | None = None
        self._before: dict[int, Tensor] = {}
        self._learning_rate: float | tuple[float, ...] | None = None
        self._loss: float | None = None
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
                recorder.guarded(-1, recorder.on_optimizer_start, optimizer)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            recorder = me()
            if recorder is not None:
                recorder.guarded(-1, recorder.on_optimizer_end, optimizer)

        ours = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        self._handles.extend(ours)
        # Global hooks: a recorder that dies with its model, unclosed, must not leave them behind.
        weakref.finalize(self, _remove, ours)
        scaling.listen(self)

    def close(self) -> None:
        """Finish the open step and take every hook away; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.listening = False
        try:
            self.guarded(-1, self._finish_step)
            self._say_if_nothing_came()
        finally:
            self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
            with torch.no_grad():
                # Handlers run without grad; what the user's code runs under is what they ask.
                self._grad_mode = mode
                return function(*args)
        except Exception as error:
            self._fault(site, error)
            return None

    def _fault(self, site: int, error: Exception) -> None:
        where = self.layers[site].name if site >= 0 else "the model"
        kind = f"{type(error).__name__}: {error}"
        self.faults[f"{where}: {kind}"] += 1
        if self._pass is not None:
            reason = f"error: {kind}"[:200]
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
            f"fault {kind}",
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
                self._pass.error = f"error: mask: {error}"
                self._fault(-1, error)

    def _begin_pass(self) -> None:
        if self._asked and not (self._optimizer_seen or self._explicit) and self._begun is not None:
            self._stepped = True
        if self._stepped:
            self._finish_step()
        done = [p for p in self._passes if p.begun]
        if self._in_optimizer and done:
            # A closure that is evaluated again moves the parameters within one step: the first
            # evaluation is the gradient at the parameters that the step starts from.
            self._pass = None
            self.listening = False
            return
        for p in [p for p in done if not p.complete]:
            self._forget(p)  # its backward was cut off by an exception
        if self._begun is None:
            self._begun = time.perf_counter()
            self._recording = self.schedule.records(self.index)
            self._sampler.slow = self._recording and self.schedule.slow(self.index)
        self.listening = self._recording
        self._pass = Pass()
        if self._recording:
            self._passes.append(self._pass)

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
        if probes.backward_id() != -1:
            if self._pass is not None:
                self._sampler.recomputed(self._pass, site, output)
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
        if self.closed or p is None or p not in self._passes:
            return
        backward = probes.backward_id()
        if backward not in p.begun:
            p.begun.add(backward)
            self._await_end(p, backward)
        self._sampler.gradient(slot, grad, p, backward)

    def _await_end(self, p: Pass, backward: int) -> None:
        me, this = weakref.ref(self), weakref.ref(p)

        def end() -> None:
            recorder, ended = me(), this()
            if recorder is not None and ended is not None:
                recorder.guarded(-1, recorder.on_backward_end, ended, backward)

        # Queued twice: callbacks queued by others during this backward (DDP's final reduction) run
        # in order of queueing, so the second turn comes after all of them.
        probes.after_backward(lambda: probes.after_backward(end))

    def on_backward_end(self, p: Pass, backward: int) -> None:
        """A backward pass came to its end: gradients are final, and not yet clipped."""
        p.ended.add(backward)
        for state in p.trunks.values():
            state.held_gradient = None
            if not p.root_open:
                state.held_activation = state.input = None
                state.edges, state.branch_edges = [], {}
        if p not in self._passes or not p.complete:
            return
        self.backwards += 1
        previous = self._readings
        self._readings = self._parameters.read_gradients(p.scale)
        if previous is not None:
            self._readings.at_step = previous.at_step
        if not p.root_open and self._pass is p and not self.forwards:
            self._pass = None
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

    # -- optimizer and scaler ------------------------------------------------------------------------

    def _mine(self, optimizer: torch.optim.Optimizer) -> bool:
        ids = {id(e.tensor()) for e in self._parameters.entries}
        return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])

    def on_optimizer_start(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        if not self._mine(optimizer):
            return
        self._optimizer_seen = True
        self._in_optimizer = True
        if not self._sampler.slow or self._readings is None:
            return
        held = self._parameters.indices_of(optimizer)
        readings = self._readings
        readings.at_step.update(self._parameters.norms(held, gradient=True))
        everything = list(range(len(self._parameters.entries)))
        if not readings.weight:
            readings.weight.update(self._parameters.norms(everything))
        if self._update:
            self._before = self._parameters.snapshot(held)

    def on_optimizer_end(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""
        if not self._mine(optimizer):
            return
        self._in_optimizer = False
        before, self._before = self._before, {}
        if before and self._readings is not None:
            self._readings.update.update(self._parameters.changes(before))
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)
        if rates and self._learning_rate is None:
            self._learning_rate = rates[0] if len(set(rates)) == 1 else rates
        if not self._explicit:
            self._stepped = True
            self.listening = True

    def on_scaled(self, scaler: Any) -> None:
        """A gradient scaler has scaled a loss: of the newest pass that has no backward yet."""
        if self._scaler is not None and scaler is not self._scaler:
            return
        if scaler._scale is None:
            return
        self._scaled = True
        for p in self._passes:
            if not p.begun:
                p.scale = scaler._scale.detach().clone().reshape(())

    def on_scaler_update(self, scaler: Any) -> None:
        """A gradient scaler was updated; without an optimizer's step before, the step overflowed."""
        if self._scaler is not None and scaler is not self._scaler:
            return
        if self._scaled and not self._stepped and not self._explicit:
            self._skipped = True
            self._stepped = True
            self.listening = True

    # -- steps ---------------------------------------------------------------------------------------

    def end_step(self, loss: float | Tensor | None = None) -> None:
        """End the open step by the user's word; from now on optimizers no longer end steps."""
        self._explicit = True
        if loss is not None:
            self._loss = float(loss)
        if self._begun is not None:
            self._finish_step()
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

    def note_loss(self, loss: float | Tensor) -> None:
        """Put the loss beside the open step."""
        self._loss = float(loss)

    def _finish_step(self) -> None:
        try:
            step = self._build()
        finally:
            self._reset_step()
        if step is None:
            return
        step = self._judge(step)
        if self._writer is not None:
            self._writer.write(step)
        self.steps.append(step)
        self._bytes += step.nbytes
        while self._bytes > self._max_bytes and len(self.steps) > 3:
            kept = thin(self.steps)
            if len(kept) == len(self.steps):
                break
            self.steps = kept
            self._bytes = sum(s.nbytes for s in kept)

    def _reset_step(self) -> None:
        self._stepped = False
        self._skipped = False
        self._scaled = False
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
        passes = [p for p in self._passes if not p.root_open and p.calls]
        with_gradient = [p for p in passes if p.begun]
        # A forward that no gradient came back through (a sample drawn, a metric) is not of the step.
        passes = [p for p in with_gradient if p.complete] or ([] if with_gradient else passes)
        if not passes:
            return None
        fields: dict[str, Any] = {}
        if self._loss is not None:
            fields["loss"] = self._loss
        return self._assembler.step(
            passes,
            self._readings,
            skipped=self._skipped,
            step=self.index,
            replicate=self.replicate,
            wall_time_s=None if self._begun is None else time.perf_counter() - self._begun,
            learning_rate=self._learning_rate,
            **fields,
        )

    def _judge(self, step: Step) -> Step:
        """Mark and warn of what is worth it: the first non-finite value, layers that died."""
        finding = self._findings.of(step)
        if finding is None:
            return step
        if self._warn:
            kind = finding.split(":")[0]
            self._say(kind, f"gradscope, step {step.step}: {finding}")
        return replace(step, finding=finding)

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
        if not self.forwards and not self.steps:
            compiled = bool(self._assembler.compiled)
            self._say(
                "no forward",
                f"{watched}, 0 forward calls in grad mode. "
                + (
                    "The model is compiled, and hooks inside compiled code are not called: watch the "
                    "uncompiled model."
                    if compiled
                    else "Either the model was never called, or only under torch.no_grad(), or it was "
                    "compiled and run before it was watched. Call gradscope.watch(model) before the "
                    "first call, and run the training loop inside the with-block."
                ),
            )
        elif not self.backwards:
            self._say(
                "no backward",
                f"{watched}, {self.forwards} forward calls, 0 backward passes through them. Either "
                "loss.backward() was never called while the model was watched, or the loss does not "
                "depend on any watched layer (detached? another model's output?).",
            )


# -- helpers -----------------------------------------------------------------------------------------


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


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
