"""The report's sentences about the nets at initialisation, each chosen from the data by a rule.

Every function takes numbers with their intervals and returns the sentence that they support, also
where that is "the data do not decide". Nothing is assumed about which variant wins.

Δ = ln(g_0 / g_L) is the log ratio of the gradient flow at the trunk's input to that at its output:
negative where the gradient vanishes towards the input. Thresholds are named and sourced below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gradscope.analysis import Interval
from gradscope.study.words import factor_text, interval_text, listed, number_text

__all__ = [
    "CONTRAST_FLAT_NATS_PER_BLOCK",
    "CONTRAST_VANISHING_NATS_PER_BLOCK",
    "DEAD_QK_RATIO",
    "DEAD_TOKEN_COSINE",
    "FLOW_NATS",
    "Flow",
    "Tokens",
    "contrast",
    "dead_net",
    "effective_depths",
    "flow",
    "flow_verdict",
    "grouped_flows",
    "initialisation_dependence",
    "not_flat",
    "post_norm_alone",
]

#: Three nats between the ends: the rule that a net is trainable up to six depth scales,
#: chi_1^(6 xi) = e^-6 in the squared gradient (Schoenholz et al. 2017, arXiv:1611.01232).
FLOW_NATS: Final = 3.0
#: The study's headline contrast, per block: at least this steep without skips and norms ...
CONTRAST_VANISHING_NATS_PER_BLOCK: Final = -1.0
#: ... and at most this steep, in either direction, in the pre-norm net.
CONTRAST_FLAT_NATS_PER_BLOCK: Final = 0.1
#: Tokens that are this parallel have become one (rank collapse: Dong et al. 2021, arXiv:2103.03404) ...
DEAD_TOKEN_COSINE: Final = 0.99
#: ... and then queries and keys get next to none of the gradient (Noci et al. 2022, arXiv:2206.03126).
DEAD_QK_RATIO: Final = 0.01

Verdict = Literal["vanishes", "explodes", "is preserved", "is undecided", "underflows", "overflows"]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """The gradient flow of one variant at one depth, over seeds.

    Attributes:
        depth: number of blocks.
        delta: Δ, in nats.
        increment: mean of ln(g_l / g_{l+1}) over the blocks, in nats per block.
        zeros: values of g_l that are exactly 0, over all seeds and positions.
        nonfinite: values of g_l that are NaN or infinite.
        values: how many values of g_l there are.
    """

    depth: int
    delta: Interval
    increment: Interval
    zeros: int = 0
    nonfinite: int = 0
    values: int = 0


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What rank collapse shows itself by, of one variant at one depth, over seeds.

    Attributes:
        token_cosine: mean cosine of different tokens at the end of the trunk.
        qk_first: ‖∇[W_Q;W_K]‖/‖∇W_V‖ in the first block.
        qk_last: the same in the last block.
    """

    token_cosine: Interval
    qk_first: Interval
    qk_last: Interval


def flow_verdict(flow: Flow) -> Verdict:
    """What the gradient does over the depth.

    ``vanishes`` if the interval of Δ ends below −`FLOW_NATS`, ``explodes`` if it begins above
    +`FLOW_NATS`, ``is preserved`` if it lies between, and else ``is undecided``. Without an interval
    (one seed) it is always undecided. Where exact zeros, or values that are NaN or infinite, leave no
    finite Δ: ``underflows`` or ``overflows``.
    """
    if not math.isfinite(flow.delta.estimate) or flow.nonfinite:
        if flow.nonfinite:
            return "overflows"
        if flow.zeros:
            return "underflows"
    if flow.delta.high < -FLOW_NATS:
        return "vanishes"
    if flow.delta.low > FLOW_NATS:
        return "explodes"
    if -FLOW_NATS < flow.delta.low and flow.delta.high < FLOW_NATS:
        return "is preserved"
    return "is undecided"


