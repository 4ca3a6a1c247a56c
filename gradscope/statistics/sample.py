"""A tensor as the kernels see it, and the register of kernels that see one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gradscope.record import STATISTICS

__all__ = [
    "KERNELS",
    "NO_DIRECTION",
    "PIECE",
    "WIDE",
    "Absent",
    "Sample",
    "Value",
    "directions",
    "kernel",
    "scalar",
    "type_kernel",
]

Value = float | Tensor

#: What statistics are computed in: narrower tensors are widened first.
WIDE: Final = (torch.float32, torch.float64)

#: Stands for a direction that does not exist, because a token is exactly zero. Whether there is such a
#: token cannot be looked at without a synchronisation; no statistic of directions can be infinite
#: otherwise, so that it is told apart when the values are on the host, and made absent.
NO_DIRECTION: Final = math.inf


#: What is computed in between stays in the processor's cache in pieces of so many elements; larger ones
#: are new memory from the system at every call.
PIECE: Final = 1 << 15
#: Lengths between which squares and products of float32 numbers keep their digits.
_LEAST: Final = 1e-15
_MOST: Final = 1e15


@dataclass(frozen=True, slots=True)
class Absent:
    """A value that cannot be had, with the reason that becomes its status."""

    why: str


@dataclass(slots=True)
class Sample:
    """A tensor as the kernels see it.

    Attributes:
        x: detached, float32 or float64, [..., features] (channels at ``feature_axis``).
        feature_axis: the axis of features.
        token_axis: the axis of tokens where x is [batch, tokens, features].
        valid: bool, the shape of x without features; positions that count. None: all do.
        input: the trunk's input h_0 in the same form, for `input_cosine`.
        rms: sqrt(mean of x^2) over the valid elements, from `measure`.
    """

    x: Tensor
    feature_axis: int = -1
    token_axis: int = 1
    valid: Tensor | None = None
    input: Tensor | None = None
    rms: Value = math.nan
    _lengths: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        *,
        feature_axis: int = -1,
        token_axis: int = 1,
        valid: Tensor | None = None,
        input: Tensor | None = None,
    ) -> Sample | Absent:
        """The sample of any tensor and of the mask [batch, tokens], or why there is none."""
        if x.is_complex():
            return Absent("not supported: complex values")
        x = x.detach()
        if x.dtype not in WIDE:
            x = x.float()
        if x.numel() == 0:
            return Absent("not supported: empty tensor")
        if x.dim() < 2:
            return cls(x.reshape(1, -1), -1, token_axis, None, input)
        if valid is not None and token_axis == 0 and x.dim() == 3:
            valid = valid.transpose(0, 1)
        if valid is not None and x.shape[:-1] != valid.shape:
            if x.dim() == 2 and len(x) == valid.numel():
                # Tokens of all sequences in one axis.
                valid = (valid.transpose(0, 1) if token_axis == 0 else valid).reshape(-1)
            elif x.dim() == 2 and len(x) == valid.shape[0]:
                valid = None  # one row per sequence: no padding in it
            else:
                return Absent(f"not supported: the mask {list(valid.shape)} does not fit {list(x.shape)}")
        if valid is not None and feature_axis != -1:
            return Absent("not supported: a mask over channels-first values")
        if valid is not None and x.device.type == "cpu" and not bool(valid.any()):
            return Absent("not supported: everything is masked")
        return cls(x, feature_axis, token_axis, valid, input)

    def positions(self) -> Tensor:
        """All positions, [positions, features]; those that do not count are 0."""
        x = self.x.movedim(self.feature_axis, -1) if self.feature_axis != -1 else self.x
        if self.valid is not None:
            x = torch.where(self.valid[..., None], x, 0.0)
        return x.reshape(-1, x.shape[-1])

    @property
    def plain(self) -> bool:
        """Whether it is on a CPU, its features last, and without a mask: what fast kernels take."""
        return self.valid is None and self.feature_axis == -1 and self.x.device.type == "cpu"

    def pieces(self) -> Iterator[Tensor]:
        """The positions in pieces that stay in the processor's cache, [some positions, features]."""
        x = self.positions()
        rows = max(PIECE // x.shape[-1], 1)
        for start in range(0, len(x), rows):
            yield x[start : start + rows]

    def lengths(self) -> Tensor | None:
        """|x| of each position, [positions], of a plain sample; None where any leaves the safe range.

        There the squares, and the products with another such sample, keep all digits of their dtype. A
        position that is exactly 0 has no direction, and is outside too.
        """
        if self._lengths is None and self.plain:
            self._lengths = torch.linalg.vector_norm(self.positions(), dim=-1)
        found = self._lengths
        safe = found is not None and _LEAST < found.amin().item() and found.amax().item() < _MOST
        return found if safe else None

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the positions that count, [positions] -> [], in float64."""
        if self.valid is None:
            return values.mean(dtype=torch.float64)
        # Indexing by the mask would ask how many there are, and so synchronise.
        valid = self.valid.reshape(-1)
        return torch.where(valid, values.double(), 0.0).sum() / valid.sum()

    def unless_zero(self, value: Tensor, *zero: Tensor) -> Value:
        """The value, or `NO_DIRECTION` where any position that counts is among the ``zero`` ones."""
        for positions in zero:
            if self.valid is not None:
                positions = positions & self.valid.reshape(-1)
            value = torch.where(positions.any(), NO_DIRECTION, value)
        return scalar(value)

    def sequences(self) -> tuple[Tensor, Tensor | None] | Absent:
        """[batch, tokens, features] and [batch, tokens], whichever axis the tokens are on."""
        if self.x.dim() != 3 or self.feature_axis != -1:
            return Absent("not supported: no token axis")
        turned = self.token_axis == 0
        x = self.x.transpose(0, 1) if turned else self.x
        if x.shape[1] < 2:
            return Absent("not supported: one token")
        valid = self.valid
        return x, valid.transpose(0, 1) if turned and valid is not None else valid

    @property
    def typical(self) -> bool:
        """Whether fourth powers of its elements, outliers too, lie in float32's range."""
        return isinstance(self.rms, float) and 1e-8 < self.rms < 1e5

    def wide(self, x: Tensor) -> Tensor:
        """X in a dtype that holds the fourth powers of its typical elements, relative to 1."""
        return x if isinstance(self.rms, float) and 1e-15 < self.rms < 1e15 else x.double()


type_kernel = Callable[[Sample], "Value | Absent"]
KERNELS: Final[dict[str, type_kernel]] = {}


def kernel(name: str) -> Callable[[type_kernel], type_kernel]:
    """Register the function that computes one slow statistic of the table."""
    if name not in STATISTICS:
        raise KeyError(f"{name!r} is not in gradscope.record.STATISTICS")

    def register(function: type_kernel) -> type_kernel:
        KERNELS[name] = function
        return function

    return register


def scalar(x: Tensor) -> Value:
    """A number where reading it is free, else the tensor itself."""
    return x.item() if x.device.type == "cpu" else x


def directions(positions: Tensor) -> tuple[Tensor, Tensor]:
    """x/|x| of each position, float64 [positions, features], and which are exactly zero, [positions].

    Divided by the largest element first: the square of a small one leaves the range of any dtype.
    """
    x = positions.double()
    x = x / x.abs().amax()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), (positions == 0).all(-1)
