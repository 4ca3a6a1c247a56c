"""Sees a gradient scaler's factor and its skipped steps, without being told of the scaler.

While at least one recorder listens, `torch.amp.GradScaler.scale` and `.update` are replaced by
functions that call the originals and then tell the recorders. The originals come back with the
last recorder's end.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

__all__ = ["listen", "silence"]

_listeners: weakref.WeakSet[Recorder] = weakref.WeakSet()
_originals: dict[str, Any] = {}


def listen(recorder: Recorder) -> None:
    """Tell this recorder of every loss that is scaled and every scaler that is updated."""
    _listeners.add(recorder)
    if _originals:
        return
    scaler_class = torch.amp.GradScaler
    scale, update = scaler_class.__dict__["scale"], scaler_class.__dict__["update"]
    _originals.update(scale=scale, update=update)

    @functools.wraps(scale)
    def seen_scale(self: Any, outputs: Any) -> Any:
        result = scale(self, outputs)
        if self.is_enabled():
            for listener in list(_listeners):
                listener.guarded(-1, listener.on_scaled, self)
        return result

    @functools.wraps(update)
    def seen_update(self: Any, new_scale: Any = None) -> None:
        update(self, new_scale)
        if self.is_enabled():
            for listener in list(_listeners):
                listener.guarded(-1, listener.on_scaler_update, self)

    scaler_class.scale = seen_scale
    scaler_class.update = seen_update


def silence(recorder: Recorder) -> None:
    """Stop telling this recorder; restore the class when nobody listens any more."""
    _listeners.discard(recorder)
    if not len(_listeners) and _originals:
        torch.amp.GradScaler.scale = _originals.pop("scale")
        torch.amp.GradScaler.update = _originals.pop("update")
