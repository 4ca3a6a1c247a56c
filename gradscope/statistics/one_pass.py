"""One pass over a tensor for all of its statistics: what the optional extension module computes.

It takes what training on a CPU is made of: dense float32 and bfloat16 tensors without a mask, their
features last. Everything else, and everything where the module was not built, takes torch's operations.
Both ways are tested against the same twins. Sums are in float64, so that neither the range of float32
nor cancellation matters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

try:
    from gradscope.statistics import _one_pass as _built  # type: ignore[attr-defined]
except ImportError:  # no compiler where it was installed
    _built = None

__all__ = [
    "PairRows",
    "Rows",
    "available",
    "distances",
    "moments",
    "norms",
    "pair",
    "pair_rows",
    "rows",
    "squares",
    "together",
]

_native: Any = _built
_HALF: Final = {torch.float32: 0, torch.bfloat16: 1}
_TYPES: Final = (Tensor, nn.Parameter)
_EXCHANGE: Final[Any] = Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
#: From so many elements on torch's operations are faster where they may use several threads.
_MANY: Final = 1 << 22
# A variance below this share of the mean square is taken about the mean.
_CANCELLATION: Final = 1e-7


class Rows(NamedTuple):
    """Sums over the positions of a tensor, see `rows`."""

    fourth: float
    within: float
    direction: float
    centred: float
    input: float
    zero: int
    zero_input: int


class PairRows(NamedTuple):
    """Sums over the positions of two tensors, see `pair_rows`."""

    cosine: float
    angle: float
    ratio: float
    change_cosine: float
    zero: int
    zero_other: int
    zero_change: int


def available() -> bool:
    """Whether the extension module was built."""
    return _native is not None


def _memory(x: Tensor) -> Tensor | None:
    """The tensor in contiguous memory; None where this is not what it takes."""
    if (
        _native is not None
        and (type(x) is Tensor or type(x) is nn.Parameter)  # a subclass: not what it looks like
        and x.dtype in _HALF
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
        and 0 < (count := x.numel())
        and count <= _most()
        # Memory that was given back (a storage resized to nothing) lies at address 0.
        and x.data_ptr() != x.storage_offset() * x.itemsize
    ):
        return x if x.is_contiguous() else x.contiguous()
    return None


def _both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    if x.dtype != y.dtype or x.shape != y.shape:
        return None
    first, second = _memory(x), _memory(y)
    return None if first is None or second is None else (first, second)


def moments(x: Tensor) -> list[float] | None:
    """l2, count, mean, variance, absmax, zeros and nonfinite of all elements; None: not taken.

    Args:
        x: any tensor; not modified, not kept.
    """
    memory = _memory(x)
    if memory is None:
        return None
    n = x.numel()
    total, squared, absmax, zeros, nonfinite = _native.moments(memory.data_ptr(), _HALF[x.dtype], n)
    if nonfinite:
        # NaN wins over infinity, as in the largest magnitude of torch.
        return [absmax, float(n), total / n, math.nan, absmax, float(zeros), float(nonfinite)]
    mean = total / n
    if n < 2:
        variance = math.nan
    else:
        spread = squared / n - mean * mean
        if spread < _CANCELLATION * (squared / n):
            variance = x.double().var().item()
        else:
            variance = spread * n / (n - 1)
    return [math.sqrt(squared), float(n), mean, variance, absmax, float(zeros), 0.0]


def squares(x: Tensor) -> float | None:
    """The sum of the squares of all elements; None: not taken."""
    memory = _memory(x)
    return None if memory is None else _native.squares(memory.data_ptr(), _HALF[x.dtype], x.numel())


def norms(tensors: Sequence[Tensor]) -> list[float | None]:
    """The Frobenius norm of each tensor; None for each that is not taken."""
    if _native is None:
        return [None] * len(tensors)
    return _native.norms(list(tensors), _TYPES, _EXCHANGE, _most())


def distances(x: Sequence[Tensor], y: Sequence[Tensor]) -> list[float | None]:
    """|x - y| of each pair of tensors of one shape; None for each that is not taken."""
    if _native is None:
        return [None] * len(x)
    return _native.distances(list(x), list(y), _TYPES, _EXCHANGE, _most())


def _most() -> int:
    return sys.maxsize if torch.get_num_threads() == 1 else _MANY


def pair(x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """<x, y> and |x - y|^2 over all elements; None: not taken."""
    both = _both(x, y)
    if both is None:
        return None
    return _native.pair(both[0].data_ptr(), both[1].data_ptr(), _HALF[x.dtype], x.numel())


def rows(
    x: Tensor, input: Tensor | None, sequences: int, tokens: int, *, tokens_first: bool
) -> Rows | None:
    """Sums over the positions of [..., features]; None: not taken.

    Args:
        x: the tensor; the positions are ``sequences`` times ``tokens``.
        input: of the same shape, for the cosines of ``input``.
        sequences: their number.
        tokens: the number of each sequence's tokens.
        tokens_first: whether x is [tokens, sequences, features].

    Returns:
        ``fourth`` powers of all elements, squares about each position's mean (``within``), the sum over
        sequences of |sum_t x_t/|x_t||^2 (``direction``), squares about each sequence's mean token
        (``centred``), the sum of cosines with ``input``, and how many positions of both are zero.
    """
    memory, start = (_memory(x), None) if input is None else _both(x, input) or (None, None)
    if memory is None:
        return None
    return Rows(
        *_native.rows(
            memory.data_ptr(),
            0 if start is None else start.data_ptr(),
            _HALF[x.dtype],
            sequences,
            tokens,
            x.shape[-1],
            1 if tokens_first else tokens,
            sequences if tokens_first else 1,
        )
    )


def together(x: Tensor, axis: int) -> float | None:
    """|sum over the samples on this axis|^2; None: not taken."""
    memory = _memory(x)
    if memory is None:
        return None
    outer, samples = math.prod(x.shape[:axis]), x.shape[axis]
    inner = math.prod(x.shape[axis + 1 :])
    return _native.together(memory.data_ptr(), _HALF[x.dtype], outer, samples, inner)


def pair_rows(h: Tensor, other: Tensor, *, branch: bool) -> PairRows | None:
    """Sums over the positions of two tensors [..., features]; None: not taken.

    Args:
        h: the stream.
        other: the next position h', with F = h' - h; or, of a ``branch``, F itself.
        branch: which of the two.

    Returns:
        the sums of cos(h, h') and of their angle (not of a branch), of |F|/|h| and of cos(F, h), and how
        many positions of h, of the other and of F are zero.
    """
    both = _both(h, other)
    if both is None:
        return None
    features = h.shape[-1]
    count = h.numel() // features
    found = _native.pair_rows(
        both[0].data_ptr(), both[1].data_ptr(), _HALF[h.dtype], count, features, int(branch)
    )
    return PairRows(*found)
