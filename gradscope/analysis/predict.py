"""The gradient at a depth that was not built, and the depth at which the verdict would turn.

From measurements at two or more depths: Δ(L), the end-to-end change of a trunk of L blocks, is laid
against laws of growth in L, and all laws that the measurements leave standing speak, each with its
weight and with what a law may be wrong by (`gradscope.analysis.extrapolation`). Within one net a profile
says little about a deeper one (its ends are its own, and DeepNorm or scaled branches change every layer
with the depth), so depth itself must be varied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.change import Change, end_to_end
from gradscope.analysis.curve import Curve, Source, as_curve
from gradscope.analysis.decay import DecayFit
from gradscope.analysis.extrapolation import Growth, fit_growth
from gradscope.analysis.growth import LAWS, Law
from gradscope.analysis.mixture import Mixture
from gradscope.analysis.profile import Interval, Profile
from gradscope.analysis.verdict import THRESHOLD
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["DepthLimit", "Prediction", "depth_limit", "predict"]

Floats = npt.NDArray[np.float64]

#: Depths beyond so many times the deepest that was measured are not spoken of.
_FARTHEST: Final = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Δ of a trunk of a depth that was not measured.

    Attributes:
        depth: the number of blocks.
        quantity: the quantity's name.
        measured: the depths that were measured.
        expected: Δ in the mean over initialisations, nats, with the interval of that mean.
        single: Δ of one new network: the same centre, with the spread over initialisations added.
        laws: law of growth, with or without what the ends add → its weight.
        formulas: law → its formula.
        misfit: p-value of the measured means under the law that fits them best; a small one is a note.
        notes: how far this extrapolates, and other things to know.
    """

    depth: float
    quantity: str
    measured: tuple[float, ...]
    expected: Interval
    single: Interval
    laws: Mapping[str, float]
    formulas: Mapping[str, str]
    misfit: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        laws = ", ".join(
            f"{self.formulas[name]} {weight:.2f}"
            for name, weight in sorted(self.laws.items(), key=lambda item: -item[1])
            if weight >= 0.05
        )
        measured = ", ".join(f"{d:g}" for d in self.measured)
        lines = [
            f"Δ of {self.quantity} at {self.depth:g} blocks, from {measured}: {self.expected} nats "
            f"in the mean; one network in [{self.single.low:.4g}, {self.single.high:.4g}]",
            f"  laws of growth: {laws}",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    __repr__ = __str__


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthLimit:
    """The number of blocks at which the verdict ``preserved`` would turn.

    Attributes:
        word: what it would turn to: ``vanishing`` or ``exploding``.
        estimate: the depth at which |Δ| is expected to be the threshold; ∞ if not within ``searched``.
        low: the least depth at which |Δ| of the mean may reach it, by the interval of the mean.
        high: the depth by which it has reached it; ∞ where that is not sure.
        searched: no depth beyond this was looked at.
        threshold: nats.
        confidence: of the interval.
    """

    word: str
    estimate: float
    low: float
    high: float
    searched: float
    threshold: float
    confidence: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"no turn of the verdict up to {self.searched:g} blocks"
        if math.isinf(self.estimate):
            return (
                f"no turn of the verdict expected up to {self.searched:g} blocks; {self.word} "
                f"(|Δ| > {self.threshold:g} nats) possible from {self.low:.3g} on "
                f"({100 * self.confidence:g} %)"
            )
        ends = [f"more than {self.searched:g}" if math.isinf(x) else f"{x:.3g}" for x in self._numbers]
        return (
            f"{self.word} (|Δ| > {self.threshold:g} nats) from {ends[0]} blocks on "
            f"[{ends[1]}, {ends[2]}] ({100 * self.confidence:g} %)"
        )

    @property
    def _numbers(self) -> tuple[float, float, float]:
        return self.estimate, self.low, self.high

    __repr__ = __str__


def predict(
    sources: Iterable[Source],
    depth: float,
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
    laws: Iterable[str | Law] | None = None,
    confidence: float = 0.95,
) -> Prediction:
    """Δ at a depth that was not built, with an interval.

    Every law of growth in `LAWS` (constant, linear, root, logarithm, power, saturating, take-off; each
    with and without a constant for what the ends add) is averaged over with the weight that Δ at all
    depths leaves it, and each may be off by a share of what it says beyond the deepest measurement. So
    the interval is wide where measurements cannot tell laws apart, where laws miss them, and far away.
    The variance over replicates grows as a power of the depth, which is averaged over too.

    ::

        records = [gradscope.measure(lambda: make(depth), batch, loss) for depth in (6, 12, 24)]
        print(gradscope.predict(records, 48))

    Args:
        sources: Records, Profiles or arrays, at two or more depths; two or more replicates each.
        depth: number of blocks to predict.
        quantity: a name in `gradscope.analysis.QUANTITIES` that has a logarithm.
        trunk: the trunk, where the Records have several.
        step: as in `gradscope.profile`.
        laws: names in `gradscope.analysis.LAWS` or laws of your own; None for all.
        confidence: coverage of the intervals.

    Raises:
        QuantityError: fewer than two depths, one replicate only, an end value that is 0 or absent, or a
            depth beyond a hundred times the deepest measurement.
        ValueError: a depth that is not positive, or an unknown law.
        TypeError: a single measurement, or sources of another type.
    """
    if isinstance(depth, bool) or not isinstance(depth, int | float | np.integer | np.floating):
        raise TypeError(f"depth= is a number of blocks; got an object of type {type(depth).__name__}")
    if not 0 < depth < math.inf:
        raise ValueError(f"depth= is a positive number of blocks; got {depth}")
    _check_confidence(confidence)
    growth = _growth(sources, quantity, trunk, step, laws)
    if depth > _FARTHEST * growth.depths[-1]:
        raise QuantityError(
            f"{depth:g} blocks are more than {_FARTHEST:g} times the deepest measurement "
            f"({growth.depths[-1]:g}): no law of growth reaches so far. Measure deeper ones."
        )
    at = np.asarray([depth], dtype=np.float64)
    return Prediction(
        depth=float(depth),
        quantity=growth.quantity,
        measured=tuple(growth.depths.tolist()),
        expected=_interval(growth.of_mean(at), confidence, growth.replicates),
        single=_interval(growth.of_one(at), confidence, growth.replicates),
        laws=growth.weights,
        formulas=growth.formulas,
        misfit=growth.misfit,
        notes=growth.notes(float(depth)),
    )


def depth_limit(
    sources: Iterable[Source],
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
    laws: Iterable[str | Law] | None = None,
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
) -> DepthLimit:
    """How deep this architecture can go: the number of blocks at which |Δ| reaches the threshold.

    By the laws of `predict`, looked for up to a hundred times the deepest measurement.

    ::

        print(gradscope.depth_limit(records))

    Args:
        sources: as in `predict`.
        quantity: as in `predict`.
        trunk: as in `predict`.
        step: as in `predict`.
        laws: as in `predict`.
        threshold: nats of amplitude, as in `gradscope.verdict`.
        confidence: coverage of the interval.

    Raises:
        QuantityError: as `predict`.
    """
    _check_confidence(confidence)
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold= is a positive number of nats; got {threshold}")
    growth = _growth(sources, quantity, trunk, step, laws)
    farthest = _FARTHEST * float(growth.depths[-1])
    grid = np.unique(np.round(np.geomspace(1, farthest, 400)))
    mixture = growth.of_mean(grid)
    tail = (1 - confidence) / 2

    def first(turned: Floats, probability: float) -> float:
        beyond = np.flatnonzero(turned > probability)
        return float(grid[beyond[0]]) if len(beyond) else math.inf

    turned = {
        "vanishing": mixture.below(-threshold),
        "exploding": 1 - mixture.below(threshold),
    }
    sides = {
        word: (first(chance, 0.5), first(chance, tail), first(chance, 1 - tail))
        for word, chance in turned.items()
    }
    word = min(sides, key=lambda w: (sides[w][0], sides[w][1]))
    estimate, soonest, latest = sides[word]
    return DepthLimit(
        word=word,
        estimate=estimate,
        low=soonest,
        high=latest,
        searched=farthest,
        threshold=threshold,
        confidence=confidence,
    )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a coverage between 0 and 1, such as .95; got {confidence}")


def _interval(mixture: Mixture, confidence: float, count: int) -> Interval:
    tail = (1 - confidence) / 2
    return Interval(
        estimate=float(mixture.quantile(0.5)[0]),
        low=float(mixture.quantile(tail)[0]),
        high=float(mixture.quantile(1 - tail)[0]),
        confidence=confidence,
        count=count,
    )


def _laws(laws: Iterable[str | Law] | None) -> list[Law]:
    if laws is None:
        return list(LAWS.values())
    chosen: list[Law] = []
    for each in [laws] if isinstance(laws, str) else laws:
        if isinstance(each, Law):
            chosen.append(each)
        elif each in LAWS:
            chosen.append(LAWS[each])
        else:
            raise ValueError(f"no law of growth {each!r}; the laws are {', '.join(LAWS)}")
    if not chosen:
        raise ValueError("laws= is empty: there is nothing to fit")
    return chosen


def _growth(
    sources: Iterable[Source],
    quantity: str,
    trunk: str | None,
    step: int | Sequence[int] | None,
    laws: Iterable[str | Law] | None,
) -> Growth:
    chosen = _laws(laws)
    curves = [as_curve(source, quantity, trunk=trunk, step=step) for source in _several(sources)]
    for what, values in (
        ("quantities", {curve.quantity for curve in curves}),
        ("kinds of replicate", {curve.kind for curve in curves}),
    ):
        if len(values) > 1:
            raise QuantityError(
                f"measurements of different {what} together: {', '.join(sorted(values))}. "
                "Predict from those of one kind."
            )
    changes = [_change(curve) for curve in curves]
    pooled: dict[float, list[Floats]] = {}
    for curve, change in zip(curves, changes, strict=True):
        pooled.setdefault(float(np.max(curve.depth)), []).append(change.per_replicate)
    starts = {min(change.ends) for change in changes}
    if len(starts) > 1:
        raise QuantityError(
            "the measurements do not start at the same depth: "
            f"{', '.join(f'l = {s:g}' for s in sorted(starts))}. Measure all with, or all without, the "
            "gradient at the trunk's input."
        )
    depths = np.asarray(sorted(pooled), dtype=np.float64)
    if len(depths) < 2:
        raise QuantityError(
            f"a prediction needs measurements at two or more depths; got {len(depths)}: "
            f"{', '.join(f'{d:g}' for d in depths) or 'none'}. Measure e.g. depths 6, 12 and 24."
        )
    delta = [np.concatenate(pooled[float(d)]) for d in depths]
    if min(len(d) for d in delta) < 2:
        raise QuantityError(
            "a prediction needs two or more replicates at every depth, to know the spread over "
            "initialisations: measure(..., replicates=5)."
        )
    return fit_growth(depths, delta, curves[0].quantity, curves[0].kind, chosen)


def _several(sources: Any) -> list[Source]:
    """The measurements, one for each depth, or what to write instead of what was given."""
    write = "predict([shallow, deeper, deepest], 48), with one measurement for each depth"
    if isinstance(sources, Record | Profile | np.ndarray):
        raise TypeError(
            f"one {type(sources).__name__} is one measurement, and this takes several, at two or more "
            f"depths: {write}."
        )
    if isinstance(sources, Mapping):
        raise TypeError(f"a mapping has no order of measurements: {write}; give list(them.values()).")
    if isinstance(sources, str | bytes) or not isinstance(sources, Iterable):
        raise TypeError(f"this takes several measurements; got a {type(sources).__name__}: {write}.")
    found: list[Source] = []
    for each in sources:
        if isinstance(each, DecayFit | str | Path):
            where = (
                "gradscope.Record.load(path)" if not isinstance(each, DecayFit) else "the Record itself"
            )
            raise TypeError(
                f"a measurement is a Record, a Profile or an array [replicates, positions]; got a "
                f"{type(each).__name__}. Give {where}."
            )
        found.append(each)
    return found


def _change(curve: Curve) -> Change:
    change = end_to_end(curve)
    ends = curve.complete[[0, -1]]
    if change is None or not ends.all():
        raise QuantityError(
            f"{curve.quantity} at {np.max(curve.depth):g} blocks has no Δ from end to end: "
            f"{'; '.join(curve.dropped())}. Measure in float64, or leave this depth out."
        )
    return change
