"""What is kept of a gradient that comes in parts by path length: sums per stream position.

The parts c_0, c_1, ... come one after the other (`gradscope.experiment.graded_backward`), and of each
only its norm and its inner product with the whole gradient g stay, added up over the parts of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["SavedBytes", "StreamSums"]


class SavedBytes:
    """A context manager that adds up what autograd keeps for the backward pass inside of it.

    Every storage is counted once, the model's own parameters and buffers never. What checkpointing
    computes again is not kept, and not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen = {
            tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
        }
        self._hooks = saved_tensors_hooks(self._pack, _same)

    def __enter__(self) -> Self:
        """Start counting."""
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.total += storage.nbytes()
        return tensor


def _same(tensor: Any) -> Any:
    return tensor


class StreamSums:
    """‖c_k‖² and ⟨c_k, g⟩ at every stream position, summed over the parts of a batch.

    Everything is summed in float64 and in units of the largest entry of g at that position: the square
    of a vanished gradient would underflow.

    Args:
        gradients: g at the stream positions of the whole batch, by number; h_0 is number 0.
        last: the number of the trunk's last position.
        lengths: K + 1, how many of the c_k there are.
    """

    def __init__(self, gradients: Mapping[int, Tensor], *, last: int, lengths: int) -> None:
        self._units = {
            position: float(g.abs().amax()) if g.numel() else 0.0 for position, g in gradients.items()
        }
        self._first = gradients[0]
        self._energy = np.zeros((last + 1, lengths))
        self._product = np.zeros((last + 1, lengths))
        self._square = np.zeros(last + 1)
        self._off = np.zeros(last + 1)
        self._mine: dict[int, Tensor] = {}
        self._sum: dict[int, Tensor] = {}

    def begin(self, gradients: Mapping[int, Tensor]) -> None:
        """The parts that come next are those of these gradients, of some of the samples."""
        self._mine, self._sum = dict(gradients), {}
        for position, g in gradients.items():
            unit = self._unit(position)
            if unit:
                self._square[position] += float(torch.sum((_exact(g) / unit) ** 2))

    def add(self, length: int, position: int, part: Tensor) -> None:
        """Take in c_k at one position."""
        unit = self._unit(position)
        if not unit or position not in self._mine:
            return
        c, g = _exact(part) / unit, _exact(self._mine[position]) / unit
        self._energy[position, length] += float(torch.sum(c * c))
        self._product[position, length] += float(torch.sum(c * g))
        summed = self._sum.get(position)
        self._sum[position] = part.detach().clone() if summed is None else summed.add_(part.detach())

    def end(self) -> None:
        """The parts of these gradients are complete."""
        for position, g in self._mine.items():
            unit, summed = self._unit(position), self._sum.get(position)
            if unit:
                rest = g if summed is None else g - summed
                self._off[position] += float(torch.sum((_exact(rest) / unit) ** 2))

    def sum_difference(self) -> tuple[float, int]:
        """‖Σ_k c_k − g‖/‖g‖ of the worst position, and which that is."""
        read = self._square > 0
        off = np.zeros_like(self._square)
        off[read] = np.sqrt(self._off[read] / self._square[read])
        worst = int(np.argmax(off))
        return float(off[worst]), worst

    def spectrum(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """‖c_k‖ and w_k = ⟨c_k, g⟩/‖g‖², [P, K + 1] each; NaN where no gradient was seen."""
        norm, weight = np.full((2, *self._energy.shape), math.nan)
        for position in np.flatnonzero(self._square > 0).tolist():
            norm[position] = np.sqrt(self._energy[position]) * self._units[position]
            weight[position] = self._product[position] / self._square[position]
        return norm, weight

    def _unit(self, position: int) -> float:
        unit = self._units.get(position, 0.0)
        return unit if unit < math.inf else 0.0


def _exact(x: Tensor) -> Tensor:
    return x.detach().double()
