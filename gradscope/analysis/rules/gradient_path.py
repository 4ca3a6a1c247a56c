"""Layers that are called and hold parameters to train, and to which no gradient can come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.view import NO_AXIS, Site, View, spans

__all__ = ["no_gradient_path"]

_CUT: Final = "no gradient path"


@register
@rule(
    name="no_gradient_path",
    title="no gradient comes here",
    citation="PyTorch, Autograd mechanics: a tensor that is detached, or made under no_grad, has no "
    "history, and what is not used has no gradient",
    thresholds={
        "share": Threshold(
            value=1.0,
            unit="1",
            source="of the steps with a backward pass in which the layer was called: all of them, since "
            "a branch may be left out by chance (stochastic depth)",
        )
    },
    needs=[("activation", "l2"), ("output_grad", "l2"), ("param_grad", "l2")],
)
def no_gradient_path(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """A block or branch whose output never gets a gradient, although its parameters are to be trained.

    In every step in which a gradient came to any output and the layer was called, its output and all of
    its parameters that are not frozen have the status ``no gradient path``. Layers off the depth axis
    (a pooler that nothing uses) are not judged, frozen ones and those that were not called are no fault.
    First is the layer nearest to the loss: what stands before it may only follow.
    """
    if not view.trunks:
        yield limits.not_checked(NO_AXIS)
        return
    gradients, activations = view.grid("output_grad", "l2"), view.grid("activation", "l2")
    words = view.words("output_grad", "l2")
    backward = gradients.ok.any(1)
    column = {site: i for i, site in enumerate(activations.sites)}
    cut: list[tuple[Site, npt.NDArray[np.int64]]] = []
    for i, site in enumerate(gradients.sites):
        if site.type == "Stream" or site not in column:
            continue
        called = np.flatnonzero(backward & activations.ok[:, column[site]])
        if not len(called) or not (words[called, i] == _CUT).all():
            continue
        place = _untrained(view, site, called)
        if place is not None:
            cut.append((place, called))
    if not cut:
        return
    # The output nearest to the loss; of those at one depth the block, unless only its branch is cut.
    cut.sort(key=lambda item: (-item[0].depth, len(item[0].layer)))
    sites = [site for site, _ in cut]
    first, called = cut[0]
    steps = view.span(np.unique(np.concatenate([rows for _, rows in cut])).tolist())
    names = list(dict.fromkeys(site.name for site in sites))
    yield limits.finding(
        "share",
        value=1.0,
        sites=sites,
        steps=steps,
        message=(
            f"{first.name} was called in {len(called)} recorded steps with a backward pass, and in none "
            "did a gradient come to its output or to its parameters, which require one. Layers "
            f"concerned: {spans(names)}."
        ),
        cause="Its output is detached, made under no_grad, turned into something that has no gradient "
        "(argmax, a NumPy array), or nothing that the loss depends on uses it.",
        remedy=f"Look at what becomes of the output of {first.name}: a .detach(), .item(), .data or "
        "no_grad in the forward pass. If it is meant, freeze the parameters: "
        "parameter.requires_grad_(False).",
    )


def _untrained(view: View, site: Site, rows: npt.NDArray[np.int64]) -> Site | None:
    """The layer with its place on the axis, if parameters of it require a gradient and none had one.

    A branch that no gradient comes to has not been seen to join the stream: its parameters say where
    it is. None too for layers off the axis.
    """
    parameters = view.grid("param_grad", "l2").sites
    inside = [i for i, p in enumerate(parameters) if p.layer.startswith(f"{site.layer}.")]
    said = view.words("param_grad", "l2")[rows][:, inside]
    required = said != "frozen"
    if not required.any() or not (said[required] == _CUT).all():
        return None
    if site.depth == site.depth:
        return site
    places = [(parameters[i].trunk, parameters[i].depth) for i in inside]
    trunk, depth = max((p for p in places if p[0]), key=lambda p: p[1], default=("", np.nan))
    return site._replace(trunk=trunk, depth=depth) if trunk else None
