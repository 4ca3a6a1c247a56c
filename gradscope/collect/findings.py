"""What in a finished step is worth a warning: the first non-finite value, a layer that died."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from gradscope.collect.open_step import OpenStep
from gradscope.collect.voice import Voice
from gradscope.layers import Layer
from gradscope.record import SIGNALS, Rows, Step

__all__ = ["Findings"]

Order = Callable[[str], Sequence[tuple[str, str, int]]]

#: A layer whose gradient has been exactly zero in so many recorded steps in a row is called dead. Sooner
#: it may be zero by construction (behind a zero-initialised head, or LoRA's B), or by chance: stochastic
#: depth multiplies a branch by zero for the whole of a small batch.
STEPS_BEFORE_DEAD: Final = 20


class Findings:
    """Looks at each finished step; remembers for how long layers have had no gradient.

    Args:
        layers: the watched layers.
        voice: warns of what is found; None to stay silent.
    """

    def __init__(self, layers: Sequence[Layer], voice: Voice | None) -> None:
        self.layers = layers
        self._voice = voice
        self._history: dict[tuple[str, str], int] = {}
        self._known: tuple[Rows, dict[str, dict[str, list[int]]]] | None = None

    def mark(self, step: Step, seen: OpenStep) -> Step:
        """The step with its finding, of which the user is warned.

        Args:
            step: the finished step.
            seen: the open step that it was made of.
        """

        def order(signal: str) -> list[tuple[str, str, int]]:
            calls = [c for c in seen.in_order_of_arrival(signal) if c.site >= 0]
            return [(self.layers[c.site].name, self.layers[c.site].type, c.index) for c in calls]

        finding = self.of(step, order)
        if finding is None:
            return step
        if self._voice is not None:
            self._voice.say(finding.split(":")[0], f"gradscope, step {step.step}: {finding}")
        return replace(step, finding=finding)

    def of(self, step: Step, order: Order) -> str | None:
        """The step's finding in words, the graver first; None where there is nothing to say.

        Args:
            step: the finished step.
            order: for a signal, the (layer, type, call) of its samples in the order they came in.
        """
        dead = self._dead(step)
        return _first_nonfinite(step, self._rows(step.rows, "nonfinite"), order) or dead

    def _dead(self, step: Step) -> str | None:
        rows = step.rows
        # All calls of a layer together: which tokens an expert's call gets is another thing every time.
        alive: dict[tuple[str, str], bool] = {}
        for row in self._rows(rows, "l2")["output_grad"]:
            if not step.status[row]:
                key = rows.layer[row], rows.type[row]
                alive[key] = alive.get(key, False) or bool(step.value[row] != 0)
        dead: list[str] = []
        for key, has_gradient in alive.items():
            zeros = self._history[key] = 0 if has_gradient else self._history.get(key, 0) + 1
            if zeros == STEPS_BEFORE_DEAD:
                dead.append(key[0])
        if not dead:
            return None
        dead = list(dict.fromkeys(dead))
        names = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        return (
            f"dead layer: the gradient at the output of {names} is exactly zero, for "
            f"{STEPS_BEFORE_DEAD} recorded steps now"
        )

    def _rows(self, rows: Rows, statistic: str) -> dict[str, list[int]]:
        """Row numbers of one statistic by signal, remembered for the row table."""
        if self._known is None or self._known[0] is not rows:
            self._known = (rows, {})
        known = self._known[1]
        if statistic not in known:
            found: dict[str, list[int]] = {s: [] for s in SIGNALS}
            for i, (signal, name) in enumerate(zip(rows.signal, rows.statistic, strict=True)):
                if name == statistic:
                    found[signal].append(i)
            known[statistic] = found
        return known[statistic]


def _first_nonfinite(step: Step, rows: Mapping[str, Sequence[int]], order: Order) -> str | None:
    for signal, words in (
        ("activation", "the activation of"),
        ("output_grad", "the gradient at the output of"),
        ("param_grad", "the gradient of"),
    ):
        at = [i for i in rows[signal] if step.value[i] > 0]
        if at:
            # The first in time is the culprit: a layer before the block around it, and in the backward
            # pass the one nearest to the loss.
            came: dict[tuple[str, str, int], int] = {}
            for key in order(signal):
                came.setdefault(key, len(came))
            table = step.rows
            keys = {i: (table.layer[i], table.type[i], int(table.call[i])) for i in at}
            first = min(at, key=lambda i: came.get(keys[i], len(came)))
            others = f", the first of {len(at)} such" if len(at) > 1 else ""
            return (
                f"non-finite: {words} {step.rows.layer[first]} holds {int(step.value[first])} NaN or "
                f"infinite elements{others}"
            )
    return None
