"""Puts a recorder's hooks on a model and on torch's optimizers and scalers, and takes them off."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from gradscope.collect import hook_guards, optimizers, probes, scaling
from gradscope.collect.setting import is_scripted
from gradscope.layers import named_layers

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder
    from gradscope.collect.traced import Traced

__all__ = ["Attachment"]


class Attachment:
    """The hooks of one recorder.

    Args:
        recorder: what they tell; held weakly.
        model: the watched model.
        modules: the modules of the recorder's layers.
        traced: what the hooks measure inside of compiled graphs.

    Attributes:
        dropped: whether compiled code without guards on these hooks was dropped.
    """

    def __init__(
        self, recorder: Recorder, model: nn.Module, modules: Sequence[nn.Module], traced: Traced
    ) -> None:
        self._handles: list[Any] = []
        keep = self._handles.append
        self._before = probes.roots_in_graphs()
        keep(model.register_forward_pre_hook(probes.RootStartProbe(recorder), with_kwargs=True))
        modules_by_name = named_layers(model)
        for site, (layer, module) in enumerate(zip(recorder.layers, modules, strict=True)):
            if is_scripted(module):
                continue
            if layer.is_block:
                probe = probes.BlockInputProbe(recorder, site, traced.input_of(site))
                entry = modules_by_name[layer.parts[0]] if layer.parts else module
                keep(entry.register_forward_pre_hook(probe, with_kwargs=True))
            seen = probes.ForwardProbe(recorder, site, traced.sites[site])
            keep(module.register_forward_hook(seen, with_kwargs=True))
        keep(model.register_forward_hook(probes.RootEndProbe(recorder), always_call=True))
        everywhere = optimizers.listen(recorder)
        self._handles.extend(everywhere)
        scaling.listen(recorder)
        self.dropped = hook_guards.listen(recorder, model)
        # Global hooks: a recorder that dies with its model, unclosed, must not leave them behind.
        self._last_wills = (
            weakref.finalize(recorder, _remove, everywhere),
            weakref.finalize(recorder, scaling.restore),
            weakref.finalize(recorder, hook_guards.restore),
        )
        self._recorder = weakref.ref(recorder)

    @property
    def inside_a_graph(self) -> bool:
        """Whether since then a model was called inside of a larger compiled function, this or another."""
        return probes.roots_in_graphs() > self._before

    def remove(self) -> None:
        """Take every hook off."""
        _remove(self._handles)
        self._handles.clear()
        for will in self._last_wills:
            will.detach()
        recorder = self._recorder()
        if recorder is not None:
            scaling.silence(recorder)
            hook_guards.silence(recorder)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
