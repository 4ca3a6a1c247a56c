"""The Record: everything that was measured, immutable, and readable without torch.

A Record is a header (what was measured, on what, with which seeds) and a sequence of
`Step` entries. All steps of one model share one `Rows` table that says, for each value,
which layer, call, signal and statistic it is; a step then holds only numbers and the
reason for each number that is absent. ``Record.to_pandas()`` gives the tidy table.

**File format** (schema 1): JSON Lines, UTF-8. Every line is one JSON object.

- The first line is the header: ``{"gradscope": "record", "schema": 1, ...}``.
- ``{"rows": 0, "trunk": [...], "depth": [...], "layer": [...], "type": [...], "call": [...],
  "signal": [...], "statistic": [...]}`` defines row table number 0.
- ``{"step": 12, "replicate": 0, "of": 0, "value": [...], "status": {"frozen": [3, 4]}, ...}``
  is one step: ``value[i]`` belongs to row i of table ``of``. ``null`` is NaN, ``"inf"`` and
  ``"-inf"`` the infinities. Rows not listed under ``status`` have status ``ok``.
- ``{"session": {...}}`` says that another run continued the file, with its own header.

Whole lines are appended as they come, so an interrupted run costs at most its last line: `Record.load`
leaves a half-written one out, and a run that continues the file cuts it off first. Every line of a
finished file is therefore plain JSON, for readers that know nothing of gradscope.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.errors import GradscopeWarning, RecordError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SCHEMA",
    "SIGNALS",
    "STATISTICS",
    "Record",
    "RecordWriter",
    "Rows",
    "Statistic",
    "Step",
    "thin",
]

SCHEMA: Final = 1
OK: Final = "ok"
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
_DTYPES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "step": np.int64,
        "replicate": np.int64,
        "depth": np.float64,
        "call": np.int64,
        "value": np.float64,
    }
)

SIGNALS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "activation": "a module's output in the forward pass",
        "output_grad": "the gradient of the loss with respect to a module's output",
        "param_grad": "the gradient of the loss with respect to a parameter",
        "weight": "a parameter's value before the optimizer's step",
        "update": "the change of a parameter in the optimizer's step",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """One stored statistic: its name, the signals it exists for, its unit and its meaning.

    Attributes:
        name: the word in the Record's ``statistic`` column.
        signals: the signals it is stored for.
        unit: ``signal`` (the unit of the tensor), ``signal^2``, ``elements``, ``positions`` or ``1``.
        meaning: one sentence with the formula.
        where: ``all`` rows of those signals, ``stream`` (positions of the residual stream only) or
            ``packed`` (parameters that hold query, key and value together).
        slow: recorded on every tenth recorded step only, because it costs more.
    """

    name: str
    signals: tuple[str, ...]
    unit: str
    meaning: str
    where: str = "all"
    slow: bool = False


_TENSOR = ("activation", "output_grad")
_ANY = ("activation", "output_grad", "param_grad", "weight", "update")

#: Every stored statistic, in the order of the Record's rows. Kernels, documentation, plots and
#: contract tests follow from this table.
STATISTICS: Final[Mapping[str, Statistic]] = MappingProxyType(
    {
        s.name: s
        for s in (
            Statistic(name="l2", signals=_ANY, unit="signal", meaning="Frobenius norm, sqrt(sum x^2)"),
            Statistic(name="count", signals=_ANY, unit="elements", meaning="number of elements"),
            Statistic(
                name="tokens",
                signals=_TENSOR,
                unit="positions",
                meaning="number of positions: elements / features (channels for convolutions)",
            ),
            Statistic(name="mean", signals=_TENSOR, unit="signal", meaning="mean over all elements"),
            Statistic(
                name="variance",
                signals=_TENSOR,
                unit="signal^2",
                meaning="variance over all elements, sum (x - mean)^2 / (count - 1)",
            ),
            Statistic(
                name="absmax",
                signals=_TENSOR,
                unit="signal",
                meaning="largest absolute value",
            ),
            Statistic(name="zeros", signals=_TENSOR, unit="elements", meaning="elements exactly 0"),
            Statistic(
                name="nonfinite",
                signals=("activation", "output_grad", "param_grad"),
                unit="elements",
                meaning="elements that are NaN or infinite",
            ),
            Statistic(
                name="dot_next",
                signals=_TENSOR,
                unit="signal^2",
                meaning="inner product with the same signal at the next stream position",
                where="stream",
            ),
            Statistic(
                name="diff_next_l2",
                signals=_TENSOR,
                unit="signal",
                meaning="norm of the difference to the same signal at the next stream position",
                where="stream",
            ),
            Statistic(
                name="unit_skip",
                signals=("activation",),
                unit="1",
                meaning=(
                    "1 where the next stream position is this one plus something, seen in the autograd "
                    "graph: adds only, coefficient 1, no other consumer; else absent"
                ),
                where="stream",
            ),
            Statistic(
                name="token_variance",
                signals=("activation",),
                unit="signal^2",
                meaning="mean over positions of the (biased) variance over features: act_var",
                slow=True,
            ),
            Statistic(
                name="kurtosis",
                signals=_TENSOR,
                unit="1",
                meaning="E x^4 / (E x^2)^2, uncentred (3 for a Gaussian)",
                slow=True,
            ),
            Statistic(
                name="token_cosine",
                signals=("activation",),
                unit="1",
                meaning="mean cosine between different tokens of one sequence (1: rank collapse)",
                where="stream",
                slow=True,
            ),
            Statistic(
                name="input_cosine",
                signals=("activation",),
                unit="1",
                meaning="input presence: mean over tokens of the cosine with the trunk's input h_0",
                where="stream",
                slow=True,
            ),
            Statistic(
                name="l2_at_step",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of .grad when the optimizer steps (after clipping)",
                slow=True,
            ),
            Statistic(
                name="query_l2",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of the query third of a packed projection",
                where="packed",
            ),
            Statistic(
                name="key_l2",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of the key third of a packed projection",
                where="packed",
            ),
            Statistic(
                name="value_l2",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of the value third of a packed projection",
                where="packed",
            ),
        )
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
        return _rebuilt, (Rows, {k: getattr(self, k) for k in KEYS})

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
        return _rebuilt, (Step, {f.name: getattr(self, f.name) for f in fields(self)})

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
        status = np.zeros(len(rows), dtype=np.uint8)
        words: dict[str, int] = {OK: 0}
        for row, why in absent.items():
            if not 0 <= row < len(rows):
                raise RecordError(f"row {row} of {len(rows)} is said to be absent ({why})")
            if why not in words and len(words) >= 255:
                why = "error: more than 254 different reasons in one step"
            status[row] = words.setdefault(why, len(words))
            if status[row]:
                values[row] = math.nan
        values.flags.writeable = status.flags.writeable = False
        return cls(rows=rows, value=values, status=status, statuses=tuple(words), **others)

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
            all(_same(getattr(self, k), getattr(other, k)) for k in _STEP_FIELDS)
            and self.rows == other.rows
            and np.array_equal(self.value, other.value, equal_nan=True)
            and np.array_equal(self.words(), other.words())
        )

    __hash__ = None  # type: ignore[assignment]


_STEP_FIELDS: Final = (
    "step",
    "replicate",
    "wall_time_s",
    "loss",
    "learning_rate",
    "loss_scale",
    "finding",
)


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Everything that was measured: a header and the steps, immutable.

    Attributes:
        header: schema, versions, dtype, device, seeds, mode, ``loss_denominator`` (a number, or
            None for "known up to one factor per step"), ``replicates`` (``initialisation``,
            ``batch`` or ``run``: what a replicate is), and whatever else describes the measurement.
            It holds what JSON can: strings, finite numbers, booleans, None, and lists and string-keyed
            mappings of these, which it keeps as tuples and read-only mappings.
        steps: the steps in order.

    Raises:
        RecordError: the header holds something that a file could not.
    """

    header: Mapping[str, Any]
    steps: tuple[Step, ...] = field(default=())

    def __post_init__(self) -> None:
        header = _header(self.header)
        object.__setattr__(self, "header", MappingProxyType({"schema": SCHEMA, **header}))
        object.__setattr__(self, "steps", tuple(self.steps))

    # -- reading ---------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of values (rows of the tidy table)."""
        return sum(len(s.rows) for s in self.steps)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return dict(self.header) == dict(other.header) and self.steps == other.steps

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping cannot be pickled; a study's worker processes hand Records over.
        return Record, (json.loads(json.dumps(dict(self.header), default=dict)), self.steps)

    def __repr__(self) -> str:
        steps = sorted({s.step for s in self.steps})
        replicates = {s.replicate for s in self.steps}
        layers = {layer for s in self.steps for layer in s.rows.layer}
        span = f"steps {steps[0]}–{steps[-1]} ({len(steps)} recorded)" if steps else "no steps"
        return (
            f"<Record of {self.header.get('model', 'a model')}: {span}, {len(replicates)} replicate"
            f"{'s' * (len(replicates) != 1)}, {len(layers)} layers and parameters, {len(self)} values>"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the steps hold, row tables counted once each."""
        tables = {id(s.rows): len(s.rows) for s in self.steps}
        return sum(s.nbytes for s in self.steps) + sum(tables.values()) * 80

    @property
    def trunks(self) -> tuple[str, ...]:
        """Names of the trunks that have at least one row, in order of appearance."""
        return tuple(
            dict.fromkeys(
                t for rows in {id(s.rows): s.rows for s in self.steps}.values() for t in rows.trunk if t
            )
        )

    def table(self, **where: Any) -> dict[str, np.ndarray]:
        """The rows that match, as a dict of equally long columns (those of `to_pandas`).

        Each keyword names a column and gives one value, or several (a set, list, range, array), e.g.
        ``record.table(signal="output_grad", statistic={"l2", "tokens"}, step=0)``. Torch- and
        pandas-free: what analyses read.

        Raises:
            RecordError: a keyword is no column.
        """
        unknown = set(where) - set(COLUMNS)
        if unknown:
            raise RecordError(f"no column {sorted(unknown)}; the columns are {list(COLUMNS)}")
        wanted = {
            k: tuple(v) if isinstance(v, Iterable) and not isinstance(v, str) else (v,)
            for k, v in where.items()
        }
        masks: dict[int, np.ndarray] = {}
        parts: list[tuple[Step, np.ndarray]] = []
        for step in self.steps:
            if any(getattr(step, k) not in wanted[k] for k in ("step", "replicate") if k in wanted):
                continue
            mask = masks.get(id(step.rows))
            if mask is None:
                mask = np.ones(len(step.rows), dtype=bool)
                for key in KEYS:
                    if key in wanted:
                        column = getattr(step.rows, key)
                        mask &= np.fromiter((v in wanted[key] for v in column), bool, len(step.rows))
                masks[id(step.rows)] = mask
            if "value" in wanted:
                mask = mask & np.isin(step.value, list(wanted["value"]))
            if "status" in wanted:
                mask = mask & np.isin(step.words().astype(str), list(wanted["status"]))
            parts.append((step, np.flatnonzero(mask)))
        columns: dict[str, list[np.ndarray]] = {k: [] for k in COLUMNS}
        cached: dict[tuple[int, bytes], dict[str, np.ndarray]] = {}
        for step, at in parts:
            key = (id(step.rows), at.tobytes())
            if key not in cached:
                cached[key] = {
                    k: np.asarray(
                        getattr(step.rows, k), dtype=None if k in ("depth", "call") else object
                    )[at]
                    for k in KEYS
                }
            for k, v in cached[key].items():
                columns[k].append(v)
            columns["step"].append(np.full(len(at), step.step, dtype=np.int64))
            columns["replicate"].append(np.full(len(at), step.replicate, dtype=np.int64))
            columns["value"].append(step.value[at])
            columns["status"].append(step.words()[at])
        empty: dict[str, np.ndarray] = {k: np.empty(0, dtype=_DTYPES.get(k, np.object_)) for k in COLUMNS}
        return {k: np.concatenate(v) if v else empty[k] for k, v in columns.items()}

    def to_pandas(self) -> pd.DataFrame:
        """The tidy table, one row per value.

        Columns: step, replicate, trunk, depth, layer, type, call, signal, statistic, value, status.
        ``value`` is float64 and NaN where absent; ``status`` says ``ok`` or why. ``depth`` is NaN
        and ``trunk`` "" off the depth axis.
        """
        import pandas as pd

        return pd.DataFrame(self.table(), columns=list(COLUMNS))

    # -- combining -------------------------------------------------------------------------

    def append(self, other: Record, *, renumber: bool = False) -> Record:
        """A Record with the steps of this one and then those of the other; the header is this one's.

        Args:
            other: further steps of the same model, or further replicates.
            renumber: shift the other's step numbers to follow this Record's last step.

        Raises:
            RecordError: both hold the same (step, replicate), and ``renumber`` is not set.
        """
        if not self.steps:
            return Record(self.header, other.steps)
        steps = other.steps
        if renumber and steps:
            shift = max(s.step for s in self.steps) + 1 - min(s.step for s in steps)
            steps = tuple(replace(s, step=s.step + shift) for s in steps)
        both = {(s.step, s.replicate) for s in self.steps} & {(s.step, s.replicate) for s in steps}
        if both:
            step, replicate = min(both)
            raise RecordError(
                f"both Records hold step {step} of replicate {replicate} ({len(both)} steps overlap). "
                "If the second continues the first, write record.append(other, renumber=True)."
            )
        return Record(self.header, self.steps + steps)

    # -- files -----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the Record to a JSON Lines file (format in the module's docstring), atomically.

        An older Record at that path is replaced, also one with a half-written last line; any other
        file is left alone.

        Raises:
            RecordError: the path holds something that is not a whole Record that this version can read,
                or cannot be written.
        """
        path = Path(path)
        if path.exists() and (path.is_dir() or path.stat().st_size):
            try:
                _read(path)
            except RecordError as error:
                raise RecordError(
                    f"{error} It is not overwritten: delete it, or save elsewhere."
                ) from None
        target = path.resolve()  # a symbolic link stays one
        temporary = target.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(_header_line(self.header))
                tables: dict[int, Rows] = {}
                for step in self.steps:
                    for line in _step_lines(step, tables):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())  # else a crash after the rename can leave an empty file
            temporary.replace(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise RecordError(f"{path} cannot be written: {error.strerror}.") from error
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a Record. A half-written last line (an interrupted run) is left out with a warning.

        Raises:
            RecordError: no such file, not a Record, damaged before its end, or of a newer schema.
        """
        path = Path(path)
        contents = _read(path)
        if contents.torn is not None:
            warnings.warn(
                f"{path}: line {contents.torn} is half-written (the run was interrupted); "
                f"the {len(contents.steps)} whole steps before it are kept.",
                GradscopeWarning,
                stacklevel=2,
            )
        return cls(contents.header, tuple(contents.steps))


class RecordWriter:
    """Appends steps to a Record file as they come; a file that exists is continued.

    The whole file is read and checked before a byte is added to it. A half-written last line, which
    an interrupted run leaves, is cut off with a warning.

    Attributes:
        path: the file.
        last_step: the largest step number already in the file, or -1.

    Raises:
        RecordError: the path holds something that is not a readable Record (it is left alone), or
            cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.last_step = -1
        self._tables: dict[int, Rows] = {}
        self._file: FileIO | None = None
        header = _header(header)
        resume = self.path.exists() and (self.path.is_dir() or self.path.stat().st_size > 0)
        contents = _read(self.path) if resume else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a step that failed halfway can be taken back.
            self._file = self.path.open("ab", buffering=0)
            if contents is None:
                self._end = 0
                self._append(_header_line(header))
                return
            self.last_step = max((s.step for s in contents.steps), default=-1)
            self._tables = contents.tables
            self._end = contents.end
            self._file.truncate(self._end)
            self._append((b"" if contents.closed else b"\n") + _line({"session": header}))
        except OSError as error:
            self.close()
            raise RecordError(f"{self.path} cannot be written: {error.strerror}.") from error
        if contents.torn is not None:
            warnings.warn(
                f"{self.path}: line {contents.torn} was half-written (a run was interrupted) and is cut "
                f"off; the {len(contents.steps)} whole steps before it are kept.",
                GradscopeWarning,
                stacklevel=2,
            )

    def write(self, step: Step) -> None:
        """Append one step and hand it to the operating system.

        A step that cannot be written (a full disk) leaves nothing of itself behind, so that the file
        stays readable and later steps may follow.

        Raises:
            RecordError: the writer is closed.
            OSError: the step could not be written.
        """
        tables = dict(self._tables)
        self._append(b"".join(_step_lines(step, tables)))
        self._tables = tables

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, data: bytes) -> None:
        if self._file is None:
            raise RecordError(f"{self.path} is closed")
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(data)


