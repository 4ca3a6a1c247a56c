"""Gradients that become exactly 0 because their dtype holds nothing smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gradscope.analysis.dtypes import SMALLEST, dtypes_of
from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import Grid, Site, View, spans

__all__ = ["underflow"]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@register
@rule(
    name="underflow",
    title="gradients underflow",
    citation="Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740",
    thresholds={
        "zeros": Threshold(
            value=0.5,
            unit="1",
            source="half of the elements lost; Micikevicius et al. 2018 saw divergence when small "
            "gradients became zeros",
        ),
        "floor": Threshold(
            value=16,
            unit="smallest numbers",
            source="elements this close to the dtype's smallest number have 4 bits or fewer",
        ),
    },
    needs=[("output_grad", "zeros"), ("output_grad", "count"), ("output_grad", "l2")],
    explained_by=("update_ratio",),
)
def underflow(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """Gradients that are exactly 0 because their dtype holds nothing smaller.

    More than half of the elements of an output's gradient are exactly 0, and the rms of the others is
    below 16 times the dtype's smallest number. Zeros alone prove nothing: ReLU, dropout and masked
    losses make them too, and a zero-initialised branch makes nothing else. Or the gradient is exactly 0
    at all depths below one where its largest element is subnormal: it went out of range in that block,
    although no output shows half of it.

    The dtype is the header's, the finest where several were seen (autocast); a gradient in float16 among
    others is recognised by its elements, whole multiples of 2⁻²⁴.
    """
    zeros, count, l2 = (view.grid("output_grad", s) for s in ("zeros", "count", "l2"))
    absmax = view.grid("output_grad", "absmax")
    if not (zeros.sites == count.sites == l2.sites):
        yield limits.not_checked("zeros, count and l2 are not of the same outputs")
        return
    names = dtypes_of(view.record.header)
    known = [name for name in names if name in SMALLEST]
    if not known:
        yield limits.not_checked(
            f"the dtype {names[0]!r} has no known smallest number" if names else "the header has no dtype"
        )
        return
    normal = bool(view.record.header.get("flush_denormal"))
    floor = min(SMALLEST[name][1 if normal else 0] for name in known)
    with np.errstate(all="ignore"):
        # In the dtype, gradients still carry the loss scale.
        scale = np.where(np.isnan(view.loss_scale), 1.0, view.loss_scale)[:, None]
        rms = l2.value * scale / np.sqrt(count.value - zeros.value)
        share = zeros.value / count.value
    floors = np.full(rms.shape, floor)
    normals = np.full(rms.shape, min(SMALLEST[name][1] for name in known))
    largest = np.full(rms.shape, np.nan)
    if absmax.sites == l2.sites:
        largest = absmax.value * scale
        half = _on_half_grid(largest)
        floors[half], normals[half] = SMALLEST["float16"]
    near = rms < limits["floor"] * floors
    present = l2.ok & (count.value > 0)
    nonzero = present & (l2.value > 0)
    tiny = largest < np.maximum(normals, limits["floor"] * floors)
    hit = nonzero & near & (share > limits["zeros"])
    hit |= _last_before_zeros(l2, present) & tiny
    for rows in view.runs:
        where = hit[rows]
        if not where.any():
            continue
        at = int(np.flatnonzero(where.any(1))[-1])
        row = int(rows[at])
        partly = np.flatnonzero(hit[row])
        # Nothing at all comes through further from the loss than what is nearly gone.
        whole = [i for i in range(int(partly.max())) if present[row, i] and l2.value[row, i] == 0]
        columns = sorted({*partly.tolist(), *whole}, reverse=True)
        start = int(max(partly, key=lambda i: share[row, i]))
        sites = _names_first(l2.sites, columns, int(partly.max()))
        seen = rows[where.any(1)]
        factor = view.loss_scale[row]
        name = l2.sites[start].name
        if share[row, start] > limits["zeros"]:
            value = float(share[row, start])
            said = (
                f"{value:.0%} of the gradient at the output of {name} is exactly 0 (threshold "
                f"{limits['zeros']:.0%}), and the rest has an rms of {rms[row, start]:.2g} (threshold "
                f"{limits['floor']:g} times the smallest number of its dtype, {floors[row, start]:.2g})."
            )
        else:
            value = 1.0
            said = (
                f"all of the gradient before {name} is exactly 0 (threshold {limits['zeros']:.0%}), and "
                f"at its output the largest element is {largest[row, start]:.2g}, below the smallest "
                f"normal number of its dtype, {normals[row, start]:.2g}."
            )
        yield limits.finding(
            "zeros",
            value=value,
            sites=sites,
            steps=view.span(seen),
            message=(
                f"At step {view.steps[row].step}, {said} Outputs concerned: "
                f"{spans([site.name for site in sites])}."
            ),
            cause=(
                "Gradients in float16 without loss scaling."
                if math.isnan(factor) and floors[row, start] == SMALLEST["float16"][0]
                else f"A loss scale of {factor:g} is too small for these gradients."
                if not math.isnan(factor)
                else "The gradient decays below the smallest number of its dtype."
            ),
            remedy="Use torch.amp.GradScaler, or bfloat16 instead of float16. Where float32 underflows, "
            "the gradient vanishes over depth: add skips or norms.",
        )


def _last_before_zeros(l2: Grid, present: Mask) -> Mask:
    """[S, P], the first depth of a trunk with a gradient, where all below it are exactly 0."""
    found = np.zeros(present.shape, dtype=np.bool_)
    depth = np.asarray([site.depth for site in l2.sites], dtype=np.float64)
    for trunk in dict.fromkeys(site.trunk for site in l2.sites):
        if not trunk:
            continue
        inside = np.asarray([s.trunk == trunk for s in l2.sites], dtype=np.bool_) & ~np.isnan(depth)
        nonzero = present & inside & (l2.value != 0)
        first = np.where(nonzero, depth, np.inf).min(1)[:, None]
        zeros = (present & inside & (l2.value == 0) & (depth < first)).any(1)[:, None]
        found |= nonzero & (depth == first) & zeros & np.isfinite(first)
    return found


def _on_half_grid(largest: Floats) -> Mask:
    """Largest elements below 2⁻¹⁴ that are whole multiples of 2⁻²⁴: the subnormal numbers of float16.

    Of float32 numbers of that size one in 2¹⁴ or fewer are.
    """
    with np.errstate(invalid="ignore"):
        steps = largest / SMALLEST["float16"][0]
        small = (largest > 0) & (largest < SMALLEST["float16"][1])
        return np.asarray(small & (steps == np.round(steps)), dtype=np.bool_)


def _names_first(sites: Sequence[Site], columns: Sequence[int], first: int) -> list[Site]:
    ordered = [first, *(i for i in columns if i != first)]
    return [sites[i] for i in ordered]
