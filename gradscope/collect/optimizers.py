"""What optimizers do to the watched parameters, and what is read of the parameters in a step.

Torch's global optimizer hooks tell of every optimizer; one that holds no watched parameter changes
nothing here. Gradients are read at the end of the backward pass, before clipping, and on slow steps
again just before the optimizer's step; updates are the difference to a copy taken just before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradscope.collect import engine
from gradscope.collect.parameters import Held, Parameters, Readings
from gradscope.collect.shards import local
from gradscope.collect.tensors import version_of
from gradscope.statistics import Value

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

__all__ = ["Optimizers", "listen"]


def listen(recorder: Recorder) -> list[Any]:
    """Tell this recorder, held weakly, of every optimizer's step; returns the handles of the hooks."""
    me = weakref.ref(recorder)

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        recorder = me()
        if recorder is not None:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            recorder.guarded(-1, recorder.on_optimizer_start, optimizer, closure is not None)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        recorder = me()
        if recorder is not None:
            recorder.guarded(-1, recorder.on_optimizer_end, optimizer)

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


class Optimizers:
    """The optimizers, and the gradient scaler, of the open step.

    Args:
        parameters: the watched parameters.
        scaler: the gradient scaler in use, where several are; None for whichever comes.
        update: whether to measure update norms on slow steps (a copy of the parameters then).

    Attributes:
        seen: whether any optimizer ever stepped watched parameters.
        in_closure: whether an optimizer is evaluating its closure.
        readings: what was read of the parameters in this step; None before anything was.
        learning_rate: the rate of the first optimizer of this step, one per group where they differ.
    """

    def __init__(self, parameters: Parameters, *, scaler: Any, update: bool) -> None:
        self._parameters = parameters
        self._scaler = scaler
        self._update = update
        self._index_of = parameters.index()
        self._indexed = True
        self._fresh = False
        self._stepping: list[int] = []
        self._overflows: list[Tensor | bool] = []
        self._early: dict[int, dict[str, Value]] = {}
        self._before: dict[int, Tensor] = {}
        self._now: set[int] = set()
        self._ever: set[int] = set()
        self._writes: list[float] = []
        self.seen = False
        self.in_closure = False
        self.readings: Readings | None = None
        self.learning_rate: float | tuple[float, ...] | None = None

    # -- the life of a step --------------------------------------------------------------------------

    def begin_step(self, *, recording: bool) -> None:
        """A step begins: parameters may have been replaced since the last one."""
        # Where FSDP2 manages them, the shards behind them may have been found since.
        self._indexed, self._fresh = self._fresh and not self._parameters.sharded, False
        if recording and not self._indexed:
            self._look_again()

    def retied(self) -> bool:
        """Before a recorded step: whether parameters share tensors that did not, or no longer do."""
        self._look_again()
        self._fresh = True
        return self._parameters.retied(self._index_of)

    def _look_again(self) -> None:
        self._index_of = self._parameters.index()
        self._indexed = True

    def begin_pass(self) -> None:
        """A forward begins: an optimizer that has not ended its step was cut off by an exception."""
        if not self.in_closure:
            self._stepping.clear()

    def reset(self) -> None:
        """The step is over: let go of all that was read in it."""
        self._overflows = []
        self._early = {}
        self._before = {}
        self._ever |= self._now
        self._now = set()
        self.readings = None
        self.learning_rate = None

    def discard_readings(self) -> None:
        """The gradients that were read are thrown away."""
        self.readings = None

    @property
    def complete(self) -> bool:
        """Whether all parameters that an optimizer has ever stepped are stepped in this step, too.

        In the first step: all that require grad.
        """
        tensors = ((i, entry.tensor()) for i, entry in enumerate(self._parameters.entries))
        expected = self._ever or {i for i, t in tensors if t is not None and t.requires_grad}
        return self._now >= expected

    @property
    def skipped(self) -> bool:
        """Whether every optimizer's step was skipped, because gradients overflowed."""
        return bool(self._overflows) and all(bool(found) for found in self._overflows)

    # -- optimizers ----------------------------------------------------------------------------------

    def _each_held(self, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        entries = self._parameters.entries
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                i = self._index_of.get(id(parameter))
                if i is not None and entries[i].tensor() is parameter:
                    yield i

    def _held(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """The numbers of the watched parameters that an optimizer holds."""
        return sorted(self._each_held(optimizer))

    def start(
        self, optimizer: torch.optim.Optimizer, *, closure: bool, recording: bool, slow: bool
    ) -> None:
        """An optimizer is about to step.

        Args:
            optimizer: the optimizer.
            closure: whether it was given a closure to evaluate.
            recording: whether the open step has anything recorded.
            slow: whether it gets the slow statistics.
        """
        if not self.holds(optimizer):
            return
        self.seen = True
        self.in_closure = closure
        self._stepping.append(id(optimizer))
        if closure:
            self._writes = self._count_writes()
            return  # what a closure computes is read at the end of its first evaluation
        if not recording:
            return
        inside = engine.backward_id() != -1
        if not (inside or slow):
            return
        held = self._held(optimizer)
        if inside:
            self._read_early(held)
        if not slow:
            return
        if self.readings is None:
            self.readings = Readings()
        norms = self._parameters.norms(held, gradient=True)
        # A fused optimizer divides by the scale itself, later.
        scale = getattr(optimizer, "grad_scale", None)
        self.readings.at_step.update({i: v if scale is None else v / scale for i, v in norms.items()})
        if not self.readings.weight:
            self.read_weights()
        if self._update:
            # Of nested optimizers (a wrapper that steps its base) the outer one's change counts.
            self._before.update(self._parameters.snapshot([i for i in held if i not in self._before]))

    @property
    def moved(self) -> bool:
        """Whether parameters were written to since an optimizer began to evaluate its closure."""
        return self._count_writes() != self._writes

    def _count_writes(self) -> list[float]:
        return [0 if t is None else version_of(local(t)) for t in self._parameters.tensors()]

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer steps any watched parameter."""
        if any(True for _ in self._each_held(optimizer)):
            return True
        if self._indexed:
            return False
        # Steps that are not recorded are free of this, unless an optimizer holds none of what was there.
        self._look_again()
        return any(True for _ in self._each_held(optimizer))

    def read_at_step(self, optimizer: torch.optim.Optimizer, why: str) -> None:
        """Read what an optimizer finds, perhaps clipped; the gradients before that are absent.

        Args:
            optimizer: the optimizer that is about to step.
            why: the status of the absent ones.
        """
        if self.readings is None:
            tensors = [entry.tensor() for entry in self._parameters.entries]
            trained = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
            self.readings = Readings(absent=dict.fromkeys(trained, why))
        self.readings.at_step.update(self._parameters.norms(self._held(optimizer), gradient=True))

    def end(self, optimizer: torch.optim.Optimizer) -> bool:
        """An optimizer has stepped; whether it held watched parameters and no other one stepped it."""
        if not self.holds(optimizer):
            return False
        if dist.is_available() and dist.is_initialized():
            self._now.update(self._held(optimizer))
        if id(optimizer) in self._stepping:
            del self._stepping[self._stepping.index(id(optimizer)) :]
        if self._stepping:
            return False
        self.in_closure = False
        before, self._before = self._before, {}
        if before and self.readings is not None:
            self.readings.update.update(self._parameters.changes(before))
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself
        self._overflows.append(found.detach().clone() if isinstance(found, Tensor) else False)
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)
        if rates and self.learning_rate is None:
            self.learning_rate = rates[0] if len(set(rates)) == 1 else rates
        return True

    # -- the gradient scaler -------------------------------------------------------------------------

    def scale_of(self, scaler: Any) -> Tensor | None:
        """The factor of a gradient scaler now; None where it is another model's, or has none yet."""
        if (self._scaler is not None and scaler is not self._scaler) or scaler._scale is None:
            return None
        return scaler._scale.detach().clone().reshape(())

    def overflowed(self, scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
        """A gradient scaler has let an optimizer step, or not; whether not: the gradients overflowed."""
        if (self._scaler is not None and scaler is not self._scaler) or not self._held(optimizer):
            return False
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return False  # stepped, and was told to change nothing
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if not any(v.item() for v in found.values()):
            return False
        self.seen = True
        self._now.update(self._held(optimizer))
        self._overflows.append(True)
        return True

    # -- readings ------------------------------------------------------------------------------------

    @property
    def stepped_early(self) -> bool:
        """Whether an optimizer has stepped inside the backward pass."""
        return bool(self._early)

    def _read_early(self, held: list[int]) -> None:
        """An optimizer steps inside the backward pass, and may clear ``.grad``: read it now."""
        readings = self._parameters.part(held).read_gradients(None)
        for n, i in enumerate(held):
            if n not in readings.absent:
                self._early[i] = {column: values[n] for column, values in readings.gradient.items()}

    def read_gradients(self, scale: Tensor | float | None, held: Held) -> None:
        """Read all ``.grad`` at the end of a backward pass of a loss that was scaled so."""
        previous = self.readings
        readings = self.readings = self._parameters.read_gradients(scale, held)
        if previous is not None:
            readings.at_step, readings.weight = previous.at_step, previous.weight
            readings.update = previous.update
        for i, columns in self._early.items():
            readings.absent.pop(i, None)
            for column, value in columns.items():
                readings.gradient[column][i] = value
        self._early = {}

    def read_weights(self) -> None:
        """Read the norms of all weights, where anything of this step was read."""
        if self.readings is not None:
            everything = list(range(len(self._parameters.entries)))
            self.readings.weight.update(self._parameters.norms(everything))
