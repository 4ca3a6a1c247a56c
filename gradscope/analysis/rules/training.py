"""Rules on how training moves: the size of updates, and sudden jumps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.trunk import norm
from gradscope.analysis.view import Grid, Site, View, spans

__all__ = ["spike", "update_ratio"]

Floats = npt.NDArray[np.float64]

#: Standard deviation of a Gaussian over its median absolute deviation.
_MAD: Final = 1.4826


# -- update-to-weight ratio ------------------------------------------------------------------------


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


# -- spikes ----------------------------------------------------------------------------------------


@register
@rule(
    name="spike",
    title="sudden spike",
    citation="loss and gradient spikes: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5.1",
    thresholds={
        "factor": Threshold(
            value=10.0, unit="1", source="below it, batches of one healthy run differ as much"
        ),
        "deviations": Threshold(
            value=8.0,
            unit="1",
            source="robust standard deviations of the logarithm, with tails heavier than a Gaussian's",
        ),
        "loss": Threshold(
            value=4.0,
            unit="1",
            source="robust standard deviations of ln loss: less is the spread of batches",
        ),
        "window": Threshold(value=50, unit="steps", source="recorded steps before, at most"),
        "least": Threshold(value=20, unit="steps", source="recorded steps before, at least"),
        "after": Threshold(
            value=5, unit="steps", source="recorded steps in which a spike reaches the loss"
        ),
    },
    explained_by=("non_finite", "update_ratio"),
)
def spike(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Loss or gradients jump: at least tenfold, and 8 robust deviations, above the window before.

    x_t against the median of the up to 50 recorded steps before it, in the logarithm, with the median
    absolute deviation times 1.4826 as deviation; and sudden: √10 times the largest of the three values
    before it. Looked at: the loss, the norm of all parameter gradients, the gradient at every output.
    Names the layers whose gradient jumped most. A jump of gradients that leaves the loss within 4
    deviations, then and in the five recorded steps after, is a note: that is how a net leaves a plateau,
    and optimizers with a second moment absorb it.
    """
    outputs, parameters = view.grid("output_grad", "l2"), view.grid("param_grad", "l2")
    columns = [view.loss[:, None], outputs.value]
    names = ["the loss"]
    if parameters.sites:
        total = norm(np.where(parameters.ok, parameters.value, 0.0))
        columns.insert(1, np.where(parameters.ok.any(1), total, np.nan)[:, None])
        names.append("the norm of all parameter gradients")
    values = np.concatenate(columns, axis=1)
    longest = max(len(rows) for rows in view.runs)
    if longest <= limits["least"]:
        yield limits.not_checked(
            f"needs more than {limits['least']:g} recorded steps of one run; there are {longest}"
        )
    else:
        known = view.loss[~np.isnan(view.loss)]
        if not len(known):
            yield limits.not_checked("the loss is not in the Record: write scope.log(loss=loss)")
        elif (known <= 0).any():
            yield limits.not_checked(
                f"the loss is 0 or below in {int((known <= 0).sum())} of {len(known)} steps, where no "
                "factor says how far it jumps: gradients alone were looked at there"
            )
    for rows in view.runs:
        jump, deviation, hit = _jumps(values[rows], limits)
        for first, last in _episodes(np.asarray(hit.any(1), dtype=np.bool_)):
            which = np.flatnonzero(hit[first])
            order = which[np.argsort(-jump[first, which], kind="stable")].tolist()
            sites = [outputs.sites[i - len(names)] for i in order if i >= len(names)]
            label = names[order[0]] if order[0] < len(names) else f"the gradient at {sites[0].name}"
            factor = math.exp(min(float(jump[first, order[0]]), 700.0))
            others = [names[i] for i in order[1:] if i < len(names)]
            others += [f"the gradient at {len(sites)} outputs"] if len(sites) > 1 else []
            steps = view.span(rows[first : last + 1])
            end = last + 1 + int(limits["after"])
            disturbed, said = _loss_after(
                view.loss[rows[first:end]], jump[first:end, 0], deviation[first, 0], limits
            )
            yield limits.finding(
                "factor",
                value=factor,
                sites=sites,
                trunk=None if sites else "",
                steps=steps,
                severity=None if disturbed else "note",
                message=(
                    f"At step {steps[0]} {label} is {factor:.3g} times its median over the steps before "
                    f"(threshold {limits['factor']:g} and {limits['deviations']:g} robust deviations)"
                    + (f"; so are {', '.join(others)}" if others else "")
                    + (f"; it lasts until step {steps[1]}. " if steps[1] > steps[0] else ". ")
                    + said
                ),
                cause="A bad batch (outlier, wrong label, other length), or a learning rate at the edge "
                "of stability.",
                remedy="Look at this step's batch; clip the gradient norm; PaLM went back about 100 "
                "steps and left out 200 to 500 batches. Frequent spikes: lower the learning rate.",
            )


def _loss_after(loss: Floats, rise: Floats, deviation: float, limits: Limits) -> tuple[bool, str]:
    """Whether a spike reached the loss, and that in words."""
    if np.isnan(loss).all():
        return True, "The loss is not in the record: write scope.log(loss=loss)."
    if np.isnan(rise).all() or math.isnan(deviation):
        return True, "Whether it reached the loss is not known: too few losses above 0 around it."
    if np.nanmax(rise) > limits["loss"] * deviation:
        factor = math.exp(min(float(np.nanmax(rise)), 700.0))
        return True, f"The loss reaches {factor:.3g} times its median."
    return False, "The loss is not disturbed."


def _jumps(series: Floats, limits: Limits) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Rise of ln x_t over the median before, robust deviation, where that is a spike. [T, P] → [T, P]."""
    with np.errstate(all="ignore"):
        y = np.where((series > 0) & np.isfinite(series), np.log(series), np.nan)
    rise, deviation = np.full(y.shape, np.nan), np.full(y.shape, np.nan)
    sudden = np.zeros(y.shape, dtype=np.bool_)
    least, window = int(limits["least"]), int(limits["window"])
    for t in range(least, len(y)):
        before = y[max(0, t - window) : t]
        at = np.flatnonzero(((~np.isnan(before)).sum(0) >= least) & ~np.isnan(y[t]))
        if not len(at):
            continue
        before = before[:, at]
        middle = np.nanmedian(before, axis=0)
        rise[t, at] = y[t, at] - middle
        deviation[t, at] = _MAD * np.nanmedian(np.abs(before - middle), axis=0)
        recent = np.where(np.isnan(before[-3:]), -np.inf, before[-3:]).max(0)
        sudden[t, at] = y[t, at] - recent > math.log(limits["factor"]) / 2
    with np.errstate(invalid="ignore"):
        hit = sudden & (rise > math.log(limits["factor"])) & (rise > limits["deviations"] * deviation)
    return rise, deviation, hit


def _episodes(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of every stretch of true flags; gaps of up to two belong to it."""
    found: list[tuple[int, int]] = []
    for i in np.flatnonzero(flags).tolist():
        if found and i - found[-1][1] <= 3:
            found[-1] = (found[-1][0], i)
        else:
            found.append((i, i))
    return found
