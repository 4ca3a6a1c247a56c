"""One forward and backward per fresh initialisation, or per batch: a Record without a training loop."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.collect.arguments import Mask
from gradscope.collect.recorder import Recorder
from gradscope.errors import MeasureError
from gradscope.experiment.batches import mapped, model_loss, own_random_state
from gradscope.layers import Selection
from gradscope.record import Record, Step

__all__ = ["measure"]

Loss = Callable[[nn.Module, Any], Tensor]


def measure(
    make_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    loss: Loss | None = None,
    replicates: int = 5,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    layers: Selection | None = None,
    statistics: Iterable[str] | None = None,
    mask: Mask | None = None,
    loss_denominator: float | None = None,
) -> Record:
    """Measure gradients and activations over depth with one forward and backward per replicate.

    Given a maker, each replicate is a fresh initialisation, ``make_model()`` under
    ``torch.manual_seed(seed + r)``, on the same batch: the spread over replicates supports a claim
    about the *architecture*. Given a model, each replicate is a batch on the same weights: the
    spread supports a claim about *this model* only. The Record's header says which.

    The caller's models, gradients and random state are left as they were: a given model is copied.
    A floating-point trunk input is made to require grad, so that depth 0 has a gradient.

    ::

        record = gradscope.measure(lambda: MyTransformer(depth=24), batch, loss)
        gradscope.profile(record).mean_increment()

    Args:
        make_model: a function that returns a new model, or a model.
        batch: what ``loss`` takes; with a model, a list or iterator of such batches (or one of them).
        loss: function (model, batch) -> scalar tensor; None for ``model(**batch).loss``.
        replicates: number of initialisations; of batches, at most so many.
        seed: replicate r is made under ``seed + r``.
        dtype: convert model and floating-point batch tensors, e.g. ``torch.float64``.
        layers: what to measure, as in `gradscope.watch`.
        statistics: names from ``gradscope.record.STATISTICS``; None for all.
        mask: padding to leave out, as in `gradscope.watch`.
        loss_denominator: the N of the flow: 1 for a summed loss, the number of loss terms for a mean.
            None leaves absolute levels undefined (ratios over depth do not need it).

    Returns:
        A `Record` with step 0 and one replicate per initialisation or batch.

    Raises:
        LayerError: no depth axis, or a pattern that matches nothing.
        MeasureError: no scalar loss, a loss that no watched layer leads to, no batch.
    """
    if replicates < 1:
        raise ValueError(f"replicates= takes at least 1; got {replicates}")
    if isinstance(make_model, nn.Module):
        original = make_model
        batches = list(_batches(batch, replicates))
        if not batches:
            raise MeasureError(
                "measure() was given a model and no batch: the iterable of batches is empty."
            )
        kind, runs = "batch", [(lambda: copy.deepcopy(original), b) for b in batches]
    elif callable(make_model):
        kind, runs = "initialisation", [(make_model, batch)] * replicates
    else:
        raise TypeError(
            "measure() takes a function that makes the model, or a model; "
            f"got an object of type {type(make_model).__name__}."
        )
    header: dict[str, Any] = {
        "replicates": kind,
        "loss_denominator": loss_denominator,
        "seeds": {"first": seed, "replicates": len(runs)},
    }
    steps: list[Step] = []
    final: dict[str, Any] = {}
    model: nn.Module | None = None
    with own_random_state():
        for r, (make, data) in enumerate(runs):
            _seed(seed + r)
            previous, model = model, make()
            if model is previous:
                raise MeasureError(
                    "make_model() returned the same model twice: its replicates would be one and the "
                    "same. Make a new model in it (lambda: Model(...)), or give the model itself and "
                    "several batches: measure(model, [batch, ...], loss)."
                )
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"make_model() returned an object of type {type(model).__name__}, no nn.Module"
                )
            if dtype is not None:
                model = model.to(dtype)
                data = _to_dtype(data, dtype)
            step, final = _one(
                model,
                data,
                loss or model_loss,
                r,
                header,
                layers=layers,
                statistics=statistics,
                mask=mask,
            )
            steps.append(step)
    return Record(final, tuple(steps))


def _one(
    model: nn.Module, batch: Any, loss: Loss, replicate: int, header: Mapping[str, Any], **options: Any
) -> tuple[Step, dict[str, Any]]:
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    recorder = Recorder(
        model, header=header, warn=False, update=False, input_gradient=True, alone=True, **options
    )
    recorder.replicate = replicate
    try:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise MeasureError(f"loss(model, batch) must return a scalar tensor; it returned {shape}.")
        if not value.requires_grad:
            raise MeasureError(
                "The loss does not require grad: no parameter or input leads to it. Is it computed under "
                "torch.no_grad(), or detached, or is the whole model frozen?"
            )
        if not recorder.forwards and not any(p.calls for p in recorder.passes):
            raise MeasureError(
                "loss(model, batch) did not call the model it was given. It must use its first argument, "
                "not a model of the enclosing scope."
            )
        value.backward()
        if not recorder.reached:
            raise MeasureError(
                f"{len(recorder.layers)} layers measured, and the loss reaches none of them: no gradient "
                "came back through any. Is the loss computed from the model's output, without detach()?"
            )
        recorder.note_parameters()
        recorder.end_step(value.detach())
    finally:
        recorder.close(quiet=True)
        for parameter, gradient in gradients:
            parameter.grad = gradient  # of a model that the caller holds too
    if recorder.faults:
        raise MeasureError(f"gradscope failed while measuring: {dict(recorder.faults)}")
    return recorder.steps[0], recorder.header


def _batches(batch: Any, most: int) -> Iterator[Any]:
    if isinstance(batch, Tensor | Mapping | tuple) or not isinstance(batch, Iterable):
        yield batch
        return
    for i, item in enumerate(batch):
        if i == most:
            return
        yield item


def _to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    return mapped(batch, lambda t, path: t.to(dtype) if t.is_floating_point() else t)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
