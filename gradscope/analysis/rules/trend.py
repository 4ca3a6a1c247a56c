"""The verdict of each trunk over its last recorded steps, which several rules read. No rule itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradscope.analysis.finding import Limits, NotChecked, Threshold
from gradscope.analysis.history import history
from gradscope.analysis.verdict import THRESHOLD, Verdict, verdict
from gradscope.analysis.view import NO_AXIS, View
from gradscope.errors import QuantityError

__all__ = ["NATS", "POOLED", "SIX_XI", "Trend", "trends"]

SIX_XI: Final = "Schoenholz et al. 2017, arXiv:1611.01232 (signals pass about 6ξ layers: 3 nats)"
NATS: Final = Threshold(value=THRESHOLD, unit="nats", source=SIX_XI)
POOLED: Final = Threshold(
    value=10, unit="steps", source="last recorded steps of a run: one batch alone is noisy"
)


@dataclass(frozen=True, slots=True)
class Trend:
    """What a signal does over one trunk.

    Attributes:
        verdict: over the last steps with finite values, whose logarithms are averaged.
        at_start: that of the first step with finite values.
        steps: since when it was the same, and the last of these steps.
        first_block: where the first block alone makes the verdict what it is, the one without it.
    """

    verdict: Verdict
    at_start: Verdict
    steps: tuple[int, int]
    first_block: Verdict | None


def trends(view: View, limits: Limits, quantity: str, threshold: str) -> Iterator[Trend | NotChecked]:
    """The trend of each trunk, or why there is none.

    Args:
        view: the Record.
        limits: of the rule that asks; its ``steps`` says over how many of the last recorded steps.
        quantity: ``grad_l2`` or ``act_mean_square``.
        threshold: name of the rule's threshold in nats.
    """
    if not view.trunks:
        yield limits.not_checked(NO_AXIS)
    for trunk in view.trunks:
        try:
            found = history(view.record, quantity, trunk=trunk)
            finite = found.ok.any(1) & ~(found.ok & ~np.isfinite(found.value)).any(1)
            if not finite.any():
                yield limits.not_checked(f"{quantity} over {trunk}: no step with finite values")
                continue
            numbers = sorted(set(found.steps[finite].tolist()))
            pooled = int(limits["steps"]) if found.kind == "run" else 1
            first, last = (
                verdict(view.record, quantity, trunk=trunk, step=steps, threshold=limits[threshold])
                for steps in (numbers[:1], numbers[-pooled:])
            )
        except QuantityError as error:
            yield limits.not_checked(f"{quantity} over {trunk}: {error}")
            continue
        since = numbers[0] if first.word == last.word else numbers[-1]
        yield Trend(last, first, (int(since), int(numbers[-1])), last.without_first_block)
