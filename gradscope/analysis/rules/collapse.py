"""Rules on tokens that become alike, and what that does to attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from gradscope.analysis.finding import Finding, Limits, NotChecked, Threshold, register, rule
from gradscope.analysis.history import History, history
from gradscope.analysis.verdict import Verdict, verdict
from gradscope.analysis.view import NO_AXIS, Site, View, spans
from gradscope.errors import QuantityError

__all__ = ["rank_collapse", "starved_attention"]

_SOURCE: Final = "Dong et al. 2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126"
_QK: Final = Threshold(
    value=1e-3,
    unit="1",
    source="Noci et al. 2022: the gradients of queries and keys go to 0 under rank collapse, that of "
    "values does not",
)


def _quantity(view: View, limits: Limits, name: str, trunk: str) -> History | NotChecked:
    try:
        found = history(view.record, name, trunk=trunk)
    except QuantityError as error:
        if name == "qk_ratio" and ": " in str(error):  # then come all the names that are known
            why = f"{str(error).split(': ')[0]} (by gradscope.analysis.QKV_NAMES)"
            return limits.not_checked(why)
        return limits.not_checked(f"{name} over {trunk}: {error}")
    if not found.ok.any():
        words = ", ".join(dict.fromkeys(str(w) for w in found.status.ravel()))
        return limits.not_checked(f"{name} over {trunk} is absent: {words}")
    return found


def _last(found: History) -> tuple[int, np.ndarray, np.ndarray]:
    """The last step that has it: number, value [P] as median over replicates, all values [R, P]."""
    step = int(found.steps[found.ok.any(1)].max())
    rows = np.flatnonzero((found.steps == step) & found.ok.any(1))
    values = np.where(found.ok[rows], found.value[rows], np.nan)
    middle = np.full(values.shape[1], np.nan)
    present = ~np.isnan(values).all(0)
    middle[present] = np.nanmedian(values[:, present], axis=0)
    return step, middle, values


def _site(view: View, trunk: str, depth: float, layer: str) -> Site:
    return Site(trunk, depth, layer, "Stream" if depth == 0 else "", 0)


@register
@rule(
    name="rank_collapse",
    title="rank collapse",
    severity="critical",
    citation=_SOURCE,
    thresholds={
        "cosine": Threshold(
            value=0.99,
            unit="1",
            source="mean cosine between tokens; 1 is the collapsed limit (Dong et al. 2021)",
        ),
        "rise": Threshold(
            value=10.0,
            unit="1",
            source="1 − cosine must have fallen tenfold from the trunk's input: tokens that enter alike "
            "do not collapse",
        ),
        "qk_ratio": _QK,
    },
    needs=[("activation", "token_cosine")],
    explained_by=("non_finite", "dead_layer", "update_ratio"),
)
def rank_collapse(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """All tokens become the same: their mean cosine at the trunk's end is .99 or more.

    And 1 − cosine is ten times smaller than at the trunk's input h_0, where the cosine is below .99. And,
    because a large common component raises the cosine of healthy trained models too (Ethayarajh 2019,
    arXiv:1909.00512), the gradients of queries and keys in some block are below 1e-3 of that of the
    values. Where they cannot be told apart, the cosine alone is a note. The norm of the gradient may be
    preserved all the while: preserved, but dead.
    """
    if not view.trunks:
        yield limits.not_checked(NO_AXIS)
    for trunk in view.trunks:
        cosine = _quantity(view, limits, "token_cosine", trunk)
        if isinstance(cosine, NotChecked):
            yield cosine
            continue
        step, value, _ = _last(cosine)
        if cosine.depth[0] != 0 or np.isnan(value[0]):
            yield limits.not_checked(
                f"the token cosine at the input of {trunk} is absent: no rise to judge"
            )
            continue
        if np.isnan(value[-1]):
            yield limits.not_checked(f"the token cosine at the end of {trunk} is not a number")
            continue
        alike = value >= limits["cosine"]
        fallen = (1 - value) * limits["rise"] <= 1 - value[0]
        if not (alike[-1] and fallen[-1]) or alike[0]:
            continue
        ratio = _quantity(view, limits, "qk_ratio", trunk)
        smallest = np.nan
        if isinstance(ratio, NotChecked):
            yield limits.not_checked(f"{ratio.reason.rstrip('.')}. The cosine alone is not proof.")
        else:
            of_step = ratio.ok & (ratio.steps == step)[:, None]
            smallest = float(ratio.value[of_step].min()) if of_step.any() else np.nan
            if smallest > limits["qk_ratio"]:
                continue  # tokens share a component, and attention still learns
        start = int(np.flatnonzero(~(alike & fallen))[-1]) + 1
        gradient = _gradient(view, trunk, step)
        preserved = (
            gradient is not None
            and gradient.word not in ("vanishing", "exploding")
            and abs(gradient.delta.estimate) < gradient.threshold
        )
        steps = _seen(cosine, limits["cosine"], step)
        change = f" (Δ = {gradient.delta.estimate:.2g} nats)" if gradient is not None else ""
        known = not np.isnan(smallest)
        if not known:
            said = (
                "Whether attention still learns is not known; tokens of trained models have a large "
                "common component too."
            )
        else:
            said = (
                f"The gradients of queries and keys are down to {smallest:.2g} of that of the values "
                f"(threshold {limits['qk_ratio']:g})."
            )
            if preserved:
                said += (
                    f" The gradient's norm does not vanish{change}, yet it tells every token the same."
                )
            elif gradient is not None:
                said += f" The gradient is {gradient.word}{change}."
        yield limits.finding(
            "cosine",
            value=float(value[-1]),
            sites=[
                _site(view, trunk, cosine.depth[i], cosine.layers[i]) for i in range(start, len(value))
            ],
            trunk=trunk,
            steps=steps,
            title=(None if not preserved else "preserved but dead: rank collapse")
            if known
            else "tokens are nearly alike",
            severity=None if known else "note",
            message=(
                f"At step {step} the mean cosine between tokens is {value[-1]:.4f} at the end of {trunk} "
                f"(threshold {limits['cosine']:g}; {value[0]:.2g} at its input), and above it from "
                f"{cosine.layers[start]} on. {said}"
            ),
            cause="Attention without skips averages the tokens, doubly exponentially fast in depth.",
            remedy="Add skip connections around the attention, or scale the branches so that the skip "
            "dominates (1/√depth).",
        )


def _gradient(view: View, trunk: str, step: int) -> Verdict | None:
    try:
        return verdict(view.record, "grad_l2", trunk=trunk, step=step)
    except QuantityError:
        return None


def _seen(cosine: History, threshold: float, step: int) -> tuple[int, int]:
    """Since when the last position has been above the threshold without a break."""
    last = np.where(cosine.ok[:, -1], cosine.value[:, -1], np.nan)
    below = cosine.steps[last < threshold]
    since = cosine.steps[(last >= threshold) & (cosine.steps > (below.max() if len(below) else -1))]
    return (int(since.min()) if len(since) else step), step


def _when(steps: list[int]) -> str:
    return f"at step {steps[0]}" if len(steps) == 1 else f"in the last {len(steps)} recorded steps"


@register
@rule(
    name="starved_attention",
    title="queries and keys have no gradient to speak of",
    citation=_SOURCE,
    thresholds={
        "qk_ratio": _QK,
        "steps": Threshold(
            value=3, unit="steps", source="last recorded steps, or all if there are fewer"
        ),
    },
    explained_by=("non_finite", "rank_collapse", "dead_layer"),
)
def starved_attention(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """‖∇[W_Q; W_K]‖/‖∇W_V‖ of a block below 1e-3 in the last three recorded steps.

    Where the tokens are all alike, or the logits so small that attention is uniform, what it looks at
    makes no difference, and nothing teaches queries and keys to look elsewhere.
    """
    if not view.trunks:
        yield limits.not_checked(NO_AXIS)
    for trunk in view.trunks:
        ratio = _quantity(view, limits, "qk_ratio", trunk)
        if isinstance(ratio, NotChecked):
            yield ratio
            continue
        steps = sorted(set(ratio.steps[ratio.ok.any(1)].tolist()))[-int(limits["steps"]) :]
        rows = np.isin(ratio.steps, steps)
        usable = ratio.ok[rows] & np.isfinite(ratio.value[rows])
        values = np.where(usable, ratio.value[rows], np.nan)
        columns = [
            i
            for i in range(values.shape[1])
            if usable[:, i].any() and np.nanmax(values[:, i]) < limits["qk_ratio"]
        ]
        if not columns:
            continue
        lowest = min(columns, key=lambda i: float(np.nanmedian(values[:, i])))
        value = float(np.nanmedian(values[:, lowest]))
        sites = [_site(view, trunk, float(ratio.depth[i]), ratio.layers[i]) for i in columns]
        yield limits.finding(
            "qk_ratio",
            value=value,
            sites=[
                sites[columns.index(lowest)],
                *(s for s, i in zip(sites, columns, strict=True) if i != lowest),
            ],
            trunk=trunk,
            steps=(int(steps[0]), int(steps[-1])),
            message=(
                f"‖∇[W_Q; W_K]‖/‖∇W_V‖ is {value:.2g} in {ratio.layers[lowest]} (threshold "
                f"{limits['qk_ratio']:g}) {_when(steps)}; below it in "
                f"{len(columns)} of {len(ratio.layers)} blocks: {spans([s.name for s in sites])}."
            ),
            cause="The tokens are alike (rank collapse), or the attention logits are tiny or saturated.",
            remedy="See the token cosine over depth. Larger query and key weights, or a norm on queries "
            "and keys; skips around the attention.",
        )
