"""Times a watcher's hooks from torch's side: whatever it registers is wrapped in a timer.

So little need be known of the watcher. What a hook costs beside its own code, torch's calling it, is
measured on hooks that do nothing, and multiplied by the number of calls.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.optim import optimizer as optim

from gradscope.collect.probes import GradientProbe

_MODULE_HOOKS = {
    "_forward_pre_hooks": "forward",
    "_forward_hooks": "forward",
    "_backward_pre_hooks": "module backward",
    "_backward_hooks": "module backward",
}
_OPTIMIZER_HOOKS = (optim._global_optimizer_pre_hooks, optim._global_optimizer_post_hooks)


class _Engine:
    """Autograd's engine, whose callbacks are timed."""

    def __init__(self, engine: Any, meter: Meter) -> None:
        self._engine = engine
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def queue_callback(self, function: Callable[[], None]) -> None:
        self._engine.queue_callback(self._meter.timed("engine", function))


class Meter:
    """The time inside of one watcher's hooks, and their number by kind, since `reset`.

    Args:
        timing: False where the hooks are compiled: then they are left as they are, and only the global
            ones are kept away from the turns of other models.
    """

    def __init__(self, *, timing: bool = True) -> None:
        self.timing = timing
        self.spent_s = 0.0
        self.calls: Counter[str] = Counter()
        self._inside = False
        self._global: tuple[dict[int, Any], ...] = ({}, {})

    def reset(self) -> None:
        self.spent_s = 0.0
        self.calls = Counter()

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed; what it calls of the watcher's own belongs to it."""
        if not self.timing:
            return function

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self.calls[kind] += 1
            self._inside = True
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent_s += time.thread_time() - start
                self._inside = False

        return run

    @property
    def inside(self) -> bool:
        """Whether a timed function runs now."""
        return self._inside

    @contextlib.contextmanager
    def attaching(self, model: nn.Module) -> Iterator[None]:
        """In this context the watcher puts its hooks on the model and on torch's optimizers."""
        before = [(hooks, set(hooks)) for hooks in _OPTIMIZER_HOOKS]
        known = {
            (id(module), name): set(getattr(module, name))
            for module in model.modules()
            for name in _MODULE_HOOKS
        }
        with self._tensor_hooks():
            yield
        for module in model.modules():
            for name, kind in _MODULE_HOOKS.items():
                hooks = getattr(module, name)
                for key in set(hooks) - known.get((id(module), name), set()):
                    hooks[key] = self.timed(kind, hooks[key])
        # Global hooks would slow the other models down, too: they are there in this watcher's turn only.
        self._global = tuple(
            {key: self.timed("optimizer", hooks.pop(key)) for key in list(hooks) if key not in keys}
            for hooks, keys in before
        )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """In this context the watched model takes a step."""
        for hooks, mine in zip(_OPTIMIZER_HOOKS, self._global, strict=True):
            hooks.update(mine)
        engine = Variable._execution_engine
        if self.timing:
            Variable._execution_engine = _Engine(engine, self)  # type: ignore[assignment]
        try:
            with self._tensor_hooks():
                yield
        finally:
            Variable._execution_engine = engine
            for hooks, mine in zip(_OPTIMIZER_HOOKS, self._global, strict=True):
                for key in mine:
                    hooks.pop(key, None)

    @contextlib.contextmanager
    def _tensor_hooks(self) -> Iterator[None]:
        register = Tensor.register_hook
        if not self.timing:
            yield
            return

        def registered(tensor: Tensor, hook: Callable[..., Any]) -> Any:
            return register(tensor, self.timed("tensor", hook))

        Tensor.register_hook = registered  # type: ignore[method-assign]
        # gradscope puts its own hooks on tensors without register_hook.
        called = GradientProbe.__call__
        GradientProbe.__call__ = self.timed("tensor", called)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Tensor.register_hook = register  # type: ignore[method-assign]
            GradientProbe.__call__ = called  # type: ignore[method-assign]


# -- hooks that do nothing -----------------------------------------------------------------------------


def idle_costs(repeats: int = 15) -> dict[str, float]:
    """Seconds that torch takes to call a hook that does nothing, by kind, and those of the timer.

    ``timer`` is what an empty timed function is said to take: it is taken off the self time.
    """
    return {
        "forward": _typical(_forward_hook, repeats),
        "tensor": _typical(_tensor_hook, repeats),
        "timer": _typical(_timer, repeats),
    }


def _typical(measure: Callable[[], float], repeats: int) -> float:
    """The median of repeated measurements."""
    found = sorted(measure() for _ in range(repeats))
    return max(found[len(found) // 2], 0.0)


def _nothing(*args: Any) -> None:
    return None


def _forward_hook(calls: int = 2000) -> float:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.zeros(1)
    bare, hooked = Same(), Same()
    hooked.register_forward_hook(_nothing, with_kwargs=True)
    times: list[float] = []
    for module in (bare, hooked):
        start = time.thread_time()
        for _ in range(calls):
            module(x)
        times.append(time.thread_time() - start)
    return (times[1] - times[0]) / calls


def _tensor_hook(nodes: int = 500) -> float:
    times: list[float] = []
    for hooked in (False, True):
        y = torch.ones(1, requires_grad=True)
        for _ in range(nodes):
            y = y * 1.0
            if hooked:
                y.register_hook(_nothing)
        start = time.thread_time()
        y.backward()
        times.append(time.thread_time() - start)
    return (times[1] - times[0]) / nodes


def _timer(calls: int = 2000) -> float:
    meter = Meter()
    run = meter.timed("", _nothing)
    for _ in range(calls):
        run()
    return meter.spent_s / calls
