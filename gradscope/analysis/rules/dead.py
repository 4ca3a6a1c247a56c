"""Layers through which nothing passes: dead ones, and those that are zero by construction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import Grid, Site, View, spans

__all__ = ["dead_layer", "zero_by_construction"]

_SIGNALS: Final = ("activation", "output_grad", "param_grad")
_LONG: Final = Threshold(
    value=20,
    unit="steps",
    source="zero-initialised heads, branches and adapters have a gradient after one or two steps",
)
_ZERO_INIT: Final = (
    "zero-initialised branches: Zhang et al. 2019, Fixup, arXiv:1901.09321; adapters: Hu et al. 2021, "
    "LoRA, arXiv:2106.09685"
)


@dataclass(slots=True)
class _Dead:
    """What became exactly zero at one step of one run, in the order of the passes."""

    rows: list[int]
    sites: dict[str, list[Site]] = field(default_factory=dict)


def _by_owner(grid: Grid) -> Grid:
    """The largest norm over the parameters of each module; absent where none is present."""
    owners: dict[Site, list[int]] = {}
    for i, site in enumerate(grid.sites):
        owners.setdefault(site._replace(layer=site.owner, type=""), []).append(i)
    present = [grid.ok[:, at].any(1) for at in owners.values()]
    largest = [np.where(grid.ok[:, at], grid.value[:, at], 0.0).max(1) for at in owners.values()]
    return Grid(tuple(owners), np.stack(largest, axis=1), np.stack(present, axis=1))


def _norms(view: View) -> Iterator[tuple[str, Grid]]:
    for signal in _SIGNALS:
        grid = view.grid(signal, "l2")
        if signal == "param_grad" and grid.sites:
            grid = _by_owner(grid)
        if signal == "output_grad":
            grid = grid.take(range(len(grid.sites))[::-1])
        yield signal, grid


_NO_NORM: Final = "no norm (l2) of the output of any layer, or of its gradient, in the Record"


def _any_norm(view: View) -> bool:
    return view.has("activation", "l2") or view.has("output_grad", "l2")


def _trailing_zeros(series: npt.NDArray[np.float64]) -> int:
    """Number of exact zeros at the end."""
    alive = np.flatnonzero(series != 0)
    return len(series) - (int(alive[-1]) + 1 if len(alive) else 0)


def _zero_since(
    view: View, rows: npt.NDArray[np.int64], *, from_start: bool, least: int, most: float
) -> dict[int, _Dead]:
    """By the first row of the zeros: what is exactly zero from there to the end of the run."""
    found: dict[int, _Dead] = {}
    for signal, grid in _norms(view):
        for column, site in enumerate(grid.sites):
            present = rows[grid.ok[rows, column]]
            zeros = _trailing_zeros(grid.value[present, column])
            if not least <= zeros <= most or (zeros == len(present)) != from_start:
                continue
            dead = found.setdefault(int(present[-zeros]), _Dead([]))
            dead.rows += [int(present[-zeros]), int(present[-1])]
            dead.sites.setdefault(signal, []).append(site)
    return found


def _described(sites: dict[str, list[Site]]) -> str:
    words = {
        "activation": "the activation of",
        "output_grad": "the gradient at the output of",
        "param_grad": "the gradient of the parameters of",
    }
    return "; ".join(f"{words[s]} {spans([site.name for site in at])}" for s, at in sites.items())


def _in_order(sites: dict[str, list[Site]]) -> list[Site]:
    return [site for signal in _SIGNALS for site in sites.get(signal, [])]


@register
@rule(
    name="dead_layer",
    title="dead layer",
    citation="dying ReLU: Lu et al. 2019, arXiv:1903.06733",
    thresholds={
        "steps": Threshold(
            value=3,
            unit="steps",
            source="recorded steps in a row, to the end: one batch without any gradient is chance",
        ),
        "from_start": _LONG,
    },
    explained_by=("non_finite", "underflow", "update_ratio", "spike"),
)
def dead_layer(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Activations or gradients of a layer that are exactly zero, to the end of the record.

    Dead is what had a nonzero value before and then none in at least three recorded steps, or none in
    more than 20 recorded steps from the start. What died at one step is one finding, first the layer
    where it starts: the first zero activation in the forward pass, else the zero gradient nearest to
    the loss. Parameters count by module: a bias alone may have no gradient.
    """
    longest = max(len(rows) for rows in view.runs)
    if not _any_norm(view):
        yield limits.not_checked(_NO_NORM)
    elif longest < limits["steps"]:
        yield limits.not_checked(
            f"needs {limits['steps']:g} recorded steps of one run; there "
            f"{'is' if longest == 1 else 'are'} {longest}"
        )
    merged: dict[tuple[int, tuple[Site, ...]], Finding] = {}
    for rows in view.runs:
        for had, least in ((True, limits["steps"]), (False, limits["from_start"] + 1)):
            found = _zero_since(view, rows, from_start=not had, least=int(least), most=np.inf)
            for row, dead in found.items():
                sites = _in_order(dead.sites)
                steps = view.span(dead.rows)
                count = int(((rows >= row) & (rows <= max(dead.rows))).sum())
                since = "and had values before" if had else "and never had a value"
                name = "steps" if had else "from_start"
                # Replicates in which the same died at the same step are one finding.
                merged.setdefault(
                    (steps[0], tuple(sites)),
                    limits.finding(
                        name,
                        value=count,
                        sites=sites,
                        steps=steps,
                        message=(
                            f"Exactly zero from step {steps[0]} to {steps[1]} ({count} recorded steps, "
                            f"threshold {limits[name]:g}), {since}: {_described(dead.sites)}."
                        ),
                        cause=_cause(dead.sites),
                        remedy="Look at the first of these layers at that step. For ReLU: a smaller "
                        "learning rate, He initialisation, or a leaky activation. Or its output is "
                        "multiplied by zero further on.",
                    ),
                )
    yield from merged.values()


