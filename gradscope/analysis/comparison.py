"""What differs between two Records, and how it is said in a terminal, a CI log and a pull request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from gradscope.analysis.renaming import renames
from gradscope.analysis.wording import WIDTH, aligned, and_more, escaped, markdown_table, wrapped

__all__ = ["Comparison", "Departure"]

_ROWS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """One number, or one state, that is not as in the baseline.

    Attributes:
        step: the step at which it was seen.
        trunk: the trunk's name.
        layer: the layer's name, as in the record.
        depth: its stream depth l: block k ends at k + 1.
        quantity: what departs: ``activation``, ``peak`` (largest activation over its root mean square),
            ``flow`` (the gradient), ``parameter gradient``.
        kind: ``increment`` (over the block that ends at ``depth``), ``level``, ``ratio`` (to the
            gradient at the block's output), or ``state`` (there is a number on one side only).
        expected: in the baseline: nats, mean over replicates; a word for a state.
        obtained: in the record.
        change: obtained − expected in nats; NaN for a state.
        error: standard error of the change, nats; NaN without replicates on both sides.
        probability: of a change as clear as this one without a difference, for all tests together
            (Bonferroni); NaN without replicates.
    """

    step: int
    trunk: str
    layer: str
    depth: float
    quantity: str
    kind: str
    expected: float | str
    obtained: float | str
    change: float = math.nan
    error: float = math.nan
    probability: float = math.nan

    @property
    def row(self) -> tuple[str, ...]:
        """Step, layer, quantity, expected, obtained, change and probability, in words."""
        change = "–"
        if math.isfinite(self.change):
            change = f"{self.change:+.3f} nat"
        if math.isfinite(self.error):
            change += f" ± {self.error:.2g}"
        p = f"{self.probability:.1e}" if math.isfinite(self.probability) else "–"
        what = f"{self.quantity} {self.kind}"
        return str(self.step), self.layer, what, _word(self.expected), _word(self.obtained), change, p


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Comparison:
    """Two Records beside each other.

    Attributes:
        models: name of the model in the record and in the baseline.
        method: ``one run each`` (every change above the tolerance departs), ``paired replicates`` or
            ``replicates`` (it must be clear over replicates too).
        steps: the steps that both have.
        features: how many numbers were compared, over all steps.
        departures: what departs: the first step first, and there the first layer first.
        blocks: (blocks that depart at the first such step by a comparable part of the largest change,
            blocks of all trunks).
        wide: whether so many of them depart that none is called the first.
        renamed: (name in the baseline, name in the record) of layers and parameters at the same depth.
        added: layers and parameters of the record only.
        removed: layers and parameters of the baseline only.
        resolution: (quantity, nats): the smallest change that would have been seen, median over layers:
            the tolerance or, with replicates, what reaches significance, if that is larger.
        notes: what to know when reading this.
    """

    models: tuple[str, str]
    method: str
    steps: tuple[int, ...]
    features: int
    departures: tuple[Departure, ...]
    blocks: tuple[int, int]
    wide: bool
    renamed: tuple[tuple[str, str], ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    resolution: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing departs and no layer was added or removed. A new name alone is no departure."""
        return not (self.departures or self.added or self.removed)

    @property
    def first(self) -> Departure | None:
        """The first departure of the first step that has one; None where nothing departs."""
        return self.departures[0] if self.departures else None

    @property
    def summary(self) -> str:
        """One sentence: the same, or where they depart first."""
        if self.same:
            return f"the same: {self.features} numbers, {self._when(self.steps)}"
        if self.first is None:
            return "different layers; what both have is the same"
        departed, blocks = self.blocks
        at = f"at step {self.first.step}"
        if self.wide:
            return f"{departed} of {blocks} blocks depart {at}"
        return f"departs first in {self.first.layer} ({self.first.quantity}), {at}"

    @staticmethod
    def _when(steps: tuple[int, ...]) -> str:
        if len(steps) == 1:
            return f"step {steps[0]}"
        return f"{len(steps)} steps, {steps[0]}–{steps[-1]}"

    def _changes_of_layers(self) -> list[str]:
        lines: list[str] = []
        if self.renamed:
            lines.append(f"renamed, matched by depth: {renames(self.renamed)}")
        for what, names in (("added", self.added), ("removed", self.removed)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{what}: {', '.join(names[:8])}{more}")
        return lines

    def _footer(self) -> list[str]:
        lines = self._changes_of_layers()
        if self.resolution:
            sizes = ", ".join(f"{name} {nats:.2g}" for name, nats in self.resolution)
            lines.append(f"resolution ({self.method}), a change is seen from [nat]: {sizes}")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    _HEAD = ("step", "layer", "what", "expected", "obtained", "change", "probability")

    def text(self, width: int = WIDTH) -> str:
        """In words, for a terminal of so many columns."""
        lines = wrapped(f"{self.models[0]} against {self.models[1]}: {self.summary}", width)
        if self.departures:
            lines += aligned(self._HEAD, [d.row for d in self.departures[:_ROWS]], width)
            lines += [f"  {line}" for line in and_more(len(self.departures), _ROWS)]
        for line in self._footer():
            lines += wrapped(line, width, "  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def markdown(self) -> str:
        """The same for a pull-request comment."""
        lines = [f"**`{self.models[0]}` against `{self.models[1]}`:** {escaped(self.summary)}"]
        if self.departures:
            lines += ["", *markdown_table(self._HEAD, [d.row for d in self.departures[:_ROWS]])]
            more = and_more(len(self.departures), _ROWS)
            lines += ["", *more] if more else []
        return "\n".join([*lines, "", *(f"- {escaped(line)}" for line in self._footer())]).rstrip() + "\n"

    def __repr__(self) -> str:
        return f"<Comparison of {self.models[0]} with {self.models[1]}: {self.summary}>"
