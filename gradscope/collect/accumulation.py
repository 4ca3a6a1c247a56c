"""Whether backward passes add up: what happened to ``.grad`` in one, and between two of them.

Several forward and backward passes are one step when their gradients are summed in ``.grad``. A
backward pass that leaves ``.grad`` alone (a saliency map by `torch.autograd.grad`) is of no step, and
gradients that were cleared before the optimizer stepped (a bad batch thrown away, another model's
loss in adversarial training) are no longer part of one.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from gradscope import statistics
from gradscope.collect.parameters import Parameters
from gradscope.collect.shards import local

__all__ = ["Accumulation"]

_NO_VERSION: Final = -1
# The gradient tensor's identity and the number of writes to it.
Mark = tuple[int, int]


class Accumulation:
    """Compares the state of all ``.grad`` at the beginnings and ends of backward passes."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._begin: list[Mark | None] = []
        self._end: list[Mark | None] = []

    def begin(self) -> None:
        """A backward pass begins."""
        self._begin = self._marks()

    def end(self) -> bool:
        """A backward pass has ended; whether it wrote to any ``.grad``."""
        self._end = self._marks()
        return self._end != self._begin

    def cleared(self) -> bool:
        """Whether all gradients that the last backward pass left are gone: None, or exactly zero."""
        gone = False
        for entry, left in zip(self._parameters.entries, self._end, strict=False):
            if left is None:
                continue
            parameter = entry.tensor()
            gradient = None if parameter is None else parameter.grad
            # Only a gradient that was written to since is looked at.
            if gradient is not None and (
                _mark(gradient) == left or statistics.norms([local(gradient)])[0] != 0
            ):
                return False
            gone = True
        return gone

    def _marks(self) -> list[Mark | None]:
        gradients = [None if p is None else p.grad for p in self._parameters.tensors()]
        return [None if gradient is None else _mark(gradient) for gradient in gradients]


def _mark(gradient: Tensor) -> Mark:
    try:
        version = gradient._version
    except RuntimeError:  # tensors made under inference_mode count no writes
        return id(gradient), _NO_VERSION
    # FSDP2 adds to the shard behind a DTensor, which counts for itself.
    shard = local(gradient)
    return id(gradient), version + (0 if shard is gradient else shard._version)
