"""The kernels behind the table of statistics: one tensor in, scalars out, nothing kept.

Every value is accumulated so that neither the dtype's range nor cancellation can spoil it: 16-bit
tensors are widened to float32 first, float32 sums of squares that leave the safe range are redone
in float64 after division by the largest magnitude, and a variance that is small beside the mean
square is redone about the mean. On a CPU those repairs are decided by looking at the first result,
which is free there; on other devices the robust form is always used, because looking would
synchronise the host (that path has been tested on the CPU only).

To add a statistic: one entry in `gradscope.record.STATISTICS` and one function here, decorated
with `kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gradscope.record import STATISTICS

__all__ = [
    "ACTIVATION",
    "GRADIENT",
    "KERNELS",
    "Absent",
    "Sample",
    "difference_norm",
    "inner_product",
    "kernel",
    "measure",
    "norms",
    "pool",
]

#: The columns of a measured tensor, in the order of the table.
ACTIVATION: Final = tuple(n for n, s in STATISTICS.items() if "activation" in s.signals)
GRADIENT: Final = tuple(n for n, s in STATISTICS.items() if "output_grad" in s.signals)

# Sums of squares outside these bounds may have lost elements to underflow, or overflowed.
_SAFE_LOW: Final = {torch.float32: 1e-30, torch.float64: 1e-290}
# A float32 sum of more squares than this loses digits: on CPUs with narrow vectors 1e-6 of the norm at
# four times as many, 1e-3 at 1e8 elements.
_MOST_AT_ONCE: Final = 1 << 18
# Below this share of the mean square, E x^2 - m^2 has lost more than one of float32's seven digits.
_CANCELLATION: Final = 0.5

Value = float | Tensor


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
        valid: bool [batch, tokens]; positions that count. None: all do.
        input: the trunk's input h_0 in the same form, for `input_cosine`.
        rms: sqrt(mean of x^2) over the valid elements, from `measure`.
    """

    x: Tensor
    feature_axis: int
    token_axis: int
    valid: Tensor | None = None
    input: Tensor | None = None
    rms: Value = math.nan

    def positions(self) -> Tensor:
        """The valid positions, [positions, features]."""
        x = self.x.movedim(self.feature_axis, -1) if self.feature_axis != -1 else self.x
        return x[self.valid] if self.valid is not None else x.reshape(-1, x.shape[-1])


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


@kernel("kurtosis")
def kurtosis(sample: Sample) -> Value | Absent:
    """E x^4 / (E x^2)^2 over all elements, uncentred. [..., d] -> []. Unit: 1.

    3 for a Gaussian, 1 for +-c, large where few elements carry the energy (outlier features; He et
    al. 2024, arXiv:2405.19279). Computed on x / sqrt(E x^2), so that nothing leaves the range.
    NaN where x is zero or not finite.
    """
    unit = _wide_enough(sample.positions(), sample.rms) / sample.rms
    return _scalar(unit.square().square().mean(dtype=torch.float64))


@kernel("token_variance")
def token_variance(sample: Sample) -> Value | Absent:
    """Mean over positions of the variance over features (biased). [..., d] -> []. Unit: x^2.

    The ``act_var`` of signal propagation (Xiong et al. 2020, arXiv:2002.04745, Lemma 2). Two-pass,
    so a large mean costs no digits.
    """
    x = _wide_enough(sample.positions(), sample.rms)
    if x.shape[-1] < 2:
        return Absent("one element")
    return _scalar(x.var(-1, correction=0).mean(dtype=torch.float64))


@kernel("token_cosine")
def token_cosine(sample: Sample) -> Value | Absent:
    """Mean cosine between different tokens of one sequence. [B, T, d] -> []. Unit: 1.

    (|sum_t u_t|^2 - T) / (T (T - 1)) with u_t = x_t / |x_t|, averaged over the valid tokens of the
    sequences that have at least two (longer sequences weigh more). 1 means rank collapse (Dong et al.
    2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126). NaN where a token is exactly zero.
    """
    x = sample.x
    if x.dim() != 3 or sample.feature_axis != -1:
        return Absent("not supported: no token axis")
    x = _wide_enough(x, sample.rms) / sample.rms
    if sample.token_axis == 0:
        x = x.transpose(0, 1)
    # The norm in float64: the square of a small token leaves float32's range.
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    if sample.valid is None:
        tokens = torch.full((x.shape[0],), float(x.shape[1]), dtype=torch.float64, device=x.device)
    else:
        valid = sample.valid if sample.token_axis == 1 else sample.valid.transpose(0, 1)
        unit = torch.where(valid[..., None], unit, 0.0)
        tokens = valid.sum(1, dtype=torch.float64)
    if x.shape[1] < 2:
        return Absent("not supported: one token")
    total = unit.sum(1).double().square().sum(-1)
    long = tokens >= 2
    cosine = torch.where(long, (total - tokens) / (tokens - 1), 0.0)  # times the number of tokens
    return _scalar(cosine.sum() / torch.where(long, tokens, 0.0).sum())


