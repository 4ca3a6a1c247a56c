"""The statistics of one tensor, in the order of the table's columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from gradscope.record import STATISTICS
from gradscope.statistics.moments import moments_of
from gradscope.statistics.sample import KERNELS, Absent, Sample, Value, type_kernel

__all__ = ["ACTIVATION", "GRADIENT", "measure"]

#: What `moments_of` gives, and the number of positions.
MOMENTS: Final = frozenset({"l2", "count", "tokens", "mean", "variance", "absmax", "zeros", "nonfinite"})
#: The columns of a measured tensor, in the order of the table.
ACTIVATION: Final = tuple(n for n, s in STATISTICS.items() if "activation" in s.signals)
GRADIENT: Final = tuple(n for n, s in STATISTICS.items() if "output_grad" in s.signals)


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
    wanted: Collection[str] | None = None,
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
        wanted: the slow statistics to compute; None for all. The others are NaN.

    Returns:
        values: floats on a CPU, 0-d tensors elsewhere; NaN where absent or filled in later.
        absent: column index -> status.
    """
    values: list[Value] = [math.nan] * len(columns)
    sample = Sample.of(x, feature_axis=feature_axis, token_axis=token_axis, valid=valid, input=input)
    if isinstance(sample, Absent):
        return values, dict.fromkeys(range(len(columns)), sample.why)
    moments = moments_of(sample.x, sample.valid)
    count = moments["count"]
    moments["tokens"] = count / sample.x.shape[sample.feature_axis]
    sample.rms = moments["l2"] / count**0.5
    plan = _plan(columns, slow, stream, wanted)
    absent: dict[int, str] = dict.fromkeys(plan.not_due, "not sampled")
    for i, name in plan.moments:
        values[i] = moments[name]
    for i, compute in plan.kernels:
        result = compute(sample)
        if isinstance(result, Absent):
            absent[i] = result.why
        else:
            values[i] = result
    if isinstance(count, float) and count == 1 and "variance" in columns:
        absent[columns.index("variance")] = "one element"
    return values, absent


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be computed for which column."""

    moments: tuple[tuple[int, str], ...]
    kernels: tuple[tuple[int, type_kernel], ...]
    not_due: tuple[int, ...]


#: Plans by the identity of what they were made for, which they hold, so that it stays what it is.
_PLANS: Final[dict[tuple[int, bool, bool, int], tuple[Any, Any, _Plan]]] = {}


def _plan(columns: Sequence[str], slow: bool, stream: bool, wanted: Collection[str] | None) -> _Plan:
    key = id(columns), slow, stream, id(wanted)
    found = _PLANS.get(key)
    if found is None:
        if len(_PLANS) >= 64:
            _PLANS.clear()
        found = _PLANS[key] = (columns, wanted, _planned(columns, slow, stream, wanted))
    return found[2]


def _planned(columns: Sequence[str], slow: bool, stream: bool, wanted: Collection[str] | None) -> _Plan:
    moments: list[tuple[int, str]] = []
    kernels: list[tuple[int, type_kernel]] = []
    not_due: list[int] = []
    for i, name in enumerate(columns):
        if name in MOMENTS:
            moments.append((i, name))
            continue
        statistic, compute = STATISTICS[name], KERNELS.get(name)
        if compute is None or (statistic.where == "stream" and not stream):
            continue
        if wanted is not None and name not in wanted:
            continue
        if statistic.slow and not slow:
            not_due.append(i)
        else:
            kernels.append((i, compute))
    return _Plan(tuple(moments), tuple(kernels), tuple(not_due))
