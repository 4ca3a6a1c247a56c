"""The numbers of two Records that belong together: matched by layer and depth, in nats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradscope.analysis.history import History, history
from gradscope.analysis.trunk import Trunk
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["Feature", "Pair", "pairs_of", "trunks_of"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Feature(NamedTuple):
    """One compared number per step and replicate.

    Attributes:
        quantity: ``activation``, ``peak``, ``flow`` or ``parameter gradient``.
        kind: ``level``, ``increment``, ``ratio``, or ``state`` where there is a number on one side only.
        trunk: the trunk's name in the record.
        layer: the layer's name in the record; of an increment, the block that it is over.
        depth: its depth.
    """

    quantity: str
    kind: str
    trunk: str
    layer: str
    depth: float


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One quantity of one Record at the matched positions."""

    history: History
    at: Indices

    def rows(self, step: int) -> tuple[Floats, list[list[str]]]:
        """[R, P] nats (NaN where there is no logarithm) and the state of every position."""
        rows = np.flatnonzero(self.history.steps == step)
        value, ok = self.history.value[rows][:, self.at], self.history.ok[rows][:, self.at]
        usable = ok & np.isfinite(value) & (value > 0)
        nats = np.where(usable, np.log(np.where(usable, value, 1.0)), np.nan)
        status = self.history.status[rows][:, self.at]
        words = np.where(
            usable, "a number", np.where(ok, np.where(value == 0, "exactly 0", "not finite"), status)
        )
        return nats, words.tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One quantity of one trunk in both Records.

    Attributes:
        name: the quantity.
        trunk: the trunk's name in the record.
        run: the record.
        base: the baseline, at the same positions.
        adjacent: [P − 1], whether two neighbouring positions are neighbours on both sides.
        renamed: old → new names.
        added: layers of the record only.
        removed: layers of the baseline only.
        output: of parameter gradients: √n·‖δ‖₂ at the same depths on both sides, of n positions.
    """

    name: str
    trunk: str
    run: _Side
    base: _Side
    adjacent: npt.NDArray[np.bool_]
    renamed: dict[str, str]
    added: list[str]
    removed: list[str]
    output: tuple[_Side, _Side] | None = None

    @property
    def layers(self) -> list[str]:
        """[P] names in the record."""
        return [self.run.history.layers[i] for i in self.run.at]

    @property
    def depth(self) -> list[float]:
        """[P] depths in the record."""
        return self.run.history.depth[self.run.at].tolist()

    @property
    def absolute(self) -> bool:
        """Whether levels may be compared."""
        return "relative" not in (self.run.history.unit, self.base.history.unit)

    def features(self, step: int) -> Iterator[tuple[Feature, Floats, Floats]]:
        """Every feature with its values in the record and in the baseline, one per replicate."""
        run, base = self.run.rows(step)[0], self.base.rows(step)[0]
        layers, depth = self.layers, self.depth

        def one(kind: str, i: int, x: Floats, y: Floats) -> tuple[Feature, Floats, Floats]:
            return Feature(self.name, kind, self.trunk, layers[i], depth[i]), x, y

        if self.name == "peak":
            for i in range(len(layers)):
                yield one("level", i, run[:, i], base[:, i])
        elif self.name == "parameter gradient":
            assert self.output is not None
            run, base = run - self.output[0].rows(step)[0], base - self.output[1].rows(step)[0]
            for i in range(len(layers)):
                yield one("ratio", i, run[:, i], base[:, i])
        else:
            end = 0 if self.name == "activation" else len(layers) - 1
            if self.absolute:
                yield one("level", end, run[:, end], base[:, end])
            sign = 1.0 if self.name == "activation" else -1.0
            for i in np.flatnonzero(self.adjacent).tolist():
                rise = [sign * (side[:, i + 1] - side[:, i]) for side in (run, base)]
                yield one("increment", i + 1, rise[0], rise[1])

    def states(self, step: int) -> Iterator[tuple[Feature, str, str]]:
        """Positions whose state is the same in all replicates of each side, and differs between them."""
        words = [
            [set(column) for column in zip(*s.rows(step)[1], strict=True)] for s in (self.run, self.base)
        ]
        for i, (mine, theirs) in enumerate(zip(*words, strict=True)):
            if len(mine) == len(theirs) == 1 and mine != theirs:
                feature = Feature(self.name, "state", self.trunk, self.layers[i], self.depth[i])
                yield feature, next(iter(theirs)), next(iter(mine))


def trunks_of(run: Record, base: Record) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Trunks of both, by name or because each has one; those of the record only; of the baseline only.

    Raises:
        QuantityError: they have none in common.
    """
    common = [(t, t) for t in run.trunks if t in base.trunks]
    if not common and len(run.trunks) == len(base.trunks) == 1:
        return [(run.trunks[0], base.trunks[0])], [], []
    if not common:
        raise QuantityError(
            f"the two Records have no trunk in common: {', '.join(run.trunks) or 'none'} against "
            f"{', '.join(base.trunks) or 'none'}."
        )
    return (
        common,
        [t for t in run.trunks if t not in base.trunks],
        [t for t in base.trunks if t not in run.trunks],
    )