@kernel("input_cosine")
def input_cosine(sample: Sample) -> Value | Absent:
    """Input presence: mean over tokens of cos(h_l, h_0). [..., d] -> []. Unit: 1."""
    if sample.input is None:
        return Absent("not supported: the trunk's input was not kept")
    if sample.input.shape != sample.x.shape:
        return Absent("not supported: the width differs from the input's")
    origin = Sample(sample.input, sample.feature_axis, sample.token_axis, sample.valid).positions()
    x = sample.positions()
    return _scalar(torch.linalg.vecdot(_directions(x), _directions(origin)).mean())


def _directions(x: Tensor) -> Tensor:
    # Divided by the largest element first: the square of a small one leaves the range of any dtype.
    x = x.double()
    x = x / x.abs().amax()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


# -- the moments, which every recorded step has -------------------------------------------------


def measure(
    x: Tensor,
    columns: Sequence[str],
    *,
    feature_axis: int = -1,
    token_axis: int = 1,
    valid: Tensor | None = None,
    input: Tensor | None = None,
    slow: bool = False,
    stream: bool = False,
) -> tuple[list[Value], dict[int, str]]:
    """The statistics of one tensor, in the order of ``columns``, and the reasons of absent ones.

    Args:
        x: any real floating tensor; not modified, not kept.
        columns: `ACTIVATION` or `GRADIENT`.
        feature_axis: see `Sample`.
        token_axis: see `Sample`.
        valid: see `Sample`; leaves padding out of every value and count. One row per sequence
            ([batch, features]) has none; where it fits no other way, the values are absent.
        input: see `Sample`.
        slow: whether the slow statistics are due.
        stream: whether this is a position of the residual stream.

    Returns:
        values: floats on a CPU, 0-d tensors elsewhere; NaN where absent or filled in later.
        absent: column index -> status.
    """
    values: list[Value] = [math.nan] * len(columns)
    if x.is_complex():
        return values, dict.fromkeys(range(len(columns)), "not supported: complex values")
    x = x.detach()
    if x.dtype not in _SAFE_LOW:
        x = x.float()
    if x.numel() == 0:
        return values, dict.fromkeys(range(len(columns)), "not supported: empty tensor")
    if x.dim() < 2:
        x = x.reshape(1, -1)
        feature_axis = -1
        valid = None
    features = x.shape[feature_axis]
    if valid is not None and token_axis == 0 and x.dim() == 3:
        valid = valid.transpose(0, 1)
    if valid is not None and x.shape[:-1] != valid.shape:
        if x.dim() == 2 and len(x) == valid.numel():
            # Tokens of all sequences in one axis.
            valid = (valid.transpose(0, 1) if token_axis == 0 else valid).reshape(-1)
        elif x.dim() == 2 and len(x) == valid.shape[0]:
            valid = None  # one row per sequence: no padding in it
        else:
            why = f"not supported: the mask {list(valid.shape)} does not fit {list(x.shape)}"
            return values, dict.fromkeys(range(len(columns)), why)
    if valid is not None and feature_axis != -1:
        why = "not supported: a mask over channels-first values"
        return values, dict.fromkeys(range(len(columns)), why)
    if valid is not None and x.device.type == "cpu" and not bool(valid.any()):
        return values, dict.fromkeys(range(len(columns)), "not supported: everything is masked")
    sample = Sample(x, feature_axis, token_axis, valid, input)
    absent: dict[int, str] = {}
    if x.device.type == "cpu":
        flat = (x if valid is None else x[valid]).reshape(-1)
        moments = _moments_on_cpu(flat)
    else:
        moments = _moments_robust(x, valid)
    count = moments["count"]
    moments["tokens"] = count / features
    l2 = moments["l2"]
    sample.rms = l2 / count**0.5
    for i, name in enumerate(columns):
        if name in moments:
            values[i] = moments[name]
            continue
        statistic = STATISTICS[name]
        compute = KERNELS.get(name)
        if compute is None or (statistic.where == "stream" and not stream):
            continue
        if statistic.slow and not slow:
            absent[i] = "not sampled"
            continue
        result = compute(sample)
        if isinstance(result, Absent):
            absent[i] = result.why
        else:
            values[i] = result
    if isinstance(count, float) and count == 1 and "variance" in columns:
        absent[columns.index("variance")] = "one element"
    return values, absent


