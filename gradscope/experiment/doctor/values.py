"""Every value of a Record against what autograd gave on an unwatched copy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from torch import Tensor

from gradscope.experiment.doctor.oracle import INPUT, Expected, Key, wide
from gradscope.experiment.doctor.report import SignalCheck, WrongValue
from gradscope.record import Record

__all__ = ["compared"]

#: Relative differences that are rounding. Norms are summed in float32 or wider.
_TOLERANCE: Final = {"l2": 2e-5, "l2_at_step": 2e-5}
_OTHERS: Final = 1e-4
#: Statuses that say of a layer that there is a value which gradscope did not get.
_UNMEASURED: Final = ("compiled", "local", "loss scaled", "not supported", "error", "not sampled")


@dataclass(frozen=True, slots=True)
class _Row:
    trunk: str
    depth: float
    key: Key
    value: float
    status: str


def compared(
    record: Record,
    first: Expected,
    second: Expected,
    parameters: Mapping[Key, float],
    layers: set[str],
) -> tuple[tuple[SignalCheck, ...], tuple[WrongValue, ...]]:
    """Compare one recorded step.

    Args:
        record: what was recorded; its last step counts.
        first: what the copy gave.
        second: what it gave with parameters that differ in their last digit: how far two right values
            may lie apart. A gradient that is zero but for rounding is all noise.
        parameters: values of weights and updates that were computed beside the watch.
        layers: names of the modules that should have been watched.
    """
    rows = list(_rows(record))
    expected = {**first.values, **parameters}
    scale = {**first.scale, **{key: abs(v) for key, v in parameters.items()}}
    for key, (value, size) in _pairs(rows, first):
        expected[key], scale[key] = value, size
    for key, value in _parameter_gradients(rows, first):
        expected[key] = scale[key] = value
    again = {**second.values, **dict(_parameter_gradients(rows, second))}
    again.update({key: value for key, (value, _) in _pairs(rows, second)})
    right: Counter[tuple[str, str]] = Counter()
    unchecked: Counter[tuple[str, str]] = Counter()
    absent: dict[tuple[str, str], Counter[str]] = {}
    error: dict[tuple[str, str], float] = {}
    wrong: list[WrongValue] = []
    seen: set[Key] = set()
    for row in rows:
        layer, call, signal, statistic = row.key
        kind = (signal, statistic)
        absent.setdefault(kind, Counter())
        seen.add(row.key)
        truth = expected.get(row.key)
        if row.status != "ok":
            said = _contradiction(row.status, truth)
            if said:
                wrong.append(_wrong(row.key, None, truth, said))
            else:
                absent[kind][row.status] += 1
            continue
        if (layer, call) in first.unsure or (truth is None and _unknown(row.key, first)):
            unchecked[kind] += 1
            continue
        if truth is None:
            wrong.append(_wrong(row.key, row.value, None, "a value where autograd has none"))
            continue
        noise = abs(truth - again.get(row.key, truth))
        size = scale.get(row.key, abs(truth))
        off = abs(row.value - truth)
        same = row.value == truth or (math.isnan(row.value) and math.isnan(truth))
        if same or off <= _TOLERANCE.get(statistic, _OTHERS) * size + 4 * noise:
            right[kind] += 1
            error[kind] = max(error.get(kind, 0.0), 0.0 if same else off / size)
        else:
            said = f"recorded {row.value:.6g}, autograd gives {truth:.6g}"
            wrong.append(_wrong(row.key, row.value, truth, said))
    wrong += _missing(expected, seen, layers)
    faults = Counter((w.signal, w.statistic) for w in wrong)
    kinds = list(dict.fromkeys([*absent, *faults]))
    return (
        tuple(
            SignalCheck(
                signal=kind[0],
                statistic=kind[1],
                right=right[kind],
                wrong=faults[kind],
                absent=dict(absent.get(kind, {})),
                unchecked=unchecked[kind],
                largest_error=error.get(kind, 0.0),
            )
            for kind in kinds
        ),
        tuple(wrong),
    )


def _wrong(key: Key, recorded: float | None, expected: float | None, why: str) -> WrongValue:
    return WrongValue(
        layer=key[0] or "the model",
        call=max(key[1], 0),
        signal=key[2],
        statistic=key[3],
        recorded=recorded,
        expected=expected,
        why=why,
    )


def _rows(record: Record) -> Iterator[_Row]:
    table = record.table(step=record.steps[-1].step)
    for i, layer in enumerate(table["layer"].tolist()):
        kind = table["type"][i]
        call = INPUT if kind == "Stream" else int(table["call"][i])
        yield _Row(
            trunk=str(table["trunk"][i]),
            depth=float(table["depth"][i]),
            key=(layer, call, str(table["signal"][i]), str(table["statistic"][i])),
            value=float(table["value"][i]),
            status=str(table["status"][i]),
        )


def _contradiction(status: str, truth: float | None) -> str:
    """What is wrong with an absence; "" where it is right, or said to be gradscope's limit."""
    if truth is None or status.startswith(_UNMEASURED):
        return ""
    if status in ("no gradient path", "not called", "frozen"):
        return f"absent as {status!r}, and autograd gives {truth:.6g}"
    return ""


