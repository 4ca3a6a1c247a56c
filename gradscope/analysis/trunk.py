"""One trunk of a Record as arrays over depth: where its stream, branches and parameters are.

Quantities are written against `Trunk` and `Values`: a `Values` holds a number or a reason for
every (step, depth), and `combine` carries the reasons along, so that no formula can turn an
absent value into a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gradscope.record import OUTSIDE, STATISTICS, Record, Rows, Step

__all__ = ["NOT_RECORDED", "NO_PARAMETERS", "OK", "Place", "Trunk", "Values", "combine", "norm", "ratio"]

OK: Final = "ok"
NOT_RECORDED: Final = "not recorded"
NO_PARAMETERS: Final = "no parameters"

#: Parameters that have no gradient by design; a block's norm is over the others.
WITHOUT_GRADIENT: Final = ("frozen", "no gradient path", "not called")

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.object_]
Mask = npt.NDArray[np.bool_]


class Place(NamedTuple):
    """A point on the depth axis: stream depth l, the module's name there and its call."""

    depth: float
    layer: str
    call: int

    @property
    def block(self) -> int:
        """Number k of the block, from 0, whose output has depth k + 1; depth in (k, k + 1]."""
        return math.ceil(self.depth - 1e-9) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Numbers over depth for S entries (step, replicate) of a Record, each a value or a reason.

    Attributes:
        places: the P points on the depth axis.
        value: [S, P] float64; NaN where absent (or measured NaN: status ``ok``).
        status: [S, P] words: ``ok``, or why the value is absent.
    """

    places: tuple[Place, ...]
    value: Floats
    status: Words

    @property
    def ok(self) -> Mask:
        """[S, P], where a value was measured (it may be NaN, infinite or exactly 0)."""
        return np.asarray(self.status == OK, dtype=np.bool_)

    def without(self, where: Mask, why: str) -> Values:
        """The same with the values at ``where`` made absent for the reason ``why``."""
        where = where & self.ok
        status = self.status.copy()
        status[where] = why
        return replace(self, value=np.where(where, np.nan, self.value), status=status)

    def take(self, at: Sequence[int]) -> Values:
        """The columns ``at``, in that order."""
        return Values(tuple(self.places[i] for i in at), self.value[:, at], self.status[:, at])

    def renamed(self, places: Iterable[Place]) -> Values:
        """The same numbers at other places."""
        return replace(self, places=tuple(places))


def combine(function: Callable[..., Floats], first: Values, *others: Values) -> Values:
    """``function`` of the values where all are present; elsewhere absent, with the first reason."""
    status = first.status
    for other in others:
        status = np.where(status == OK, other.status, status)
    with np.errstate(all="ignore"):
        value = function(first.value, *(other.value for other in others))
    return Values(first.places, np.where(status == OK, value, np.nan), status)


def ratio(numerator: Values, denominator: Values, why: str) -> Values:
    """The quotient; 0/0 is absent for the reason ``why``, x/0 is infinite."""
    undefined = (numerator.value == 0) & (denominator.value == 0)
    return combine(np.divide, numerator, denominator).without(undefined, why)


def norm(parts: Floats) -> Floats:
    """sqrt(sum x²) over the last axis, without overflow or underflow of the squares.

    [..., n] → [...]; 0 for n = 0. NaN in, NaN out.
    """
    if parts.shape[-1] == 0:
        return np.zeros(parts.shape[:-1])
    largest = np.max(np.abs(parts), axis=-1)
    scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)
    with np.errstate(all="ignore"):
        return scale * np.sqrt(np.sum((parts / scale[..., None]) ** 2, axis=-1))


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """Where one row table keeps the values of one trunk."""

    row: dict[tuple[Place, str, str], int]
    stream: dict[float, Place]
    branches: tuple[Place, ...]
    parameters: tuple[Place, ...]


def _layout(rows: Rows, trunk: str) -> _Layout:
    row: dict[tuple[Place, str, str], int] = {}
    modules: dict[Place, None] = {}
    parameters: dict[Place, None] = {}
    stream: dict[float, Place] = {}
    for i, (name, depth, layer, kind, call, signal, statistic) in enumerate(rows.entries()):
        if name != trunk or depth != depth:
            continue
        place = Place(depth, layer, call)
        row[place, signal, statistic] = i
        if kind == "Parameter":
            parameters[place] = None
            continue
        modules[place] = None
        if kind == "Stream" or (statistic in STATISTICS and STATISTICS[statistic].where == "stream"):
            stream[depth] = place
    for depth in {p.depth for p in modules if p.depth.is_integer()} - set(stream):
        block = _block_at(depth, modules)
        if block is not None:
            stream[depth] = block
    on_stream = set(stream.values())
    return _Layout(row, stream, tuple(p for p in modules if p not in on_stream), tuple(parameters))


def _elsewhere(words: npt.NDArray[np.object_], names: list[str]) -> npt.NDArray[np.bool_]:
    """[S, P], what is not recorded at one depth because it is at another in that step."""
    missing = np.asarray(words == NOT_RECORDED, dtype=np.bool_)
    found = np.zeros_like(missing)
    for name in {name for name in names if names.count(name) > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        found[:, same] = missing[:, same] & ~missing[:, same].all(axis=1, keepdims=True)
    return found


def _block_at(depth: float, modules: Iterable[Place]) -> Place | None:
    """The block whose output has that depth, where no stream statistic tells (``statistics=``).

    A block contains its branches, so its name is the prefix of everything else in (k, k + 1].
    """
    inside = [p for p in modules if depth - 1 < p.depth <= depth]
    shortest = min((p for p in inside if p.depth == depth), key=lambda p: len(p.layer), default=None)
    if shortest is None or any(
        p is not shortest and not p.layer.startswith(f"{shortest.layer}.") for p in inside
    ):
        return None
    return shortest


class Trunk:
    """One trunk of a Record, and its values over depth for every step and replicate.

    Attributes:
        record: the Record.
        name: the trunk's name.
        steps: the Record's S entries, by step, then replicate.
    """

    def __init__(self, record: Record, name: str) -> None:
        self.record = record
        self.name = name
        self.steps: tuple[Step, ...] = tuple(
            sorted(record.steps, key=lambda step: (step.step, step.replicate))
        )
        tables = {id(step.rows): step.rows for step in self.steps}
        self._layouts = {key: _layout(rows, name) for key, rows in tables.items()}

    @cached_property
    def stream(self) -> tuple[Place, ...]:
        """The stream positions h_0 .. h_L that have rows, by depth."""
        found: dict[float, Place] = {}
        for layout in self._layouts.values():
            found.update(layout.stream)
        return tuple(found[depth] for depth in sorted(found))

    @cached_property
    def branches(self) -> tuple[Place, ...]:
        """The branches, by depth k + j/m."""
        return self._union(layout.branches for layout in self._layouts.values())

    @cached_property
    def parameters(self) -> tuple[Place, ...]:
        """The parameters of this trunk's blocks; ``layer`` is the parameter's name."""
        return self._union(layout.parameters for layout in self._layouts.values())

    @cached_property
    def blocks(self) -> tuple[Place, ...]:
        """The blocks, named after the stream position at their output, depth k + 1."""
        found = {p.depth: p for p in self.stream if p.depth >= 1}
        for parameter in self.parameters:
            depth = parameter.block + 1.0
            found.setdefault(depth, Place(depth, f"{self.name}.{parameter.block}", 0))
        return tuple(found[depth] for depth in sorted(found))

    @staticmethod
    def _union(places: Iterable[tuple[Place, ...]]) -> tuple[Place, ...]:
        # Stable: places of equal depth stay in forward order.
        return tuple(sorted(dict.fromkeys(p for part in places for p in part), key=lambda p: p.depth))

    def has(self, signal: str, statistic: str) -> bool:
        """Whether any row of this trunk holds that statistic of that signal."""
        return any(
            (s, t) == (signal, statistic) for layout in self._layouts.values() for _, s, t in layout.row
        )

    def at_stream(self, signal: str, statistic: str) -> Values:
        """That statistic at the stream positions. Values [S, P].

        Of activations it is absent where the model adds a block's output to the stream by itself: it is
        of the output, and not of the stream. Their gradients are one.
        """
        values = self._read(self.stream, signal, statistic, by_depth=True)
        if signal != "activation":
            return values
        skip = self._read(self.stream, "activation", "unit_skip", by_depth=True)
        return values.without(skip.status == OUTSIDE, OUTSIDE)

    def at_branches(self, signal: str, statistic: str) -> Values:
        """That statistic of the branches' outputs. Values [S, P]."""
        return self._read(self.branches, signal, statistic)

    def of_parameters(self, signal: str, statistic: str) -> Values:
        """That statistic of every parameter. Values [S, P]."""
        return self._read(self.parameters, signal, statistic)

    def pairs(self, values: Values) -> tuple[Values, Values]:
        """The values at l and at l + 1, both placed at l; the last stream position has no next."""
        here = values.take(range(len(values.places) - 1))
        following = values.take(range(1, len(values.places))).renamed(here.places)
        apart = [b.depth != a.depth + 1 for a, b in zip(values.places, values.places[1:], strict=False)]
        gap = np.broadcast_to(np.asarray(apart, dtype=np.bool_), following.value.shape)
        return here, following.without(gap, "next position not recorded")

    def at_block_input(self, values: Values, places: Sequence[Place]) -> Values:
        """Stream values at the input h_k of the block that each of ``places`` belongs to."""
        column = {p.depth: i for i, p in enumerate(values.places)}
        missing = len(values.places)
        padded = Values(
            (*values.places, Place(math.nan, "", 0)),
            np.column_stack([values.value, np.full(len(values.value), np.nan)]),
            np.column_stack([values.status, np.full(len(values.value), NOT_RECORDED, dtype=object)]),
        )
        return padded.take([column.get(float(p.block), missing) for p in places]).renamed(places)

    def per_block(self, values: Values, *, partial: bool = True) -> Values:
        """Norm over each block's parameters, sqrt(sum of squares). Values at `blocks`.

        With ``partial``, parameters without a gradient by design (frozen, no gradient path, not
        called) are left out, and a block is absent only if all of its parameters are. Any other
        reason makes the block absent; so does every reason without ``partial``. A parameter whose depth
        changed during the run, as where a branch lost its skip, counts where it is recorded.
        """
        shape = (len(self.steps), len(self.blocks))
        value, status = np.full(shape, np.nan), np.full(shape, NO_PARAMETERS, dtype=object)
        for column, block in enumerate(self.blocks):
            inside = [i for i, p in enumerate(values.places) if p.block + 1 == block.depth]
            if not inside:
                continue
            words = values.status[:, inside]
            present = np.asarray(words == OK, dtype=np.bool_)
            skipped = np.isin(words.astype(str), WITHOUT_GRADIENT) & partial
            skipped |= _elsewhere(words, [values.places[i].layer for i in inside])
            blocking = ~present & ~skipped
            status[:, column] = np.where(present.any(1), OK, words[:, 0])
            bad = blocking.any(1)
            status[bad, column] = words[bad, blocking[bad].argmax(1)]
            total = norm(np.where(present, values.value[:, inside], 0.0))
            value[:, column] = np.where(status[:, column] == OK, total, np.nan)
        return Values(self.blocks, value, status)

    def _read(
        self, places: tuple[Place, ...], signal: str, statistic: str, *, by_depth: bool = False
    ) -> Values:
        value = np.full((len(self.steps), len(places)), np.nan)
        status = np.full(value.shape, NOT_RECORDED, dtype=object)
        found: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        for key, layout in self._layouts.items():
            pairs = [
                (i, layout.row.get((layout.stream.get(p.depth, p) if by_depth else p, signal, statistic)))
                for i, p in enumerate(places)
            ]
            hits = [(i, row) for i, row in pairs if row is not None]
            found[key] = (
                np.asarray([i for i, _ in hits], dtype=np.int64),
                np.asarray([row for _, row in hits], dtype=np.int64),
            )
        for s, step in enumerate(self.steps):
            columns, rows = found[id(step.rows)]
            value[s, columns] = step.value[rows]
            status[s, columns] = np.asarray(step.statuses, dtype=object)[step.status[rows]]
        return Values(places, value, status)
