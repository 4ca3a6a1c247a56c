"""From the samples of one step to its rows: statuses, depths, pooling over micro-batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from gradscope.collect import shards
from gradscope.collect.merging import COLUMNS, TO_NEXT, Samples, merged
from gradscope.collect.parameter_rows import ParameterRows, place_of
from gradscope.collect.parameters import Parameters, Readings
from gradscope.collect.passes import LAST, PAIR, Call, Pass, Slot
from gradscope.collect.places import Places, added_outputs, changing_successors, following_in, places_of
from gradscope.collect.schedule import Schedule
from gradscope.collect.traced import COMPILED, settle
from gradscope.layers import Layer
from gradscope.record import OUTSIDE, STATISTICS, Rows, Step
from gradscope.record.steps import coded
from gradscope.statistics import ACTIVATION, EMPTY, GRADIENT, NO_DIRECTION, SLOW_PAIR, Values, pool

__all__ = ["Assembler"]

_A: Final = len(ACTIVATION)
#: By how many factors of the loss's scale a gradient's statistic is scaled.
_POWER: Final = tuple({"signal": 1, "signal^2": 2}.get(STATISTICS[n].unit, 0) for n in GRADIENT)
_STREAM_COLUMN: Final = np.array([STATISTICS[n].where == "stream" for _, n in COLUMNS])
_AXIS_COLUMN: Final = np.array([STATISTICS[n].where == "axis" for _, n in COLUMNS])
_DIRECTIONS: Final = tuple(i for i, n in enumerate(ACTIVATION) if STATISTICS[n].directions)
_FLOATS: Final = {float}
# What of activations relates a stream position to the next one, and what else is of the stream alone.
_PAIRS: Final = np.array([s == "activation" and n in (*PAIR, *SLOW_PAIR) for s, n in COLUMNS])
_ALONE: Final = ~_PAIRS & _STREAM_COLUMN & np.array([s == "activation" for s, _ in COLUMNS])
_SUCCESSORS: Final = "not supported: not the same two positions in every micro-batch"
_SOMETIMES: Final = "not supported: a gradient in some micro-batches only"
_UNIT_SKIP: Final = ACTIVATION.index("unit_skip")


@dataclass(slots=True)
class Assembler:
    """Turns the passes of a step into a `Step`; keeps the last row table to share it.

    Attributes:
        layers: the watched layers.
        trunks: their trunks' names, in the order that negative sites count them.
        parameters: the model's parameters.
        wanted: the chosen statistics.
        verified: for each branch site, whether the graph showed that its output is added.
        added: for each call of a block, whether it showed that of the block's own output.
        cadence: when what is recorded.
        compiled: sites inside a compiled module, which no hook can see.
        scripted: sites of modules of TorchScript's.
        reached: whether a gradient ever came out of a compiled graph.
        identity: what must be the same on all ranks, so that their values can be put side by side.
    """

    layers: Sequence[Layer]
    trunks: tuple[str, ...]
    parameters: Parameters
    wanted: frozenset[str]
    update: bool
    cadence: Schedule
    verified: dict[int, bool] = field(default_factory=dict)
    added: dict[tuple[int, int], bool] = field(default_factory=dict)
    compiled: frozenset[int] = frozenset()
    scripted: frozenset[int] = frozenset()
    reached: bool = False
    identity: str = ""
    _signature: Any = None
    _rows: Rows | None = None
    _take: np.ndarray | None = None
    _laid_out: tuple[Any, list[tuple[int, int]], Places] | None = None
    _kept: list[tuple[np.ndarray, np.ndarray, tuple[str, ...]]] = field(default_factory=list)
    _parameter_rows: ParameterRows = field(init=False)

    def __post_init__(self) -> None:
        layers = [(x.name, x.type, x.trunk, x.block) for x in self.layers]
        names = [entry.name for entry in self.parameters.entries]
        same = (layers, names, sorted(self.wanted), self.update, self.cadence)
        self.identity = hashlib.sha256(repr(same).encode()).hexdigest()[:16]
        self._parameter_rows = ParameterRows(self.parameters, self.wanted, update=self.update)

    def step(
        self,
        samples: Samples,
        *,
        refusal: str | None = None,
        parameters_too: bool = True,
        **fields: Any,
    ) -> Step:
        """One `Step` of the Record.

        Args:
            samples: of this rank, or of all.
            refusal: a reason for which no value is right.
            parameters_too: whether those of parameters are not, either.
            **fields: of the step.
        """
        signature = (samples.keys, samples.places)  # as mappings: layers left out change the order only
        if signature != self._signature:
            self._signature = signature
            self._rows, self._take = self._table(*signature)
        assert self._rows is not None and self._take is not None
        values = np.concatenate([samples.value.reshape(-1)[self._take], samples.parameter_value])
        words = np.concatenate([samples.why.reshape(-1)[self._take], samples.parameter_why])
        if refusal is not None:
            words[: None if parameters_too else len(self._take)] = refusal
        fields.setdefault("loss", samples.loss)
        if samples.scale is not None:
            fields.setdefault("loss_scale", samples.scale)
        status, statuses = self._statuses(words)
        return Step.coded(self._rows, values, status, statuses, **fields)

    def samples(self, passes: Sequence[Pass], readings: Readings | None, *, skipped: bool) -> Samples:
        """The values of one step on this rank. The passes' samples are pooled as one batch."""
        readings = Readings() if readings is None else readings
        _to_host(passes, readings)
        for p in passes:
            self.reached = settle(p, self.layers) or self.reached
        keys, places = self._layout(passes)
        value, why = self._samples(keys, passes)
        apart = np.ix_(changing_successors(keys, passes), TO_NEXT)
        why[apart] = np.where(why[apart] == "", _SUCCESSORS, why[apart])
        pairs, outputs = added_outputs(keys, passes, self.added)
        why[np.ix_(pairs, _PAIRS)] = why[np.ix_(outputs, _ALONE)] = OUTSIDE
        parameter_value, parameter_why = self._parameter_rows.values(readings)
        if skipped:
            # An overflow: the optimizer took no step, and the gradients are no one's gradients.
            why[:, _A:] = "skipped step"
            parameter_why[self._parameter_rows.of_step] = "skipped step"
        losses = [float(p.loss) for p in passes if p.loss is not None]
        return Samples(
            keys=keys,
            places=places,
            value=value,
            why=why,
            parameter_value=parameter_value,
            parameter_why=parameter_why,
            loss=sum(losses) / len(losses) if losses else None,
            scale=None if readings.scale is None else float(readings.scale),
        )

    def for_other_ranks(
        self, samples: Samples, passes: Sequence[Pass], ranks: tuple[int, ...]
    ) -> Samples:
        """The same with what these ranks must know to put theirs beside it."""
        held = [shards.copies(entry.tensor(), ranks) for entry in self.parameters.entries]
        following: dict[tuple[int, int], tuple[int, int]] = {}
        for p in passes:
            following = {**following_in(p), **following}
        copies = np.array([held[i] for i, _, _ in self._parameter_rows.rows], dtype=np.int64)
        return replace(samples, copies=copies, following=following, identity=self.identity)

    def merged(self, ranks: Sequence[Samples]) -> Samples:
        """The samples of all ranks as those of one batch."""
        return merged(ranks, self._parameter_rows.norms, self._parameter_rows.sums)

    def _statuses(self, words: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """The statuses as numbers and their words; most steps have those of an earlier one."""
        for kept in self._kept:
            if np.array_equal(kept[0], words):
                return kept[1], kept[2]
        status, statuses = coded(words)
        # Steps with and without slow statistics take turns.
        self._kept = [*self._kept[-1:], (words, status, statuses)]
        return status, statuses

    # -- layers --------------------------------------------------------------------------------

    def _layout(self, passes: Sequence[Pass]) -> tuple[list[tuple[int, int]], Places]:
        """The (site, call) pairs in row order, and their places; most steps have those of the last."""
        # Lists of numbers: a tuple for each call would have the garbage collector look at all of them.
        calls = [x for p in passes for c in p.calls for x in (c.site, c.index, c.block_call)]
        trunks = [(t, state.calls) for p in passes for t, state in p.trunks.items()]
        stream = [x for _, of_trunk in trunks for c in of_trunk for x in (c.site, c.index)]
        names = [(t, len(of_trunk)) for t, of_trunk in trunks]
        sizes = [(len(p.calls), len(p.trunks)) for p in passes]
        shape = (calls, stream, names, sizes, [dict(p.counts) for p in passes], dict(self.verified))
        if self._laid_out is None or self._laid_out[0] != shape:
            places = places_of(passes, self.layers, self.trunks, self.verified)
            self._laid_out = (shape, self._keys(passes), places)
        return self._laid_out[1:]

    def _keys(self, passes: Sequence[Pass]) -> list[tuple[int, int]]:
        """(site, call) pairs in row order."""
        keys: list[tuple[int, int]] = []
        for t in range(len(self.trunks)):
            if any(p.trunks.get(self.trunks[t]) for p in passes):
                keys.append((-1 - t, 0))
        for site in range(len(self.layers)):
            count = max((p.counts.get(site, 0) for p in passes), default=0)
            keys += [(site, index) for index in range(max(count, 1))]
        return keys

    def _samples(
        self, keys: list[tuple[int, int]], passes: Sequence[Pass]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values [keys, columns] and statuses ("" for ok) of the same shape."""
        value = np.full((len(passes), len(keys), len(COLUMNS)), np.nan)
        why = np.full((len(keys), len(COLUMNS)), "", dtype=object)
        calls: dict[tuple[int, int], list[Call | None]] = {key: [None] * len(passes) for key in keys}
        for n, p in enumerate(passes):
            for call in p.calls:
                calls[call.site, call.index][n] = call
        for k, ((site, _), of_key) in enumerate(calls.items()):
            done = False
            parts = _with_elements(of_key)
            reached = any(slot is not None and slot.gradient is not None for _, _, slot in parts)
            for n, call, slot in parts:
                error = call.error or passes[n].error
                if slot is None or error:
                    why[k, :] = error or "not supported: no floating-point output"
                    done = True
                    continue
                done = True
                value[n, k, :_A] = slot.values
                for column, reason in slot.absent.items():
                    why[k, column] = reason
                for column in _DIRECTIONS:
                    if slot.values[column] == NO_DIRECTION:
                        why[k, column] = "zero token"
                if slot.stream:
                    if call.unit_skip:
                        value[n, k, _UNIT_SKIP] = 1.0
                    elif slot.traced is not None:
                        why[k, _UNIT_SKIP] = COMPILED
                    elif slot.successor is not None:
                        why[k, _UNIT_SKIP] = (
                            "no unit skip"
                            if call.unit_skip is False
                            else "not supported: the graph between the positions is not visible"
                        )
                    else:
                        why[k, _UNIT_SKIP] = LAST
                reason = (
                    slot.error
                    if slot.error
                    else "not supported: several backward passes through one forward"
                    if slot.repeated
                    else _SOMETIMES
                    if slot.gradient is None and reached
                    else "no gradient path"
                    if slot.gradient is None
                    else ""
                )
                if slot is not call.slots[0]:
                    # What relates to the stream was taken from the first output.
                    related = _STREAM_COLUMN | _AXIS_COLUMN
                    why[k, related] = "not supported: the gradient came through another output"
                if reason:
                    why[k, _A:] = reason
                elif slot.gradient is not None:
                    value[n, k, _A:] = _unscaled(slot.gradient, passes[n].scale)
                    for column, reason in (slot.gradient_absent or {}).items():
                        why[k, _A + column] = reason
            if not done:
                why[k, :] = (
                    COMPILED
                    if site in self.compiled
                    else "not supported: a module of TorchScript"
                    if site in self.scripted
                    else "not called"
                )
        if len(passes) == 1:
            return value[0], why
        a = pool(ACTIVATION, value[..., :_A])
        g = pool(GRADIENT, value[..., _A:])
        return np.concatenate([a, g], axis=-1), why

    def _table(self, keys: list[tuple[int, int]], places: Places) -> tuple[Rows, np.ndarray]:
        entries: list[tuple[str, float, str, str, int, str, str]] = []
        take: list[int] = []
        for k, (site, index) in enumerate(keys):
            trunk, depth = places.get((site, index), ("", math.nan))
            if site < 0:
                first = next(x.name for x in self.layers if x.is_block and x.trunk == trunk)
                name, kind, stream = first, "Stream", True
            else:
                layer = self.layers[site]
                name, kind, stream = layer.name, layer.type, layer.is_block
            left_out = np.zeros_like(_AXIS_COLUMN) if stream else _STREAM_COLUMN
            if not stream and not (trunk and self.layers[site].branch is not None):
                left_out = _STREAM_COLUMN | _AXIS_COLUMN
            for column, (signal, statistic) in enumerate(COLUMNS):
                if statistic in self.wanted and not left_out[column]:
                    entries.append((trunk, depth, name, kind, index, signal, statistic))
                    take.append(k * len(COLUMNS) + column)
        sites = {x.name: s for s, x in enumerate(self.layers)}
        sites |= {part: s for s, x in enumerate(self.layers) for part in x.parts}
        at = [place_of(entry.owner, sites, places) for entry in self.parameters.entries]
        for i, signal, statistic in self._parameter_rows.rows:
            name = self.parameters.entries[i].name
            entries.append((*at[i], name, "Parameter", 0, signal, statistic))
        return Rows.of(entries), np.asarray(take, dtype=np.int64)


def _with_elements(calls: Sequence[Call | None]) -> list[tuple[int, Call, Slot | None]]:
    """The calls of the micro-batches with their primary slots; without the empty ones, where not all are.

    An expert that no token of a micro-batch went to takes no part in what the others say.
    """
    found = [(n, call, call.primary()) for n, call in enumerate(calls) if call is not None]
    return [x for x in found if x[2] is None or x[2].absent.get(0) != EMPTY] or found


def _unscaled(gradient: Values, scale: Tensor | float | None) -> list[float]:
    if scale is None:
        return gradient  # type: ignore[return-value]
    by = float(scale)
    return [
        float(v) / by / by if power == 2 else float(v) / by if power else float(v)
        for power, v in zip(_POWER, gradient, strict=True)
    ]


def _to_host(passes: Sequence[Pass], readings: Readings) -> None:
    """Replace every device scalar by its float, with one copy per device."""
    waiting: dict[torch.device, list[tuple[Any, Any, Tensor]]] = {}

    def look(holder: Any, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            if type(value) is not float and isinstance(value, Tensor):
                waiting.setdefault(value.device, []).append((holder, key, value))

    def look_at(values: Values) -> None:
        if type(values) is list and set(map(type, values)) != _FLOATS:
            look(values, enumerate(values))

    for p in passes:
        look(p, (("loss", p.loss), ("scale", p.scale)))
        for call in p.calls:
            for slot in call.slots:
                if slot.source is not None:
                    look(slot, (("traced", slot.traced), ("traced_gradient", slot.traced_gradient)))
                look_at(slot.values)
                if slot.gradient is not None:
                    look_at(slot.gradient)
    look(readings, (("scale", readings.scale),))
    for column in readings.gradient.values():
        look_at(column)
    for found in (readings.at_step, readings.weight, readings.update):
        look(found, found.items())
    for group in waiting.values():
        flat = torch.cat([value.detach().double().reshape(-1) for _, _, value in group]).tolist()
        numbers = iter(flat)
        for holder, key, value in group:
            number: Any = next(numbers) if not value.dim() else list(islice(numbers, value.numel()))
            if value.dim() > 1:  # what a compiled graph has written
                width = value.shape[-1]
                number = [number[i : i + width] for i in range(0, len(number), width)]
            if isinstance(holder, list | dict):
                holder[key] = number
            else:
                setattr(holder, key, number)
