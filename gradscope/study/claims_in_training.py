"""The report's sentences about training, each chosen from the data by a rule.

As in `gradscope.study.claims_at_initialisation`: a sentence claims what the intervals support, in
either direction, and else says that the data do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gradscope.analysis import Interval
from gradscope.study.claims_at_initialisation import Flow, flow_verdict
from gradscope.study.words import interval_text, listed

__all__ = [
    "LEARNED_NATS",
    "Trained",
    "better_with",
    "faster_with",
    "flow_change",
    "learned_context",
    "rate_edges",
    "robustness",
    "zeros_in_training",
]

#: How far below the byte frequencies' cross-entropy a loss must be to show that context was used: the
#: position alone, and the difference of the two splits, are worth a hundredth or two.
LEARNED_NATS: Final = 0.05


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


def learned_context(trained: Trained, unigram_nats: float) -> str:
    """Whether a variant learned more than how frequent each byte is.

    It did if the interval of its final loss ends at least `LEARNED_NATS` below the unigram
    cross-entropy, it did not if the interval begins above that (and has not even learned the
    frequencies if it begins `LEARNED_NATS` above), and else it is not decided.
    """
    if not math.isfinite(trained.final.estimate):
        diverged = sum(len(v) < len(trained.steps) for v in trained.losses.values())
        return (
            f"**“{trained.label}”** diverged in {max(diverged, 1)} of {len(trained.losses)} runs at its "
            f"best learning rate, {trained.rate:g}."
        )
    at = (
        f"**“{trained.label}”** ends at {interval_text(trained.final, 3)} nats per byte "
        f"(learning rate {trained.rate:g})"
    )
    low, high = unigram_nats - LEARNED_NATS, unigram_nats + LEARNED_NATS
    if trained.final.high < low:
        return f"{at}: it has learned from the context."
    if trained.final.low > high:
        return f"{at}: it has not even learned how frequent each byte is."
    if trained.final.low > low:
        return f"{at}: **no better than byte frequencies alone**."
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
        f"the lowest loss without skips came at step {listed(took)} (by seed), with skips it was "
        f"reached at step {listed(['never' if n is None else n for n in needed])}"
    )
    if all(n is not None and n < t for n, t in zip(needed, took, strict=True)):
        return f"**Trains faster with skips**: {pair}, {detail}."
    if all(n is None or n > t for n, t in zip(needed, took, strict=True)):
        return f"**Trains slower with skips**: {pair}, {detail}."
    return f"Not shown to train faster: {pair}, {detail}."


def rate_edges(trained: Sequence[Trained]) -> str:
    """Which best learning rates lie on the edge of what was tried."""
    low = [f"“{t.label}”" for t in trained if len(t.rates) > 1 and t.rate == t.rates[0]]
    high = [f"“{t.label}”" for t in trained if len(t.rates) > 1 and t.rate == t.rates[-1]]
    parts: list[str] = []
    if low:
        parts.append(f"the smallest for {listed(low)}")
    if high:
        parts.append(f"the largest for {listed(high)}")
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
        f"**“{label}”**: in float32, denormals flushed, {first.zeros} of {first.values} gradient norms "
        f"over depth are exactly 0 at the first step and {last.zeros} of {last.values} at the last "
        "recorded one. That is underflow; they are shown as zeros and no rate is computed through them."
    )


def flow_change(label: str, first: Flow, last: Flow) -> str | None:
    """How training changes what the gradient does, where the verdict is another one afterwards.

    The verdicts are those of `flow_verdict`, over the runs at the best learning rate.
    """
    before, after = flow_verdict(first), flow_verdict(last)
    if before == after or "is undecided" in (before, after):
        return None
    return (
        f"**Training changes the gradient of “{label}”**: at the first step it {before}, at the last "
        f"recorded one it {after} (Δ {interval_text(first.delta)} and {interval_text(last.delta)} nats)."
    )


def robustness(first_label: str, second_label: str, difference: Interval, depth: int) -> str:
    """Whether one variant tolerates the learning rates tried better than another in a deep net.

    Args:
        first_label: a variant.
        second_label: the one it is compared with.
        difference: of the worst final loss over the rates tried, first minus second, paired by seed; a
            run that diverged counts as guessing.
        depth: number of blocks.
    """
    numbers = (
        f"worst final loss over the learning rates tried, “{first_label}” minus “{second_label}”: "
        f"{interval_text(difference, 3)} nats per byte, paired by seed, a run that diverged counted "
        "as guessing"
    )
    if difference.high < 0:
        return f"**With {depth} blocks “{first_label}” is the more robust** ({numbers})."
    if difference.low > 0:
        return f"**With {depth} blocks “{second_label}” is the more robust** ({numbers})."
    return f"With {depth} blocks neither is shown to be the more robust ({numbers})."
