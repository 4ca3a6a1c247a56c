"""The rows of parameters in a step: what they are, their values and statuses, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

import numpy as np

from gradscope.collect.parameters import PARAM_GRAD, UPDATE, WEIGHT, Parameters, Readings
from gradscope.record import STATISTICS

__all__ = ["ParameterRows", "place_of"]

#: Gradients that `torch.autograd.grad` returns (PCGrad, per-task gradients) are no longer to be had.
_NOT_WRITTEN: Final = "not supported: no backward pass wrote to .grad"


class ParameterRows:
    """The rows of all parameters, in order.

    Args:
        parameters: the model's parameters.
        wanted: the chosen statistics.
        update: whether updates are measured.

    Attributes:
        rows: for each row, the parameter's number, signal and statistic.
        norms: which of them are norms, [rows].
        sums: which are counts that add up over shards, [rows].
        of_step: which are of the optimizer's step, and of nobody's where it was skipped, [rows].
    """

    def __init__(self, parameters: Parameters, wanted: Collection[str], *, update: bool) -> None:
        self._parameters = parameters
        self.rows: list[tuple[int, str, str]] = [
            (i, signal, n)
            for i, entry in enumerate(parameters.entries)
            for signal, names in (("param_grad", PARAM_GRAD), ("weight", WEIGHT), ("update", UPDATE))
            for n in names
            if n in wanted
            and (STATISTICS[n].where != "packed" or entry.packing is not None)
            and (signal != "update" or update)
        ]
        names = np.array([statistic for _, _, statistic in self.rows], dtype=np.str_)
        self.norms: np.ndarray = np.strings.endswith(names, "l2") | (names == "l2_at_step")
        self.sums: np.ndarray = names == "nonfinite"
        self.of_step = np.array([signal in ("param_grad", "update") for _, signal, _ in self.rows], bool)
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for row, (i, signal, statistic) in enumerate(self.rows):
            groups.setdefault((signal, statistic), []).append((row, i))
        self._groups: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        for key, pairs in groups.items():
            rows, of = np.asarray(pairs, dtype=np.int64).T
            self._groups[key] = (rows, of)

    def values(self, readings: Readings) -> tuple[np.ndarray, np.ndarray]:
        """Values and statuses ("" for ok) of the parameter rows."""
        if readings.gradient:
            # As they were then: the next forward finds other parameters where the model was changed.
            elements = np.asarray(readings.gradient["count"], dtype=float)
            frozen = np.zeros(len(elements), dtype=bool)
            frozen[[i for i, reason in readings.absent.items() if reason == "frozen"]] = True
        else:
            tensors = self._parameters.tensors()
            frozen = np.array([t is not None and not t.requires_grad for t in tensors], dtype=bool)
            elements = np.array([math.nan if t is None else t.numel() for t in tensors], dtype=float)
        values = np.full(len(self.rows), np.nan)
        why = np.full(len(self.rows), "", dtype=object)
        scale = 1.0 if readings.scale is None else float(readings.scale)
        no_gradient = np.full(len(elements), "", dtype=object)
        if not readings.gradient:
            no_gradient[:] = np.where(frozen, "frozen", _NOT_WRITTEN)
        for i, reason in readings.absent.items():
            no_gradient[i] = reason
        later = {"l2_at_step": readings.at_step, "weight": readings.weight, "update": readings.update}
        for (signal, statistic), (rows, of) in self._groups.items():
            if statistic == "count":
                values[rows] = elements[of]
                why[rows] = np.where(np.isnan(elements[of]), "not called", "")
            elif signal == "param_grad" and statistic != "l2_at_step":
                why[rows] = no_gradient[of]
                if readings.gradient:
                    column = np.asarray(readings.gradient[statistic], dtype=float)[of]
                    values[rows] = column if statistic == "nonfinite" else column / scale
            else:
                found = later[statistic if signal == "param_grad" else signal]
                missing = np.ones(len(of), dtype=bool)
                if found:
                    values[rows] = [found.get(i, math.nan) for i in of.tolist()]
                    missing = np.array([i not in found for i in of.tolist()], dtype=bool)
                reason = np.where(frozen[of] & (signal != "weight"), "frozen", "not sampled")
                why[rows] = np.where(missing, reason, "")
        return values, why


def place_of(
    owner: str, sites: dict[str, int], places: dict[tuple[int, int], tuple[str, float]]
) -> tuple[str, float]:
    """Trunk and depth of the innermost layer on the axis that holds a module."""
    while True:
        site = sites.get(owner)
        if site is not None and (site, 0) in places and places[site, 0][0]:
            # A parameter used at several depths has none.
            return ("", math.nan) if (site, 1) in places else places[site, 0]
        if not owner:
            return "", math.nan
        owner = owner.rpartition(".")[0]
