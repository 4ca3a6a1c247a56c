"""Moments, norms and inner products that neither the dtype's range nor cancellation can spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gradscope.statistics import one_pass
from gradscope.statistics.sample import WIDE, Absent, Value

__all__ = [
    "FOUND",
    "difference_norm",
    "distances",
    "frobenius_norm",
    "inner_product",
    "moments_of",
    "nonfinite",
    "norms",
    "relate",
    "robust_moments",
]

#: What `one_pass.moments` gives, in its order.
FOUND: Final[tuple[str, ...]] = ("l2", "count", "mean", "variance", "absmax", "zeros", "nonfinite")
# Sums of squares outside these bounds may have lost elements to underflow, or overflowed.
_SAFE_LOW: Final = {torch.float32: 1e-30, torch.float64: 1e-290}
# A float32 sum of more squares than this loses digits: on CPUs with narrow vectors 1e-6 of the norm at
# four times as many, 1e-3 at 1e8 elements.
_MOST_AT_ONCE: Final = 1 << 18
# The integer that has the bits of a float.
_BITS: Final = {torch.float32: torch.int32, torch.float64: torch.int64}
# So many squares a norm of torch's own adds without losing digits.
_SMALL: Final = 1 << 15
# Below this share of the mean square, E x^2 - m^2 has lost more than one of float32's seven digits.
_CANCELLATION: Final = 0.5


def moments_of(x: Tensor, valid: Tensor | None = None) -> dict[str, Value]:
    """Count, l2, mean, variance, absmax, zeros and nonfinite of the valid elements of [..., features]."""
    if x.device.type == "cpu":
        flat = (x if valid is None else x[valid]).reshape(-1)
        found = one_pass.moments(flat)
        return _moments_on_cpu(flat) if found is None else dict(zip(FOUND, found, strict=True))
    return robust_moments(x, valid)


def _moments_on_cpu(flat: Tensor) -> dict[str, Value]:
    count = flat.numel()
    total = flat.sum().item()
    absmax, zeros = _magnitudes(flat)
    values: dict[str, Value] = {"count": float(count), "absmax": absmax, "zeros": float(zeros)}
    if not math.isfinite(absmax):
        values["nonfinite"] = float(count - int(torch.isfinite(flat).sum().item()))
        values |= {"l2": absmax, "mean": total / count, "variance": math.nan}
        return values
    values["nonfinite"] = 0.0
    mean = total / count
    squares = dot(flat, flat)
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


def _magnitudes(flat: Tensor) -> tuple[float, int]:
    """The largest magnitude (NaN if any is, else inf if any is), and how many elements are exactly 0.

    Zeros are counted among the bits: twice as fast as among the floats. Of the two zeros the negative one
    has the least bits of all, so that a look at these says whether it is there.
    """
    low, high = flat.amin().item(), flat.amax().item()
    most = math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)
    kind = _BITS[flat.dtype]
    bits = flat.view(kind)
    counted = flat if bits.amin().item() == torch.iinfo(kind).min else bits
    return most, flat.numel() - int(torch.count_nonzero(counted).item())


def _scaled(flat: Tensor, absmax: float) -> dict[str, Value]:
    scaled = flat.double() / absmax
    return {
        "l2": absmax * math.sqrt(torch.dot(scaled, scaled).item()),
        "mean": absmax * scaled.mean().item(),
        "variance": absmax * (absmax * scaled.var().item()) if flat.numel() > 1 else math.nan,
    }


def robust_moments(x: Tensor, valid: Tensor | None = None) -> dict[str, Value]:
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


def relate(a: Tensor, b: Tensor) -> tuple[Value, Value]:
    """<a, b> and |a - b| over all elements, robust against the range. [...], [...] -> [], []."""
    a, b = a.detach(), b.detach()
    found = one_pass.pair(a, b)
    if found is not None:
        return found[0], math.sqrt(found[1])
    return inner_product(a, b), difference_norm(a, b)


def inner_product(a: Tensor, b: Tensor) -> Value:
    """<a, b> over all elements, robust against under- and overflow. [...], [...] -> []."""
    a, b = _flat(a), _flat(b)
    if a.device.type != "cpu":
        return (a.double() * b.double()).sum()
    product = dot(a, b) if a.dtype == b.dtype else math.nan
    # Small or not finite: the product of float32 elements may have left the range. A sum that is
    # small because its terms cancel is redone as well, which costs time and no digits.
    if not (a.numel() * _SAFE_LOW[a.dtype] < abs(product) < math.inf):
        product = dot(a.double(), b.double())
    return product


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b> of two vectors on a CPU, in pieces short enough for float32 accumulators."""
    if a.numel() <= _MOST_AT_ONCE:
        return torch.dot(a, b).item()
    pieces = zip(a.split(_MOST_AT_ONCE), b.split(_MOST_AT_ONCE), strict=True)
    return sum(torch.dot(x, y).item() for x, y in pieces)