def _moments_on_cpu(flat: Tensor) -> dict[str, Value]:
    count = flat.numel()
    total = flat.sum().item()
    low, high = torch.aminmax(flat)
    absmax = max(-low.item(), high.item())
    if not math.isfinite(absmax):  # aminmax propagates NaN, max() may not
        absmax = math.nan if math.isnan(low.item()) or math.isnan(high.item()) else math.inf
    zeros = count - int(torch.count_nonzero(flat).item())
    values: dict[str, Value] = {"count": float(count), "absmax": absmax, "zeros": float(zeros)}
    if not math.isfinite(absmax):
        values["nonfinite"] = float(count - int(torch.isfinite(flat).sum().item()))
        values |= {"l2": absmax, "mean": total / count, "variance": math.nan}
        return values
    values["nonfinite"] = 0.0
    mean = total / count
    squares = _dot(flat, flat)
    if absmax > 0 and not (count * _SAFE_LOW[flat.dtype] < squares < math.inf):
        return values | _scaled(flat, absmax)
    spread = squares / count - mean * mean
    if count > 1 and spread < _CANCELLATION * squares / count:
        variance = flat.double().var().item()
    else:
        variance = spread * count / (count - 1) if count > 1 else math.nan
    if not math.isfinite(mean):  # the sum overflowed where the elements did not
        mean = flat.double().mean().item()
    return values | {"l2": math.sqrt(squares), "mean": mean, "variance": variance}


def _scaled(flat: Tensor, absmax: float) -> dict[str, Value]:
    scaled = flat.double() / absmax
    return {
        "l2": absmax * math.sqrt(torch.dot(scaled, scaled).item()),
        "mean": absmax * scaled.mean().item(),
        "variance": absmax * (absmax * scaled.var().item()) if flat.numel() > 1 else math.nan,
    }


def _moments_robust(x: Tensor, valid: Tensor | None) -> dict[str, Value]:
    """The same without a look at any value: no host synchronisation, two passes over x."""
    if valid is None:
        count: Value = float(x.numel())
        weight = None
    else:
        weight = valid[..., None].expand(x.shape)
        count = weight.sum(dtype=torch.float64)
        x = torch.where(weight, x, 0.0)
    absmax = x.abs().amax()
    finite = torch.isfinite(absmax)
    # A power of two: the division rounds nothing, which a small variance beside a large mean needs.
    exponent = torch.frexp(torch.where(finite & (absmax > 0), absmax, 1.0)).exponent
    scale = torch.ldexp(torch.ones_like(absmax), exponent - 1)
    unit = x / scale
    mean = unit.sum(dtype=torch.float64) / count
    centred = unit - mean.to(unit.dtype)
    if weight is not None:
        centred = torch.where(weight, centred, 0.0)
    left = centred.sum(dtype=torch.float64)  # of the mean, which was rounded to be subtracted
    spread = centred.square().sum(dtype=torch.float64) - left * left / count
    squares = unit.square().sum(dtype=torch.float64)
    scale = scale.double()
    return {
        "count": count,
        "l2": torch.where(finite, scale * squares.sqrt(), absmax.double()),
        "mean": torch.where(finite, scale * mean, x.sum(dtype=torch.float64) / count),
        "variance": torch.where(finite, scale * (scale * spread / (count - 1)), math.nan),
        "absmax": absmax.double(),
        "zeros": count - torch.count_nonzero(x).double(),
        "nonfinite": x.numel() - torch.isfinite(x).sum(dtype=torch.float64),
    }


def inner_product(a: Tensor, b: Tensor) -> Value:
    """<a, b> over all elements, robust against under- and overflow. [...], [...] -> []."""
    a, b = _flat(a), _flat(b)
    if a.device.type != "cpu":
        return (a.double() * b.double()).sum()
    product = _dot(a, b) if a.dtype == b.dtype else math.nan
    # Small or not finite: the product of float32 elements may have left the range. A sum that is
    # small because its terms cancel is redone as well, which costs time and no digits.
    if not (a.numel() * _SAFE_LOW[a.dtype] < abs(product) < math.inf):
        product = _dot(a.double(), b.double())
    return product


def _dot(a: Tensor, b: Tensor) -> float:
    """<a, b> of two vectors on a CPU, in pieces short enough for float32 accumulators."""
    if a.numel() <= _MOST_AT_ONCE:
        return torch.dot(a, b).item()
    pieces = zip(a.split(_MOST_AT_ONCE), b.split(_MOST_AT_ONCE), strict=True)
    return sum(torch.dot(x, y).item() for x, y in pieces)


def difference_norm(a: Tensor, b: Tensor) -> Value:
    """|a - b| over all elements, from the difference itself. [...], [...] -> []."""
    difference = _flat(a) - _flat(b)
    if difference.device.type != "cpu":
        return _moments_robust(difference, None)["l2"]
    norm = _norm_on_cpu(difference)
    # Two float32 elements of opposite sign may differ by more than float32 can hold.
    return norm if math.isfinite(norm) else _norm_on_cpu(_flat(a).double() - _flat(b).double())