def _cause(sites: dict[str, list[Site]]) -> str:
    if "activation" in sites:
        return (
            f"All outputs of {sites['activation'][0].name} are zero: every unit is on the flat side "
            "of its activation (a large step or bias), or its weights or scale became zero."
        )
    if "output_grad" in sites:
        return (
            f"No gradient comes back through what follows {sites['output_grad'][0].name}: a dead or "
            "saturated layer inside it, a clamp, an underflow, or a loss that is exactly zero."
        )
    return (
        f"The module {sites['param_grad'][0].name} is called but gets no gradient: its units are all on "
        "the flat side of their activation, or its output is multiplied by zero."
    )


@register
@rule(
    name="zero_by_construction",
    title="zero by construction",
    severity="note",
    citation=_ZERO_INIT,
    thresholds={"from_start": _LONG},
    explained_by=("underflow", "dead_layer"),
)
def zero_by_construction(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Activations or gradients that are exactly zero since the first step, for at most 20 recorded steps.

    A zero-initialised head, ReZero's α, LoRA's B: nothing passes at first, by design. A note; only what
    lasts longer than 20 recorded steps is called dead.
    """
    if not _any_norm(view):
        yield limits.not_checked(_NO_NORM)
    named: dict[tuple[Site, ...], Finding] = {}
    for rows in view.runs:
        found = _zero_since(view, rows, from_start=True, least=1, most=limits["from_start"])
        for dead in found.values():
            sites = _in_order(dead.sites)
            steps = view.span(dead.rows)
            named.setdefault(
                tuple(sites),
                limits.finding(
                    "from_start",
                    value=len({row for row in rows.tolist() if row <= max(dead.rows)}),
                    sites=sites,
                    steps=steps,
                    message=(
                        f"Exactly zero since the first recorded step (to step {steps[1]}): "
                        f"{_described(dead.sites)}. It is called dead after more than "
                        f"{limits['from_start']:g} recorded steps."
                    ),
                    cause="A zero-initialised weight or scale, or an underflow.",
                    remedy="Nothing, if it is meant. Train a few steps under the watch: it must go away.",
                ),
            )
    yield from named.values()
