"""The part of the study that does not train: fresh models, one forward and backward, in float64.

float64 and no flushing of denormals: without skips and norms a gradient may fall by a hundred
orders of magnitude over the stack, and it is the network's value that is wanted here, not the
floor of the number format.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

import gradscope
from gradscope.errors import MeasureError
from gradscope.record import Record
from gradscope.reference import Transformer, next_token_loss
from gradscope.study.outcome import InitialisationOutcome
from gradscope.study.plan import InitialisationUnit
from gradscope.study.text import Text

__all__ = ["measure_unit"]


def make_model(unit: InitialisationUnit) -> Transformer:
    """A fresh model of the unit, drawn from torch's global random state."""
    return Transformer(
        unit.variant,
        depth=unit.depth,
        width=unit.width,
        heads=unit.heads,
        context=unit.context,
        initialization=unit.initialization,
    )


def measure_unit(
    unit: InitialisationUnit, text: Text, progress: Callable[[float], None]
) -> tuple[Record, InitialisationOutcome]:
    """Measure all seeds of a unit on one batch of training text.

    Args:
        unit: what to measure.
        text: where the batch comes from.
        progress: called with the share done, 0 to 1.
    """
    start = time.process_time()
    inputs, targets = next(text.batches(seed=0, batch=unit.batch, context=unit.context))
    batch = (torch.from_numpy(inputs), torch.from_numpy(targets))
    record = gradscope.measure(
        partial(make_model, unit),
        batch,
        next_token_loss,
        replicates=unit.seeds,
        seed=0,
        dtype=torch.float64,
        loss_denominator=inputs.size,
    )
    share = 0.35 if unit.effective_depth else 1.0
    progress(share)
    values: list[float | None] = []
    statuses: list[str] = []
    branches = 0
    for seed in range(unit.seeds):
        torch.manual_seed(seed)
        model = make_model(unit).to(torch.float64)
        branches = len(model.branches)
        if not unit.effective_depth:
            values.append(None)
            statuses.append("not sampled")
            continue
        try:
            depth = gradscope.effective_depth(model, batch, next_token_loss)
        except MeasureError as error:
            values.append(None)
            statuses.append(f"error: {error}")
        else:
            values.append(depth.value if depth.status == "ok" else None)
            statuses.append(depth.status)
        progress(share + (1 - share) * (seed + 1) / unit.seeds)
    return record, InitialisationOutcome(
        branches=branches,
        effective_depth=tuple(values),
        effective_depth_status=tuple(statuses),
        cpu_time_s=time.process_time() - start,
    )
