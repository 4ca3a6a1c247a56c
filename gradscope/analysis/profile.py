"""A quantity over depth at one step, its increments, and intervals over replicates.

Log-gradient profiles over depth are random walks, so a line fitted by ordinary least squares
through one of them says far more than it knows. What is certain is taken per replicate (one mean
increment, one end-to-end difference) and judged by Student's t over replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.analysis.arguments import as_record, check_coverage
from gradscope.analysis.history import History, history
from gradscope.analysis.quantities import find_quantity
from gradscope.analysis.trunk import OK
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["Interval", "Profile", "interval", "profile"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval over replicates.

    Attributes:
        estimate: the mean over replicates; NaN where no replicate has a value.
        low: lower end; NaN with fewer than two replicates.
        high: upper end; NaN with fewer than two replicates.
        confidence: coverage of [low, high], such as .95.
        count: number of replicates that entered.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.low) and math.isnan(self.high):
            return f"{self.estimate:.4g} (n = {self.count}, no interval)"
        return (
            f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}] "
            f"({100 * self.confidence:g} %, n = {self.count})"
        )


def interval(samples: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval of one number per replicate, mean ± t·s/√n.

    NaN samples are replicates without a value: they are left out, and ``count`` says how many
    entered. Infinite samples (the logarithm of an exact zero) make the estimate infinite and leave
    the interval open on that side: low = −∞ and high = NaN for −∞.

    Args:
        samples: one number per replicate.
        confidence: coverage, in (0, 1).
    """
    check_coverage(confidence)
    x = np.asarray(list(samples), dtype=np.float64)
    x = x[~np.isnan(x)]
    n = len(x)
    if n == 0:
        return Interval(estimate=math.nan, low=math.nan, high=math.nan, confidence=confidence, count=0)
    with np.errstate(invalid="ignore"):
        mean = float(np.mean(x))
    low, high = math.nan, math.nan
    if math.isinf(mean):
        low, high = (-math.inf, math.nan) if mean < 0 else (math.nan, math.inf)
    elif n > 1 and math.isfinite(mean):
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * float(np.std(x, ddof=1)) / math.sqrt(n)
        low, high = mean - half, mean + half
    return Interval(estimate=mean, low=low, high=high, confidence=confidence, count=n)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Profile:
    """One quantity over the depth of one trunk, for R entries (one per replicate at one step).

    Attributes:
        quantity: the quantity's name.
        label: what an axis says.
        unit: its unit; ``relative`` means known up to one factor per step.
        log: whether it lives on a logarithmic scale; increments and Δ exist only then.
        trunk: the trunk's name.
        depth: [P] stream depth l, from the input end to the loss end.
        layers: [P] names of the modules at these depths.
        value: [R, P] float64; NaN where absent (or measured NaN: status ``ok``).
        status: [R, P] words: ``ok``, or why the value is absent.
        replicates: [R] replicate numbers.
        steps: [R] step numbers.
        kind: what a replicate is: ``initialisation`` supports claims about an architecture,
            ``batch`` only about this model on these data, ``run`` about this training.
        notes: what to know when reading the numbers: the step taken, absent and zero values.
    """

    quantity: str
    label: str
    unit: str
    log: bool
    trunk: str
    depth: Floats
    layers: tuple[str, ...]
    value: Floats
    status: npt.NDArray[np.object_]
    replicates: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    kind: str
    notes: tuple[str, ...]

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """[R, P], where a value was measured; it may be NaN, infinite or exactly 0."""
        return np.asarray(self.status == OK, dtype=np.bool_)

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """[R, P], where the measured value is exactly 0: underflow, or zero by construction."""
        return self.ok & (self.value == 0)

    @property
    def increments(self) -> Floats:
        """[R, P − 1], r_l = ln(g_l/g_{l+1}) between neighbouring positions.

        Negative where the quantity falls towards the input: for gradients, which run backward,
        r < 0 is vanishing. For activations, which run forward, r < 0 is growth along the pass. NaN
        where an endpoint is absent, zero or not finite; `notes` says how many and where.

        Raises:
            QuantityError: the quantity has no logarithmic scale (a cosine, a share).
        """
        self._require_log("increments")
        usable = self.ok & np.isfinite(self.value) & (self.value > 0)
        with np.errstate(all="ignore"):
            y = np.where(usable, np.log(np.where(usable, self.value, 1.0)), np.nan)
        return y[:, :-1] - y[:, 1:]

    @property
    def mean_increment_per_replicate(self) -> Floats:
        """Mean increment per unit of depth (block) of each replicate, in the order of appearance.

        Σ r / Σ (depth between), over the increments that exist; NaN where none does.
        """
        r = self.increments
        gaps = np.broadcast_to(np.diff(self.depth), r.shape)
        present = np.isfinite(r)
        with np.errstate(all="ignore"):
            rows = np.where(present, r, 0.0).sum(1) / np.where(present, gaps, 0.0).sum(1)
        return self._per_replicate(rows)

    @property
    def delta_per_replicate(self) -> Floats:
        """Δ = ln(g_first/g_last) of each replicate, between the positions of `ends`.

        −∞ where the first is exactly 0, +∞ where the last is; NaN where both are, where one is not
        finite, or where there are no ends.
        """
        self._require_log("delta")
        ends = self.ends
        if ends is None:
            return self._per_replicate(np.full(len(self.value), np.nan))
        first, last = self.value[:, ends[0]], self.value[:, ends[1]]
        with np.errstate(all="ignore"):
            rows = np.log(first) - np.log(last)
            rows = np.where(np.isfinite(first) & np.isfinite(last), rows, np.nan)
        return self._per_replicate(rows)

    @property
    def ends(self) -> tuple[int, int] | None:
        """Indices of the first and last position that every entry has, or None if there are not two.

        One and the same pair for all entries, so that Δ is one estimator.
        """
        common = np.flatnonzero(self.ok.all(0))
        return (int(common[0]), int(common[-1])) if len(common) > 1 else None

    def mean_increment(self, confidence: float = 0.95) -> Interval:
        """Mean of r_l per block: per replicate, then Student's t over replicates.

        Units: nats per block. With one replicate, ``low`` and ``high`` are NaN.
        """
        return interval(self.mean_increment_per_replicate, confidence)

    def delta(self, confidence: float = 0.95) -> Interval:
        """Δ = ln(g_first/g_last): per replicate, then Student's t over replicates.

        Units: nats. Δ < 0: a gradient vanishes towards the input (Schoenholz et al. 2017,
        arXiv:1611.01232, for the threshold of 3). An exact zero at the first position gives −∞.
        """
        return interval(self.delta_per_replicate, confidence)

    def first_to_last_ratio(self, confidence: float = 0.95) -> Interval:
        """exp(Δ): the geometric mean over replicates of g_first/g_last, with its interval."""
        delta = self.delta(confidence)
        with np.errstate(over="ignore"):
            estimate, low, high = np.exp([delta.estimate, delta.low, delta.high]).tolist()
        return Interval(
            estimate=estimate, low=low, high=high, confidence=delta.confidence, count=delta.count
        )

    def __repr__(self) -> str:
        entries = len(set(self.replicates.tolist()))
        plural = "" if entries == 1 else "es" if self.kind == "batch" else "s"
        text = (
            f"<Profile of {self.quantity} [{self.unit}] over {self.trunk}: depths {self.depth[0]:g} to "
            f"{self.depth[-1]:g}, {entries} {self.kind}{plural}"
        )
        return "; ".join([text, *self.notes]) + ">"

    def _require_log(self, what: str) -> None:
        if not self.log:
            raise QuantityError(
                f"{self.quantity} has no {what}: they are ratios of positive quantities, and "
                f"{self.label} may be zero or negative. Read profile.value."
            )

    def _per_replicate(self, rows: Floats) -> Floats:
        """Mean of the entries of each replicate: several steps of one run are not replicates."""
        order = list(dict.fromkeys(self.replicates.tolist()))
        with np.errstate(invalid="ignore"):
            return np.asarray([_mean(rows[self.replicates == r]) for r in order], dtype=np.float64)


