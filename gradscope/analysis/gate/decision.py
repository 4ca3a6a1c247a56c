"""Has a run with other seeds departed from its baseline, and where: screen, confirm, name.

**Screen** with five fresh replicates: a feature is flagged where p·m ≤ .1 and the change is above half
the tolerance; nothing flagged passes. Half of the level goes to the features of the stream and half to
those of the parameters, so that m is twice the number of its own: parameters are many, and blocks few.
**Confirm** with ten further fresh ones, only the k flagged features: p·k ≤ .01, the same sign, a change
above the tolerance. After three of the ten a first look ends what is clear: p·k ≤ 10⁻⁴ fails, and no
feature with p ≤ .05 and the same sign passes. Where a given model has no further batches, p·m ≤ 10⁻⁴ and
a change above the tolerance fail at once. **Name** the block by the weights, forward-first; else by
the activations, forward-first; else by the largest |t|. No single block is blamed where at least half of
the blocks depart on both sides of it (`Place.wide`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.gate.features import Feature
from gradscope.analysis.gate.moderated import Moments, Tested, moderated_t
from gradscope.analysis.gate.tolerance import Tolerance

__all__ = ["COMPARABLE", "CONFIRM", "FIRST_LOOK", "SCREEN", "Place", "Rule", "name_place"]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Fresh replicates of the two stages.
SCREEN: Final = 5
CONFIRM: Final = 10
#: So many of the further ones are looked at first.
FIRST_LOOK: Final = 3
_SCREEN_LEVEL: Final = 0.1
_CONFIRM_LEVEL: Final = 0.01
_CLEAR_LEVEL: Final = 1e-4
_ALIVE_LEVEL: Final = 0.05
#: Kinds of one per parameter, and the means of these.
_OF_PARAMETERS: Final = ("param_grad ", "rms ")
_POWER_95: Final = 1.645
#: A block departs with others if it does so by this share of the largest change.
COMPARABLE: Final = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """The test of one set of features under one tolerance.

    Attributes:
        features: F.
        role: [F] number of each feature's role.
        smallest: [F] the smallest change worth failing for, nats.
        tests: [F] m, what a p-value is multiplied by for the many features.
    """

    features: tuple[Feature, ...]
    role: npt.NDArray[np.int64]
    smallest: Floats
    tests: Floats

    @classmethod
    def of(cls, features: Sequence[Feature], tolerance: Tolerance) -> Rule:
        """For these features."""
        numbers = {role: i for i, role in enumerate(dict.fromkeys(f.role for f in features))}
        own = np.asarray([any(k in f.role for k in _OF_PARAMETERS) for f in features], dtype=np.bool_)
        counts = [int((~own).sum()), int(own.sum())]
        groups = sum(1 for n in counts if n)
        return cls(
            tuple(features),
            np.asarray([numbers[f.role] for f in features], dtype=np.int64),
            np.asarray([tolerance.of(f.kind, f.role) for f in features], dtype=np.float64),
            groups * np.where(own, counts[1], counts[0]).astype(np.float64),
        )

    def screen(self, base: Moments, run: Moments) -> tuple[Mask, Tested]:
        """[F], which features the first fresh replicates flag."""
        tested = moderated_t(base, run, self.role)
        clear = tested.p_value * self.tests <= _SCREEN_LEVEL
        return clear & (np.abs(tested.change) > self.smallest / 2), tested

    def confirm(
        self, base: Moments, run: Moments, flagged: Mask, screened: Floats
    ) -> tuple[str, Mask, Tested]:
        """Whether the further replicates confirm what the first ones flagged.

        Args:
            base: the baseline.
            run: the further replicates alone: `FIRST_LOOK` of them, or all.
            flagged: [F].
            screened: [F], the changes that the screen saw; the sign must be the same.

        Returns:
            ``failed``, ``passed``, or ``open`` where a first look cannot tell; [F], which of the flagged
            features depart, each by itself (p ≤ .01), to read the place from; and the test.
        """
        tested = moderated_t(base, run, self.role)
        first = run.count <= FIRST_LOOK
        flags = int(flagged.sum())
        same = flagged & (np.sign(tested.change) == np.sign(screened))
        large = same & (np.abs(tested.change) > self.smallest)
        level = _CLEAR_LEVEL if first else _CONFIRM_LEVEL
        if (large & (tested.p_value * flags <= level)).any():
            status = "failed"
        elif first and (same & (tested.p_value <= _ALIVE_LEVEL)).any():
            status = "open"
        else:
            status = "passed"
        return status, large & (tested.p_value <= _CONFIRM_LEVEL), tested

    def clear(self, tested: Tested) -> Mask:
        """[F], which features depart so clearly that no further replicates need confirm it.

        A change above the tolerance with p·m ≤ 10⁻⁴: for where there are no further ones.
        """
        return (tested.p_value * self.tests <= _CLEAR_LEVEL) & (np.abs(tested.change) > self.smallest)

    def resolution(self, tested: Tested, counts: tuple[int, int]) -> Floats:
        """[F] the smallest change flagged with 95 % power, and seen above the tolerance when confirmed.

        max((t_crit + 1.645)·s̃·√(1/S_b + 1/S_r), τ + 1.645·s̃·√(1/S_b + 1/S_c)), nats, with S_c = 10
        replicates that confirm: a change of τ itself is seen to be above τ in half of all checks.

        Args:
            tested: the screen.
            counts: S_b and S_r.
        """
        from scipy.special import stdtrit

        level = 1 - _SCREEN_LEVEL / self.tests / 2
        critical = np.asarray(stdtrit(tested.degrees, level), dtype=np.float64)
        flags = (critical + _POWER_95) * tested.error
        base, run = counts
        later = tested.error * math.sqrt((1 / base + 1 / CONFIRM) / (1 / base + 1 / run))
        return np.maximum(flags, self.smallest + _POWER_95 * later)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run departs.

    Attributes:
        layer: the block, or what departs off the blocks; "" where nothing departs.
        block: its index, −1 off the blocks.
        departing: indices of the blocks that depart.
        blocks: how many blocks there are.
    """

    layer: str
    block: int
    departing: frozenset[int]
    blocks: int

    @property
    def wide(self) -> bool:
        """Whether so many blocks depart that no single one can be blamed.

        At least half of all, of those in front of the named one, and of those behind it: a change of one
        block's forward pass leaves what lies in front nearly alone, one of its backward pass what lies
        behind.
        """
        if self.blocks == 0:
            return False
        front = range(max(self.block, 0))
        behind = range(self.block + 1, self.blocks)
        return all(
            2 * len(self.departing.intersection(part)) >= len(part)
            for part in (range(self.blocks), front, behind)
        )


