"""The sentences of the study's report, each chosen from the data by a rule that stands here.

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

__all__ = [
    "CONTRAST_FLAT_NATS_PER_BLOCK",
    "CONTRAST_VANISHING_NATS_PER_BLOCK",
    "DEAD_QK_RATIO",
    "DEAD_TOKEN_COSINE",
    "FLOW_NATS",
    "LEARNED_NATS",
    "Flow",
    "Tokens",
    "Trained",
    "better_with",
    "contrast",
    "dead_net",
    "faster_with",
    "flow",
    "flow_verdict",
    "initialisation_dependence",
    "interval_text",
    "learned_context",
    "not_flat",
    "number_text",
    "rate_edges",
    "robustness",
    "zeros_in_training",
]

#: Three nats between the ends: the rule that a net is trainable up to six depth scales,
#: chi_1^(6 xi) = e^-6 in the squared gradient (Schoenholz et al. 2017, arXiv:1611.01232).
FLOW_NATS: Final = 3.0
#: The study's headline contrast, per block: at least this steep without skips and norms ...
CONTRAST_VANISHING_NATS_PER_BLOCK: Final = -1.0
#: ... and at most this steep, in either direction, in the pre-norm net.
CONTRAST_FLAT_NATS_PER_BLOCK: Final = 0.1
#: How far below the byte frequencies' cross-entropy a loss must be to show that context was used: the
#: position alone, and the difference of the two splits, are worth a hundredth or two.
LEARNED_NATS: Final = 0.05
#: Tokens that are this parallel have become one (rank collapse: Dong et al. 2021, arXiv:2103.03404) ...
DEAD_TOKEN_COSINE: Final = 0.99
#: ... and then queries and keys get next to none of the gradient (Noci et al. 2022, arXiv:2206.03126).
DEAD_QK_RATIO: Final = 0.01

Verdict = Literal["vanishes", "explodes", "is preserved", "is undecided", "underflows"]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """The gradient flow of one variant at one depth, over seeds.

    Attributes:
        depth: number of blocks.
        delta: Δ, in nats.
        increment: mean of ln(g_l / g_{l+1}) over the blocks, in nats per block.
        zeros: values of g_l that are exactly 0, over all seeds and positions.
        values: how many values of g_l there are.
    """

    depth: int
    delta: Interval
    increment: Interval
    zeros: int = 0
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


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The runs of one variant at one depth, at its best learning rate.

    Attributes:
        label: the variant, as plots name it.
        rate: the best of the learning rates.
        rates: all rates tried, ascending.
        steps: optimizer steps after which the validation loss was taken.
        losses: validation loss by seed, one value per entry of `steps`; nats per byte.
        final: mean of the last validation loss over seeds.
    """

    label: str
    rate: float
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    losses: Mapping[int, tuple[float, ...]]
    final: Interval


# -- numbers in words ----------------------------------------------------------------------------


def number_text(x: float, digits: int = 2) -> str:
    """A number for prose: fixed digits, a true minus sign, and e-notation where it must."""
    if x != x:
        return "not known"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if x == 0:
        return "0"
    if abs(x) >= 1e5 or abs(x) < 0.5 * 10**-digits:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{x:.{digits}f}".replace("-", "−")


def interval_text(interval: Interval, digits: int = 2) -> str:
    """``estimate [low, high]``; the estimate alone where there is no interval."""
    estimate = number_text(interval.estimate, digits)
    if math.isnan(interval.low) or math.isnan(interval.high):
        return estimate
    return f"{estimate} [{number_text(interval.low, digits)}, {number_text(interval.high, digits)}]"


def _listed(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _factor(nats: float) -> str:
    """e^nats as a factor, also where it is out of a float's range."""
    if abs(nats) < math.log(1e5):
        return number_text(math.exp(nats), 2 if abs(nats) < 2 else 1 if nats > 0 else 3)
    exponent = nats / math.log(10)
    whole = math.floor(exponent)
    return f"{10 ** (exponent - whole):.0f}e{whole}".replace("-", "−").replace("10e", "9e")


# -- at initialisation ---------------------------------------------------------------------------


def flow_verdict(flow: Flow) -> Verdict:
    """What the gradient does over the depth.

    ``vanishes`` if the interval of Δ ends below −`FLOW_NATS`, ``explodes`` if it begins above
    +`FLOW_NATS`, ``is preserved`` if it lies between, ``underflows`` if exact zeros leave no finite Δ,
    and else ``is undecided``. Without an interval (one seed) it is always undecided.
    """
    if flow.zeros and not math.isfinite(flow.delta.estimate):
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
}


