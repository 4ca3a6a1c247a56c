"""Values over ranks: what a watched copy under DDP records, against every rank's own autograd.

Each rank runs an unwatched copy on its own batch, outside of DDP. The whole batch's values follow from
these by sums over ranks: a parameter's gradient is the mean of the ranks' gradients; of an output the
squares of all ranks' elements are added, and its gradient is divided by the number of ranks first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradscope.experiment.doctor.oracle import Expected, expected_values, wide
from gradscope.experiment.doctor.report import Check, WrongValue
from gradscope.experiment.doctor.training import Setup, Trainer
from gradscope.layers.naming import callable_layers
from gradscope.record import Record

__all__ = ["over_ranks", "spread"]

#: Relative differences that are rounding.
_TOLERANCE: Final = 2e-5
_NAME: Final = "values over ranks"
Truth = dict[tuple[str, int, str, str], float]


def spread(model: nn.Module) -> DistributedDataParallel | None:
    """The model, where it is under DDP on more than one rank."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, DistributedDataParallel):
        return None
    return inner if dist.get_world_size(inner.process_group) > 1 else None


def over_ranks(
    model: DistributedDataParallel, setup: Setup, dice: Callable[[], Any]
) -> tuple[Check, tuple[WrongValue, ...]]:
    """Watch one step of a copy under DDP; all ranks call this, each with its own batch."""
    group = model.process_group
    twin = setup.copy()
    with dice():
        names = callable_layers(twin)
        own = expected_values(twin, setup.own_batch(), setup.loss, names, {})
    truth = _truth(own, dict(_trained(twin)), group)
    wrapped = DistributedDataParallel(
        setup.copy(), process_group=group, find_unused_parameters=model.find_unused_parameters
    )
    recorder = setup.watch(wrapped)
    try:
        with dice():
            Trainer(setup, wrapped).step()
    finally:
        recorder.close(quiet=True)
    return _judged(recorder.record, truth, dist.get_world_size(group))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _truth(own: Expected, parameters: dict[str, nn.Parameter], group: Any) -> Truth:
    """The whole batch's values from the ranks' own; the same sums on every rank, in one order."""
    world = dist.get_world_size(group)
    truth: Truth = {}
    for name, parameter in parameters.items():
        gradient = own.parameter_gradient.get(name)
        shape = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        total = shape if gradient is None else wide(gradient.to_dense()).to(shape).clone()
        dist.all_reduce(total, group=group)
        truth[name, 0, "param_grad", "l2"] = float(total.norm()) / world
    sums: dict[tuple[str, int, str], tuple[float, int]] = {}
    for signal, tensors in (("activation", own.activation), ("output_grad", own.gradient)):
        for (layer, call), x in tensors.items():
            if (layer, call) not in own.unsure:
                sums[layer, call, signal] = (float(wide(x).norm()), x.numel())
    found: list[Any] = [None] * world
    dist.all_gather_object(found, sums, group=group)
    # What ran on some ranks only is a matter of those.
    for key in dict.fromkeys(key for part in found for key in part):
        lengths, counts = zip(*(part[key] for part in found if key in part), strict=True)
        share = world if key[2] == "output_grad" else 1
        truth[*key, "l2"] = math.hypot(*cast("tuple[float, ...]", lengths)) / share
        truth[*key, "count"] = float(sum(counts))
    return truth


def _judged(record: Record, truth: Truth, world: int) -> tuple[Check, tuple[WrongValue, ...]]:
    right, local, wrong = 0, 0, list[WrongValue]()
    table = record.table(step=record.steps[-1].step) if record.steps else record.table()
    for i, layer in enumerate(table["layer"].tolist()):
        key = (layer, int(table["call"][i]), str(table["signal"][i]), str(table["statistic"][i]))
        expected, status = truth.get(key), str(table["status"][i])
        if expected is None or table["type"][i] == "Stream":
            continue
        value = float(table["value"][i])
        local += status == "local"
        if status != "ok":
            continue
        if math.isclose(value, expected, rel_tol=_TOLERANCE, abs_tol=1e-12):
            right += 1
        else:
            said = f"recorded {value:.6g}, the {world} ranks together have {expected:.6g}"
            wrong.append(
                WrongValue(
                    layer=layer or "the model",
                    call=key[1],
                    signal=key[2],
                    statistic=key[3],
                    recorded=value,
                    expected=expected,
                    why=said,
                )
            )
    detail = f"{right} right, {len(wrong)} wrong, {local} local, on {world} ranks"
    return Check(name=_NAME, ok=right > 0 and not wrong, detail=detail), tuple(wrong)