def _mean(x: Floats) -> float:
    x = x[~np.isnan(x)]
    return float(np.mean(x)) if len(x) else math.nan


def profile(
    record: Record,
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
) -> Profile:
    """One quantity over depth at one step, with one row per replicate.

    Args:
        record: the Record.
        quantity: a name in `gradscope.analysis.QUANTITIES`.
        trunk: the trunk's name; needed only where several trunks have values of this quantity.
        step: the step's number, or several (then each replicate has one row per step, and counts
            once in intervals). None: the last step at which most replicates have the quantity;
            `Profile.notes` says which.

    Returns:
        The values [R, P] with the reason of every absent one. Without a gradient at the trunk's
        input h_0, the profile starts at l = 1 and says so.

    Raises:
        QuantityError: no such quantity, trunk or step, several trunks to choose from, or nothing in
            the Record that the quantity could be derived from.
    """
    full = history(as_record(record, "profile"), quantity, trunk=trunk)
    notes = list(full.notes)
    steps = _chosen_steps(full, step, notes)
    rows = np.flatnonzero(np.isin(full.steps, steps))
    missing = sorted(set(full.replicates.tolist()) - set(full.replicates[rows].tolist()))
    if missing:
        notes.append(f"replicates without that step: {_spans(missing)}")
    ok, zero = full.ok[rows], full.ok[rows] & (full.value[rows] == 0)
    start = 0
    if full.depth[0] == 0 and len(full.depth) > 1 and ok.any() and not ok[:, 0].any():
        notes.append(f"h_0 is absent ({full.status[rows[0], 0]}): the profile starts at l = 1")
        start = 1
    elif full.depth[0] >= 1 and _starts_at_input(full):
        notes.append("h_0 is not in the Record: the profile starts at l = 1")
    keep = slice(start, None)
    result = Profile(
        quantity=full.quantity,
        label=full.label,
        unit=full.unit,
        log=full.log,
        trunk=full.trunk,
        depth=full.depth[keep],
        layers=full.layers[keep],
        value=full.value[rows, keep],
        status=full.status[rows, keep],
        replicates=full.replicates[rows],
        steps=full.steps[rows],
        kind=full.kind,
        notes=(*notes, *_reading_notes(full, rows, keep, zero[:, keep])),
    )
    for array in (result.value, result.status, result.replicates, result.steps):
        array.flags.writeable = False
    return result


