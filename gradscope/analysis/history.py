"""One quantity over depth for every step and replicate of a Record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gradscope.analysis.arguments import as_record
from gradscope.analysis.quantities import Quantity, find_quantity
from gradscope.analysis.trunk import NO_PARAMETERS, NOT_RECORDED, OK, Trunk, Values
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["History", "history"]

Array = TypeVar("Array", bound="np.ndarray[Any, Any]")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class History:
    """One quantity over depth for every step and replicate of a Record.

    Attributes:
        quantity: the quantity's name.
        label: what an axis says.
        unit: its unit; ``relative`` means known up to one factor per step.
        log: whether it lives on a logarithmic scale.
        trunk: the trunk's name.
        depth: [P] stream depth l.
        layers: [P] names of the modules at these depths.
        value: [S, P] float64; NaN where absent (or measured NaN: status ``ok``).
        status: [S, P] words: ``ok``, or why the value is absent.
        steps: [S] step numbers, ascending.
        replicates: [S] replicate numbers.
        kind: what a replicate is: ``initialisation``, ``batch`` or ``run``.
        notes: what to know when reading the numbers.
    """

    quantity: str
    label: str
    unit: str
    log: bool
    trunk: str
    depth: npt.NDArray[np.float64]
    layers: tuple[str, ...]
    value: npt.NDArray[np.float64]
    status: npt.NDArray[np.object_]
    steps: npt.NDArray[np.int64]
    replicates: npt.NDArray[np.int64]
    kind: str
    notes: tuple[str, ...]

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """[S, P], where a value was measured; it may be NaN, infinite or exactly 0."""
        return np.asarray(self.status == OK, dtype=np.bool_)

    def __repr__(self) -> str:
        return (
            f"<History of {self.quantity} [{self.unit}] over {self.trunk}: "
            f"{len(set(self.steps.tolist()))} steps, {len(set(self.replicates.tolist()))} replicates, "
            f"depths {self.depth[0]:g} to {self.depth[-1]:g}>"
        )


def history(record: Record, quantity: str = "grad_l2", *, trunk: str | None = None) -> History:
    """One quantity over depth for every step and replicate.

    Args:
        record: the Record.
        quantity: a name in `QUANTITIES`.
        trunk: the trunk's name; needed only where several trunks have values of this quantity.

    Returns:
        The values [S, P] with the reason of every absent one.

    Raises:
        QuantityError: no such quantity or trunk, several trunks to choose from, or nothing in the
            Record that the quantity could be derived from.
    """
    asked = find_quantity(quantity)
    trunks = as_record(record, "history").trunks
    notes: list[str] = []
    if not record.steps:
        raise QuantityError(
            "the Record holds no step. A step is complete when the next one begins, when the scope is "
            "closed, or when scope.step() is called."
        )
    if not trunks:
        raise QuantityError(
            f"the Record has no depth axis, so {quantity!r} has no profile: no trunk of repeated blocks "
            'was found or watched. Say which layers are the blocks: gradscope.watch(model, layers="….*").'
        )
    if trunk is not None and trunk not in trunks:
        raise QuantityError(f"no trunk {trunk!r} in this Record; its trunks are {_listed(trunks)}.")
    if trunk is not None or len(trunks) == 1:
        trunk = trunk if trunk is not None else trunks[0]
        values = _evaluate(asked, Trunk(record, trunk))
    else:
        with_values: dict[str, Values] = {}
        for name in trunks:
            try:
                found = _evaluate(asked, Trunk(record, name))
            except QuantityError:
                continue
            if found.ok.any():
                with_values[name] = found
        if len(with_values) != 1:
            raise QuantityError(
                f"the Record has {len(trunks)} trunks, {_listed(trunks)}, and {len(with_values)} of them "
                f"have values of {quantity!r}. Choose one: trunk={(list(with_values) or trunks)[0]!r}."
            )
        trunk, values = next(iter(with_values.items()))
        notes.append(f"of the trunks {_listed(trunks)} only {trunk!r} has values")
    relative = asked.with_loss and record.header.get("loss_denominator") is None
    if relative:
        notes.append(
            "the loss's denominator is unknown: the level is known up to one factor per step "
            "(set loss_denominator=); ratios over depth are exact"
        )
    ordered = sorted(record.steps, key=lambda step: (step.step, step.replicate))
    return History(
        quantity=asked.name,
        label=asked.label,
        unit="relative" if relative else asked.unit,
        log=asked.log,
        trunk=trunk,
        depth=_frozen(np.asarray([p.depth for p in values.places], dtype=np.float64)),
        layers=tuple(p.layer for p in values.places),
        value=_frozen(values.value),
        status=_frozen(values.status),
        steps=_frozen(np.asarray([step.step for step in ordered], dtype=np.int64)),
        replicates=_frozen(np.asarray([step.replicate for step in ordered], dtype=np.int64)),
        kind=str(record.header.get("replicates", "run")),
        notes=tuple(notes),
    )


def _evaluate(asked: Quantity, trunk: Trunk) -> Values:
    values = asked.function(trunk)
    if not values.places:
        over = {
            "stream": "stream position",
            "pairs": "two neighbouring stream positions",
            "branches": "branch",
            "blocks": "block",
        }[asked.over]
        raise QuantityError(
            f"trunk {trunk.name!r} has no {over} in this Record, so there is no {asked.name!r}. "
            "The layers= of the watch probably left it out."
        )
    if np.isin(values.status.astype(str), (NOT_RECORDED, NO_PARAMETERS)).all():
        raise QuantityError(
            f"no row of trunk {trunk.name!r} holds what {asked.name!r} is derived from. The statistics= "
            "or update= of the watch probably left it out."
        )
    return values


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array
