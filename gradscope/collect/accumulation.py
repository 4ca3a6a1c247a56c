"""Whether backward passes add up: what happened to ``.grad`` in one, and between two of them.

Several forward and backward passes are one step when their gradients are summed in ``.grad``. A
backward pass that leaves ``.grad`` alone (a saliency map by `torch.autograd.grad`) is of no step, and
gradients that were cleared before the optimizer stepped (a bad batch thrown away, another model's
loss in adversarial training) are no longer part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor
from torch.nn.parameter import is_lazy

from gradscope import statistics
from gradscope.collect.parameters import Held, Parameters
from gradscope.collect.shards import local

__all__ = ["Accumulation"]

_NO_VERSION: Final = -1
# For each parameter the gradient's identity, and the number of writes to it. Two lists of numbers: a
# thousand tuples in every step would have the garbage collector run.
Marks = tuple[list[int | None], list[int | None]]


class Accumulation:
    """Compares the state of all ``.grad`` at the beginnings and ends of backward passes."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._begin: Marks = [], []
        self._end: Marks = [], []
        # One gradient that is not exactly zero, a small one, whose norm costs nothing.
        self._witness: int | None = None
        sizes = [0 if p is None or is_lazy(p) else p.numel() for p in parameters.tensors()]
        self._by_size = sorted(range(len(sizes)), key=sizes.__getitem__)

    def begin(self) -> None:
        """A backward pass begins."""
        self._begin = _marks(self._parameters.held().gradients)

    def end(self, held: Held) -> bool:
        """A backward pass has ended and left this; whether it wrote to any ``.grad``."""
        self._end = _marks(held.gradients)
        self._witness = next((i for i in self._by_size if self._is_left(i)), None)
        return self._end != self._begin

    def cleared(self) -> bool:
        """Whether all gradients that the last backward pass left are gone: None, or exactly zero."""
        left = [i for i, mark in enumerate(self._end[0]) if mark is not None]
        if self._witness is not None:
            # Not by the number of writes: what is written to ``.grad.data`` is not counted.
            return not self._is_left(self._witness) and not any(map(self._is_left, left))
        # All were exactly zero. Only of a gradient that was written to since it is known that it is new.
        (was, written), (now, rewritten) = self._end, _marks(self._parameters.held().gradients)
        return bool(left) and not any(was[i] == now[i] and written[i] == rewritten[i] for i in left)

    def _is_left(self, number: int) -> bool:
        """Whether a parameter has a gradient that is not exactly zero."""
        parameter = self._parameters.entries[number].tensor()
        gradient = None if parameter is None else parameter.grad
        return gradient is not None and bool(statistics.norms([local(gradient)])[0] != 0)


def _marks(gradients: Sequence[Tensor | None]) -> Marks:
    numbers = [None if g is None else id(g) for g in gradients]
    try:
        writes = [
            None if g is None else g._version if type(g) is Tensor else _writes(g) for g in gradients
        ]
    except RuntimeError:
        writes = [None if g is None else _writes(g) for g in gradients]
    return numbers, writes


def _writes(gradient: Tensor) -> int:
    try:
        version = gradient._version
    except RuntimeError:  # tensors made under inference_mode count no writes
        return _NO_VERSION
    # FSDP2 adds to the shard behind a DTensor, which counts for itself.
    shard = local(gradient)
    return version + (0 if shard is gradient else shard._version)