def difference_norm(a: Tensor, b: Tensor) -> Value:
    """|a - b| over all elements, from the difference itself. [...], [...] -> []."""
    if a.device.type != "cpu":
        return robust_moments(_flat(a) - _flat(b), None)["l2"]
    x, y = _flat(a), _flat(b)
    norm = _norm_on_cpu(x - y)
    # Two float32 elements of opposite sign may differ by more than float32 can hold.
    return norm if math.isfinite(norm) else _norm_on_cpu(_flat(a).double() - _flat(b).double())


def distances(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Value]:
    """|a - b| of each pair of tensors of one shape and any dtype; complex as real and imaginary parts."""
    found: list[Any] = one_pass.distances(a, b)
    for i, distance in enumerate(found):
        if distance is None:
            found[i] = norms([a[i].detach() - b[i].detach()])[0]
    return found


def frobenius_norm(x: Tensor) -> Value:
    """|x| over all elements, robust against under- and overflow. [...] -> []."""
    return _norm_on_cpu(_flat(x)) if x.device.type == "cpu" else robust_moments(x, None)["l2"]


def _norm_on_cpu(flat: Tensor) -> float:
    found = one_pass.squares(flat)
    if found is not None:
        return math.sqrt(found)
    squares = dot(flat, flat)
    if flat.numel() * _SAFE_LOW[flat.dtype] < squares < math.inf:
        return math.sqrt(squares)
    absmax = flat.abs().amax().item() if flat.numel() else 0.0
    if absmax == 0 or not math.isfinite(absmax):
        return absmax
    scaled = flat.double() / absmax
    return absmax * math.sqrt(torch.dot(scaled, scaled).item())


def norms(tensors: Sequence[Tensor]) -> list[Value]:
    """The Frobenius norm of each tensor (sparse ones coalesced). Any shapes -> one scalar each."""
    found: list[Any] = one_pass.norms(tensors)
    left = [i for i, norm in enumerate(found) if norm is None]
    if left:
        for i, norm in zip(left, _other_norms([tensors[i] for i in left]), strict=True):
            found[i] = norm
    return found


def _other_norms(tensors: Sequence[Tensor]) -> list[Value]:
    dense = [_dense(t.detach()) for t in tensors]
    wide = [t if t.dtype in WIDE else t.float() for t in dense]
    found: list[Value] = [0.0] * len(wide)
    small = [i for i, t in enumerate(wide) if t.device.type == "cpu" and 0 < t.numel() <= _SMALL]
    # Torch's own norms, all at once, add float32 squares one after the other: of more elements that is
    # off by 1e-5 at a million and 1e-3 at a hundred million, and a dot product is as fast.
    for i, norm in zip(small, _norms_of_small([wide[i] for i in small]), strict=True):
        found[i] = norm
    for i in set(range(len(wide))).difference(small):
        found[i] = frobenius_norm(wide[i]) if wide[i].numel() else 0.0
    return found


def _norms_of_small(tensors: list[Tensor]) -> list[float]:
    if not tensors:
        return []
    norms = torch.stack([n.double() for n in torch._foreach_norm(tensors)]).tolist()
    return [
        norm if _SAFE_LOW[t.dtype] * t.numel() < norm * norm < math.inf else _norm_on_cpu(_flat(t))
        for t, norm in zip(tensors, norms, strict=True)
    ]


def nonfinite(tensor: Tensor, norm: Value) -> Value | Absent:
    """Number of NaN or infinite elements; a finite norm proves that there are none."""
    if type(norm) is float:
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
    return (t if t.dtype in WIDE else t.float()).reshape(-1)
