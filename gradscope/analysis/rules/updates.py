"""How far each optimizer step moves the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.trunk import norm
from gradscope.analysis.view import Grid, Site, View, spans

__all__ = ["update_ratio"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Group:
    """The parameters of one block, or of one module off the axis."""

    site: Site
    columns: tuple[int, ...]


def _groups(sites: tuple[Site, ...]) -> list[_Group]:
    found: dict[tuple[str, float, str], list[int]] = {}
    for i, site in enumerate(sites):
        on_axis = site.depth == site.depth
        key = (
            site.trunk,
            float(math.ceil(site.depth)) if on_axis else 0.0,
            "" if on_axis else site.owner,
        )
        found.setdefault(key, []).append(i)
    groups: list[_Group] = []
    for (trunk, depth, owner), columns in found.items():
        name = owner or _common([sites[i].owner for i in columns])
        groups.append(_Group(Site(trunk, depth if trunk else math.nan, name, "", 0), tuple(columns)))
    return groups


def _common(names: list[str]) -> str:
    """The longest dotted prefix of all of them."""
    parts = [name.split(".") for name in names]
    length = 0
    while all(len(p) > length for p in parts) and len({p[length] for p in parts}) == 1:
        length += 1
    return ".".join(parts[0][:length])


@register
@rule(
    name="update_ratio",
    title="update-to-weight ratio out of range",
    citation="Karpathy, CS231n notes, 'Neural Networks 3: ratio of weights:updates': about 1e-3",
    thresholds={
        "high": Threshold(
            value=1e-1, unit="1", source="CS231n notes: about 1e-3, here a hundred times that"
        ),
        "low": Threshold(
            value=1e-5, unit="1", source="CS231n notes: about 1e-3, here a hundredth of that"
        ),
        "samples": Threshold(
            value=3, unit="samples", source="so many samples in a row, so that one bad batch is none"
        ),
    },
    needs=[("update", "l2"), ("weight", "l2")],
)
def update_ratio(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """‖ΔW‖/‖W‖ of a block's parameters (off the axis, of a module's) above .1 or below 1e-5.

    Of updates, after the optimizer, not of gradients. High: in three sampled steps in a row, the first
    sample left out, because optimizers with a second moment begin with their largest steps. Low: at
    every sample, so that the end of a schedule does not count; not judged while the learning rate still
    rises. What is initialised to zero has no such ratio and is left out.
    """
    update, weight = view.grid("update", "l2"), view.grid("weight", "l2")
    at = {site: i for i, site in enumerate(weight.sites)}
    shared = [i for i, site in enumerate(update.sites) if site in at]
    update = update.take(shared)
    weight = weight.take([at[site] for site in update.sites])
    both = update.ok & weight.ok
    zero: list[str] = []
    few = 0
    for rows in view.runs:
        for group in _groups(update.sites):
            columns = [i for i in group.columns if both[rows][:, i].any()]
            if not columns:
                continue
            sampled = rows[both[rows][:, columns].any(1)]
            there = both[sampled][:, columns]
            moved = np.where(there, update.value[sampled][:, columns], 0.0)
            size = norm(np.where(there, weight.value[sampled][:, columns], 0.0))
            if size[0] == 0:
                zero.append(group.site.name)
                continue
            with np.errstate(all="ignore"):
                ratio = norm(moved) / size
            if len(sampled) < limits["samples"]:
                few += 1
                continue
            yield from _too_high(view, limits, group, update, columns, sampled, moved, ratio)
            yield from _too_low(view, limits, group, sampled, ratio)
    if zero:
        yield limits.not_checked(f"initialised to zero, which has no ratio: {spans(zero)}")
    if few:
        yield limits.not_checked(
            f"fewer than {limits['samples']:g} sampled steps (slow_every= of the watch)"
        )


def _too_high(
    view: View,
    limits: Limits,
    group: _Group,
    update: Grid,
    columns: list[int],
    sampled: npt.NDArray[np.int64],
    moved: Floats,
    ratio: Floats,
) -> Iterator[Finding]:
    run = _longest_run(ratio > limits["high"], start=1)
    if len(run) < limits["samples"]:
        return
    steps = view.span(sampled[run])
    peak = int(run[np.argmax(ratio[run])])
    most = update.sites[columns[int(np.argmax(moved[run].max(0)))]]
    yield limits.finding(
        "high",
        value=float(ratio[peak]),
        sites=[most._replace(layer=most.owner, type=""), group.site],
        steps=steps,
        message=(
            f"The updates of {group.site.name} are {ratio[peak]:.2g} of its weights at step "
            f"{view.steps[int(sampled[peak])].step} (threshold {limits['high']:g}), and above it at "
            f"{len(run)} samples in a row, steps {steps[0]}–{steps[1]}. Most of it is {most.layer}."
        ),
        cause="The learning rate of these parameters is too high, or the optimizer's second moment is "
        "still far too small.",
        remedy="Lower the learning rate (of this parameter group) by the factor that is missing to 1e-3, "
        "or warm it up.",
    )


def _too_low(
    view: View, limits: Limits, group: _Group, sampled: npt.NDArray[np.int64], ratio: Floats
) -> Iterator[Finding | NotChecked]:
    if len(ratio) < limits["samples"] or not (ratio < limits["low"]).all():
        return
    rate = view.learning_rate[sampled]
    if rate[-1] == rate.max() and rate[-1] > 1.5 * rate[0]:
        yield limits.not_checked(
            f"the updates of {group.site.name} are small, and the learning rate still rises (warm-up)"
        )
        return
    steps = view.span(sampled)
    middle = float(np.median(ratio))
    yield limits.finding(
        "low",
        value=middle,
        sites=[group.site],
        steps=steps,
        title="weights hardly move",
        message=(
            f"The updates of {group.site.name} are {middle:.2g} of its weights in the median, and below "
            f"the threshold {limits['low']:g} at all {len(ratio)} samples, steps "
            f"{steps[0]}–{steps[1]}."
        ),
        cause=(
            "These parameters were never updated: they are not in the optimizer, or their learning rate "
            "is 0."
            if middle == 0
            else "The learning rate of these parameters is too low, or their gradient vanishes."
        ),
        remedy="Give the parameters to the optimizer, or raise their learning rate to a ratio of 1e-3.",
    )


def _longest_run(flags: npt.NDArray[np.bool_], start: int) -> npt.NDArray[np.int64]:
    """Indices of the longest run of true flags from ``start`` on."""
    best: list[int] = []
    current: list[int] = []
    for i in range(start, len(flags)):
        current = [*current, i] if flags[i] else []
        if len(current) > len(best):
            best = current
    return np.asarray(best, dtype=np.int64)
