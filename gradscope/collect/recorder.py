"""The life of a step: from the first forward after an optimizer's step to the next one.

The recorder hears every hook and decides what belongs to which pass and which step. What is measured,
read, kept and said it leaves to its parts. It holds no activation and no gradient beyond what
`gradscope.collect.passes` documents, and copies of parameters only while an optimizer steps.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradscope.collect import engine, probes, shards, voice
from gradscope.collect.arguments import Mask, scalar_loss, valid_positions
from gradscope.collect.attachment import Attachment
from gradscope.collect.building import Builder
from gradscope.collect.faults import Faults
from gradscope.collect.findings import Findings
from gradscope.collect.open_step import OpenStep
from gradscope.collect.parts import Options, Parts
from gradscope.collect.passes import ARRIVALS, Pass, Slot
from gradscope.collect.ranks import Ranks
from gradscope.collect.scaling import ScaledBackwards
from gradscope.collect.schedule import Schedule
from gradscope.collect.setting import (
    chosen_statistics,
    describe,
    forget_compiled_code,
)
from gradscope.collect.storage import Storage
from gradscope.collect.tensors import tensors_in
from gradscope.collect.traced import COMPILED
from gradscope.errors import LayerError
from gradscope.layers import Layer, Selection, select
from gradscope.record import Record, Step

__all__ = ["Recorder"]

#: Without any optimizer's step after so many backward passes, the user is told what to write.
BACKWARDS_BEFORE_QUESTION: Final = 50
#: Stands for the backward pass of a step of which only the optimizer was seen.
_NO_BACKWARD: Final = -2
_CALL: Final = nn.Module._wrapped_call_impl.__code__
_CHANGED: Final = "not supported: the model was changed in the middle of a step"


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
        warn: whether to warn when a step turns non-finite or a layer is dead.
        update: whether to measure update norms on slow steps (a copy of the parameters then).
        input_gradient: make a float trunk input require grad (for models that nobody else uses).
        alone: other processes have no part in a model that is in no wrapper (for models that nobody
            else uses).
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
        alone: bool = False,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        wanted = chosen_statistics(statistics)
        self.schedule = schedule or Schedule()
        chosen = {
            "statistics": sorted(wanted),
            "cadence": {"every": self.schedule.every, "slow_every": self.schedule.slow_every},
        }
        self._model = weakref.ref(model)
        self._selection = layers
        self._options = Options(wanted, update=update, scaler=scaler, input_gradient=input_gradient)
        self._voice = voice.Voice()
        selected = select(model, layers)
        self._use(Parts.of(self, model, selected, self._options, self.schedule))
        self._faults = Faults(self.layers, self._voice)
        self._findings = Findings(self.layers, self._voice if warn else None)
        self._storage = Storage(
            {**describe(model, self.layers), **(header or {}), **chosen},
            path=path,
            max_bytes=max_bytes,
            voice=self._voice,
        )
        self._ranks = Ranks(self._voice, alone=alone)
        self._mask = mask
        self._mask_seen = False

        self.backwards = 0
        self.forwards = 0
        self.reached = False
        self.closed = False
        self.listening = True
        self.replicate = 0
        self.index = self._storage.first_step
        self._step = OpenStep()
        self._explicit = False
        self._asked = False
        self._scaled = ScaledBackwards()
        self._running: set[int] = set()
        self._cached: tuple[Any, Step] | None = None
        self._here = threading.local()
        self._changed = False
        self._builder = Builder(self._ranks, self._faults)
        self._attach(model, selected)

    def _use(self, parts: Parts) -> None:
        """Work with these parts; the hooks reach them by names of their own."""
        self._parts = parts
        self.layers = parts.layers
        self._structure = parts.structure
        self._assembler = parts.assembler
        self._sampler = parts.sampler
        self.quick = parts.sampler.quick
        self._accumulation = parts.accumulation
        self._optimizers = parts.optimizers
        self._traced = parts.traced

    def _attach(self, model: nn.Module, selected: Sequence[tuple[Layer, nn.Module]]) -> None:
        modules = [module for _, module in selected]
        self._attachment = Attachment(self, model, modules, self._traced)
        if self._assembler.compiled and (self._attachment.dropped or forget_compiled_code()):
            self._voice.say(*voice.compiled_before(len(self._assembler.compiled)))

    def _look_again(self) -> None:
        """The model was changed since the last step: find its layers and parameters by name anew."""
        model = self._model()
        if model is None:
            return
        try:
            selected = select(model, self._selection)
        except LayerError as error:
            selected = ()  # what is left are the parameters
            self._voice.say(*voice.no_layers_left(error))
        before = self._parts
        self._use(Parts.of(self, model, selected, self._options, self.schedule))
        self._parts.take_over(before)
        self._faults.layers = self._findings.layers = self.layers
        self._attachment.remove()
        self._attach(model, selected)
        self._changed = True

    def close(self, *, quiet: bool = False) -> None:
        """Finish the open step and take every hook away; a second call does nothing.

        Args:
            quiet: do not say that nothing came, because the caller says it better.
        """
        if self.closed:
            return
        self.closed = True
        self.listening = False
        self._traced.stop()
        try:
            self.guarded(-1, self._finish_step)
            if not quiet:
                self._say_if_nothing_came()
        finally:
            self._attachment.remove()
            self._drop_step()
            self._ranks.close()
            self._storage.close()

    # -- faults --------------------------------------------------------------------------------------

    def guarded(self, site: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call a handler; an error in it is counted and warned of once, never raised."""
        if engine.dispatch_modes() or engine.function_modes():
            with engine.unseen():  # in which there are none
                return self.guarded(site, function, *args)
        # Handlers run without grad; what the user's code runs under is what they ask. What the context
        # managers would do is done by hand: this is the one place that every hook goes through.
        mode = self._here.grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args)
        except Exception as error:
            slot = next((a for a in args if isinstance(a, Slot)), None)
            self.note_fault(site, error, slot)
            return None
        finally:
            torch._C._set_grad_enabled(mode)

    @property
    def _grad_mode(self) -> bool:
        """Whether the code that this thread's handler was called from runs with grad."""
        return getattr(self._here, "grad_mode", True)

    def note_fault(self, site: int, error: Exception, slot: Slot | None = None) -> None:
        """An error of gradscope's own in a handler: count it, and warn of it once."""
        self._faults.note(site, error, slot=slot, during=self._step.newest)

    @property
    def faults(self) -> Counter[str]:
        """Errors of gradscope's own by place and kind, with how often each came."""
        return self._faults.counts

    # -- forward -------------------------------------------------------------------------------------

    def on_root_start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the watched model begins."""
        if engine.backward_id() != -1 or engine.in_transform():
            return
        last = self._step.newest
        if last is not None and last.root_open and last.mine and self._calls_itself():
            last.within += 1  # what it calls is called by this forward
            return
        if last is not None and last.root_open and (last.mine or self._grad_mode):
            # The last forward never came to its end: an exception. Half a record is no record.
            self._step.forget([last])
        if not self._grad_mode:
            return  # an evaluation: not of any step
        self._begin_pass(root=True)
        p = self._step.newest
        if p is None:
            return
        p.root_open = True
        self.forwards += 1
        model = self._model()
        if model is not None and self._ranks.many:
            self._ranks.begin_pass(model)
        if self._mask is not None:
            try:
                p.valid = valid_positions(self._mask, self._model(), args, kwargs)
            except Exception as error:
                self.note_fault(-1, error)
                p.error = f"error: mask: {error}"
            self._mask_seen = self._mask_seen or p.valid is not None
            self._sampler.masked = p.valid is None
        if self._step.recording:
            self._sampler.begin_forward(p)

    def _calls_itself(self) -> bool:
        """Whether the forward that begins is called by another one of the model that still runs.

        One that is open and does not run was cut off by Ctrl-C, which torch's hooks are not told of.
        """
        model, running = self._model(), 0
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is model:
                running += 1
            frame = frame.f_back
        return running > 1

    def _begin_pass(self, *, root: bool = False) -> None:
        if (
            self._asked
            and not (self._optimizers.seen or self._explicit)
            and self._step.began_s is not None
        ):
            self._step.stepped = True
        if self._step.stepped:
            self._meet_ranks()
            self._end_step()
        if self._evaluates_again():
            self._step.newest = None
            self.listening = False
            return
        self._step.forget_the_cut_off()
        # Outside of any backward pass nothing runs; what is still noted was cut off by an exception.
        self._running.clear()
        self._scaled.forget_the_cut_off()
        changed = self.schedule.records(self.index) and (
            self._structure.changed() or (self._step.began_s is None and self._optimizers.retied())
        )
        if changed and root and self._step.began_s is None:
            self._look_again()
            changed = False
        self._optimizers.begin_pass()
        if self._step.began_s is None:
            self._begin_step()
        self.listening = self._step.recording
        self._traced.begin(self._model(), recording=self._step.recording)
        self._step.begin_pass()
        if changed and self._step.newest is not None:
            # Its hooks were put on other modules, and cannot be moved before the step is over.
            self._step.newest.error = _CHANGED

    def _evaluates_again(self) -> bool:
        """Whether an optimizer evaluates its closure once more within one step.

        The first evaluation is the gradient at the parameters that the step starts from. What comes
        before the parameters move or the gradients are cleared is a micro-batch of it, and so is what
        came before the optimizer was called (Lightning puts the last micro-batch into the closure).
        """
        if not (self._optimizers.in_closure and self._step.with_gradient()):
            return False
        return self._optimizers.moved or self._accumulation.cleared()

    def _begin_step(self) -> None:
        recording = self.schedule.records(self.index)
        self._step.begin(recording=recording)
        # What the graph proves about blocks and branches was seen on others.
        self._sampler.begin_step(slow=recording and (self._changed or self.schedule.slow(self.index)))
        self._changed = self._changed and not recording
        model = self._model()
        if model is not None:
            self._assembler.parameters.find_shards(model)
            if self._ranks.begin(model, self._assembler.identity, self.index):
                self._storage.note_parallelism(str(self._ranks.parallelism))
        self._optimizers.begin_step(recording=recording)

    def on_root_end(self, output: Any) -> None:
        """A forward of the watched model came to its end."""
        p = self._step.newest
        if p is None or not p.root_open or not p.mine:
            return
        if engine.backward_id() != -1 or engine.in_transform():
            return
        if p.within:
            p.within -= 1
            return
        if not self._grad_mode:
            return
        if output is None and sys.exc_info()[1] is not None:
            self._sampler.end_forward()
            self._step.forget([p])  # the forward raised: half a record is no record
            return
        p.root_open = False
        self._sampler.end_forward()
        if not self._step.recording:
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad and not tensor.is_leaf:
                probe = probes.BackwardProbe(self, p)
                p.graph.append(weakref.ref(probe))
                tensor.register_hook(probe)
        if p.valid is not None and not self._sampler.masked:
            shape = list(p.valid.shape)
            p.error = f"error: the mask {shape} has the shape [batch, tokens] of no watched layer"
            self._voice.say(*voice.misfit_mask(shape))
        p.loss = scalar_loss(output)
        self._traced.collect(p)
        if self._sampler.slow:
            self._sampler.prove_sole_consumers(p, output)
        p.end_forward()

    def _enclosing_pass(self, site: int) -> Pass | None:
        """The recorded pass that a layer called now belongs to; a new one outside of a forward."""
        p = self._step.newest
        if p is None or (not p.root_open and (p.begun or self._step.stepped or p.gone(site))):
            self._begin_pass()
        return self._step.newest if self._step.recording else None

    def on_block_input(self, site: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block is about to run; returns new (args, kwargs), or None for the old ones."""
        if engine.backward_id() != -1 or engine.in_transform() or not self._heard():
            return None
        p = self._enclosing_pass(site)
        if p is None:
            return None
        return self._sampler.block_input(p, site, args, kwargs, grad_mode=self._grad_mode)

    def on_forward(self, site: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A watched layer has run."""
        if engine.in_transform():
            return
        backward = engine.backward_id()
        if backward != -1:
            passes = self._step.passes
            mine = [q for q in passes if backward in q.begun] or passes
            if len(mine) == 1:
                self._sampler.recomputed(mine[0], site, output)
            return
        p = self._enclosing_pass(site) if self._heard() else None
        if p is not None:
            self._sampler.output(p, site, args, kwargs, output, grad_mode=self._grad_mode)

    def _heard(self) -> bool:
        # Without grad only what runs inside a forward with grad counts (re-entrant checkpointing, a
        # part of the model under no_grad); everything else is an evaluation.
        # While a forward runs, what another thread calls is none of it.
        p = self._step.newest
        return p.mine if p is not None and p.root_open else self._grad_mode

    # -- backward ------------------------------------------------------------------------------------

    def on_gradient(self, slot: Slot, grad: Tensor) -> None:
        """The gradient with respect to a sampled tensor has come."""
        p = slot.owner
        if engine.batched(grad):
            if slot.gradient is None:
                slot.error = "not supported: a backward pass under vmap"
            return
        if p is None or not self.on_backward_start(p):
            return
        self.reached = True
        if slot.backward is None:
            slot.arrival = next(ARRIVALS)
        self._sampler.gradient(slot, grad, p, engine.backward_id())

    def on_backward_start(self, p: Pass) -> bool:
        """A gradient reaches a forward pass, perhaps the first one; whether the pass is recorded."""
        if self.closed or p not in self._step.passes:
            return False
        backward = engine.backward_id()
        if backward in p.begun:
            return True
        if backward not in self._running:
            if not self._running:
                self._settle_what_came_before(p)
                self._accumulation.begin()
            self._running.add(backward)
            engine.after_backward(probes.BackwardEndProbe(self, backward), last=True)
        p.begun.add(backward)
        scale = self._scaled.scale_of(backward)
        if scale is not None:
            p.scale = scale
        return p in self._step.passes

    def _settle_what_came_before(self, p: Pass) -> None:
        """Before the first backward pass through p: do the earlier ones still belong to this step?"""
        before = self._step.with_gradient()
        if p in before or not before:
            return
        if self._step.stepped:
            # All forwards came first, and the optimizer steps after each backward pass.
            rest, newest = [q for q in self._step.passes if not q.begun], self._step.newest
            self._step.passes = before
            self._end_step()
            self._begin_step()
            self._step.passes, self._step.newest = rest if self._step.recording else [], newest
        elif self._accumulation.cleared():
            self._step.forget(before)
            self._optimizers.discard_readings()

    def on_scaled_backward(self, scale: Tensor) -> None:
        """The backward pass of a scaled loss begins."""
        backward = engine.backward_id()
        self._scaled.begin(backward, scale)
        engine.after_backward(probes.ScaleEndProbe(self, backward))

    def on_scaled_backward_end(self, backward: int) -> None:
        """The backward pass of a scaled loss came to its end."""
        self._scaled.end(backward)

    def on_backward_end(self, backward: int) -> None:
        """A backward pass came to its end: gradients are final, and not yet clipped."""
        self._running.discard(backward)
        mine = self._step.end_backward(backward)
        if not mine or self._running:
            return
        self.backwards += 1
        if self._traced.seen:
            self._traced.take_gradients(mine, backward)
        if not self.forwards and self._step.newest in mine:
            self._step.newest = None
        model = self._model()
        unreduced = model is not None and shards.unreduced(model)
        held = self._assembler.parameters.held()
        if self._accumulation.end(held) or self._optimizers.stepped_early or unreduced:
            for p in mine:
                p.accumulated = True
            self._optimizers.read_gradients(mine[-1].scale, held)
        if self._optimizers.seen or self._explicit:
            return
        if self._asked:
            self._step.stepped = True
        elif self.backwards >= BACKWARDS_BEFORE_QUESTION:
            self._asked = True
            self._voice.say(*voice.no_optimizer(self.backwards))

    # -- optimizer and scaler ------------------------------------------------------------------------

    def on_optimizer_start(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        """An optimizer is about to step."""
        if self._attachment.inside_a_graph and not closure and not self._step.newest:
            self._begin_inside_a_graph(optimizer)
        self._optimizers.start(
            optimizer,
            closure=closure,
            recording=self._step.recording and bool(self._step.passes),
            slow=self._sampler.slow,
        )

    def _begin_inside_a_graph(self, optimizer: torch.optim.Optimizer) -> None:
        """No forward was seen, because it is a part of a larger compiled function: say so.

        What is left of the step are its parameters as the optimizer finds them.
        """
        if not self._optimizers.holds(optimizer):
            return
        if self._step.stepped:
            self._end_step()
        self._voice.say(*voice.compiled_around())
        self._assembler.compiled = frozenset(range(len(self.layers)))
        self._begin_step()
        self._step.begin_pass()
        p, self._step.newest = self._step.newest, None
        if p is None or not self._step.recording:
            return
        p.begun.add(_NO_BACKWARD)
        p.ended.add(_NO_BACKWARD)
        p.accumulated = True
        self._optimizers.read_at_step(optimizer, COMPILED)

    def on_optimizer_end(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped."""
        if self._optimizers.end(optimizer):
            self._note_stepped()

    def on_scaled(self, scaler: Any, scaled: Any) -> None:
        """A gradient scaler has scaled a loss, here or of another model: its backward will tell."""
        scale = self._optimizers.scale_of(scaler)
        if scale is None:
            return
        for tensor in tensors_in(scaled):
            if tensor.requires_grad:
                tensor.register_hook(probes.ScaleProbe(self, scale))

    def on_scaler_step(self, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        """A gradient scaler has let an optimizer step, or not: the gradients overflowed."""
        if self._optimizers.overflowed(scaler, optimizer):
            self._note_stepped()

    def _note_stepped(self) -> None:
        if not self._explicit:
            self._step.stepped = True
            self.listening = True
            if self._ranks.many and self._optimizers.complete:
                self._meet_ranks()

    # -- ranks ---------------------------------------------------------------------------------------

    def _meet_ranks(self) -> None:
        """At the end of a step, which all ranks come to: pool its values, where all ranks watch."""
        if not self._ranks.many or self._step.settled or self._step.began_s is None:
            return
        if engine.backward_id() != -1:
            return  # an optimizer that steps inside the backward pass: when the next forward begins
        self._step.settled = True
        self.index += self._ranks.settle()
        if self._step.recording and self._ranks.together:
            self._step.pooled = self._builder.pooled(self._parts, self._step, self.index, self.replicate)
        self._storage.note_parallelism(str(self._ranks.parallelism))

    # -- steps ---------------------------------------------------------------------------------------

    def end_step(self, loss: float | Tensor | None = None) -> None:
        """End the open step by the user's word; from now on optimizers no longer end steps."""
        self._explicit = True
        self._step.stepped = True
        if self._step.began_s is not None:
            if loss is not None:
                self._step.loss = float(loss)
            self._meet_ranks()
            self._finish_step()
        self._step.stepped = False
        self.listening = True

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The forward passes of the open step."""
        return tuple(self._step.passes)

    def note_parameters(self) -> None:
        """Read weight norms now, for measurements without an optimizer."""
        if self._sampler.slow:
            self._optimizers.read_weights()

    def note_denominator(self, denominator: float) -> None:
        """Put the loss's denominator into the header; where it changes, take it out for good."""
        self._storage.note_denominator(denominator)

    def note_loss(self, loss: float | Tensor) -> None:
        """Put the loss beside the open step."""
        if self._step.began_s is not None:
            self._step.loss = float(loss)
            if self._step.pooled is not None:
                self._step.pooled = replace(self._step.pooled, loss=self._step.loss)

    def _end_step(self) -> None:
        """Finish the step inside of another handler, which an error here must not stop."""
        try:
            self._finish_step()
        except Exception as error:
            self.note_fault(-1, error)

    def _finish_step(self) -> None:
        try:
            step = self._build()
            if step is not None:
                step = self._findings.mark(step, self._step)
        finally:
            if self._step.began_s is not None:
                self.index += 1
            self._drop_step()
        if step is not None:
            self._storage.note_dtypes(
                self._sampler.dtypes | self._traced.dtypes, self._sampler.autocast_dtypes
            )
            self._storage.add(step)

    def _drop_step(self) -> None:
        self._sampler.end_forward()
        self._step.close()
        self._step = OpenStep()
        self._optimizers.reset()
        self._cached = None

    def _build(self) -> Step | None:
        return self._builder.build(
            self._parts, self._step, self.index, self.replicate, first=not self.steps
        )

    # -- reading -------------------------------------------------------------------------------------

    @property
    def header(self) -> dict[str, Any]:
        """The Record's header."""
        return self._storage.header

    @property
    def steps(self) -> list[Step]:
        """The finished steps that are in memory."""
        return self._storage.steps

    @property
    def record(self) -> Record:
        """What has been recorded so far; a step that is under way counts with what it has."""
        return self._storage.record(None if self.closed else self._open_step())

    def _open_step(self) -> Step | None:
        step, rate = self._step, self._optimizers.learning_rate
        if not step.with_gradient() or any(p.elsewhere for p in step.passes):
            return None  # what another thread is at is not looked at before it is done
        state = (len(step.passes), self.backwards, step.stepped, rate, step.loss, step.pooled is None)
        if self._cached is None or self._cached[0] != state:
            built = self.guarded(-1, self._build)
            if built is None:
                return None
            self._cached = (state, built)
        return self._cached[1]

    def _say_if_nothing_came(self) -> None:
        if self._mask is not None and self.forwards and not self._mask_seen and not self.faults:
            self._voice.say(*voice.no_mask(self._mask, self.forwards))
        if self._attachment.inside_a_graph:
            return  # said already
        said = voice.nothing_came(
            layers=len(self.layers),
            compiled=len(self._assembler.compiled),
            forwards=self.forwards,
            steps=len(self.steps),
            reached=self.reached or self._assembler.reached,
        )
        if said is not None:
            self._voice.say(*said)