def name_place(
    features: Sequence[Feature], failed: Mask, strength: Floats, size: Floats, blocks: Sequence[str]
) -> Place:
    """The block that a departure starts in.

    Args:
        features: F.
        failed: [F], which depart.
        strength: [F], how clearly: |t|.
        size: [F], how much, in units of the smallest change worth failing for. A block counts as
            departing if it does so by a quarter of the largest: a change in one block moves others a
            little.
        blocks: names, forward order.
    """
    hits: list[int] = np.flatnonzero(failed).tolist()
    if not hits:
        return Place("", -1, frozenset(), len(blocks))
    on_blocks = [i for i in hits if features[i].block >= 0]
    largest = max((float(size[i]) for i in on_blocks), default=0.0)
    departing = frozenset(features[i].block for i in on_blocks if size[i] >= COMPARABLE * largest)
    weights = [i for i in hits if features[i].kind == "rms"]
    if weights and not any(features[i].block >= 0 for i in weights):
        # What starts with other weights is a cause, and what the blocks do follows from it.
        return Place(features[weights[0]].layer, -1, frozenset(), len(blocks))
    chosen = -1
    for kinds in (("rms",), ("act", "upd")):
        found = [i for i in on_blocks if features[i].kind in kinds]
        if found:
            chosen = min(found, key=lambda i: features[i].block)
            break
    if chosen < 0:
        chosen = max(on_blocks or hits, key=lambda i: float(strength[i]))
    feature = features[chosen]
    layer = blocks[feature.block] if feature.block >= 0 else feature.layer
    return Place(layer, feature.block, departing, len(blocks))
