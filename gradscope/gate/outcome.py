"""What a check found, and how it is said in a terminal, a CI log and a pull request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gradscope.analysis.wording import WIDTH, aligned, and_more, escaped, markdown_table, wrapped

__all__ = ["MEANINGS", "Change", "Outcome", "Profile"]

_HEAD: Final = ("layer", "feature", "expected", "obtained", "change", "probability")
_ROWS: Final = 8
#: What the kinds of feature are logarithms of.
MEANINGS: Final = {
    "flow": "gradient norm in front of the block over that behind it",
    "act": "activation variance behind the block over that in front of it",
    "upd": "what the block adds to the stream, over the stream",
    "gup": "what the block adds to the gradient, over the gradient",
    "endpoint": "gradient norm at the last block's output; activation variance at the first one's input",
    "delta": "gradient norm in front of all blocks over that behind them",
    "param_grad": "gradient norm of a parameter, over that at its block's output",
    "rms": "root mean square of a parameter",
}
_BARS: Final = "▁▂▃▄▅▆▇█"
_WIDEST: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that is not as in the baseline.

    Attributes:
        layer: block, parameter, or what else it is about.
        feature: kind of feature (``flow``, ``rms``, …), or the exact fact (``gradient``, ``shape``, …).
        expected: as in the baseline: nats for features.
        obtained: in this run.
        change: obtained − expected in nats; NaN for exact facts.
        tolerance: the smallest change worth failing for, nats; NaN for exact facts.
        probability: of a change as clear as this one in unchanged code: 0 for exact facts and for the
            same seeds, where nothing but rounding differs.
        block: index of the block, −1 off the blocks.
    """

    layer: str
    feature: str
    expected: str
    obtained: str
    change: float = math.nan
    tolerance: float = math.nan
    probability: float = 0.0
    block: int = -1

    @property
    def row(self) -> tuple[str, str, str, str, str, str]:
        """Layer, feature, expected, obtained, change, probability, in words."""
        layer, feature = self.layer, self.feature
        if feature == "mean":  # of a kind of feature over the layers that have one role
            kind, _, layer = layer.partition(" ")
            feature = f"mean {kind}"
        change = "–"
        if math.isfinite(self.change):
            change = f"{self.change:+.3f} nat (×{math.exp(max(min(self.change, 99), -99)):.3g})"
        p = "exact" if self.probability == 0 else f"{self.probability:.1e}"
        return layer, feature, self.expected, self.obtained, change, p


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A level over depth, expected and obtained.

    Attributes:
        name: what it is.
        expected: nats, one per position; NaN where it is not known.
        obtained: the same.
    """

    name: str
    expected: tuple[float, ...]
    obtained: tuple[float, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int = WIDTH) -> list[str]:
        """What it is, and two rows of bars, in at most so many columns."""
        known = [x for x in (*self.expected, *self.obtained) if math.isfinite(x)]
        if not known:
            return wrapped(f"{self.name}: nothing measured", width)
        low, high = min(known), max(known)
        most = max(1, min(_WIDEST, width - len("  expected ")))
        return [
            *wrapped(f"{self.name}, {low:.2f} to {high:.2f} nat", width),
            f"  expected {_bars(self.expected, low, high, most)}",
            f"  obtained {_bars(self.obtained, low, high, most)}",
        ]


def _bars(values: tuple[float, ...], low: float, high: float, most: int) -> str:
    step = max(1, math.ceil(len(values) / most))
    top = len(_BARS) - 1
    return "".join(
        _BARS[round((x - low) / (high - low) * top) if high > low else 0] if math.isfinite(x) else "·"
        for x in values[::step]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a check.

    Attributes:
        status: ``passed``; ``suspicious``: flagged by the first fresh replicates and not confirmed by the
            further ones, which passes; ``failed``; ``not applicable``: the baseline is of something else.
        reason: one sentence.
        tier: what decided: ``exact facts``, ``same seeds``, ``other seeds`` or ``fingerprint``.
        where: the block that departs first, or ``k of n blocks``; empty where nothing departs.
        changes: what departs, the named block's first.
        layers: the names of all that departs.
        notes: what to know besides.
        resolution: kind of feature → the median over layers of the smallest change that this check would
            have caught with 95 % power, nats.
        replicates: how many were run.
        profiles: gradient and activation over depth.
        model: the model's name.
    """

    status: str
    reason: str
    tier: str
    where: str = ""
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    resolution: Mapping[str, float] = field(default_factory=dict[str, float])
    replicates: int = 0
    profiles: tuple[Profile, ...] = ()
    model: str = ""

    @property
    def failed(self) -> bool:
        """Whether a test must fail: ``failed``, or ``not applicable``, where nothing was checked."""
        return self.status in ("failed", "not applicable")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that depart, each once."""
        return tuple(dict.fromkeys(c.layer for c in self.changes))

    def text(self, width: int = WIDTH) -> str:
        """In words, for a terminal of so many columns."""
        lines = wrapped(f"gradient baseline of {self.model}: {self.status}. {self.reason}", width)
        if self.changes:
            lines += aligned(_HEAD, [c.row for c in self.changes[:_ROWS]], width)
            lines += [f"  {line}" for line in and_more(len(self.changes), _ROWS)]
        if self.status in ("failed", "suspicious"):
            for profile in self.profiles:
                lines += [f"  {line}" for line in profile.lines(width - 2)]
        for line in self._footer():
            lines += wrapped(line, width, "  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def markdown(self) -> str:
        """The same for a pull-request comment."""
        lines = [
            f"**Gradient baseline of `{escaped(self.model)}`: {self.status}.** {escaped(self.reason)}"
        ]
        if self.changes:
            lines += ["", *markdown_table(_HEAD, [c.row for c in self.changes[:_ROWS]])]
            more = and_more(len(self.changes), _ROWS)
            lines += ["", *more] if more else []
        if self.status in ("failed", "suspicious") and self.profiles:
            lines += ["", "```text", *(str(profile) for profile in self.profiles), "```"]
        lines += ["", *(f"- {escaped(line)}" for line in self._footer())]
        return "\n".join(lines).rstrip() + "\n"

    def _footer(self) -> list[str]:
        lines: list[str] = []
        if self.resolution:
            sizes = {kind: f"{size:.2g}" for kind, size in self.resolution.items()}
            words = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
            if len(set(sizes.values())) == 1:
                words = f"{next(iter(sizes.values()))} in every feature"
            rate = "" if self.tier == "same seeds" else "in 95 % of checks "
            lines.append(f"resolution: a change of one layer is caught {rate}from [nat] {words}")
        features = [change.row[1].removeprefix("mean ") for change in self.changes[:_ROWS]]
        known = [f"{kind}: {MEANINGS[kind]}" for kind in dict.fromkeys(features) if kind in MEANINGS]
        if known:
            lines.insert(0, f"natural logarithms of {'; '.join(known)}")
        return lines + [f"note: {note}" for note in self.notes]
