"""Rows and steps: what each value is, and the values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.errors import RecordError

__all__ = ["COLUMNS", "DTYPES", "KEYS", "OK", "SCHEMA", "STEP_FIELDS", "Rows", "Step", "rebuilt", "thin"]

SCHEMA: Final = 1
OK: Final = "ok"
#: The status of `unit_skip`, and of all that is of the stream only, at the output of a block that the
#: model adds to the stream: ``x = x + block(x)``.
OUTSIDE: Final = "not supported: the skip is outside of the block, whose output is not the stream"
COLUMNS: Final = (
    "step",
    "replicate",
    "trunk",
    "depth",
    "layer",
    "type",
    "call",
    "signal",
    "statistic",
    "value",
    "status",
)
KEYS: Final = ("trunk", "depth", "layer", "type", "call", "signal", "statistic")
DTYPES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "step": np.int64,
        "replicate": np.int64,
        "depth": np.float64,
        "call": np.int64,
        "value": np.float64,
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What each value of a step is: one entry per value, shared by all steps of one layout.

    Attributes:
        trunk: name of the container of repeated blocks; "" off the axis.
        depth: stream depth l; NaN off the axis. The output of block k (from 0) is k + 1, branch j
            of m in block k is k + j/m, the first block's input 0.
        layer: name of the module, or of the parameter.
        type: class name of the module, ``Parameter``, or ``Stream`` for a trunk's input.
        call: 0 for the first call of the module in a forward pass, and so on.
        signal: one of `SIGNALS`.
        statistic: one of `STATISTICS`.
    """

    trunk: tuple[str, ...]
    depth: npt.NDArray[np.float64]
    layer: tuple[str, ...]
    type: tuple[str, ...]
    call: npt.NDArray[np.int64]
    signal: tuple[str, ...]
    statistic: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", _owned(self.depth, np.float64))
        object.__setattr__(self, "call", _owned(self.call, np.int64))
        lengths = {k: len(getattr(self, k)) for k in KEYS}
        if len(set(lengths.values())) > 1:
            raise RecordError(f"the columns of a row table differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.layer)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the constructor: a pickled array comes back writeable.
        return rebuilt, (Rows, {k: getattr(self, k) for k in KEYS})

    @classmethod
    def of(cls, entries: Iterable[tuple[str, float, str, str, int, str, str]]) -> Rows:
        """Build the table from (trunk, depth, layer, type, call, signal, statistic) tuples."""
        columns = list(zip(*entries, strict=True)) or [()] * len(KEYS)
        return cls(
            trunk=tuple(columns[0]),
            depth=np.asarray(columns[1], dtype=np.float64),
            layer=tuple(columns[2]),
            type=tuple(columns[3]),
            call=np.asarray(columns[4], dtype=np.int64),
            signal=tuple(columns[5]),
            statistic=tuple(columns[6]),
        )

    def entries(self) -> Iterator[tuple[str, float, str, str, int, str, str]]:
        """The tuples that `of` takes, in order."""
        return zip(
            self.trunk,
            self.depth.tolist(),
            self.layer,
            self.type,
            self.call.tolist(),
            self.signal,
            self.statistic,
            strict=True,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return self is other or (
            np.array_equal(self.depth, other.depth, equal_nan=True)
            and np.array_equal(self.call, other.call)
            and all(getattr(self, k) == getattr(other, k) for k in KEYS if k not in ("depth", "call"))
        )

    __hash__ = None  # type: ignore[assignment]


def coded(words: npt.NDArray[np.object_]) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    """Statuses ("" stands for ok) as codes of one byte each, and the words that these stand for."""
    known = {"": 0, OK: 0}
    status = np.zeros(len(words), dtype=np.uint8)
    for row in np.flatnonzero(words != "").tolist():
        why = words[row]
        if why not in known and len(known) > 255:
            why = "error: more than 254 different reasons in one step"
        status[row] = known.setdefault(why, len(known) - 1)
    status.flags.writeable = False
    return status, tuple(word for word in known if word)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """The values of one training step (or one measurement) of one replicate.

    Attributes:
        step: the step's number, from 0; a resumed run goes on counting.
        replicate: the replicate's number, from 0.
        rows: what each value is.
        value: float64, one per row; NaN where absent (or measured NaN: status ``ok``).
        status: one code per row, an index into ``statuses``.
        statuses: the words behind the codes; ``ok`` is code 0.
        wall_time_s: seconds from the start of this step to the start of the next, or None.
        loss: the loss, where it could be seen, or None.
        learning_rate: that of the optimizer's step: a number, one per parameter group where they
            differ, or None.
        loss_scale: the factor of a gradient scaler, by which gradients were divided, or None.
        finding: what was worth a warning in this step; such steps are never thinned.
    """

    step: int
    replicate: int
    rows: Rows
    value: npt.NDArray[np.float64]
    status: npt.NDArray[np.uint8]
    statuses: tuple[str, ...] = (OK,)
    wall_time_s: float | None = None
    loss: float | None = None
    learning_rate: float | tuple[float, ...] | None = None
    loss_scale: float | None = None
    finding: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _owned(self.value, np.float64))
        object.__setattr__(self, "status", _owned(self.status, np.uint8))
        if not self.value.shape == self.status.shape == (len(self.rows),):
            raise RecordError(
                f"{self.value.shape} values and {self.status.shape} statuses for {len(self.rows)} rows"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, (Step, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def of(
        cls, rows: Rows, value: Sequence[float] | np.ndarray, absent: Mapping[int, str], **others: Any
    ) -> Step:
        """Build a step from its values and the reasons of the absent ones, by row number.

        Args:
            rows: what each value is.
            value: one number per row; copied.
            absent: why a value is absent, by its row number; the value then becomes NaN.
            **others: the remaining attributes: ``step=``, ``replicate=``, ``loss=`` and so on.

        Raises:
            RecordError: not one value per row, or a reason for a row that does not exist.
        """
        values = np.array(value, dtype=np.float64)
        if values.shape != (len(rows),):
            raise RecordError(f"{values.shape} values for {len(rows)} rows")
        words = np.full(len(rows), "", dtype=object)
        for row, why in absent.items():
            if not 0 <= row < len(rows):
                raise RecordError(f"row {row} of {len(rows)} is said to be absent ({why})")
            words[row] = why
        return cls.coded(rows, values, *coded(words), **others)

    @classmethod
    def coded(
        cls, rows: Rows, value: np.ndarray, status: np.ndarray, statuses: tuple[str, ...], **others: Any
    ) -> Step:
        """The same from numbers that stand for statuses, see `coded`; absent values become NaN."""
        values = np.where(status == 0, value, math.nan)
        values.flags.writeable = False
        return cls(rows=rows, value=values, status=status, statuses=statuses, **others)

    @property
    def nbytes(self) -> int:
        """Bytes held by this step alone (the row table is shared)."""
        return self.value.nbytes + self.status.nbytes + 400

    def words(self) -> npt.NDArray[np.object_]:
        """The status of each row as a word."""
        return np.asarray(self.statuses, dtype=object)[self.status]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Step):
            return NotImplemented
        return (
            all(_same(getattr(self, k), getattr(other, k)) for k in STEP_FIELDS)
            and self.rows == other.rows
            and np.array_equal(self.value, other.value, equal_nan=True)
            and np.array_equal(self.words(), other.words())
        )

    __hash__ = None  # type: ignore[assignment]


STEP_FIELDS: Final = (
    "step",
    "replicate",
    "wall_time_s",
    "loss",
    "learning_rate",
    "loss_scale",
    "finding",
)


def thin(steps: Sequence[Step]) -> list[Step]:
    """Every second step, keeping the first, the last and every step with a finding.

    Thinning is by step number, so that all replicates of a step stay or go together.
    """
    found = {s.step for s in steps if s.finding is not None}
    numbers = sorted({s.step for s in steps})
    plain = [n for n in numbers if n not in found]
    keep = found | set(plain[::2]) | set(numbers[-1:])
    return [s for s in steps if s.step in keep]


def _owned(array: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """The array itself if nobody can write to it, else a copy that nobody can write to."""
    array = np.asarray(array, dtype=dtype)
    if array.flags.writeable or not array.flags.owndata:
        array = array.copy()
        array.flags.writeable = False
    return array


def rebuilt(cls: type[Any], attributes: Mapping[str, Any]) -> Any:
    """What pickle and deepcopy call: the class with its attributes."""
    return cls(**attributes)


def _same(a: Any, b: Any) -> bool:
    """Equality under which NaN equals NaN."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)
