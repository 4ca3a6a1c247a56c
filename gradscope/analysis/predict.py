"""The gradient at a depth that was not built, and the depth at which the verdict would turn.

From measurements at two or more depths: Δ(L), the end-to-end change of a trunk of L blocks, is laid
against laws of growth in L, and all laws that the measurements leave standing speak, each with its
weight. Within one net a profile says little about a deeper one (its ends are its own, and DeepNorm or
scaled branches change every layer with the depth), so depth itself must be varied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.change import Change, end_to_end
from gradscope.analysis.curve import Curve, Source, as_curve
from gradscope.analysis.growth import LAWS, Growth, fit_growth
from gradscope.analysis.profile import Interval, Profile
from gradscope.analysis.verdict import THRESHOLD
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["LAWS", "DepthLimit", "Prediction", "depth_limit", "predict"]

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
        laws: law of growth → its weight.
        notes: how far this extrapolates, and other things to know.
    """

    depth: float
    quantity: str
    measured: tuple[float, ...]
    expected: Interval
    single: Interval
    laws: Mapping[str, float]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        laws = ", ".join(
            f"{LAWS[name][0]} {weight:.2f}"
            for name, weight in sorted(self.laws.items(), key=lambda item: -item[1])
            if weight >= 0.01
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
    confidence: float = 0.95,
) -> Prediction:
    """Δ at a depth that was not built, with an interval.

    Every law of growth in `LAWS` is fitted to Δ of all replicates at all depths by weighted least
    squares, the variance over replicates growing as a power of the depth; laws are averaged with weights
    exp(−BIC/2), and the interval is that of the mixture, so that what the measurements cannot tell apart
    makes it wider.

    ::

        records = [gradscope.measure(lambda: make(depth), batch, loss) for depth in (6, 12, 24)]
        print(gradscope.predict(records, 48))

    Args:
        sources: Records, Profiles or arrays, at two or more depths; two or more replicates each.
        depth: number of blocks to predict.
        quantity: a name in `gradscope.analysis.QUANTITIES` that has a logarithm.
        trunk: the trunk, where the Records have several.
        step: as in `gradscope.profile`.
        confidence: coverage of the intervals.

    Raises:
        QuantityError: fewer than two depths, one replicate only, or an end value that is 0 or absent.
        ValueError: a depth that is not positive.
    """
    if not 0 < depth < math.inf:
        raise ValueError(f"depth= is a positive number of blocks; got {depth}")
    _check_confidence(confidence)
    growth = _growth(sources, quantity, trunk, step)
    return Prediction(
        depth=float(depth),
        quantity=growth.quantity,
        measured=tuple(growth.depths.tolist()),
        expected=growth.interval_at(float(depth), confidence, single=False),
        single=growth.interval_at(float(depth), confidence, single=True),
        laws=growth.weights,
        notes=growth.notes(float(depth)),
    )


def depth_limit(
    sources: Iterable[Source],
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
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
        threshold: nats of amplitude, as in `gradscope.verdict`.
        confidence: coverage of the interval.

    Raises:
        QuantityError: as `predict`.
    """
    _check_confidence(confidence)
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold= is a positive number of nats; got {threshold}")
    growth = _growth(sources, quantity, trunk, step)
    farthest = _FARTHEST * float(growth.depths[-1])
    grid = np.unique(np.round(np.geomspace(1, farthest, 400)))
    tail = (1 - confidence) / 2
    low, middle, high = (
        np.asarray([growth.quantile(float(d), p, single=False) for d in grid])
        for p in (tail, 0.5, 1 - tail)
    )

    def first(curve: Floats) -> float:
        beyond = np.flatnonzero(curve > threshold)
        return float(grid[beyond[0]]) if len(beyond) else math.inf

    sides = {
        "vanishing": (first(-middle), first(-low), first(-high)),
        "exploding": (first(middle), first(high), first(low)),
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


def _growth(
    sources: Iterable[Source], quantity: str, trunk: str | None, step: int | Sequence[int] | None
) -> Growth:
    if isinstance(sources, Record | Profile):
        raise TypeError("this takes several measurements, at two or more depths: predict([a, b, c], 48)")
    curves = [as_curve(source, quantity, trunk=trunk, step=step) for source in sources]
    for what, values in (
        ("quantities", {curve.quantity for curve in curves}),
        ("kinds of replicate", {curve.kind for curve in curves}),
    ):
        if len(values) > 1:
            raise QuantityError(f"measurements of different {what} together: {', '.join(sorted(values))}")
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
    return fit_growth(depths, delta, curves[0].quantity, curves[0].kind)


def _change(curve: Curve) -> Change:
    change = end_to_end(curve)
    ends = curve.complete[[0, -1]]
    if change is None or not ends.all():
        raise QuantityError(
            f"{curve.quantity} at {np.max(curve.depth):g} blocks has no Δ from end to end: "
            f"{'; '.join(curve.dropped())}. Measure in float64, or leave this depth out."
        )
    return change