_VERDICT_WORDS: Final[Mapping[Verdict, str]] = {
    "vanishes": "vanishes towards the input",
    "explodes": "explodes towards the input",
    "is preserved": f"keeps its norm (Δ within ±{FLOW_NATS:g} nats)",
    "is undecided": f"is undecided (the interval of Δ crosses ±{FLOW_NATS:g} nats)",
    "underflows": "underflows to exact zeros on its way to the input",
    "overflows": "overflows (values that are NaN or infinite)",
}
_FALLING: Final[frozenset[Verdict]] = frozenset({"vanishes", "underflows"})
_RISING: Final[frozenset[Verdict]] = frozenset({"explodes", "overflows"})


def _verdicts_text(flows: Sequence[Flow]) -> str:
    """What the gradient does, and at which depths where that differs."""
    by_verdict: dict[Verdict, list[int]] = {}
    for one in flows:
        by_verdict.setdefault(flow_verdict(one), []).append(one.depth)
    if len(by_verdict) == 1:
        (verdict,) = by_verdict
        if len(flows) == 1:
            return f"{_VERDICT_WORDS[verdict]} at {flows[0].depth} blocks"
        return f"{_VERDICT_WORDS[verdict]} at every depth measured"
    return "; ".join(
        f"{_VERDICT_WORDS[verdict]} at {listed(depths)} blocks" for verdict, depths in by_verdict.items()
    )


def _rates_text(flows: Sequence[Flow]) -> str:
    """Nats per block at each depth; no rate is taken through values that are 0 or not finite."""
    whole = [f for f in flows if not f.zeros and not f.nonfinite]
    if not whole:
        return ""
    return ", ".join(f"{interval_text(f.increment)} at {f.depth}" for f in whole) + " blocks"


def _deltas_text(flows: Sequence[Flow]) -> str:
    return ", ".join(f"{interval_text(f.delta)} at {f.depth}" for f in flows) + " blocks"


def flow(label: str, flows: Sequence[Flow]) -> str:
    """What the gradient of one variant does at each depth, with its rate.

    Args:
        label: the variant, as plots name it.
        flows: by depth, ascending.
    """
    sentence = f"**“{label}”**: the gradient {_verdicts_text(flows)}"
    rates = _rates_text(flows)
    if rates:
        sentence += f". Nats per block: {rates}"
    last = flows[-1]
    if math.isfinite(last.delta.estimate):
        sentence += (
            f"; with {last.depth} blocks the trunk's input gets {factor_text(last.delta.estimate)} times "
            "the gradient of its output"
        )
    values = sum(f.values for f in flows)
    zeros, nonfinite = sum(f.zeros for f in flows), sum(f.nonfinite for f in flows)
    if zeros:
        sentence += f"; {zeros} of {values} norms are exactly 0 (underflow)"
    if nonfinite:
        sentence += f"; {nonfinite} of {values} norms are NaN or infinite (overflow)"
    return sentence + "."


def post_norm_alone(label: str, flows: Sequence[Flow]) -> str:
    """Whether the norm after the addition makes the gradient vanish, as it is often said to."""
    vanishing = [f.depth for f in flows if flow_verdict(f) in _FALLING]
    deltas = _deltas_text(flows)
    if vanishing:
        return f"**“{label}”**: the gradient vanishes at {listed(vanishing)} blocks; Δ is {deltas}."
    if all(flow_verdict(f) == "is preserved" for f in flows):
        verdicts = _verdicts_text(flows)
        return f"**“{label}” does not vanish by itself**: its gradient {verdicts}; Δ is {deltas}."
    return (
        f"“{label}”: the gradient is not shown to vanish, nor at every depth to be kept; Δ is {deltas}."
    )


