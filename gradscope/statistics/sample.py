"""A tensor as the kernels see it, and the register of kernels that see one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gradscope.record import STATISTICS
from gradscope.statistics import one_pass

__all__ = [
    "EMPTY",
    "KERNELS",
    "NO_DIRECTION",
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

#: Why a tensor without elements has no statistics.
EMPTY: Final = "not supported: empty tensor"

#: What statistics are computed in: narrower tensors are widened first.
WIDE: Final = (torch.float32, torch.float64)

#: Stands for a direction that does not exist, because a token is exactly zero. Whether there is such a
#: token cannot be looked at without a synchronisation; no statistic of directions can be infinite
#: otherwise, so that it is told apart when the values are on the host, and made absent.
NO_DIRECTION: Final = math.inf


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
        by_tokens: whether anything is asked of it for which sequences matter.
    """

    x: Tensor
    feature_axis: int = -1
    token_axis: int = 1
    valid: Tensor | None = None
    input: Tensor | None = None
    rms: Value = math.nan
    by_tokens: bool = True
    _rows: one_pass.Rows | None = None
    _looked: bool = False

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
        if x.layout is not torch.strided or x.is_nested:
            return Absent("not supported: a sparse or nested tensor")
        if x.requires_grad:
            x = x.detach()
        if x.dtype not in WIDE:
            x = x.float()
        if x.numel() == 0:
            return Absent(EMPTY)
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

    @property
    def rows(self) -> one_pass.Rows | None:
        """What all statistics of its positions follow from, in one pass; None where it is not taken.

        Of values that are not finite the kernels say themselves what they are.
        """
        if not self._looked:
            self._looked = True
            if self.plain and isinstance(self.rms, float) and math.isfinite(self.rms):
                x, start = self.x, self.input
                sequences, tokens, turned = self.x.numel() // self.x.shape[-1], 1, False
                if self.by_tokens and x.dim() == 3:
                    turned = self.token_axis == 0
                    sequences, tokens = (x.shape[1], x.shape[0]) if turned else (x.shape[0], x.shape[1])
                if start is not None:
                    start = start.to(x.dtype) if start.shape == x.shape else None
                self._rows = one_pass.rows(x, start, sequences, tokens, tokens_first=turned)
        return self._rows

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
