"""Hook objects, and how one is put on a tensor.

A hook object holds a weak reference to its recorder and no tensor. It pickles and deep-copies to an
inert callable of the standard library, so that a watched model can be saved, copied for an EMA, and
loaded where gradscope is not installed; the copies are unwatched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame as _dynamo

from gradscope.collect.engine import batched

if TYPE_CHECKING:
    from gradscope.collect.passes import Pass, Slot
    from gradscope.collect.recorder import Recorder
    from gradscope.collect.traced import TracedSite

__all__ = [
    "BackwardEndProbe",
    "BackwardProbe",
    "BlockInputProbe",
    "ForwardProbe",
    "GradientProbe",
    "RootEndProbe",
    "RootStartProbe",
    "ScaleEndProbe",
    "ScaleProbe",
    "note_root_in_a_graph",
    "put_on",
    "roots_in_graphs",
]

_NO_BACKWARD: Final = -1


def _inert() -> tuple[Any, tuple[Any, str]]:
    # nullcontext.__exit__ takes any positional arguments, does nothing and returns None, which is
    # what a hook must return to change nothing.
    return getattr, (contextlib.nullcontext(), "__exit__")


class _Probe:
    __slots__ = ("__weakref__", "_recorder", "site")

    def __init__(self, recorder: Recorder, site: int = -1) -> None:
        self._recorder = weakref.ref(recorder)
        self.site = site

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, arguments = _inert()
        return function(*arguments)


class ForwardProbe(_Probe):
    """Forward hook of a watched layer."""

    __slots__ = ("traced",)

    def __init__(self, recorder: Recorder, site: int, traced: TracedSite) -> None:
        super().__init__(recorder, site)
        self.traced = traced

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hand the output to the recorder; in a graph that is being compiled, measure it there."""
        if torch.compiler.is_compiling():
            self.traced.measure(output)
            return
        recorder = self._recorder()
        if recorder is None or not recorder.listening:
            return
        try:
            if recorder.quick is not None and recorder.quick.forward(self.site, output):
                return
        except Exception as error:
            recorder.note_fault(self.site, error)
            return
        recorder.guarded(self.site, recorder.on_forward, self.site, args, kwargs, output)


class BlockInputProbe(_Probe):
    """Forward pre-hook of a block: the first one to run in a pass sees the trunk's input."""

    __slots__ = ("traced",)

    def __init__(self, recorder: Recorder, site: int, traced: TracedSite | None) -> None:
        super().__init__(recorder, site)
        self.traced = traced

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Hand the input to the recorder; what comes back replaces the arguments."""
        if torch.compiler.is_compiling():
            if self.traced is not None:
                self.traced.measure((args, kwargs))
            return None
        recorder = self._recorder()
        if recorder is None or not recorder.listening:
            return None
        try:
            if recorder.quick is not None and recorder.quick.skips(self.site):
                return None
        except Exception as error:
            recorder.note_fault(self.site, error)
            return None
        return recorder.guarded(self.site, recorder.on_block_input, self.site, args, kwargs)


class RootStartProbe(_Probe):
    """Forward pre-hook of the watched model: where a step may begin."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Tell the recorder that a forward begins."""
        if torch.compiler.is_compiling():
            note_root_in_a_graph()
            return
        recorder = self._recorder()
        if recorder is not None:
            recorder.guarded(-1, recorder.on_root_start, args, kwargs)


class RootEndProbe(_Probe):
    """Forward hook of the watched model: the forward came to its end."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Tell the recorder that a forward ended."""
        if torch.compiler.is_compiling():
            return
        recorder = self._recorder()
        if recorder is not None:
            recorder.guarded(-1, recorder.on_root_end, output)


class GradientProbe(_Probe):
    """Tensor hook on a watched output."""

    __slots__ = ("shape", "slot")
    # Else torch warns, when such an output is saved, that its hook is not.
    __torch_unserializable__ = True

    def __init__(self, recorder: Recorder, slot: Slot, shape: torch.Size) -> None:
        super().__init__(recorder, slot.site)
        self.slot = slot
        self.shape = shape

    def __call__(self, grad: Tensor | None) -> None:
        """Hand the gradient to the recorder."""
        recorder = self._recorder()
        if recorder is None or grad is None:
            return
        try:
            if recorder.quick is not None and recorder.quick.gradient(self, grad):
                return
        except Exception as error:
            recorder.note_fault(self.site, error, self.slot)
            return
        # The hook may sit on the base of a view, which has another shape.
        if grad.shape != self.shape:
            grad = grad.reshape(self.shape)
        recorder.guarded(self.site, recorder.on_gradient, self.slot, grad)


