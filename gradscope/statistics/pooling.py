"""Pooling the statistics of the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradscope.record import STATISTICS

__all__ = ["pool"]


def pool(names: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Statistics of the concatenation of several samples, from those of each.

    Exact for every column, as if the micro-batches had been one batch; for ``token_cosine`` where
    every sequence has at least two valid tokens. Only ``sample_dot`` is another number: samples meet
    those of their own micro-batch.

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
            rule = STATISTICS[name].pooled
            if rule == "sum":
                out[:, i] = x.sum(0)
            elif rule == "norm":
                scale = np.abs(x).max(0)
                unit = x / np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
                out[:, i] = np.sqrt(np.square(unit).sum(0)) * np.where(scale > 0, scale, 1.0)
            elif rule == "mean":
                weight = column("tokens")
                out[:, i] = (weight * x).sum(0) / weight.sum(0)
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
    return out