def _chosen_steps(full: History, step: int | Sequence[int] | None, notes: list[str]) -> list[int]:
    recorded = sorted(set(full.steps.tolist()))
    if step is not None:
        given = list(step) if isinstance(step, Sequence | np.ndarray) else [step]
        if not all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in given):
            raise TypeError(
                f"step= is a step's number, or several: step=10, step=[0, 10]; got {step!r}. None takes "
                "the last step that has the quantity."
            )
        steps = [int(s) for s in given]
        unknown = sorted(set(steps) - set(recorded))
        if not steps:
            raise QuantityError("step= is empty: there is no step to take. None takes the last one.")
        if unknown:
            raise QuantityError(
                f"no step {_spans(unknown)} in this Record; it holds {len(recorded)} steps: "
                f"{_spans(recorded)}."
            )
        return steps
    has = np.any(full.ok, axis=1)
    count = {s: int(has[full.steps == s].sum()) for s in recorded}
    last = max(recorded, key=lambda s: (count[s], s))
    if len(recorded) > 1:
        which = "recorded step" if last == recorded[-1] else f"step that has {full.quantity}"
        notes.append(f"step {last}, the last {which}")
    return [last]


def _starts_at_input(full: History) -> bool:
    return find_quantity(full.quantity).over in ("stream", "pairs")


def _reading_notes(
    full: History, rows: npt.NDArray[np.int64], keep: slice, zero: npt.NDArray[np.bool_]
) -> list[str]:
    """What is absent, zero or not finite, and what that does to increments."""
    notes: list[str] = []
    depth, status = full.depth[keep], full.status[rows, keep]
    value, ok = full.value[rows, keep], full.ok[rows, keep]
    for why in dict.fromkeys(status[~ok].tolist()):
        where = np.asarray(status == why, dtype=np.bool_).any(0)
        notes.append(f"absent ({why}) at depth {_spans(depth[where])}")
    broken = ok & ~np.isfinite(value)
    if full.log and zero.any():  # a share or a cosine of 0 is a value like any other
        notes.append(
            f"exactly 0 (underflow, or zero by construction) at depth {_spans(depth[zero.any(0)])} in "
            f"{int(zero.any(1).sum())} of {len(rows)} entries"
        )
    if broken.any():
        notes.append(
            f"not finite at depth {_spans(depth[broken.any(0)])} in "
            f"{int(broken.any(1).sum())} of {len(rows)} entries"
        )
    unusable = ~ok | zero | broken
    lost = unusable[:, :-1] | unusable[:, 1:]
    if full.log and lost.any():
        where = depth[:-1][lost.any(0)]
        notes.append(
            f"{int(lost.sum())} of {lost.size} increments are left out, at depth {_spans(where)}: "
            "an endpoint is absent, 0 or not finite"
        )
    common = np.flatnonzero(ok.all(0))
    if full.log and len(common) > 1 and len(common) < len(depth):
        first, last = depth[common[0]], depth[common[-1]]
        if (first, last) != (depth[0], depth[-1]):
            notes.append(f"Δ is between depth {first:g} and {last:g}, the ends that every entry has")
    return notes


def _spans(numbers: Iterable[float]) -> str:
    """Ascending numbers in short: '0–3, 7, 9–12', at most eight spans."""
    spans: list[list[float]] = []
    for number in map(float, numbers):
        if spans and number - spans[-1][1] == 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [f"{a:g}" if a == b else f"{a:g}–{b:g}" for a, b in spans[:8]]
    return ", ".join([*shown, *(["…"] if len(spans) > 8 else [])])
