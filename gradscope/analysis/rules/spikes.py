"""Sudden jumps of the loss or of gradients against the recent window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.trunk import norm
from gradscope.analysis.view import View

__all__ = ["spike"]

Floats = npt.NDArray[np.float64]

#: Standard deviation of a Gaussian over its median absolute deviation.
_MAD: Final = 1.4826


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
