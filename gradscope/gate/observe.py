"""Replicates of a model as a baseline holds them: for taking one, and for comparing with one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from torch import nn

from gradscope.analysis.decay import fit_decay
from gradscope.errors import GateError, GradscopeError, MeasureError
from gradscope.experiment.checksum import digest
from gradscope.experiment.effective_depth import effective_depth
from gradscope.experiment.progress import counted
from gradscope.experiment.replicate import (
    Replicate,
    Replicates,
    initial_facts,
    joined,
    kinds_of_skip,
)
from gradscope.gate.baseline import PAIRED, Baseline, ParameterRow
from gradscope.gate.seen import Seen
from gradscope.layers import select
from gradscope.record import Record

__all__ = ["ONE_START", "as_batches", "bare", "depths", "observe", "skips", "take"]

#: What is wrong with replicates that are one.
ONE_START: Final = (
    "make_model() starts with the same weights under every seed, so that its replicates are one: it sets "
    "a seed of its own, or loads weights. Take that out of it, or give the model itself and a list of "
    "batches"
)


def as_batches(batch: Any) -> list[Any]:
    """The batches that a given model is measured on.

    Raises:
        GateError: one batch instead of several.
    """
    if isinstance(batch, Mapping) or hasattr(batch, "shape") or not isinstance(batch, Iterable):
        raise GateError(
            "A given model has no initialisations to repeat: its replicates are batches. Give a list of "
            "20 batches, or a function that makes the model: lambda: Model(...)."
        )
    return list(batch)


def take(
    make_model: Any,
    batch: Any,
    loss: Any = None,
    *,
    replicates: int = 20,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
) -> Baseline:
    """See `gradscope.gate.take`."""
    runner = Replicates(make_model, batch, loss)
    if isinstance(make_model, nn.Module):
        batches = as_batches(batch)[:replicates]
        numbers = list(range(len(batches)))
    else:
        batches = []
        numbers = list(range(replicates) if seeds is None else seeds)
    digests = [digest(item)[0] for item in batches]
    if len(set(digests or numbers)) < max(3, len(numbers)):
        raise GateError(
            f"{len(numbers)} replicates are too few, or some are the same: take 20 different ones (with "
            "5, one baseline in eight fails every later run)."
        )
    found = [
        runner.run(n, batches[n] if batches else None, checksums=i < PAIRED)
        for i, n in enumerate(counted(numbers, "gradient baseline: replicate", show=progress))
    ]
    first = batches[0] if batches else batch
    effective, why = depths(runner, numbers[:PAIRED], batches or [batch] * PAIRED, loss)
    taken = observe(
        found,
        batch=first,
        batches=digests,
        architecture=skips(runner, found[0], first, loss),
        effective_depth=effective,
        no_depth=why,
    )
    _must_say_something(taken)
    return taken


def _must_say_something(baseline: Baseline) -> None:
    """Refuse what later runs could pass without any gradient, or fail by no noise."""
    drawn = [p.checksum for p in baseline.parameters.values() if not p.constant]
    if baseline.kind == "initialisation" and drawn and all(len(set(c)) == 1 for c in drawn):
        raise GateError(f"{ONE_START}.")
    gradients = [x for x in baseline.features if x.feature.kind in ("flow", "gup", "param_grad")]
    if not any(item.state == "value" for item in gradients):
        raise GateError(
            "No gradient of this model is a finite number other than 0 in every replicate: a baseline of "
            "it would guard nothing. gradscope.testing.assert_healthy says what is wrong."
        )


def skips(runner: Replicates, first: Replicate, batch: Any, loss: Any) -> Mapping[str, str]:
    """The architecture table; empty where it cannot be read."""
    try:
        return kinds_of_skip(runner.model(first.seed), batch, loss)
    except MeasureError:
        return {}


def depths(
    runner: Replicates, seeds: Sequence[int], batches: Sequence[Any], loss: Any
) -> tuple[tuple[float, ...], str]:
    """Effective depth D of each seed's model; empty where it does not exist for this model, and why."""
    found: list[float] = []
    for seed, batch in zip(seeds, batches, strict=False):
        try:
            value = effective_depth(runner.model(seed), batch, loss, progress=False).value
        except GradscopeError as error:
            return (), str(error)
        if not math.isfinite(value):
            return (), "no sum over paths is finite"
        found.append(value)
    return tuple(found), ""


def bare(runner: Replicates, seed: int, baseline: Baseline) -> Baseline:
    """What one initialisation says of the parameters, without running it: all else is empty."""
    model = runner.model(seed)
    layers = [layer.name for layer, _ in select(model, None) if layer.is_block]
    return Baseline(
        kind=baseline.kind,
        fingerprint={},
        summary={},
        effective_depth=(),
        seeds=(seed,),
        batches=(),
        blocks=tuple(layers),
        architecture={},
        parameters={
            name: ParameterRow(x.shape, x.requires_grad, "", None, x.constant, (x.checksum,))
            for name, x in initial_facts(model).items()
        },
        features=(),
        nonfinite=False,
        activation={},
        output_grad={},
    )


def observe(
    replicates: Sequence[Replicate],
    *,
    batch: Any,
    batches: Sequence[str] = (),
    architecture: Mapping[str, str] | None = None,
    effective_depth: tuple[float, ...] = (),
    no_depth: str = "",
    summary: bool = True,
) -> Baseline:
    """What these replicates say, as a `Baseline`; a run that is compared with one has the same form.

    Args:
        replicates: of one model.
        batch: the batch, or the first of them.
        batches: digests, where replicates are batches.
        architecture: block → kinds of skip.
        effective_depth: of the first replicates.
        no_depth: why there is none.
        summary: whether to fit the family of decay, for the reader.
    """
    record = joined(replicates)
    seen = Seen.of(replicates, record, batch)
    return replace(
        seen.baseline(range(len(replicates)), batches),
        summary=_summary(record, effective_depth, no_depth) if summary else {},
        effective_depth=effective_depth,
        architecture=architecture or {},
    )


def _summary(record: Record, effective: tuple[float, ...], no_depth: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for trunk in record.trunks:
        what = f" of {trunk}" if len(record.trunks) > 1 else ""
        try:
            fit = fit_decay(record, trunk=trunk)
        except GradscopeError as error:
            found[f"decay{what}"] = str(error)
            continue
        found[f"family{what}"] = fit.family if fit.ok else fit.status
        found[f"Δ{what}"] = f"{fit.delta} nats"
        found[f"ξ{what}"] = str(fit.depth_scale)
    if effective:
        found["D"] = f"{np.mean(effective):.4g} branches (mean of {len(effective)})"
    else:
        found["D"] = f"none. {no_depth}"
    return found