def flow(label: str, flows: Sequence[Flow]) -> str:
    """What the gradient of one variant does at each depth, with its rate.

    Args:
        label: the variant, as plots name it.
        flows: by depth, ascending.
    """
    by_verdict: dict[Verdict, list[int]] = {}
    for one in flows:
        by_verdict.setdefault(flow_verdict(one), []).append(one.depth)
    if len(by_verdict) == 1:
        (verdict,) = by_verdict
        where = (
            f"at every depth measured ({flows[0].depth} to {flows[-1].depth} blocks)"
            if len(flows) > 1
            else f"at {flows[0].depth} blocks"
        )
        sentence = f"**{label}**: the gradient {_VERDICT_WORDS[verdict]} {where}"
    else:
        parts = [
            f"{_VERDICT_WORDS[verdict]} at {_listed(depths)} blocks"
            for verdict, depths in by_verdict.items()
        ]
        sentence = f"**{label}**: the gradient " + "; ".join(parts)
    rates = [f"{interval_text(f.increment)} at {f.depth}" for f in flows if not f.zeros]
    if rates:
        sentence += f". Nats per block: {', '.join(rates)} blocks"
    last = flows[-1]
    if math.isfinite(last.delta.estimate):
        sentence += (
            f"; with {last.depth} blocks the trunk's input gets {_factor(last.delta.estimate)} times "
            "the gradient of its output"
        )
    zeros = sum(f.zeros for f in flows)
    if zeros:
        sentence += f"; {zeros} of {sum(f.values for f in flows)} norms are exactly 0 (underflow)"
    return sentence + "."


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
            f"measured** {rule}: the first part holds at {_listed(steep or ['no depth'])}, the second "
            f"at {_listed(flat or ['no depth'])}."
        )
    return (
        f"**The contrast between “{without_label}” and “{with_label}” holds at {_listed(both)} blocks "
        f"only**, of {_listed(depths)} {rule}."
    )


def initialisation_dependence(label: str, flows: Mapping[str, Sequence[Flow]]) -> str:
    """Whether the same net does the same under every initialisation.

    Args:
        label: the variant, as plots name it.
        flows: by initialisation, each by depth, ascending.
    """
    verdicts = {
        name: {flow_verdict(f) for f in by_depth if f.depth == by_depth[-1].depth}.pop()
        for name, by_depth in flows.items()
    }
    depth = next(iter(flows.values()))[-1].depth
    listed = "; ".join(
        f"{name}: {interval_text(by_depth[-1].increment)} nats per block, {verdicts[name]}"
        for name, by_depth in flows.items()
    )
    kinds = set(verdicts.values())
    if "explodes" in kinds and kinds & {"vanishes", "underflows"}:
        exploding = [name for name, verdict in verdicts.items() if verdict == "explodes"]
        head = (
            f"**“{label}” does not always vanish: it depends on the initialisation, and reverses "
            f"under {_listed(exploding)}**"
        )
    elif len(kinds) == 1:
        head = f"**“{label}” does the same under every initialisation tried**"
    else:
        head = f"**What “{label}” does depends on the initialisation**"
    return f"{head} (at {depth} blocks: {listed})."


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
        f"block and {interval_text(end.qk_last, 4)} in the last"
    )
    rule = f"(rule: token cosine above {DEAD_TOKEN_COSINE}, last ratio below {DEAD_QK_RATIO})"
    if both:
        where = "at every depth measured" if len(both) == len(flows) else f"at {_listed(both)} blocks"
        return (
            f"**“{label}” keeps the norm of its gradient {where}, and the net is dead there**: {numbers} "
            f"{rule}. A preserved gradient norm alone does not say that a net can learn."
        )
    if dead:
        return f"**“{label}” is dead by rank collapse at {_listed(dead)} blocks**: {numbers} {rule}."
    return f"“{label}” shows no rank collapse by the rule used {rule}: {numbers}."


def not_flat(label: str, flows: Sequence[Flow]) -> str:
    """Whether a preserved gradient is also constant over depth, and whether its rate is one number.

    Not flat: the interval of Δ leaves out 0 at every depth. No exponential: the interval of the rate
    at the deepest net lies wholly nearer to 0 than that at the shallowest.
    """
    outside = [f for f in flows if f.delta.low > 0 or f.delta.high < 0]
    first, last = flows[0], flows[-1]
    numbers = ", ".join(f"{interval_text(f.delta)} at {f.depth}" for f in flows) + " blocks"
    if len(outside) < len(flows):
        which = [f.depth for f in flows if f not in outside]
        return f"“{label}” cannot be told from flat at {_listed(which)} blocks: Δ is {numbers}."
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


# -- in training ---------------------------------------------------------------------------------


