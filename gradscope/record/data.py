"""The Record itself."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.errors import GradscopeWarning, RecordError
from gradscope.record.file import checked_header, header_line, read_file, step_lines
from gradscope.record.steps import COLUMNS, DTYPES, KEYS, SCHEMA, Rows, Step

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Record"]


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
        header = checked_header(self.header)
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
        empty: dict[str, np.ndarray] = {k: np.empty(0, dtype=DTYPES.get(k, np.object_)) for k in COLUMNS}
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
        """Write the Record to a JSON Lines file (format in `gradscope.record.file`), atomically.

        An older Record at that path is replaced, also one with a half-written last line; any other
        file is left alone.

        Raises:
            RecordError: the path holds something that is not a whole Record that this version can read,
                or cannot be written.
        """
        path = Path(path)
        if path.exists() and (path.is_dir() or path.stat().st_size):
            try:
                read_file(path)
            except RecordError as error:
                raise RecordError(
                    f"{error} It is not overwritten: delete it, or save elsewhere."
                ) from None
        target = path.resolve()  # a symbolic link stays one
        temporary = target.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(header_line(self.header))
                tables: dict[int, Rows] = {}
                for step in self.steps:
                    for line in step_lines(step, tables):
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
        contents = read_file(path)
        if contents.torn is not None:
            warnings.warn(
                f"{path}: line {contents.torn} is half-written (the run was interrupted); "
                f"the {len(contents.steps)} whole steps before it are kept.",
                GradscopeWarning,
                stacklevel=2,
            )
        return cls(contents.header, tuple(contents.steps))
