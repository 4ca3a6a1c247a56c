"""NaN and infinite values, and where they began."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import Grid, Site, View

__all__ = ["non_finite"]


def _broken(view: View, signal: str) -> Grid:
    """Number of non-finite elements; where only the norm was stored, 1 for a norm that is not finite."""
    grid, l2 = view.grid(signal, "nonfinite"), view.grid(signal, "l2")
    if not grid.sites:
        return Grid(l2.sites, np.where(np.isfinite(l2.value), 0.0, 1.0), l2.ok)
    return grid


@register
@rule(
    name="non_finite",
    title="NaN or infinite values",
    severity="critical",
    citation="IEEE 754; the first culprit by the order of the passes",
    thresholds={
        "elements": Threshold(value=0, unit="elements", source="any NaN or infinity spreads to the loss")
    },
    explained_by=("update_ratio", "skipped_steps"),
)
def non_finite(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """The first layer, signal and step with NaN or infinite elements.

    First in time: the earliest step; within it activations in the order of the forward pass, then
    gradients from the loss end, then parameter gradients. Everything after it is counted in the message.
    Infinite activations that nothing later takes over, with a finite loss and finite gradients, are a
    note: additive masks hold −∞ on purpose.
    """
    grids = {s: _broken(view, s) for s in ("activation", "output_grad", "param_grad")}
    grids["output_grad"] = _backward(grids["output_grad"])
    unseen = [s.replace("_", " ") for s, grid in grids.items() if not grid.ok.any()]
    if unseen:
        yield limits.not_checked(f"no value of: {', '.join(unseen)}")
    found: dict[tuple[str, Site], list[tuple[int, Finding]]] = {}
    for rows in view.runs:
        first: tuple[str, int, int] | None = None
        after: dict[str, int] = {}
        last = 0
        for row in rows.tolist():
            for signal, grid in grids.items():
                bad = np.flatnonzero(grid.ok[row] & (grid.value[row] > limits["elements"]))
                if len(bad) and first is None:
                    first = signal, row, int(bad[0])
                if len(bad):
                    after[signal] = max(after.get(signal, 0), len(bad))
                    last = row
        if first is not None:
            signal, row, column = first
            finding = _non_finite(view, limits, grids, first, after, view.span([row, last]))
            found.setdefault((signal, grids[signal].sites[column]), []).append((row, finding))
    for items in found.values():  # replicates with the same culprit are one finding
        yield min(items, key=lambda item: item[0])[1]


def _backward(grid: Grid) -> Grid:
    """The same in the order of the backward pass."""
    return grid.take(range(len(grid.sites))[::-1])


def _non_finite(
    view: View,
    limits: Limits,
    grids: dict[str, Grid],
    first: tuple[str, int, int],
    after: dict[str, int],
    steps: tuple[int, int],
) -> Finding:
    signal, row, column = first
    grid = grids[signal]
    site, elements = grid.sites[column], float(grid.value[row, column])
    absmax = view.grid(signal, "absmax")
    largest = absmax.value[row, absmax.sites.index(site)] if site in absmax.sites else math.nan
    # A −∞ that a softmax turns into 0 breaks nothing; a NaN anywhere, or a broken loss, does. Finite
    # gradients are the evidence: where none was measured, nothing is known to be contained.
    gradients = [grids[s] for s in ("output_grad", "param_grad") if s in grids]
    contained = (
        signal == "activation"
        and math.isinf(largest)
        and any(g.ok[row].any() for g in gradients)
        and not (after.keys() - {"activation"})
        and not np.isinf(view.loss[row])
        and grid.value[row, -1] == 0
    )
    what = {
        "activation": f"the activation of {site.name}",
        "output_grad": f"the gradient at the output of {site.name}",
        "param_grad": f"the gradient of the parameter {site.name}",
    }[signal]
    words = {"activation": "activations", "output_grad": "output gradients", "param_grad": "parameters"}
    total = ", ".join(f"{count} {words[s]}" for s, count in after.items())
    before = [
        at.name
        for at, value in zip(grid.sites[:column], grid.value[row, :column], strict=True)
        if value == 0 and at.depth == at.depth
    ]
    comes_after = f" Before it, {before[-1]} is finite." if before else ""
    return limits.finding(
        "elements",
        value=elements,
        sites=[site],
        steps=steps,
        severity="note" if contained else None,
        message=(
            f"First at step {view.steps[row].step}: {what} holds {elements:.0f} NaN or infinite elements "
            f"(threshold {limits['elements']:g}).{comes_after} Up to step {steps[1]} at most {total} "
            "at once."
        ),
        cause=(
            "Additive masks hold −∞ on purpose; all gradients that were measured are finite."
            if contained
            else {
                "activation": "An overflow, a division by zero, a log or root of a number ≤ 0 in this "
                "layer's forward pass, or weights that the step before had made non-finite.",
                "output_grad": "The forward pass is finite up to here: the backward of what comes after "
                "this output divides by zero or overflows (a root or norm at 0, a loss scale too large).",
                "param_grad": "The gradients of the outputs are finite: this parameter's own backward "
                "overflows, or the parameter is used outside the watched layers.",
            }[signal]
        ),
        remedy=(
            "Nothing."
            if contained
            else "Look at this layer at this step first; what follows is its consequence. Run the step "
            "again under torch.autograd.set_detect_anomaly(True); lower the learning rate, clip "
            "gradients, or compute this layer in float32 (bfloat16 instead of float16)."
        ),
    )