def learned_context(trained: Trained, unigram_nats: float) -> str:
    """Whether a variant learned more than how frequent each byte is.

    It did if the interval of its final loss ends at least `LEARNED_NATS` below the unigram
    cross-entropy, it did not if the interval begins above that, and else it is not decided.
    """
    if not math.isfinite(trained.final.estimate):
        diverged = sum(len(v) < len(trained.steps) for v in trained.losses.values())
        return (
            f"**{trained.label}** diverged in {max(diverged, 1)} of {len(trained.losses)} runs at its "
            f"best learning rate, {trained.rate:g}."
        )
    at = (
        f"**{trained.label}** ends at {interval_text(trained.final, 3)} nats per byte "
        f"(learning rate {trained.rate:g})"
    )
    if trained.final.high < unigram_nats - LEARNED_NATS:
        return f"{at}: it has learned from the context."
    if trained.final.low > unigram_nats - LEARNED_NATS:
        return f"{at}: **it has learned nothing but how frequent each byte is**."
    return f"{at}: not told from byte frequencies alone."


def better_with(with_skip: Trained, without: Trained, difference: Interval) -> str:
    """Whether the variant with skips ends at a lower validation loss, seed by seed.

    Args:
        with_skip: the variant with skips.
        without: its counterpart without.
        difference: of the final losses, with minus without, paired by seed.
    """
    pair = f"“{with_skip.label}” against “{without.label}”"
    numbers = f"difference of the final losses {interval_text(difference, 3)} nats per byte"
    if difference.high < 0:
        return f"**Trains better with skips**: {pair}, {numbers}, paired by seed."
    if difference.low > 0:
        return f"**Trains worse with skips**: {pair}, {numbers}, paired by seed."
    return f"No difference shown: {pair}, {numbers}, paired by seed."


def faster_with(with_skip: Trained, without: Trained) -> str:
    """How many steps the variant with skips needs to reach the best loss of the one without.

    For each seed: the first evaluation at which the loss with skips is at or below the lowest that
    the same seed reached without. Faster only if every seed got there in fewer steps than the other
    net took for it.
    """
    seeds = sorted(with_skip.losses.keys() & without.losses.keys())
    needed: list[int | None] = []
    took: list[int] = []
    for seed in seeds:
        other = without.losses[seed]
        best = min(range(len(other)), key=lambda i, other=other: other[i])
        took.append(without.steps[best])
        reached = (
            s for s, v in zip(with_skip.steps, with_skip.losses[seed], strict=False) if v <= other[best]
        )
        needed.append(next(reached, None))
    pair = f"“{with_skip.label}” against “{without.label}”"
    got = [n for n in needed if n is not None]
    if not got:
        return f"Not faster: {pair}, in no seed did the net with skips reach the other's lowest loss."
    detail = (
        f"the lowest loss without skips came at step {_listed(took)} (by seed), with skips it was "
        f"reached at step {_listed(['never' if n is None else n for n in needed])}"
    )
    if all(n is not None and n < t for n, t in zip(needed, took, strict=True)):
        return f"**Trains faster with skips**: {pair}, {detail}."
    if all(n is None or n > t for n, t in zip(needed, took, strict=True)):
        return f"**Trains slower with skips**: {pair}, {detail}."
    return f"Not shown to train faster: {pair}, {detail}."


def rate_edges(trained: Sequence[Trained]) -> str:
    """Which best learning rates lie on the edge of what was tried."""
    low = [t.label for t in trained if len(t.rates) > 1 and t.rate == t.rates[0]]
    high = [t.label for t in trained if len(t.rates) > 1 and t.rate == t.rates[-1]]
    parts: list[str] = []
    if low:
        parts.append(f"the smallest for {_listed(low)}")
    if high:
        parts.append(f"the largest for {_listed(high)}")
    if not parts:
        return "Every best learning rate lies inside the range tried."
    return (
        f"The best learning rate tried is {'; '.join(parts)}: on the edge of the range, so a rate "
        "beyond it may be better still for them."
    )


def zeros_in_training(label: str, first: Flow, last: Flow) -> str | None:
    """The exact zeros of float32, where there are any: reported as zeros, not as absent."""
    if not first.zeros and not last.zeros:
        return None
    return (
        f"**{label}**: in float32, denormals flushed, {first.zeros} of {first.values} gradient norms "
        f"over depth are exactly 0 at the first step and {last.zeros} of {last.values} at the last "
        "recorded one. That is underflow; they are shown as zeros and no rate is computed through them."
    )


def robustness(first_label: str, second_label: str, difference: Interval, depth: int) -> str:
    """Whether one variant tolerates the learning rates tried better than another in a deep net.

    Args:
        first_label: a variant.
        second_label: the one it is compared with.
        difference: of the worst final loss over the rates tried, first minus second, paired by seed.
        depth: number of blocks.
    """
    numbers = (
        f"worst final loss over the learning rates tried, “{first_label}” minus “{second_label}”: "
        f"{interval_text(difference, 3)} nats per byte, paired by seed"
    )
    if difference.high < 0:
        return f"**With {depth} blocks “{first_label}” is the more robust** ({numbers})."
    if difference.low > 0:
        return f"**With {depth} blocks “{second_label}” is the more robust** ({numbers})."
    return f"With {depth} blocks neither is shown to be the more robust ({numbers})."