def thin(steps: Sequence[Step]) -> list[Step]:
    """Every second step, keeping the first, the last and every step with a finding.

    Thinning is by step number, so that all replicates of a step stay or go together.
    """
    found = {s.step for s in steps if s.finding is not None}
    numbers = sorted({s.step for s in steps})
    plain = [n for n in numbers if n not in found]
    keep = found | set(plain[::2]) | set(numbers[-1:])
    return [s for s in steps if s.step in keep]


# -- the file format -----------------------------------------------------------------------

_LONGEST_HEADER_BYTES: Final = 1 << 24  # so that a large foreign file is not read whole to refuse it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What a file holds.

    Attributes:
        header: of the first line, without the file's own marks.
        tables: the row tables by number.
        steps: in the order of the file.
        end: the byte after the last whole line.
        closed: whether that line ends in a newline.
        torn: the number of the half-written line after it, if there is one.
    """

    header: dict[str, Any]
    tables: dict[int, Rows]
    steps: list[Step]
    end: int
    closed: bool
    torn: int | None


def _owned(array: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """The array itself if nobody can write to it, else a copy that nobody can write to."""
    array = np.asarray(array, dtype=dtype)
    if array.flags.writeable or not array.flags.owndata:
        array = array.copy()
        array.flags.writeable = False
    return array


def _rebuilt(cls: type[Any], attributes: Mapping[str, Any]) -> Any:
    return cls(**attributes)


def _same(a: Any, b: Any) -> bool:
    """Equality under which NaN equals NaN."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