def grouped_flows(flows: Mapping[str, Sequence[Flow]]) -> str:
    """What the gradients of many variants do, those that do the same together.

    Args:
        flows: by label, each by depth, ascending.
    """
    groups: dict[str, list[str]] = {}
    for label, by_depth in flows.items():
        groups.setdefault(_verdicts_text(by_depth), []).append(f"“{label}”")
    parts = [f"that of {listed(labels)} {verdicts}" for verdicts, labels in groups.items()]
    return f"The gradients of the other variants: {'. And '.join(parts)}."


def effective_depths(values: Mapping[str, Interval], blocks: int, branches: int) -> str:
    """How many branches the gradient has crossed, variant by variant, from many to few.

    Args:
        values: D by label; those without a value are left out.
        blocks: number of blocks.
        branches: n.
    """
    known = {label: d for label, d in values.items() if not math.isnan(d.estimate)}
    if not known:
        return f"No effective depth could be had at {blocks} blocks."
    whole = [label for label, d in known.items() if abs(d.estimate - branches) < 1e-6 * branches]
    none = [label for label, d in known.items() if d.estimate == 0]
    others = sorted(
        (label for label in known if label not in whole + none), key=lambda n: -known[n].estimate
    )
    parts: list[str] = []
    if whole:
        parts.append(f"all of them in {listed([f'“{label}”' for label in whole])}")
    parts += [f"{interval_text(known[label])} in “{label}”" for label in others]
    if none:
        parts.append(f"none in {listed([f'“{label}”' for label in none])}")
    return (
        f"**Effective depth** at {blocks} blocks: of {branches} branches, the gradient at the trunk's "
        f"input has crossed on average {'; '.join(parts)}."
    )


def contrast(
    without_label: str, without: Sequence[Flow], with_label: str, with_skip: Sequence[Flow]
) -> str:
    """The headline: whether the interval of the rate is below −1 without, and inside ±.1 with, skips."""
    steep = [f.depth for f in without if f.increment.high <= CONTRAST_VANISHING_NATS_PER_BLOCK]
    flat = [
        f.depth
        for f in with_skip
        if -CONTRAST_FLAT_NATS_PER_BLOCK <= f.increment.low
        and f.increment.high <= CONTRAST_FLAT_NATS_PER_BLOCK
    ]
    both = [d for d in steep if d in flat]
    depths = [f.depth for f in without]
    rule = (
        f"(rule: the 95 % interval of the mean increment ends at or below "
        f"{number_text(CONTRAST_VANISHING_NATS_PER_BLOCK, 0)} nat per block for “{without_label}”, and "
        f"lies within ±{CONTRAST_FLAT_NATS_PER_BLOCK:g} for “{with_label}”)"
    )
    if both == depths:
        return (
            f"**The contrast holds at every depth measured**: “{without_label}” loses its gradient "
            f"block by block, “{with_label}” does not {rule}."
        )
    if not both:
        return (
            f"**The contrast between “{without_label}” and “{with_label}” does not show at any depth "
            f"measured** {rule}: the first part holds at {listed(steep or ['no depth'])}, the second "
            f"at {listed(flat or ['no depth'])}."
        )
    return (
        f"**The contrast between “{without_label}” and “{with_label}” holds at {listed(both)} blocks "
        f"only**, of {listed(depths)} {rule}."
    )


def initialisation_dependence(label: str, flows: Mapping[str, Sequence[Flow]]) -> str:
    """Whether the same net does the same under every initialisation.

    Args:
        label: the variant, as plots name it.
        flows: by initialisation, each by depth, ascending.
    """
    kinds = {name: {flow_verdict(f) for f in by_depth} for name, by_depth in flows.items()}
    falling = [name for name, verdicts in kinds.items() if verdicts <= _FALLING]
    rising = [name for name, verdicts in kinds.items() if verdicts <= _RISING]
    if falling and rising:
        head = (
            f"**“{label}” does not always vanish: it depends on the initialisation, and reverses "
            f"under {listed(rising)}**"
        )
    elif len(falling) == len(flows) or len(rising) == len(flows):
        head = f"**“{label}” does the same under every initialisation tried**"
    else:
        head = f"**What “{label}” does depends on the initialisation**"
    parts: list[str] = []
    for name, by_depth in flows.items():
        rates = _rates_text(by_depth)
        parts.append(
            f"under {name} it {_verdicts_text(by_depth)}"
            + (f" (nats per block: {rates})" if rates else "")
        )
    return f"{head}: {'; '.join(parts)}."


