"""Does gradscope tell the truth here? A test of itself on the caller's own model, batch and machine."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.collect.recorder import Recorder
from gradscope.collect.schedule import Schedule
from gradscope.errors import LayerError, MeasureError
from gradscope.experiment.batches import loss_or_own, own_random_state
from gradscope.experiment.doctor.oracle import Expected, expected_values, wide
from gradscope.experiment.doctor.ranks import over_ranks, spread
from gradscope.experiment.doctor.report import Check, DoctorReport, SignalCheck, WrongValue
from gradscope.experiment.doctor.traces import differences, traces
from gradscope.experiment.doctor.training import (
    Setup,
    Trainer,
    bit_identity,
    memory,
    overhead,
    retention,
)
from gradscope.experiment.doctor.values import compared
from gradscope.experiment.untouched import unwrapped
from gradscope.layers import Selection, named_layers
from gradscope.layers.naming import callable_layers

__all__ = ["Check", "DoctorReport", "SignalCheck", "WrongValue", "doctor"]


def doctor(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    layers: Selection | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    seconds: float = 5.0,
    progress: bool = True,
) -> DoctorReport:
    """Check every recorded value against autograd on an unwatched copy, and that nothing is disturbed.

    The model itself is only copied. Its copies run one step watched with the slow statistics, and one
    without; unwatched, one with a leaf of zeros added to every module's output, whose ``.grad`` is the
    truth; a few steps watched and unwatched, which must be bit-identical; and pairs of steps for the
    costs. Hooks, attributes and torch's global state are compared before and after the watch.

    ::

        print(gradscope.doctor(model, batch, loss))

    A model under DistributedDataParallel is judged as the module inside of it and by its values over all
    ranks: every rank calls this then, on its own batch.

    Args:
        model: the model, in the mode in which it is trained.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)`` → scalar tensor; put ``autocast`` and the like inside. None:
            ``model(**batch).loss``.
        layers: what is watched, as in `gradscope.watch`; None: the default watch, and for the
            values every module.
        optimizer: makes the optimizer from a list of parameters; None: AdamW with a rate of 1e-3.
        seconds: how long to time the overhead; 0 leaves it out.
        progress: whether to say on a terminal what is being done.

    Returns:
        A `DoctorReport`: ``ok``, every wrong value, and the table that it prints.

    Raises:
        MeasureError: the model cannot be copied, or the loss is no scalar that requires grad.
    """
    original = unwrapped(model)
    name = type(original).__name__
    setup = Setup(
        copy=lambda: _copied(original),
        batch=batch,
        loss=loss_or_own(loss, batch),
        optimizer=optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)),
        layers=layers,
    )
    everything = Setup(
        copy=setup.copy,
        batch=batch,
        loss=setup.loss,
        optimizer=setup.optimizer,
        layers="**" if layers is None else layers,
    )

    def dice() -> Any:
        return own_random_state((*original.parameters(), *original.buffers()))

    def say(text: str) -> None:
        if progress and sys.stderr.isatty():
            print(f"\rgradscope doctor: {text:<40}", end="", file=sys.stderr, flush=True)

    try:
        say("watching")
        axis, hooks = _axis(setup)
    except LayerError as error:
        return DoctorReport(model=name, refused=str(error))
    with torch.inference_mode(False), torch.enable_grad():
        say("values")
        signals, wrong, checks = _values(everything, dice)
        ranks = spread(model)
        if ranks is not None:
            say("values over ranks")
            pooled, more = over_ranks(ranks, everything, dice)
            checks, wrong = [*checks, pooled], (*wrong, *more)
        say("bit-identity")
        checks += [bit_identity(setup, dice), hooks]
        with dice():
            say("memory")
            checks += [retention(setup), memory(setup)]
        if seconds > 0:
            with dice():
                say("overhead")
                checks.append(overhead(setup, seconds))
    say("done")
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)
    return DoctorReport(model=name, signals=signals, wrong=wrong, checks=(axis, *checks))


def _copied(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise MeasureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the doctor "
            "needs unwatched copies to compare with. Detach the tensors that the model keeps as "
            "attributes, or give a freshly built model."
        ) from error
    twin.zero_grad(set_to_none=True)
    return twin


def _axis(setup: Setup) -> tuple[Check, Check]:
    """The depth axis that the default watch finds; and whether closing it restores everything."""
    model = setup.copy()
    before = traces(model)
    recorder = setup.watch(model)
    trunks = recorder.header["trunks"]
    recorder.close(quiet=True)
    left = differences(before, traces(model))
    found = ", ".join(f"{trunk}: {blocks} blocks" for trunk, blocks in trunks.items())
    detail = f"{', '.join(left[:3])} not as before" if left else "every hook, attribute and flag"
    return (
        Check(name="depth axis", ok=None, detail=found or "none: the layers have no depth"),
        Check(name="restored by close()", ok=not left, detail=detail),
    )


def _values(
    setup: Setup, dice: Callable[[], Any]
) -> tuple[tuple[SignalCheck, ...], tuple[WrongValue, ...], list[Check]]:
    trainer = Trainer(setup, setup.copy())
    names = callable_layers(trainer.model)
    weights = {n: p.detach().clone() for n, p in _named_parameters(trainer.model)}
    recorder, loss = _watched_step(setup, trainer, dice)
    record = recorder.record
    checks = [
        Check(
            name="errors inside gradscope",
            ok=not recorder.faults,
            detail=", ".join(f"{k} ({n} times)" for k, n in recorder.faults.items()) or "none",
        )
    ]
    if not record.steps:
        return (), (), [*checks, Check(name="values", ok=False, detail="nothing was recorded")]
    parameters: dict[tuple[str, int, str, str], float] = {}
    for n, p in _named_parameters(trainer.model):
        parameters[n, 0, "weight", "l2"] = float(wide(weights[n]).norm())
        parameters[n, 0, "weight", "count"] = float(p.numel())
        if p.requires_grad:
            change = wide(p) - wide(weights[n])
            parameters[n, 0, "update", "l2"] = float(change.norm())
            parameters[n, 0, "update", "count"] = float(p.numel())
    table = record.table(type="Stream")
    # Where a block has no module of its own, its input is that of the first of its parts.
    parts = {layer.name: layer.parts[0] for layer in recorder.layers if layer.parts}
    inputs = {str(name): str(parts.get(name, name)) for name in set(table["layer"].tolist())}
    runs: list[Expected] = []
    for perturbed in (False, True):
        twin = setup.copy()
        if perturbed:
            _perturb(twin)
        with dice():
            runs.append(
                expected_values(twin, setup.own_batch(), setup.loss, callable_layers(twin), inputs)
            )
    watched = {layer.name for layer in recorder.layers} if setup.layers != "**" else set(names)
    signals, wrong = compared(record, runs[0], runs[1], parameters, watched)
    # Most steps have no slow statistics, and their hooks may take another way.
    ordinary, _ = _watched_step(setup, Trainer(setup, setup.copy()), dice, schedule=_Ordinary())
    again, more = compared(ordinary.record, runs[0], runs[1], parameters, watched)
    known = {(w.layer, w.call, w.signal, w.statistic) for w in wrong}
    wrong += tuple(w for w in more if (w.layer, w.call, w.signal, w.statistic) not in known)
    said = f"{sum(s.right for s in again)} right, {len(more)} wrong, without slow statistics"
    faults = ", ".join(f"{k} ({n} times)" for k, n in ordinary.faults.items())
    fine = not (more or faults)
    checks.append(Check(name="values of an ordinary step", ok=fine, detail=faults or said))
    noise = abs(runs[0].loss - runs[1].loss)
    seen = float(loss)
    same = seen == runs[0].loss or (math.isnan(seen) and math.isnan(runs[0].loss))
    same = same or abs(seen - runs[0].loss) <= 4 * noise + 1e-6 * abs(runs[0].loss)
    detail = f"{runs[0].loss:.6g}, watched {seen:.6g}"
    checks.append(Check(name="loss of the copy", ok=same, detail=detail))
    return signals, wrong, checks


@dataclass(frozen=True, slots=True)
class _Ordinary(Schedule):
    """No step has the slow statistics, not even the first."""

    def slow(self, step: int) -> bool:
        return False


def _watched_step(
    setup: Setup, trainer: Trainer, dice: Callable[[], Any], **options: Any
) -> tuple[Recorder, Tensor]:
    """One step of a copy, watched; what recorded it, and the loss."""
    recorder = setup.watch(trainer.model, **options)
    try:
        with dice():
            loss = trainer.step()
    finally:
        recorder.close(quiet=True)
    return recorder, loss


def _perturb(model: nn.Module) -> None:
    """Change every parameter in its last digit."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                digit = torch.finfo(parameter.dtype).eps
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1 + digit * noise)


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    seen: set[int] = set()
    found: list[tuple[str, nn.Parameter]] = []
    for owner, module in named_layers(model).items():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{owner}.{attribute}" if owner else attribute, parameter))
    return found