def _unknown(key: Key, expected: Expected) -> bool:
    """Whether the copy has no counterpart of a value, rather than none of its gradient."""
    layer, call, signal, statistic = key
    if signal in ("activation", "output_grad"):
        # What it computes of every tensor it must have of this one too, unless there is no such tensor.
        return statistic not in _OF_EVERY_TENSOR or (layer, call) not in expected.activation
    return statistic not in ("l2", "l2_at_step")


_OF_EVERY_TENSOR: Final = ("l2", "mean", "variance", "absmax", "zeros", "nonfinite", "kurtosis")


def _missing(expected: Mapping[Key, float], seen: set[Key], layers: set[str]) -> list[WrongValue]:
    """Layers that ran and have no row, by their norm alone."""
    found: list[WrongValue] = []
    for key, truth in expected.items():
        layer, call, signal, statistic = key
        if statistic == "l2" and key not in seen and call != INPUT:
            if signal in ("activation", "output_grad") and layer not in layers:
                continue
            found.append(_wrong(key, None, truth, f"no row at all, and autograd gives {truth:.6g}"))
    return found


def _pairs(rows: list[_Row], expected: Expected) -> Iterator[tuple[Key, tuple[float, float]]]:
    """Inner product with, and difference to, the next stream position."""
    for signal, tensors in (("activation", expected.activation), ("output_grad", expected.gradient)):
        stream = sorted(
            {(r.trunk, r.depth, r.key[:2]) for r in rows if r.key[2:] == (signal, "dot_next")}
        )
        for (trunk, _, row), (next_trunk, _, following) in pairwise(stream):
            a, b = tensors.get(row), tensors.get(following)
            if trunk != next_trunk or a is None or b is None or a.shape != b.shape:
                continue
            x, y = wide(a), wide(b)
            size = float(x.norm() * y.norm())
            yield (*row, signal, "dot_next"), (float((x * y).sum()), size)
            difference = float((x - y).norm())
            yield (
                (*row, signal, "diff_next_l2"),
                (difference, difference + 1e-2 * float(x.norm())),
            )


def _parameter_gradients(rows: list[_Row], expected: Expected) -> Iterator[tuple[Key, float]]:
    for row in rows:
        layer, _, signal, statistic = row.key
        gradient = expected.parameter_gradient.get(layer)
        if signal != "param_grad" or gradient is None:
            continue
        if statistic in ("l2", "l2_at_step"):
            yield row.key, float(wide(gradient).norm())
        elif statistic == "count":
            yield row.key, float(gradient.numel())
        elif statistic == "nonfinite":
            yield row.key, float((~wide(gradient).isfinite()).sum())
        elif statistic in ("query_l2", "key_l2", "value_l2") and gradient.dim() == 2:
            yield row.key, _third(gradient, ("query_l2", "key_l2", "value_l2").index(statistic))


def _third(gradient: Tensor, which: int) -> float:
    axis = 0 if gradient.shape[0] == 3 * gradient.shape[1] else 1
    part = wide(gradient).chunk(3, axis)[which]
    return math.sqrt(float(part.square().sum()))