def _header(header: Mapping[str, Any]) -> dict[str, Any]:
    if "gradscope" in header:
        raise RecordError(
            "a header cannot have a key 'gradscope': it marks the file as a Record. "
            "Write the version as header['versions']['gradscope']."
        )
    return {k: _immutable(v, f"[{k!r}]") for k, v in header.items() if k != "schema"}


def _immutable(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a plain string also of a subclass, as torch.__version__ is
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_immutable(v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return MappingProxyType({k: _immutable(v, f"{where}[{k!r}]") for k, v in value.items()})
    raise RecordError(
        f"header{where} is {value!r} ({type(value).__name__}); a header holds what JSON can: strings, "
        "finite numbers, booleans, None, lists, and mappings with string keys. Write str(...) of it."
    )


def _line(entry: Mapping[str, Any]) -> bytes:
    # ASCII with escapes: a name that is no valid UTF-8 (a lone surrogate) is kept too.
    text = json.dumps(entry, allow_nan=False, separators=(",", ":"), default=dict)
    return text.encode("ascii") + b"\n"


def _header_line(header: Mapping[str, Any]) -> bytes:
    return _line({"gradscope": "record", "schema": SCHEMA, **_header(header)})


def _number(x: float) -> float | int | str | None:
    if x != x:
        return None
    if x in (math.inf, -math.inf):
        return "inf" if x > 0 else "-inf"
    return int(x) if x.is_integer() and abs(x) < 2**53 and (x or math.copysign(1, x) > 0) else x


def _float(x: float | str | None) -> float:
    return math.nan if x is None else float(x)


def _step_lines(step: Step, tables: dict[int, Rows]) -> Iterator[bytes]:
    """The lines of one step; a row table that is new is added to ``tables`` and written first."""
    of = next((i for i, t in tables.items() if t is step.rows), None)
    if of is None:
        of = next((i for i, t in tables.items() if t == step.rows), None)
        if of is None:
            of = max(tables, default=-1) + 1
            tables[of] = step.rows
            rows = step.rows
            yield _line(
                {
                    "rows": of,
                    **{
                        k: [_number(d) for d in rows.depth.tolist()]
                        if k == "depth"
                        else rows.call.tolist()
                        if k == "call"
                        else list(getattr(rows, k))
                        for k in KEYS
                    },
                }
            )
        else:
            tables[of] = step.rows  # the next look-up is by identity
    entry: dict[str, Any] = {"step": step.step, "replicate": step.replicate, "of": of}
    for name in _STEP_FIELDS[2:]:
        value = getattr(step, name)
        if value is not None:
            entry[name] = (
                [_number(float(v)) for v in value]
                if isinstance(value, tuple)
                else value
                if isinstance(value, str)
                else _number(float(value))
            )
            if entry[name] is None:
                entry[name] = "nan"
    entry["value"] = [_number(v) for v in step.value.tolist()]
    status: dict[str, list[int]] = {}
    for row in np.flatnonzero(step.status).tolist():
        status.setdefault(step.statuses[step.status[row]], []).append(row)
    entry["status"] = status
    yield _line(entry)


def _rows_from(entry: Mapping[str, Any]) -> Rows:
    columns = [[_float(d) for d in entry[k]] if k == "depth" else entry[k] for k in KEYS]
    return Rows.of(zip(*columns, strict=True))


def _step_from(entry: Mapping[str, Any], tables: Mapping[int, Rows]) -> Step:
    absent = {row: why for why, rows in entry["status"].items() for row in rows}
    optional: dict[str, Any] = {}
    for name in _STEP_FIELDS[2:]:
        value = entry.get(name)
        if value is not None:
            optional[name] = (
                value
                if name == "finding"
                else tuple(_float(v) for v in value)
                if isinstance(value, list)
                else _float(value)
            )
    return Step.of(
        tables[entry["of"]],
        [_float(v) for v in entry["value"]],
        absent,
        step=int(entry["step"]),
        replicate=int(entry["replicate"]),
        **optional,
    )


def _read(path: Path) -> _Contents:
    """Read and check the whole file."""
    header = _read_header(path)
    sessions: list[Any] = []
    tables: dict[int, Rows] = {}
    steps: list[Step] = []
    end, closed, torn = 0, True, None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if number > 1:
                    _read_line(line, sessions, tables, steps)
            except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
                # Only a write that was cut short leaves a line without its newline, and only the last.
                if not line.endswith(b"\n"):
                    torn = number
                    break
                raise RecordError(
                    f"{path} is damaged at line {number} ({type(error).__name__}: {error}); the "
                    f"{len(steps)} steps before it are intact. Restore the file from a copy, or keep "
                    f"only the {number - 1} lines before it."
                ) from None
            end += len(line)
            closed = line.endswith(b"\n")
    if sessions:
        header["sessions"] = [*header.get("sessions", ()), *sessions]
    return _Contents(header=header, tables=tables, steps=steps, end=end, closed=closed, torn=torn)


def _read_line(line: bytes, sessions: list[Any], tables: dict[int, Rows], steps: list[Step]) -> None:
    entry = json.loads(line.decode("utf-8"))
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    if "session" in entry:
        sessions.append(entry["session"])
    elif "rows" in entry:
        rows = _rows_from(entry)
        # Two runs that write one file at once would give one number to two tables.
        if tables.setdefault(int(entry["rows"]), rows) != rows:
            raise ValueError(f"row table {entry['rows']} is defined twice, differently")
    else:
        steps.append(_step_from(entry, tables))


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            line = file.readline(_LONGEST_HEADER_BYTES)
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise RecordError(f"{path} is a folder, not a Record file.") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(line.decode("utf-8"))
        if header.pop("gradscope") != "record":
            raise ValueError("another kind of file")
        schema = int(header.pop("schema"))
        if schema < 1:
            raise ValueError("no such schema")
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
        raise RecordError(
            f"{path} is not a gradscope Record: its first line is no header but "
            f"{line[:60].decode('utf-8', 'replace')!r}."
        ) from None
    if schema > SCHEMA:
        raise RecordError(
            f"{path} has schema {schema}, this gradscope reads up to {SCHEMA}. "
            "Update it: pip install --upgrade torch-gradscope"
        )
    return header
