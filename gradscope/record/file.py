"""The Record's format on disk.

**File format** (schema 1): JSON Lines, UTF-8. Every line is one JSON object.

- The first line is the header: ``{"gradscope": "record", "schema": 1, ...}``.
- ``{"rows": 0, "trunk": [...], "depth": [...], "layer": [...], "type": [...], "call": [...],
  "signal": [...], "statistic": [...]}`` defines row table number 0.
- ``{"step": 12, "replicate": 0, "of": 0, "value": [...], "status": {"frozen": [3, 4]}, ...}``
  is one step: ``value[i]`` belongs to row i of table ``of``. ``null`` is NaN, ``"inf"`` and
  ``"-inf"`` the infinities. Rows not listed under ``status`` have status ``ok``.
- ``{"header": {...}}`` gives new values to entries of the header, for the whole file.
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
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from gradscope.errors import GradscopeWarning, RecordError, RecordInUseError
from gradscope.record.steps import KEYS, SCHEMA, STEP_FIELDS, Rows, Step

__all__ = ["Contents", "RecordWriter", "checked_header", "header_line", "read_file", "step_lines"]


_LONGEST_HEADER_BYTES: Final = 1 << 24  # so that a large foreign file is not read whole to refuse it


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
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


class RecordWriter:
    """Appends steps to a Record file as they come; a file that exists is continued.

    The whole file is read and checked before a byte is added to it. A half-written last line, which
    an interrupted run leaves, is cut off with a warning.

    Attributes:
        path: the file.
        last_step: the largest step number already in the file, or -1.

    Raises:
        RecordInUseError: another writer has the file.
        RecordError: the path holds something that is not a readable Record (it is left alone), or
            cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.last_step = -1
        self._tables: dict[int, Rows] = {}
        self._file: FileIO | None = None
        header = checked_header(header)
        resume = self.path.exists() and (self.path.is_dir() or self.path.stat().st_size > 0)
        contents = read_file(self.path) if resume else None
        if contents is not None:
            self.last_step = max((s.step for s in contents.steps), default=-1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a step that failed halfway can be taken back.
            self._file = self.path.open("ab", buffering=0)
            _lock(self._file)
            if contents is None:
                self._end = 0
                self._append(header_line(header))
                return
            self._tables = contents.tables
            self._end = contents.end
            self._file.truncate(self._end)
            self._append((b"" if contents.closed else b"\n") + _line({"session": header}))
        except BlockingIOError as error:
            self._file, file = None, self._file
            if file is not None:
                file.close()
            raise RecordInUseError(
                f"{self.path} is being written by another watch. Give this one its own path=.",
                self.last_step,
            ) from error
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
        self._append(b"".join(step_lines(step, tables)))
        self._tables = tables

    def amend(self, header: Mapping[str, Any]) -> None:
        """Append new values of header entries, which hold for the whole file.

        Raises:
            RecordError: the writer is closed.
            OSError: they could not be written.
        """
        self._append(_line({"header": checked_header(header)}))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            # By its own word: a forked process (a data loader's) may hold the file open for longer.
            _lock(self._file, False)
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


def _lock(file: FileIO, lock: bool = True) -> None:
    """Claim a file for this writer, or let go of it. Where the system knows no locks, nothing happens.

    Raises:
        BlockingIOError: another writer has it.
    """
    if fcntl is None or file.closed:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if lock else fcntl.LOCK_UN)
    except BlockingIOError:
        raise
    except OSError:
        return  # a file system without locks


def checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header, deeply immutable, holding only what JSON can."""
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


def header_line(header: Mapping[str, Any]) -> bytes:
    """The first line of a file."""
    return _line({"gradscope": "record", "schema": SCHEMA, **checked_header(header)})


def _number(x: float) -> float | int | str | None:
    if x != x:
        return None
    if x in (math.inf, -math.inf):
        return "inf" if x > 0 else "-inf"
    return int(x) if x.is_integer() and abs(x) < 2**53 and (x or math.copysign(1, x) > 0) else x


def _float(x: float | str | None) -> float:
    return math.nan if x is None else float(x)


def step_lines(step: Step, tables: dict[int, Rows]) -> Iterator[bytes]:
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
    for name in STEP_FIELDS[2:]:
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
    for name in STEP_FIELDS[2:]:
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


def read_file(path: Path) -> Contents:
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
                    _read_line(line, header, sessions, tables, steps)
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
    return Contents(header=header, tables=tables, steps=steps, end=end, closed=closed, torn=torn)


def _read_line(
    line: bytes,
    header: dict[str, Any],
    sessions: list[Any],
    tables: dict[int, Rows],
    steps: list[Step],
) -> None:
    entry = json.loads(line.decode("utf-8"))
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    if "session" in entry:
        sessions.append(entry["session"])
    elif "header" in entry:
        header.update(checked_header(entry["header"]))
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
