"""The comparison of a run with its baseline: same seeds, and other seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.gate.decision import Place, Rule, name_place
from gradscope.analysis.gate.features import Feature
from gradscope.analysis.gate.moderated import Moments, Tested
from gradscope.analysis.gate.tolerance import Tolerance
from gradscope.gate.baseline import Baseline, Expected
from gradscope.gate.facts import SAME_CHECKSUM, same_values
from gradscope.gate.outcome import Change, Profile

__all__ = ["SAME_SEEDS", "OtherSeeds", "first_unpaired", "floor_of", "profiles", "same_seeds"]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Nats: with the same seeds a mean change above this fails. Threads change 1e-7, processors 4e-7,
#: bfloat16 instead of float32 6e-3.
SAME_SEEDS: Final = 0.02
#: Two checksums of activations or gradients within this are of the same tensor, in float32 without a
#: change of dtype: the file keeps three decimals.
_SAME_CHECKSUM_FINE: Final = 1e-3
#: Two features that a file keeps with four decimals may differ by this.
_FILE_ROUNDING: Final = 1e-4
_COARSE: Final = 1e-2
_FINE: Final = 1e-4


def floor_of(baseline: Baseline, run: Baseline) -> float:
    """Nats: what rounding may change under the same seeds."""
    precise = {"float32", "float64"}
    words = {b.fingerprint.get("dtype", "") for b in (baseline, run)}
    return _FINE if len(words) == 1 and words <= precise else _COARSE


def first_unpaired(baseline: Baseline, run: Baseline) -> str:
    """The first parameter that starts with other values under the same seed; "" where all pair.

    Where both draw random numbers in the forward pass, as dropout does, these must be the same too.
    """
    for name, old in baseline.parameters.items():
        new = run.parameters.get(name)
        if new is None or (old.constant and new.constant):
            continue
        if not same_values(old, new):
            return name
    if any(a != b for a, b in zip(baseline.random, run.random, strict=False)):
        return "the forward pass (dropout)"
    return ""


def same_seeds(
    baseline: Baseline, run: Baseline, tolerance: Tolerance
) -> tuple[list[Change], Place, float]:
    """Tier 2: what departs under the same seeds, where that begins, and the largest mean change."""
    now = {item.feature.name: item for item in run.features}
    features: list[Feature] = []
    changes: list[Change] = []
    sizes: list[float] = []
    limits: list[float] = []
    for item in baseline.features:
        if item.state != "value":
            continue
        other = now.get(item.feature.name)
        if other is None and item.feature.kind == "mean":
            continue  # of a role whose parameters were renamed; they are compared one by one
        if other is None or other.state != "value":
            obtained, change, size = other.state if other else "absent", math.nan, math.inf
        else:
            d = np.asarray(other.paired) - np.asarray(item.paired[: len(other.paired)])
            change, size = float(np.mean(d)), float(np.mean(np.abs(d)))
            obtained = f"{np.mean(other.paired):.3f}"
        features.append(item.feature)
        sizes.append(size)
        limits.append(tolerance.same_seeds(item.feature.kind, SAME_SEEDS))
        kept = item.paired[: len(other.paired)] if other and other.paired else item.paired
        changes.append(
            Change(
                layer=item.feature.layer,
                feature=item.feature.kind,
                expected=f"{np.mean(kept):.3f}",
                obtained=obtained,
                change=change,
                tolerance=limits[-1],
                block=item.feature.block,
            )
        )
    size = np.asarray(sizes, dtype=np.float64)
    failed = size > np.asarray(limits)
    place = name_place(features, failed, size, size, baseline.blocks)
    if failed.any():
        place = _by_checksum(baseline, run, features, failed, size, place)
    order = sorted(
        np.flatnonzero(failed).tolist(),
        key=lambda i: (
            not place.wide and changes[i].block != place.block,
            features[i].kind != "rms",
            -size[i],
        ),
    )
    return [changes[i] for i in order], place, float(size.max(initial=0.0))


def _by_checksum(
    baseline: Baseline,
    run: Baseline,
    features: Sequence[Feature],
    failed: Mask,
    size: Floats,
    place: Place,
) -> Place:
    """The block whose weights depart; else whose output does; else the gradient nearest the loss.

    Norms alone misname a post-norm net, where a changed block leaves the norm of its output as it was.
    Under the same seeds the forward pass in front of a change is exactly what it was: blocks there that
    depart do so by the gradient that comes back. A norm of the forward pass that is another one by more
    than rounding tells it too, where a checksum of three decimals does not yet.
    """
    weights = [features[i].block for i in np.flatnonzero(failed).tolist() if features[i].kind == "rms"]
    inside = [block for block in weights if block >= 0]
    if weights and not inside:
        return place
    floor = floor_of(baseline, run)
    limit = SAME_CHECKSUM if floor > _FINE else _SAME_CHECKSUM_FINE
    names = list(baseline.activation)
    moved = {
        baseline.blocks[feature.block]
        for feature, change in zip(features, size.tolist(), strict=True)
        if feature.kind in ("act", "upd") and change > floor + _FILE_ROUNDING
    }
    forward = [
        n
        for n in names
        if n in moved or _differ(baseline.activation[n], run.activation.get(n, ()), limit)
    ]
    if inside or forward:
        name = baseline.blocks[min(inside)] if inside else forward[0]
        block = baseline.blocks.index(name) if name in baseline.blocks else -1
        behind = place.departing.intersection(range(block, place.blocks)) if block >= 0 else frozenset()
        return Place(name, block, frozenset(behind), place.blocks)
    backward = [
        n for n in names if _differ(baseline.output_grad.get(n, ()), run.output_grad.get(n, ()), limit)
    ]
    if not backward:
        return place
    # The gradient at a block's input departs first where the block itself does.
    after = min(names.index(backward[-1]) + 1, len(names) - 1)
    block = baseline.blocks.index(names[after]) if names[after] in baseline.blocks else -1
    return Place(names[after], block, place.departing, place.blocks)


def _differ(old: Sequence[float], new: Sequence[float], limit: float) -> bool:
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if not math.isnan(a)]
    return any(not abs(a - b) <= limit for a, b in pairs)


@dataclass(frozen=True, slots=True, eq=False)
class OtherSeeds:
    """Tier 3: the features that have a value in all replicates of both sides.

    Attributes:
        rule: the test.
        base: moments of the baseline.
        run: of the run.
    """

    rule: Rule
    base: Moments
    run: Moments

    @classmethod
    def of(cls, baseline: Baseline, run: Baseline, tolerance: Tolerance) -> OtherSeeds:
        """Pair the features by name."""
        now = {item.feature.name: item for item in run.features if item.state == "value"}
        both = [
            (item, now[item.feature.name])
            for item in baseline.features
            if item.state == "value" and item.feature.name in now
        ]
        return cls(
            Rule.of([old.feature for old, _ in both], tolerance),
            _moments([old for old, _ in both], len(baseline.seeds)),
            _moments([new for _, new in both], len(run.seeds)),
        )

    def named(self, names: set[str]) -> Mask:
        """[F], which features have these names."""
        return np.asarray([f.name in names for f in self.rule.features], dtype=np.bool_)

    def place(self, failed: Mask, tested: Tested, blocks: Sequence[str]) -> Place:
        """Where the failing features begin."""
        size = np.abs(tested.change) / self.rule.smallest
        return name_place(self.rule.features, failed, np.abs(tested.t), size, blocks)

    def changes(self, failed: Mask, tested: Tested, place: Place) -> list[Change]:
        """What fails, in words: the named block's first, its weights before what they cause."""
        features = self.rule.features
        at = sorted(
            np.flatnonzero(failed).tolist(),
            key=lambda i: (
                not place.wide and features[i].block != place.block,
                features[i].kind != "rms",
                -abs(float(tested.t[i])),
            ),
        )
        return [
            Change(
                layer=features[i].layer,
                feature=features[i].kind,
                expected=f"{self.base.mean[i]:.3f}",
                obtained=f"{self.run.mean[i]:.3f}",
                change=float(tested.change[i]),
                tolerance=float(self.rule.smallest[i]),
                probability=max(float(tested.p_value[i]), 1e-300),
                block=features[i].block,
            )
            for i in at
        ]


def _moments(items: Sequence[Expected], count: int) -> Moments:
    mean = np.asarray([item.mean for item in items], dtype=np.float64)
    return Moments(mean, np.asarray([item.spread for item in items], dtype=np.float64) ** 2, count)


def profiles(baseline: Baseline, run: Baseline) -> tuple[Profile, ...]:
    """Gradient and activation over the blocks, as the means of their increments add up."""
    now = {item.feature.name: item for item in run.features}
    found: list[Profile] = []
    for kind, name, backward in (
        ("flow", "ln gradient norm along the depth, from the loss (0 at the right)", True),
        ("act", "ln activation variance along the depth, from the input (0 at the left)", False),
    ):
        both: list[tuple[float, ...]] = []
        for source in ({item.feature.name: item for item in baseline.features}, now):
            steps = [
                source[key].mean if key in source and source[key].state == "value" else 0.0
                for key in (f"{kind} {block}" for block in baseline.blocks)
            ]
            level = np.cumsum(steps[::-1])[::-1] if backward else np.cumsum(steps)
            both.append((*level.tolist(), 0.0) if backward else (0.0, *level.tolist()))
        found.append(Profile(name=name, expected=both[0], obtained=both[1]))
    return tuple(found)