class BackwardProbe(_Probe):
    """Tensor hook on an output of the model: a backward pass through its forward begins."""

    __slots__ = ("owner",)
    __torch_unserializable__ = True

    def __init__(self, recorder: Recorder, owner: Pass) -> None:
        super().__init__(recorder)
        self.owner = owner

    def __call__(self, grad: Tensor | None) -> None:
        """Called with the gradient, which may be None."""
        recorder = self._recorder()
        if recorder is not None and not (grad is not None and batched(grad)):
            recorder.guarded(-1, recorder.on_backward_start, self.owner)


class ScaleProbe(_Probe):
    """Tensor hook on a scaled loss: what the backward pass that begins now is scaled by."""

    __slots__ = ("scale",)

    def __init__(self, recorder: Recorder, scale: Tensor) -> None:
        super().__init__(recorder)
        self.scale = scale

    def __call__(self, grad: Tensor | None) -> None:
        """Called with the gradient of the scaled loss."""
        recorder = self._recorder()
        if recorder is not None:
            recorder.guarded(-1, recorder.on_scaled_backward, self.scale)


class ScaleEndProbe(_Probe):
    """Callback of the engine: the backward pass of a scaled loss came to its end."""

    __slots__ = ("backward",)

    def __init__(self, recorder: Recorder, backward: int) -> None:
        super().__init__(recorder)
        self.backward = backward

    def __call__(self) -> None:
        """Called by the engine."""
        recorder = self._recorder()
        if recorder is not None:
            recorder.on_scaled_backward_end(self.backward)


class BackwardEndProbe(_Probe):
    """Callback of the engine: a backward pass came to its end."""

    __slots__ = ("backward",)

    def __init__(self, recorder: Recorder, backward: int) -> None:
        super().__init__(recorder)
        self.backward = backward

    def __call__(self) -> None:
        """Called by the engine."""
        recorder = self._recorder()
        if recorder is not None:
            recorder.guarded(-1, recorder.on_backward_end, self.backward)


# -- torch.compile -----------------------------------------------------------------------------------

#: How many watched models were called inside of a larger compiled function: counted while tracing.
_roots_in_graphs = 0


def note_root_in_a_graph() -> None:
    """Traced: a watched model is called inside of a larger compiled function, where no step is seen."""
    global _roots_in_graphs
    if not torch.compiler.is_exporting():
        _roots_in_graphs += 1


def roots_in_graphs() -> int:
    """How many times that was traced in this process."""
    return _roots_in_graphs


# What torch._dynamo.assume_constant_result would do, without importing all of it: the function runs
# once, while the call is traced, and is no part of the graph.
note_root_in_a_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]

# The hooks of a compiled module itself are called beside its graph, and they, with all that they call,
# would be compiled as well. Where the module's own graph calls a hook, it is traced all the same.
for _function in (
    ForwardProbe.__call__,
    BlockInputProbe.__call__,
    RootStartProbe.__call__,
    RootEndProbe.__call__,
):
    _dynamo.set_code_exec_strategy(
        _function.__code__,
        _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.SKIP),
    )


def put_on(tensor: Tensor, probe: GradientProbe) -> Any:
    """Put a hook on a tensor that requires grad; returns the handle where it is a leaf."""
    if tensor.is_leaf or type(tensor) is not Tensor or tensor._backward_hooks is not None:
        return tensor.register_hook(probe)
    # What register_hook does, less what a handle costs: a third of the hook's time where caches are cold.
    hooks: OrderedDict[Any, Any] = OrderedDict()  # subscripted, each one would keep its alias
    tensor._backward_hooks = hooks
    tensor.grad_fn._register_hook_dict(tensor)  # type: ignore[union-attr]
    hooks[probe] = probe
    return None
