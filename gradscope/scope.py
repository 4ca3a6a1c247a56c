"""The public watch: a recorder with a face."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gradscope.collect.arguments import Mask
from gradscope.collect.recorder import Recorder
from gradscope.collect.schedule import Schedule
from gradscope.collect.setting import is_scripted
from gradscope.errors import GradscopeWarning, LayerError
from gradscope.layers import Selection
from gradscope.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradscope.analysis.diagnosis import Diagnosis

__all__ = ["Scope", "watch"]

# The scope lives as long as its model: `gradscope.watch(model)` alone, result unused, records too.
_open: weakref.WeakKeyDictionary[nn.Module, Scope] = weakref.WeakKeyDictionary()


def watch(
    model: nn.Module,
    layers: Selection | None = None,
    *,
    statistics: Iterable[str] | None = None,
    every: int = 1,
    slow_every: int = 10,
    mask: Mask | None = None,
    path: str | os.PathLike[str] | None = None,
    max_bytes: int = 256_000_000,
    warn: bool = True,
    update: bool = True,
    scaler: Any = None,
) -> Scope:
    """Watch a model train: record gradients, activations and parameters over depth, step by step.

    Nothing in the training loop changes, and nothing in the model: losses and parameters are
    bit-identical with and without the watch. A step ends at the first forward in grad mode after
    an optimizer of ``torch.optim`` has stepped (several backward passes before it are gradient
    accumulation and are pooled into one batch), or where ``scope.step()`` says so. Forwards under
    ``no_grad`` are not recorded. Parameter gradients are read at the end of the backward pass,
    before clipping. A model may change in between: before each recorded step, layers that were replaced
    or added are found by name.

    ::

        with gradscope.watch(model) as scope:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        print(scope.diagnose())
        scope.plot()

    Args:
        model: any module. Watching a model that is being watched returns the same scope; of nested
            with-blocks on it the outermost ends the watch.
        layers: what to watch: None for every block and its attention and feed-forward branches,
            a glob over module names (``"**"``: every module; ``"model.layers.*"``: these are the
            blocks), a module class, a predicate (name, module) -> bool, or several of these.
        statistics: names from ``gradscope.record.STATISTICS``; None for all.
        every: record each n-th step.
        slow_every: of the recorded steps, each n-th also gets the statistics that cost more
            (token variance, kurtosis, token cosine, weight and update norms).
        mask: padding to leave out, [batch, tokens] with true where a token counts: the name of the
            forward argument that holds it (``"attention_mask"``), a tensor, or a function of the
            forward's (args, kwargs).
        path: a file that every finished step is appended to; a file that exists is continued.
        max_bytes: memory for the steps; above it older ones are thinned by two, keeping the first,
            the last and those with a finding. With ``path`` the file keeps all.
        warn: warn as soon as a step has ended in which a value turned non-finite, or with which a layer
            has had a gradient of exactly zero for 20 recorded steps.
        update: measure update norms, which takes a copy of the parameters during the optimizer's
            step on each step with slow statistics.
        scaler: the ``torch.amp.GradScaler`` in use, where several are; one alone is found by itself.

    Returns:
        A `Scope`: a context manager with ``record``, ``diagnose()``, ``plot()``, ``table()``, ``step()``,
        ``close()``.

    Raises:
        LayerError: no depth axis in the model, a pattern that matches nothing, or a model of TorchScript.
        RecordError: ``path`` holds something that is not a readable Record.
    """
    if not isinstance(model, nn.Module):
        kind = "the class" if isinstance(model, type) else "an object of type"
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"watch() takes an nn.Module instance; got {kind} {name}.")
    if is_scripted(model):
        raise LayerError(
            f"{type(model).__name__} is a module of TorchScript, whose forward calls no hooks. Watch the "
            "model that it was made of, or one that has it as a part."
        )
    options: dict[str, Any] = {
        "layers": layers,
        "statistics": statistics,
        "schedule": Schedule(every=every, slow_every=slow_every),
        "mask": mask,
        "path": path,
        "max_bytes": max_bytes,
        "warn": warn,
        "update": update,
        "scaler": scaler,
    }
    scope = _open.get(model)
    if scope is not None:
        other = [name for name, value in options.items() if not _same(value, scope._options[name])]
        if other:
            warnings.warn(
                f"This {type(model).__name__} is being watched already, with other options "
                f"({', '.join(other)}), which stay. For new ones, end the first watch: scope.close().",
                GradscopeWarning,
                stacklevel=2,
            )
        return scope
    recorder = Recorder(model, **options)
    scope = Scope(recorder)
    scope._options = options
    # Where nobody closes it, the model's end or the program's does: the last step reaches the file.
    scope._end = weakref.finalize(model, recorder.close)
    _open[model] = scope
    return scope


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, str | int | Schedule | os.PathLike) and a == b)


class Scope:
    """A model that is being watched, or was; made by `watch`.

    Attributes:
        record: everything recorded so far, an immutable `Record`; after ``close()`` the whole.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._options: dict[str, Any] = {}
        self._end: weakref.finalize[..., Any] | None = None
        self._entered = 0

    @property
    def record(self) -> Record:
        """What has been recorded so far, the step under way included with what it has."""
        return self._recorder.record

    @property
    def faults(self) -> dict[str, int]:
        """Errors inside gradscope that were caught, with their counts; {} is the healthy state."""
        return dict(self._recorder.faults)

    @property
    def closed(self) -> bool:
        """Whether the watch has ended."""
        return self._recorder.closed

    def step(self, *, loss: float | Tensor | None = None, loss_denominator: float | None = None) -> None:
        """Say that a step ends here; from now on optimizers no longer end steps.

        For loops without an optimizer of ``torch.optim``, and to say what the watch cannot know.

        Args:
            loss: put beside the step.
            loss_denominator: the N of the flow, for the whole Record: 1 for a summed loss, the number
                of loss terms for a mean. Only with it can absolute levels be compared across batches
                and runs. One that changes from step to step leaves it unknown.

        Raises:
            ValueError: a loss denominator that is not a positive number.
        """
        if loss_denominator is not None:
            if not 0 < loss_denominator < math.inf:
                raise ValueError(f"loss_denominator= takes a positive number; got {loss_denominator!r}")
            self._recorder.guarded(-1, self._recorder.note_denominator, float(loss_denominator))
        self._recorder.guarded(-1, self._recorder.end_step, loss)

    def log(self, *, loss: float | Tensor) -> None:
        """Put the loss beside the open step, where the model's output does not hold it."""
        self._recorder.guarded(-1, self._recorder.note_loss, loss)

    def diagnose(self, **options: Any) -> Diagnosis:
        """What is wrong so far, where, why and what to do: `gradscope.diagnose` of the record."""
        from gradscope.analysis.diagnosis import diagnose

        return diagnose(self.record, **options)

    def plot(self, quantity: str = "grad_l2", **options: Any) -> Axes:
        """Depth against a quantity: `gradscope.plot.depth` of the record."""
        from gradscope.show import plots

        return plots.depth(self.record, quantity, **options)

    def table(self, step: int | None = None) -> Any:
        """A table with one line per layer, for the terminal (a ``rich.table.Table``)."""
        from gradscope.show import terminal

        return terminal.layer_table(self.record, step)

    def close(self) -> None:
        """Finish the open step and leave nothing behind on the model; a second call does nothing."""
        model = self._recorder._model()
        if model is not None and _open.get(model) is self:
            del _open[model]
        if self._end is not None:
            self._end.detach()
        self._recorder.close()

    def __enter__(self) -> Scope:
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The same watch may be entered again by code further in; the outermost block ends it.
        self._entered -= 1
        if self._entered == 0:
            self.close()

    def __repr__(self) -> str:
        recorder = self._recorder
        blocks = [x for x in recorder.layers if x.is_block]
        trunks = recorder.header["trunks"]
        axis = ", ".join(f"{name} ({count} blocks)" for name, count in trunks.items()) or "no depth axis"
        branches = sum(x.branch is not None for x in recorder.layers)
        others = len(recorder.layers) - len(blocks) - branches
        parts = [axis]
        parts += [f"{branches} branches"] if branches else []
        parts += [f"{others} other layers"] if others else []
        state = "closed" if recorder.closed else "watching"
        steps = len(recorder.steps)
        return (
            f"<Scope {state} {recorder.header['model']}: {', '.join(parts)}; "
            f"{steps} step{'s' * (steps != 1)} recorded>"
        )
