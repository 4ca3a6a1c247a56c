"""One quantity as logarithms along the pass that carries it: what decay fits and verdicts read.

A gradient travels from the loss (depth L) to the input (depth 0), an activation the other way. A
`Curve` lists its positions in that order, so that the same estimators serve both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.arguments import not_a_record
from gradscope.analysis.dtypes import SMALLEST, dtypes_inside
from gradscope.analysis.profile import Profile, profile
from gradscope.analysis.quantities import Quantity, find_quantity
from gradscope.analysis.trunk import Trunk
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["MINIMUM_LAYERS", "Curve", "Source", "as_curve"]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Source = Record | Profile | npt.ArrayLike

#: Below so many layers a curve has no shape to speak of.
MINIMUM_LAYERS: Final = 4

_TAKES: Final = "this takes a Record, a Profile, or an array of numbers [replicates, positions]"

#: Energies whose amplitude is a quantity of its own.
_AMPLITUDES: Final = {"act_mean_square": "act_rms"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Curve:
    """ln of one quantity over depth, R replicates × P positions, in the order of its pass.

    Attributes:
        quantity: the quantity's name.
        trunk: the trunk's name.
        forward: True for activations (pass from input to loss), False for gradients.
        kind: what a replicate is: ``initialisation``, ``batch`` or ``run``.
        depth: [P] stream depth l, in the order of the pass.
        layers: [P] names of the modules at these depths.
        y: [R, P] nats of amplitude (½ ln of an energy); −∞ for an exact 0, +∞ for an infinite value,
            NaN where absent or NaN.
        absent: [R, P], where no value was measured (a NaN in ``y`` elsewhere is a measured NaN).
        zero_bound: [R] nats; the largest amplitude that an exact 0 may hide; NaN where not known.
        notes: what to know when reading the numbers.
    """

    quantity: str
    trunk: str
    forward: bool
    kind: str
    depth: Floats
    layers: tuple[str, ...]
    y: Floats
    absent: Mask
    zero_bound: Floats
    notes: tuple[str, ...]

    @property
    def replicates(self) -> int:
        """R."""
        return len(self.y)

    @property
    def distance(self) -> Floats:
        """[P] distance along the pass from where it starts: L − l for gradients, l for activations."""
        return np.abs(self.depth - self.depth[0])

    @property
    def from_input(self) -> Floats:
        """[P] l, counted from the input end."""
        return self.depth

    @property
    def from_loss(self) -> Floats:
        """[P] d = L − l, counted from the loss end."""
        return float(np.max(self.depth)) - self.depth

    @property
    def complete(self) -> Mask:
        """[P], where every replicate has a finite logarithm."""
        return np.asarray(np.isfinite(self.y).all(0), dtype=np.bool_)

    @property
    def measured(self) -> Mask:
        """[P], where every replicate has a finite value or an exact zero, or an overflow."""
        return np.asarray(~np.isnan(self.y).any(0), dtype=np.bool_)

    @property
    def layer_count(self) -> int:
        """Positions at the output of a layer (depth > 0) that every replicate has."""
        return int((self.complete & (self.depth > 0)).sum())

    def take(self, columns: Mask | Sequence[int]) -> Curve:
        """The same at those positions only."""
        at = np.flatnonzero(columns) if np.asarray(columns).dtype == np.bool_ else np.asarray(columns)
        return Curve(
            quantity=self.quantity,
            trunk=self.trunk,
            forward=self.forward,
            kind=self.kind,
            depth=self.depth[at],
            layers=tuple(self.layers[i] for i in at),
            y=self.y[:, at],
            absent=self.absent[:, at],
            zero_bound=self.zero_bound,
            notes=self.notes,
        )

    def dropped(self) -> tuple[str, ...]:
        """Why positions are not in a fit, in words, one reason each with its depths."""
        reasons: dict[str, list[float]] = {}
        for column in np.flatnonzero(~self.complete):
            y, absent = self.y[:, column], self.absent[:, column]
            why = (
                "absent"
                if absent.any()
                else "not finite"
                if np.isnan(y).any() or np.isposinf(y).any()
                else "exactly 0"
            )
            reasons.setdefault(why, []).append(float(self.depth[column]))
        return tuple(
            f"{why} at depth {', '.join(f'{d:g}' for d in sorted(at))}" for why, at in reasons.items()
        )


def as_curve(
    source: Source,
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
) -> Curve:
    """The logarithms of a quantity along its pass.

    Args:
        source: a Record; or a `Profile`; or an array [R, P] (or [P]) of positive values, one row per
            replicate (taken as initialisations), at depths 0 .. P − 1 from the input to the loss.
        quantity: a name in `gradscope.analysis.QUANTITIES`; for an array, only its direction counts.
        trunk: the trunk's name, needed where several have values.
        step: as in `gradscope.profile`. Several steps of one run are averaged, not replicates.

    Raises:
        QuantityError: the quantity has no logarithmic scale, or the Record cannot give it.
        ValueError: an array of another shape, or with negative values.
    """
    if isinstance(source, Record):
        asked = _with_decay(quantity)
        # The square of an amplitude leaves the range of float64 before the amplitude does.
        amplitude = _AMPLITUDES.get(quantity, quantity)
        found = profile(source, amplitude, trunk=trunk, step=step)
        power = asked.power if amplitude == quantity else 1
        return _of_profile(replace(found, quantity=quantity), _zero_bound(source, found), power)
    if isinstance(source, Profile):
        if trunk is not None or step is not None:
            raise ValueError("trunk= and step= belong to a Record; a Profile has chosen already")
        if quantity not in ("grad_l2", source.quantity):
            raise ValueError(f"this is a Profile of {source.quantity!r}, not of {quantity!r}")
        return _of_profile(source, math.nan, _with_decay(source.quantity).power)
    if trunk is not None or step is not None:
        raise ValueError("trunk= and step= belong to a Record; an array has neither")
    return _of_array(source, quantity)


def _with_decay(quantity: str) -> Quantity:
    """The quantity, which must have a logarithm."""
    asked = find_quantity(quantity)
    if not asked.log:
        raise QuantityError(
            f"{asked.name} has no decay: {asked.label} may be zero or negative, so it has no "
            "logarithm to fit. Quantities that have one: "
            f"{', '.join(_with_logarithm())}."
        )
    if asked.over == "branches":
        raise QuantityError(
            f"{asked.name} has no decay over depth: attention and feed-forward branches alternate in it, "
            "and their offset would pass for a change. Look at gradscope.profile(record, ...).value."
        )
    return asked


def _of_array(values: npt.ArrayLike, quantity: str) -> Curve:
    asked = _with_decay(quantity)
    try:
        array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_TAKES}; {not_a_record(values)}") from error
    if values is None or isinstance(values, Real):
        raise TypeError(f"{_TAKES}; {not_a_record(values)}")
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(
            "an array of values is [replicates, positions], with two positions or more; got shape "
            f"{array.shape if np.ndim(values) > 1 else np.shape(values)}"
        )
    if (array < 0).any():
        raise ValueError("an array of values holds norms, not logarithms: it has negative entries")
    order = slice(None) if asked.forward else slice(None, None, -1)
    with np.errstate(divide="ignore"):
        y = np.log(array)[:, order] / asked.power
    depth = np.arange(array.shape[1], dtype=np.float64)
    return Curve(
        quantity=quantity,
        trunk="",
        forward=asked.forward,
        kind="initialisation",
        depth=depth[order],
        layers=tuple(f"layer {at:g}" for at in depth[order]),
        y=y,
        absent=np.zeros(y.shape, dtype=np.bool_),
        zero_bound=np.full(len(y), math.nan),
        notes=(),
    )


def _of_profile(found: Profile, bound: float, power: int) -> Curve:
    asked = _with_decay(found.quantity)
    order = slice(None) if asked.forward else slice(None, None, -1)
    with np.errstate(all="ignore"):
        rows = np.where(found.ok, np.log(found.value), np.nan)[:, order] / power
    numbers = list(dict.fromkeys(found.replicates.tolist()))
    entries = sorted({int((found.replicates == r).sum()) for r in numbers})
    notes = found.notes
    if len(entries) > 1:
        notes = (
            *notes,
            f"replicates have {entries[0]} to {entries[-1]} of these steps: each is averaged over its "
            "own, and counts once",
        )
    absent = ~found.ok[:, order]
    with np.errstate(all="ignore"):
        y = np.stack([rows[found.replicates == r].mean(0) for r in numbers])
    return Curve(
        quantity=found.quantity,
        trunk=found.trunk,
        forward=asked.forward,
        kind=found.kind,
        depth=found.depth[order],
        layers=found.layers[order],
        y=y,
        absent=np.stack([absent[found.replicates == r].any(0) for r in numbers]),
        zero_bound=np.full(len(y), bound),
        notes=notes,
    )


def _with_logarithm() -> list[str]:
    from gradscope.analysis.quantities import QUANTITIES

    return sorted(n for n, asked in QUANTITIES.items() if asked.log and asked.over != "branches")


def _zero_bound(record: Record, found: Profile) -> float:
    """Logarithm of what an exact zero may hide at most: every element below the dtype's floor.

    A tensor that has become 0 element by element had elements smaller than the smallest number of
    its dtype; its flow is then at most N·√d times that. The coarsest dtype that may have been passed
    through counts. Known for the flow and the mean square on the stream; NaN for other quantities, or
    where the header does not tell the dtype.
    """
    header: dict[str, Any] = dict(record.header)
    names = dtypes_inside(header)
    known = bool(names) and all(name in SMALLEST for name in names)
    if found.quantity not in ("grad_l2", "grad_rms", "act_rms") or not known:
        return math.nan
    normal = bool(header.get("flush_denormal"))
    smallest = max(SMALLEST[name][1 if normal else 0] for name in names)
    width = 1.0
    if found.quantity == "grad_l2":
        trunk = Trunk(record, found.trunk)
        count, tokens = (trunk.at_stream("output_grad", s).value for s in ("count", "tokens"))
        with np.errstate(all="ignore"):
            widths = count / tokens
        if not np.isfinite(widths).any():
            return math.nan
        width = float(np.nanmax(widths))
    denominator = header.get("loss_denominator")
    scale = 1.0 if denominator is None or found.quantity == "act_rms" else float(denominator)
    return math.log(smallest) + 0.5 * math.log(width) + math.log(scale)
