"""What a graded backward pass leaves of its gradients: sums per stream position and path length.

The copies of a batch carry c_0, ..., c_K and, last, a guard that starts from 0 and must arrive as 0
(`gradscope.experiment.paths`). At every stream position their products are taken as soon as the gradient
is there, so that no gradient of the copies is kept, and added up over the parts of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradscope.errors import MeasureError

__all__ = ["SavedBytes", "StreamSums"]

#: Largest relative difference of gradients that counts as rounding, by the dtype of the stream. Models in
#: float64 often take their loss and norms in float32 all the same, as those of Hugging Face do.
ROUNDING: Final[Mapping[torch.dtype, float]] = {torch.float64: 1e-5, torch.float32: 1e-4}


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
        last: the number of the trunk's last position, which the backward pass reaches first.
        samples: the number of samples of the whole batch.
        lengths: K + 1, how many of the c_k there are.
        whole: whether no path is longer than K, so that Σ_k c_k = g.
    """

    def __init__(
        self, gradients: Mapping[int, Tensor], *, last: int, samples: int, lengths: int, whole: bool
    ) -> None:
        self.gradients = gradients
        self.last = last
        self.samples = samples
        self.lengths = lengths
        self.whole = whole
        self.seed_difference = math.nan
        self._units = {
            position: float(g.abs().amax()) if g.numel() else 0.0 for position, g in gradients.items()
        }
        self._energy = np.zeros((last + 1, lengths))
        self._product = np.zeros((last + 1, lengths))
        self._square = np.zeros(last + 1)
        self._off = np.zeros(last + 1)
        self._read = np.zeros(last + 1, dtype=np.bool_)
        self._start = self._stop = 0
        self._factor = 0.0

    @property
    def copies(self) -> int:
        """How many copies the batch must hold: one for each c_k, and the guard."""
        return self.lengths + 1

    def begin(self, start: int, stop: int) -> None:
        """The gradients that come next are those of these samples."""
        self._start, self._stop = start, stop
        self._factor = 0.0

    def add(self, position: int, copied: Tensor, dim: int) -> None:
        """Take in the copies' gradient at one position. The last position must come first.

        Raises:
            MeasureError: the gradients are not those of the batch as given.
        """
        if position == self.last:
            self._factor = self._seed_factor(copied, dim)
        unit = self._units.get(position, 0.0)
        if not (0 < unit < math.inf) or not self._factor:
            return
        scale = unit * self._factor
        size = copied.shape[dim] // self.copies
        parts = [_exact(copied.narrow(dim, k * size, size)) / scale for k in range(self.copies)]
        if parts.pop().any():
            raise MeasureError(
                "A copy of the samples that no gradient was given to has one at stream position "
                f"{position}: the samples of a batch influence each other. Use a model without batch "
                "statistics and without anything else that is shared among the samples."
            )
        u = self._mine(position, dim, parts[0].shape) / unit
        # In place of u itself, the sum of its parts: so a net of dead branches has w_0 = 1 exactly.
        g = torch.stack(parts).sum(0) if self.whole else u
        self._off[position] += float(torch.sum((g - u) ** 2))
        self._square[position] += float(torch.sum(g * g))
        for k, part in enumerate(parts):
            self._energy[position, k] += float(torch.sum(part * part))
            self._product[position, k] += float(torch.sum(part * g))
        self._read[position] = True

    def check(self) -> float:
        """‖Σ_k c_k − g‖/‖g‖, the worst position's; NaN for a spectrum that is cut off.

        Raises:
            MeasureError: it is more than rounding.
        """
        if not self.whole or not self._read.any():
            return math.nan
        dtype = self.gradients[0].dtype
        off = np.sqrt(self._off[self._read] / self._square[self._read])
        worst = int(np.argmax(off))
        if not off[worst] <= ROUNDING[dtype]:
            raise MeasureError(
                f"The parts of the gradient do not sum to the gradient itself at stream position "
                f"{np.flatnonzero(self._read)[worst]} (relative difference {off[worst]:.1e}, allowed "
                f"{ROUNDING[dtype]:.0e} in {str(dtype).removeprefix('torch.')}): they cancel too much, "
                "or the gradient is too small, for the dtype, or the samples influence each other. For "
                "the dtype, model.double()."
            )
        return float(off[worst])

    def spectrum(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """‖c_k‖ and w_k = ⟨c_k, g⟩/‖g‖², [P, K + 1] each; NaN where no gradient was seen."""
        norm, weight = np.full((2, *self._energy.shape), math.nan)
        for position in np.flatnonzero(self._read).tolist():
            norm[position] = np.sqrt(self._energy[position]) * self._units[position]
            weight[position] = self._product[position] / self._square[position]
        return norm, weight

    def gradient_l2(self) -> float:
        """‖g‖ at h_0, of the batch as given."""
        unit, g = self._units[0], _exact(self.gradients[0])
        return unit * float(torch.sum((g / unit) ** 2).sqrt()) if 0 < unit < math.inf else unit

    def _mine(self, position: int, dim: int, shape: torch.Size) -> Tensor:
        """The rows of the samples at hand, of the whole batch's gradient."""
        g = self.gradients[position]
        rows = g.shape[dim] // self.samples
        mine = g.narrow(dim, self._start * rows, (self._stop - self._start) * rows)
        if g.shape[dim] % self.samples or mine.shape != shape:
            raise MeasureError(
                f"The stream has shape {tuple(g.shape)} for {self.samples} samples, and "
                f"{tuple(shape)} for {self._stop - self._start} of them, which are then not rows of it. "
                "Is batch_dim= the dimension of the samples?"
            )
        return _exact(mine)

    def _seed_factor(self, copied: Tensor, dim: int) -> float:
        """By which factor the loss sees these copies' samples, against the batch as given.

        A mean is over another number of terms, a mean over valid tokens over another share of them. It
        is read where the trunk ends, where the first copy has all of the gradient. 0: none has any.
        """
        first = _exact(copied.narrow(dim, 0, copied.shape[dim] // self.copies))
        u = self._mine(self.last, dim, first.shape)
        largest = float(u.abs().amax())
        if not largest:
            return 0.0  # whatever these samples get here, in the batch as given it is nothing
        height = float(first.abs().amax())
        a, u = first / height, u / largest
        factor = float(torch.sum(a * u) / torch.sum(u * u))
        off = float(torch.sum((a - factor * u) ** 2).sqrt() / torch.sum(a * a).sqrt())
        tolerance = ROUNDING[copied.dtype]
        if not (off <= tolerance and factor > 0):
            raise MeasureError(
                f"The copied samples have another gradient at the trunk's end than in the batch itself "
                f"(relative difference {off:.1e}, allowed {tolerance:.0e} in "
                f"{str(copied.dtype).removeprefix('torch.')}): the loss compares samples with each "
                "other, or weighs them by their place in the batch, or the gradient is too small for "
                "its dtype. Write a loss that is a mean or a sum over samples; for the dtype, "
                "model.double()."
            )
        self.seed_difference = off if math.isnan(self.seed_difference) else max(self.seed_difference, off)
        return factor * height / largest


def _exact(x: Tensor) -> Tensor:
    return x.detach().double().cpu().contiguous()