def dead_net(label: str, flows: Sequence[Flow], tokens: Sequence[Tokens]) -> str:
    """Whether a net keeps the norm of its gradient and is dead all the same, by rank collapse.

    Dead: the token cosine's interval begins above `DEAD_TOKEN_COSINE`, and that of the last block's
    query-and-key to value gradient ratio ends below `DEAD_QK_RATIO`.
    """
    dead = [
        f.depth
        for f, t in zip(flows, tokens, strict=True)
        if t.token_cosine.low > DEAD_TOKEN_COSINE and t.qk_last.high < DEAD_QK_RATIO
    ]
    kept = [f.depth for f in flows if flow_verdict(f) == "is preserved"]
    both = [d for d in dead if d in kept]
    last, end = flows[-1], tokens[-1]
    numbers = (
        f"at {last.depth} blocks the token cosine at the end is {interval_text(end.token_cosine, 4)}, "
        f"and queries and keys get {interval_text(end.qk_first, 4)} of the values' gradient in the first "
        f"block and {interval_text(end.qk_last, 4)} in the last; Δ is {_deltas_text(flows)}"
    )
    rule = f"(rule: token cosine above {DEAD_TOKEN_COSINE}, last ratio below {DEAD_QK_RATIO})"
    if both:
        where = "at every depth measured" if len(both) == len(flows) else f"at {listed(both)} blocks"
        elsewhere = [d for d in dead if d not in kept]
        also = f" (and is dead at {listed(elsewhere)} blocks, too)" if elsewhere else ""
        return (
            f"**“{label}” keeps the norm of its gradient {where}, and the net is dead there by rank "
            f"collapse**{also}: {numbers} {rule}."
        )
    if dead:
        return f"**“{label}” is dead by rank collapse at {listed(dead)} blocks**: {numbers} {rule}."
    return f"“{label}” shows no rank collapse by the rule used {rule}: {numbers}."


def not_flat(label: str, flows: Sequence[Flow]) -> str:
    """Whether a preserved gradient is also constant over depth, and whether its rate is one number.

    Not flat: the interval of Δ leaves out 0 at every depth. No exponential: the interval of the rate
    at the deepest net lies wholly nearer to 0 than that at the shallowest.
    """
    outside = [f for f in flows if f.delta.low > 0 or f.delta.high < 0]
    first, last = flows[0], flows[-1]
    numbers = _deltas_text(flows)
    if len(outside) < len(flows):
        which = [f.depth for f in flows if f not in outside]
        return f"“{label}” cannot be told from flat at {listed(which)} blocks: Δ is {numbers}."
    grows = all(f.delta.low > 0 for f in flows)
    falls = all(f.delta.high < 0 for f in flows)
    direction = (
        "the gradient grows towards the input"
        if grows
        else "the gradient falls towards the input"
        if falls
        else "the direction changes with depth"
    )
    sentence = f"**“{label}” is not flat**: {direction}, Δ is {numbers}"
    nearer = (
        last.increment.high < first.increment.low and last.increment.low > 0
        if grows
        else last.increment.low > first.increment.high and last.increment.high < 0
    )
    if len(flows) > 1 and (grows or falls) and nearer:
        sentence += (
            f". The rate itself shrinks with the number of blocks, {interval_text(first.increment, 3)} "
            f"to {interval_text(last.increment, 3)} nats per block: no exponential, as the power law of "
            "pre-norm nets would have it"
        )
    return sentence + "."
