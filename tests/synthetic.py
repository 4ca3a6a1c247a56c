"""Hand-built Records: statistics of known arrays by obvious numpy, for tests without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradscope.record import Record, Rows, Step

Entry = tuple[str, float, str, str, int, str, str]


class Builder:
    """Collects (row, value or reason) for one step; `step` makes the Step."""

    def __init__(self) -> None:
        self.rows: list[Entry] = []
        self.value: list[float] = []
        self.absent: dict[int, str] = {}

    def add(self, entry: Entry, value: float | str) -> None:
        if isinstance(value, str):
            self.absent[len(self.rows)] = value
        self.rows.append(entry)
        self.value.append(np.nan if isinstance(value, str) else value)

    def module(
        self,
        depth: float,
        layer: str,
        signal: str,
        values: Mapping[str, float | str],
        *,
        trunk: str = "h",
        kind: str = "Block",
        call: int = 0,
    ) -> None:
        for statistic, value in values.items():
            self.add((trunk, depth, layer, kind, call, signal, statistic), value)

    def parameter(
        self, depth: float, name: str, values: Mapping[tuple[str, str], float | str], trunk: str = "h"
    ) -> None:
        for (signal, statistic), value in values.items():
            self.add((trunk, depth, name, "Parameter", 0, signal, statistic), value)

    def step(self, step: int = 0, replicate: int = 0, rows: Rows | None = None, **fields: float) -> Step:
        rows = rows if rows is not None else Rows.of(self.rows)
        return Step.of(rows, self.value, self.absent, step=step, replicate=replicate, **fields)


def moments(x: np.ndarray) -> dict[str, float]:
    """The stored statistics of one tensor [tokens, features], each by its definition."""
    largest = float(np.abs(x).max())
    unit = x / largest if largest else np.full_like(x, np.nan)
    return {
        # Squares of the smallest numbers are 0.
        "l2": float(np.sqrt((x**2).sum()))
        or (largest * float(np.sqrt((unit**2).sum())) if largest else 0.0),
        "count": float(x.size),
        "tokens": float(x.shape[0]),
        "mean": float(x.mean()),
        "variance": float(x.var(ddof=1)),
        "absmax": float(np.abs(x).max()),
        "zeros": float((x == 0).sum()),
        "nonfinite": float((~np.isfinite(x)).sum()),
        "token_variance": float(x.var(axis=-1).mean()),
        "kurtosis": float((unit**4).mean() / (unit**2).mean() ** 2),
    }


def name(depth: int, trunk: str = "h") -> tuple[str, str]:
    """Layer and type of a stream position."""
    return (trunk, "Stream") if depth == 0 else (f"{trunk}.{depth - 1}", "Block")


def stream_step(
    gradients: Sequence[np.ndarray],
    activations: Sequence[np.ndarray] | None = None,
    *,
    step: int = 0,
    replicate: int = 0,
    unit_skip: float | str = 1.0,
    trunk: str = "h",
    first: str | None = None,
) -> Step:
    """A step whose stream statistics are those of δ_0 .. δ_L and h_0 .. h_L.

    ``first`` makes all gradient statistics at depth 0 absent for that reason.
    """
    b = Builder()
    activations = activations if activations is not None else gradients
    last = len(gradients) - 1
    for depth, (g, h) in enumerate(zip(gradients, activations, strict=True)):
        layer, kind = name(depth, trunk)
        for signal, arrays, x in (("output_grad", gradients, g), ("activation", activations, h)):
            values: dict[str, float | str] = dict(moments(x))
            if signal == "output_grad":
                del values["token_variance"]
            if depth < last:
                values["dot_next"] = float((x * arrays[depth + 1]).sum())
                values["diff_next_l2"] = float(np.linalg.norm(x - arrays[depth + 1]))
            else:
                values["dot_next"] = values["diff_next_l2"] = "not supported: last stream position"
            if signal == "activation":
                values["unit_skip"] = unit_skip if depth < last else "no unit skip"
            if signal == "output_grad" and depth == 0 and first is not None:
                values = dict.fromkeys(values, first)
            b.module(float(depth), layer, signal, values, trunk=trunk, kind=kind)
    return b.step(step, replicate)


def flat_record(
    norms: np.ndarray,
    *,
    tokens: int = 4,
    features: int = 8,
    steps: Sequence[int] | None = None,
    replicates: Sequence[int] | None = None,
    header: Mapping[str, object] | None = None,
    status: np.ndarray | None = None,
    trunk: str = "h",
) -> Record:
    """A Record whose flow (N = 1) at depth p of entry s is norms[s, p]; "" in ``status`` is ok."""
    entries = len(norms)
    steps = steps if steps is not None else [0] * entries
    replicates = replicates if replicates is not None else list(range(entries))
    made: list[Step] = []
    rows: Rows | None = None
    for s in range(entries):
        b = Builder()
        for p, flow in enumerate(norms[s]):
            layer, kind = name(p, trunk)
            why = "" if status is None else status[s, p]
            b.module(
                float(p),
                layer,
                "output_grad",
                {
                    "l2": why or float(flow * np.sqrt(tokens)),
                    "count": why or float(tokens * features),
                    "tokens": why or float(tokens),
                    "dot_next": "not sampled",
                },
                trunk=trunk,
                kind=kind,
            )
        rows = rows if rows is not None else Rows.of(b.rows)
        made.append(b.step(steps[s], replicates[s], rows))
    return Record(
        dict({"replicates": "initialisation", "loss_denominator": 1} if header is None else header),
        tuple(made),
    )