def pairs_of(run: Record, base: Record, mine: str, theirs: str, *, with_peak: bool) -> list[Pair]:
    """Every quantity that both have of a trunk.

    Args:
        run: the record.
        base: the baseline.
        mine: the trunk's name in the record.
        theirs: in the baseline.
        with_peak: also the largest activation over the root mean square.
    """
    quantities = {"activation": "act_rms", "flow": "grad_l2", "parameter gradient": "param_grad"}
    if with_peak:
        quantities["peak"] = "max_to_rms"
    found: dict[str, Pair] = {}
    for name, quantity in quantities.items():
        try:
            both = history(run, quantity, trunk=mine), history(base, quantity, trunk=theirs)
        except QuantityError:
            continue  # one of them did not record it
        at, renamed, added, removed = _matched(*both)
        if not len(at):
            continue
        adjacent = np.all(np.diff(at, axis=0) == 1, axis=1)
        sides = _Side(both[0], at[:, 0]), _Side(both[1], at[:, 1])
        output = None
        if name == "parameter gradient":
            at_output = _flow_at(found.get("flow"), sides[0].history.depth[sides[0].at])
            if at_output is None:
                continue
            output = _raw(at_output[0], run), _raw(at_output[1], base)
        found[name] = Pair(name, mine, *sides, adjacent, renamed, added, removed, output)
    return list(found.values())


def _flow_at(flow: Pair | None, depths: Floats) -> tuple[_Side, _Side] | None:
    """The flow at these depths on both sides, or None where it is not known at all of them."""
    if flow is None:
        return None
    place = {depth: i for i, depth in enumerate(flow.depth)}
    if any(depth not in place for depth in depths.tolist()):
        return None
    at = [place[depth] for depth in depths.tolist()]
    return _Side(flow.run.history, flow.run.at[at]), _Side(flow.base.history, flow.base.at[at])


def _raw(flow: _Side, record: Record) -> _Side:
    """√n·‖δ‖₂ where the flow is N·‖δ‖₂/√n.

    A parameter's gradient is a sum over the n positions, and is divided by the loss's denominator N like
    δ is: over this, it depends neither on N nor on the size of the batch.
    """
    tokens = Trunk(record, flow.history.trunk).at_stream("output_grad", "tokens").value
    denominator = record.header.get("loss_denominator")
    value = flow.history.value * tokens / (1.0 if denominator is None else float(denominator))
    return _Side(replace(flow.history, value=value), flow.at)


def _matched(run: History, base: History) -> tuple[Indices, dict[str, str], list[str], list[str]]:
    """[P, 2] indices of the same positions; old → new names; layers of one side only.

    By name and call; what is left on both sides by depth. Equally many at the same depths are matched by
    depth, whatever their names.
    """
    keys = [_with_calls(side.layers) for side in (run, base)]
    if len(keys[0]) == len(keys[1]) and np.array_equal(run.depth, base.depth):
        renamed = {b: a for a, b in zip(run.layers, base.layers, strict=True) if a != b}
        index = np.arange(len(keys[0]))
        return np.stack([index, index], axis=1), renamed, [], []
    place = {key: i for i, key in enumerate(keys[1])}
    at = {i: place[key] for i, key in enumerate(keys[0]) if key in place}
    free = [i for i in range(len(keys[1])) if i not in set(at.values())]
    by_depth = {float(base.depth[i]): i for i in free}
    renamed: dict[str, str] = {}
    for i in range(len(keys[0])):
        if i not in at and float(run.depth[i]) in by_depth:
            at[i] = by_depth.pop(float(run.depth[i]))
            renamed[base.layers[at[i]]] = run.layers[i]
    added = [key[0] for i, key in enumerate(keys[0]) if i not in at]
    removed = [key[0] for i, key in enumerate(keys[1]) if i not in set(at.values())]
    return np.asarray(sorted(at.items()), dtype=np.int64).reshape(-1, 2), renamed, added, removed


def _with_calls(names: tuple[str, ...]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    keys: list[tuple[str, int]] = []
    for name in names:
        keys.append((name, counts.get(name, 0)))
        counts[name] = counts.get(name, 0) + 1
    return keys
