"""Sees a gradient scaler's factor and its skipped steps, without being told of the scaler.

While at least one recorder listens, `torch.amp.GradScaler.scale` and `.step` are replaced by
functions that call the originals and then tell the recorders. The originals come back with the
last recorder's end.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

__all__ = ["ScaledBackwards", "listen", "restore", "silence"]

_listeners: weakref.WeakSet[Recorder] = weakref.WeakSet()
_originals: dict[str, Any] = {}


def listen(recorder: Recorder) -> None:
    """Tell this recorder of every loss that is scaled and every step that overflows."""
    _listeners.add(recorder)
    if _originals:
        return
    scaler_class = torch.amp.GradScaler
    scale, step = scaler_class.__dict__["scale"], scaler_class.__dict__["step"]
    _originals.update(scale=scale, step=step)

    @functools.wraps(scale)
    def seen_scale(self: Any, outputs: Any) -> Any:
        result = scale(self, outputs)
        if self.is_enabled():
            for listener in list(_listeners):
                listener.guarded(-1, listener.on_scaled, self, result)
        return result

    @functools.wraps(step)
    def seen_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, optimizer, *args, **kwargs)
        if self.is_enabled():
            for listener in list(_listeners):
                listener.guarded(-1, listener.on_scaler_step, self, optimizer)
        return result

    scaler_class.scale = seen_scale
    scaler_class.step = seen_step


def silence(recorder: Recorder) -> None:
    """Stop telling this recorder; restore the class when nobody listens any more."""
    _listeners.discard(recorder)
    restore()


def restore() -> None:
    """Give the class its own methods back where nobody listens."""
    if not len(_listeners) and _originals:
        torch.amp.GradScaler.scale = _originals.pop("scale")
        torch.amp.GradScaler.step = _originals.pop("step")


class ScaledBackwards:
    """The backward passes of scaled losses that run now, of this model or of another, by their number."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[Tensor, int]] = {}

    def begin(self, backward: int, scale: Tensor) -> None:
        """One begins, in this thread."""
        self._running[backward] = scale, threading.get_ident()

    def end(self, backward: int) -> None:
        """One came to its end."""
        self._running.pop(backward, None)

    def forget_the_cut_off(self) -> None:
        """No backward pass runs in this thread; what is noted of one was cut off by an exception."""
        if self._running:
            others = {t.ident for t in threading.enumerate()} - {threading.get_ident()}
            self._running = {b: found for b, found in self._running.items() if found[1] in others}

    def scale_of(self, backward: int) -> Tensor | None:
        """The factor of the loss that a backward pass differentiates; None where it is not scaled."""
        if backward in self._running:
            return self._running[backward][0]
        # A backward pass inside of another one (re-entrant checkpointing) runs in the same thread.
        me = threading.get_ident()
        return next((scale for scale, thread in self._running.values() if thread == me), None)
