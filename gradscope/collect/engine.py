"""What gradscope asks torch about the moment: which backward pass runs, and what is around a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Final

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "after_backward",
    "backward_id",
    "batched",
    "dispatch_modes",
    "function_modes",
    "in_transform",
    "unseen",
]

#: Whether modes of the user's see every operation, and every function of torch's, now.
dispatch_modes: Final = torch._C._len_torch_dispatch_stack
function_modes: Final = torch._C._is_torch_function_mode_enabled


def backward_id() -> int:
    """The number of the backward pass this code runs in, or -1 outside of any."""
    # Private, and the only source that is right under nested and re-entrant passes. Without it
    # everything reads as "outside", and recomputation would be counted twice: refuse loudly instead.
    return torch._C._current_graph_task_id()


def after_backward(function: Callable[[], None], *, last: bool = False) -> None:
    """Call a function at the end of the backward pass that runs now.

    Args:
        function: the function.
        last: after all that others queue during this backward pass (DDP's final reduction).
    """
    queue: Callable[[Callable[[], None]], None]
    queue = torch.autograd.Variable._execution_engine.queue_callback
    # They run in order of queueing: what queues itself again then comes after all of them.
    queue((lambda: queue(function)) if last else function)


def in_transform() -> bool:
    """Whether torch is tracing, compiling, or inside a functorch transform: nothing to measure."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _symbolic_trace._is_fx_tracing_flag
        or (dispatch_modes() > 0 and _fake())
    )


def batched(grad: Tensor) -> bool:
    """Whether it is the gradient of a batch of backward passes (``is_grads_batched``, or vmap)."""
    return is_legacy_batchedtensor(grad) or peek_interpreter_stack() is not None


def _fake() -> bool:
    key = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(k) is not None for k in (key.FAKE, key.PROXY, key.FUNCTIONAL))


@contextlib.contextmanager
def unseen() -> Generator[None]:
    """A context in which the user's modes do not see what gradscope computes.

    Selective checkpointing replays the operations that it saw; a profiler counts them; a default device
    is another one than the watched tensor's.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
