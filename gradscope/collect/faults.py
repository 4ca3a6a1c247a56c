"""Errors of gradscope's own: counted, put where the value would stand, and warned of once.

Training goes on: what raises inside a hook is caught by the recorder and ends here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gradscope.collect.passes import Call, Pass, Slot
from gradscope.collect.voice import Voice
from gradscope.layers import Layer

__all__ = ["Faults"]


class Faults:
    """What went wrong inside gradscope.

    Attributes:
        layers: the watched layers.
        counts: how often, by place and error.
    """

    def __init__(self, layers: Sequence[Layer], voice: Voice) -> None:
        self.layers = layers
        self._voice = voice
        self.counts: Counter[str] = Counter()

    def note(
        self, site: int, error: Exception, *, slot: Slot | None = None, during: Pass | None = None
    ) -> None:
        """An error was caught.

        Args:
            site: the layer at whose hook it came, -1 for the model.
            error: the error.
            slot: the sample that misses a value for it.
            during: without a slot, the pass in which values are missing for it.
        """
        where = self.layers[site].name if site >= 0 else "the model"
        kind = f"{type(error).__name__}: {error}"
        self.counts[f"{where}: {kind}"] += 1
        reason = f"error: {kind}"[:200]
        if slot is not None:
            slot.error = reason
        elif during is not None:
            _mark(during, site, reason)
        self._voice.say(
            f"fault {type(error).__name__}",
            f"gradscope caught an error of its own at {where}: {kind}. Training goes on; the values "
            "that are missing for it have this as their status, and scope.faults counts it.",
        )


def _mark(p: Pass, site: int, reason: str) -> None:
    if site < 0:
        p.error = reason
        return
    calls = [c for c in p.calls if c.site == site]
    if calls:
        calls[-1].error = reason
    else:
        p.calls.append(Call(site, 0, [], error=reason))
        p.counts[site] = 1
