"""The part of the study that trains: short runs on real text, watched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

import gradscope
from gradscope.record import Record
from gradscope.reference import Transformer, next_token_loss
from gradscope.study.outcome import TrainingOutcome
from gradscope.study.plan import TrainingUnit
from gradscope.study.text import Text

__all__ = ["BETAS", "EPSILON", "WEIGHT_DECAY", "train_unit"]

#: AdamW's constants: torch's defaults, except that nothing decays in so short a run.
BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8
WEIGHT_DECAY: Final = 0.0


def train_unit(
    unit: TrainingUnit, text: Text, progress: Callable[[float], None]
) -> tuple[Record, TrainingOutcome]:
    """Train one model with the watch on. Denormals are flushed while it runs.

    Values that decay to denormals make CPU arithmetic several times slower, and float32 cannot
    tell them from zero for any purpose of training.

    Args:
        unit: what to train.
        text: what to train on.
        progress: called with the share done, 0 to 1.
    """
    torch.set_flush_denormal(True)
    try:
        return _train(unit, text, progress)
    finally:
        torch.set_flush_denormal(False)


def _train(
    unit: TrainingUnit, text: Text, progress: Callable[[float], None]
) -> tuple[Record, TrainingOutcome]:
    start = time.process_time()
    torch.manual_seed(unit.seed)
    model = Transformer(
        unit.variant, depth=unit.depth, width=unit.width, heads=unit.heads, context=unit.context
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=unit.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        fused=True,  # a tenth of the step on a CPU
    )
    # A constant rate after the warm-up: a schedule that decays to zero would tie the loss curve to
    # the number of steps, and "faster" could not be read off it.
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / unit.warmup_steps)
    )
    inputs, targets = text.validation_windows(windows=unit.validation_windows, context=unit.context)
    validation = (torch.from_numpy(inputs), torch.from_numpy(targets))
    batches = text.batches(seed=unit.seed, batch=unit.batch, context=unit.context)
    train_loss: list[float] = []
    validation_step: list[int] = []
    validation_loss: list[float] = []
    diverged_at: int | None = None

    # No warnings on the terminal: the report says what became of every layer.
    with gradscope.watch(model, every=unit.watch_every, warn=False) as scope:
        for step in range(unit.steps):
            if step % unit.evaluate_every == 0:
                validation_step.append(step)
                validation_loss.append(_evaluate(model, validation))
            inputs, targets = next(batches)
            loss = next_token_loss(model, (torch.from_numpy(inputs), torch.from_numpy(targets)))
            scope.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            train_loss.append(loss.item())
            if not math.isfinite(train_loss[-1]):
                diverged_at = step
                break
            progress((step + 1) / unit.steps)
        if diverged_at is None:
            validation_step.append(unit.steps)
            validation_loss.append(_evaluate(model, validation))
            if not math.isfinite(validation_loss[-1]):
                diverged_at = unit.steps
    flush_denormal = _flushes_denormals()
    # What only the loop knows: how its processes compute, and that the loss is a mean of so many terms.
    known = {"flush_denormal": flush_denormal, "loss_denominator": unit.batch * unit.context}
    record = Record({**scope.record.header, **known}, scope.record.steps)
    return record, TrainingOutcome(
        train_loss=tuple(train_loss),
        validation_step=tuple(validation_step),
        validation_loss=tuple(validation_loss),
        diverged_at=diverged_at,
        flush_denormal=flush_denormal,
        cpu_time_s=time.process_time() - start,
    )


def _evaluate(model: Transformer, validation: tuple[Tensor, Tensor]) -> float:
    """Mean loss over the validation windows. The models have no dropout: train mode is eval mode."""
    inputs, targets = validation
    total = 0.0
    with torch.no_grad():
        for chunk in zip(inputs.split(16), targets.split(16), strict=True):
            total += next_token_loss(model, chunk).item() * len(chunk[0])
    return total / len(inputs)


def _flushes_denormals() -> bool:
    # Asked of the arithmetic itself: set_flush_denormal reports only whether the CPU could.
    smallest = torch.finfo(torch.float32).tiny
    return bool((torch.tensor([smallest]) / 2 == 0).item())
