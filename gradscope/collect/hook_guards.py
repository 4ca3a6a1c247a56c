"""Makes torch.compile look at the hooks of modules while a model is watched.

Compiled code belongs to a function, and so to all modules of one class, and by default it has no guard on
their hooks. A watched model would run what was compiled for an unwatched one of its class, and measure
nothing; an unwatched one would run what was compiled for the watched one, and write its numbers. While at
least one recorder listens, torch's option for that (``skip_nnmodule_hook_guards``) is off.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame

if TYPE_CHECKING:
    from gradscope.collect.recorder import Recorder

__all__ = ["apply", "listen", "restore", "silence"]

_listeners: weakref.WeakSet[Recorder] = weakref.WeakSet()
_before: list[bool] = []


def listen(recorder: Recorder, model: nn.Module) -> bool:
    """From now on compiled code is guarded; whether some that this model would have run was dropped."""
    _listeners.add(recorder)
    return apply(model, again=True)


def apply(model: nn.Module, *, again: bool = False) -> bool:
    """The same, as soon as torch's compiler is loaded, which takes a second and is not done for this.

    What is compiled between its loading and the first forward of the watched model is not guarded.

    Args:
        model: the watched model.
        again: look for its compiled code although the option is off already.

    Returns:
        whether compiled code was dropped.
    """
    if "torch._dynamo" not in sys.modules or (_before and not again):
        return False
    config: Any = torch._dynamo.config
    if not _before:
        _before.append(config.skip_nnmodule_hook_guards)
        config.skip_nnmodule_hook_guards = False
    if not any(eval_frame._debug_get_cache_entry_list(code) for code in _code_of(model)):
        return False
    torch._dynamo.reset()
    return True


def silence(recorder: Recorder) -> None:
    """Stop for this recorder; torch's option comes back when nobody listens any more."""
    _listeners.discard(recorder)
    restore()


def restore() -> None:
    """Give torch its option back where nobody listens."""
    if not len(_listeners) and _before:
        config: Any = torch._dynamo.config
        config.skip_nnmodule_hook_guards = _before.pop()


def _code_of(model: nn.Module) -> Iterator[CodeType]:
    for kind in {type(module) for module in model.modules()}:
        code = getattr(getattr(kind, "forward", None), "__code__", None)
        if code is not None:
            yield code
