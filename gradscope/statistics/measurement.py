"""The statistics of one tensor, in the order of the table's columns."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from gradscope.record import STATISTICS
from gradscope.statistics import one_pass
from gradscope.statistics.moments import FOUND, moments_of
from gradscope.statistics.sample import KERNELS, Absent, Sample, Value, type_kernel

__all__ = ["ACTIVATION", "GRADIENT", "Values", "measure", "ordinary_absences"]

#: The statistics of one tensor, by column: numbers where reading them is free, else tensors among them.
Values = MutableSequence[Any]

#: The columns of a measured tensor, in the order of the table.
ACTIVATION: Final = tuple(n for n, s in STATISTICS.items() if "activation" in s.signals)
GRADIENT: Final = tuple(n for n, s in STATISTICS.items() if "output_grad" in s.signals)
#: The first columns of both: what `moments_of` gives, and the number of positions.
_MOMENTS: Final = ("l2", "count", "tokens", "mean", "variance", "absmax", "zeros", "nonfinite")
assert ACTIVATION[: len(_MOMENTS)] == GRADIENT[: len(_MOMENTS)] == _MOMENTS
_VARIANCE: Final = _MOMENTS.index("variance")
#: Kernels that need to know which tokens are of one sequence.
_BY_TOKENS: Final = frozenset({"token_cosine", "token_centred_l2"})


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
) -> tuple[Values, dict[int, str]]:
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
    x = x.detach()
    plan = _plan(columns, slow, stream, wanted)
    found = one_pass.moments(x) if valid is None else None
    values: Values
    if found is not None and not plan.kernels:
        count = found[1]
        features = x.shape[feature_axis] if x.dim() > 1 else count
        # No object that the garbage collector would look at in every step.
        values = array("d", (found[0], count, count / features, *found[2:], *plan.rest))
        absent = plan.absent.copy()
    else:
        filled: list[Value] = [math.nan] * len(columns)
        values = filled
        sample = Sample.of(x, feature_axis=feature_axis, token_axis=token_axis, valid=valid, input=input)
        if isinstance(sample, Absent):
            return values, dict.fromkeys(range(len(columns)), sample.why)
        moments: dict[str, Value] = (
            moments_of(sample.x, sample.valid) if found is None else dict(zip(FOUND, found, strict=True))
        )
        count = moments["count"]
        moments["tokens"] = count / sample.x.shape[sample.feature_axis]
        sample.rms = moments["l2"] / count**0.5
        sample.by_tokens = plan.by_tokens
        absent = plan.absent.copy()
        for i, name in enumerate(_MOMENTS):
            filled[i] = moments[name]
        for i, compute in plan.kernels:
            result = compute(sample)
            if isinstance(result, Absent):
                absent[i] = result.why
            else:
                filled[i] = result
    if isinstance(count, float) and count == 1:
        absent[_VARIANCE] = "one element"
    return values, absent


def ordinary_absences(
    columns: Sequence[str], *, stream: bool, wanted: Collection[str] | None
) -> dict[int, str] | None:
    """The reasons of absent columns in a step without slow statistics; see `measure`.

    Returns:
        column index -> status; None where more is due in such a step than the moments.
    """
    plan = _plan(columns, False, stream, wanted)
    return None if plan.kernels else dict(plan.absent)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be computed for which column.

    Attributes:
        kernels: the columns that are due, and their kernels.
        absent: why others are not.
        rest: NaN for each column behind the moments.
        by_tokens: whether any kernel needs to know which tokens are of one sequence.
    """

    kernels: tuple[tuple[int, type_kernel], ...]
    absent: dict[int, str]
    rest: tuple[float, ...]
    by_tokens: bool


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
    kernels: list[tuple[int, type_kernel]] = []
    absent: dict[int, str] = {}
    for i, name in enumerate(columns):
        compute = KERNELS.get(name)
        if compute is None or (STATISTICS[name].where == "stream" and not stream):
            continue
        if wanted is not None and name not in wanted:
            continue
        if STATISTICS[name].slow and not slow:
            absent[i] = "not sampled"
        else:
            kernels.append((i, compute))
    return _Plan(
        kernels=tuple(kernels),
        absent=absent,
        rest=(math.nan,) * (len(columns) - len(_MOMENTS)),
        by_tokens=any(columns[i] in _BY_TOKENS for i, _ in kernels),
    )