def _norm_on_cpu(flat: Tensor) -> float:
    squares = _dot(flat, flat)
    if flat.numel() * _SAFE_LOW[flat.dtype] < squares < math.inf:
        return math.sqrt(squares)
    absmax = flat.abs().amax().item() if flat.numel() else 0.0
    if absmax == 0 or not math.isfinite(absmax):
        return absmax
    scaled = flat.double() / absmax
    return absmax * math.sqrt(torch.dot(scaled, scaled).item())


def norms(tensors: Sequence[Tensor]) -> list[Value]:
    """The Frobenius norm of each tensor (sparse ones coalesced). Any shapes -> one scalar each."""
    dense = [_dense(t.detach()) for t in tensors]
    wide = [t if t.dtype in _SAFE_LOW else t.float() for t in dense]
    # One dot product each: torch's own norms add float32 squares one after the other, which is off by
    # 1e-5 at a million elements and 1e-3 at a hundred million, and they are not faster.
    return [
        0.0
        if t.numel() == 0
        else _norm_on_cpu(_flat(t))
        if t.device.type == "cpu"
        else _moments_robust(t, None)["l2"]
        for t in wide
    ]


def nonfinite(tensor: Tensor, norm: Value) -> Value | Absent:
    """Number of NaN or infinite elements; a finite norm proves that there are none."""
    if isinstance(norm, float):
        if math.isfinite(norm):
            return 0.0
        values = _dense(tensor.detach())
        return float(values.numel() - int(torch.isfinite(values).sum().item()))
    return tensor.numel() - torch.isfinite(_dense(tensor.detach())).sum(dtype=torch.float64)


def _dense(t: Tensor) -> Tensor:
    if t.is_sparse:
        # Repeated indices must be summed before squaring. The zeros do not change a norm.
        t = t.coalesce().values()
    elif t.layout != torch.strided:
        t = t.to_dense()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _flat(t: Tensor) -> Tensor:
    t = t.detach()
    return (t if t.dtype in _SAFE_LOW else t.float()).reshape(-1)


def _wide_enough(x: Tensor, rms: Value) -> Tensor:
    """The tensor in a dtype that holds the fourth powers of its typical elements, relative to 1."""
    return x if isinstance(rms, float) and 1e-15 < rms < 1e15 else x.double()


def _scalar(x: Tensor) -> Value:
    return x.item() if x.device.type == "cpu" else x


# -- pooling over the micro-batches of one step --------------------------------------------------


def pool(names: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Statistics of the concatenation of several samples, from those of each.

    Exact for every column, as if the micro-batches had been one batch; for ``token_cosine`` where
    every sequence has at least two valid tokens.

    Args:
        names: the columns.
        values: [samples, rows, columns] float64; a sample that is NaN in ``count`` takes no part.

    Returns:
        [rows, columns].
    """
    at = {name: i for i, name in enumerate(names)}
    count = values[..., at["count"]]
    here = ~np.isnan(count)
    n = np.where(here, count, 0.0)
    total = n.sum(0)
    out = np.full(values.shape[1:], np.nan)

    def column(name: str) -> np.ndarray:
        return np.where(here, values[..., at[name]], 0.0)

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (n * column("mean")).sum(0) / total if "mean" in at else np.nan
        # Relative to the largest, per row: the square of a norm may leave float64's range.
        largest = column("l2").max(0)
        squares = np.square(column("l2") / np.where(largest > 0, largest, 1.0))
        for name, i in at.items():
            x = column(name)
            if name in ("count", "tokens", "zeros", "nonfinite", "dot_next"):
                out[:, i] = x.sum(0)
            elif name in ("l2", "diff_next_l2"):
                scale = np.abs(x).max(0)
                unit = x / np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
                out[:, i] = np.sqrt(np.square(unit).sum(0)) * np.where(scale > 0, scale, 1.0)
            elif name == "absmax":
                out[:, i] = x.max(0)
            elif name == "mean":
                out[:, i] = mean
            elif name == "variance":
                inner = np.where(n > 1, (n - 1) * x, 0.0).sum(0)
                between = (n * np.square(column("mean") - mean)).sum(0)
                out[:, i] = (inner + between) / (total - 1)
            elif name == "kurtosis":
                # A sample of exact zeros has no kurtosis of its own, and adds only its count.
                fourth = np.where(squares != 0, x * np.square(squares) / np.where(n > 0, n, 1.0), 0.0)
                out[:, i] = fourth.sum(0) * total / np.square(squares.sum(0))
            elif name == "unit_skip":
                out[:, i] = np.where(here, x, np.inf).min(0)
            else:  # means over positions
                weight = column("tokens")
                out[:, i] = (weight * x).sum(0) / weight.sum(0)
    return out
