"""A Record as health rules read it: every statistic as an array over steps and layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gradscope.analysis.trunk import NOT_RECORDED, OK, Trunk
from gradscope.record import Record, Step

__all__ = ["NO_AXIS", "Grid", "Site", "View", "spans"]

#: What rules say that need a depth axis.
NO_AXIS: Final = (
    'no depth axis: no trunk of repeated blocks was found; say which layers are the blocks: layers="….*"'
)

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Entry = tuple[str, float, str, str, int]


class Site(NamedTuple):
    """What a value belongs to: one call of a module, or a parameter."""

    trunk: str
    depth: float
    layer: str
    type: str
    call: int

    @property
    def name(self) -> str:
        """How a finding calls it."""
        if self.type == "Stream":
            return f"input of {self.layer}"
        return f"{self.layer or '(model)'}{f' call {self.call}' if self.call else ''}"

    @property
    def owner(self) -> str:
        """Of a parameter, the module that holds it."""
        return self.layer.rpartition(".")[0]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """One statistic of one signal over all steps.

    Attributes:
        sites: the P places; modules in the order of the forward pass.
        value: [S, P]; NaN where absent (or measured NaN).
        ok: [S, P], where a value was measured; it may be NaN, infinite or exactly 0.
    """

    sites: tuple[Site, ...]
    value: Floats
    ok: Mask

    def take(self, at: Sequence[int]) -> Grid:
        """The columns ``at``."""
        return Grid(tuple(self.sites[i] for i in at), self.value[:, at], self.ok[:, at])


class View:
    """A Record, arranged for rules.

    Attributes:
        record: the Record.
        steps: its S entries, by step, then replicate.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.steps: tuple[Step, ...] = tuple(
            sorted(record.steps, key=lambda step: (step.step, step.replicate))
        )
        self._tables = {id(step.rows): step.rows for step in self.steps}
        self._grids: dict[tuple[str, str], Grid] = {}
        self._words: dict[tuple[str, str], npt.NDArray[np.object_]] = {}
        self._trunks: dict[str, Trunk] = {}

    # -- steps ---------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> tuple[npt.NDArray[np.int64], ...]:
        """For each replicate, the rows of its steps in time."""
        numbers = np.asarray([step.replicate for step in self.steps], dtype=np.int64)
        return tuple(np.flatnonzero(numbers == r) for r in dict.fromkeys(numbers.tolist()))

    @cached_property
    def step_numbers(self) -> npt.NDArray[np.int64]:
        """[S] step numbers."""
        return np.asarray([step.step for step in self.steps], dtype=np.int64)

    @cached_property
    def loss(self) -> Floats:
        """[S] losses; NaN where not known."""
        return np.asarray([math.nan if s.loss is None else s.loss for s in self.steps], np.float64)

    @cached_property
    def loss_scale(self) -> Floats:
        """[S] factor of the gradient scaler; NaN where none was seen."""
        return np.asarray(
            [math.nan if s.loss_scale is None else s.loss_scale for s in self.steps], np.float64
        )

    @cached_property
    def learning_rate(self) -> Floats:
        """[S] learning rates, the largest over parameter groups; NaN where not known."""
        rates = [s.learning_rate for s in self.steps]
        return np.asarray(
            [math.nan if r is None else max(r) if isinstance(r, tuple) else r for r in rates], np.float64
        )

    def span(self, rows: Iterable[int]) -> tuple[int, int]:
        """Step numbers of the first and the last of some rows."""
        numbers = [self.steps[i].step for i in rows]
        return min(numbers), max(numbers)

    # -- values --------------------------------------------------------------------------------

    @property
    def trunks(self) -> tuple[str, ...]:
        """Names of the trunks."""
        return self.record.trunks

    def trunk(self, name: str) -> Trunk:
        """One trunk as arrays over depth."""
        if name not in self._trunks:
            self._trunks[name] = Trunk(self.record, name)
        return self._trunks[name]

    def grid(self, signal: str, statistic: str) -> Grid:
        """One statistic of one signal. Modules for activations and their gradients, else parameters."""
        key = (signal, statistic)
        if key not in self._grids:
            self._grids[key], self._words[key] = self._read(signal, statistic)
        return self._grids[key]

    def words(self, signal: str, statistic: str) -> npt.NDArray[np.object_]:
        """[S, P] the status of each value of `grid`: ``ok``, why it is absent, or ``not recorded``."""
        self.grid(signal, statistic)
        return self._words[signal, statistic]

    def has(self, signal: str, statistic: str) -> bool:
        """Whether there is any measured value of it."""
        return bool(self.grid(signal, statistic).ok.any())

    def why_absent(self, signal: str, statistic: str) -> str:
        """Why there is none, in words."""
        kind = self.record.header.get("replicates", "run")
        if signal == "update" and kind != "run":
            return "a measurement makes no updates; gradscope.watch sees those of a training run"
        words: dict[str, None] = {}
        for step in self.steps:
            rows = self._rows(id(step.rows), signal, statistic)
            words.update(dict.fromkeys(str(word) for word in step.words()[list(rows.values())]))
        found = ", ".join(word for word in words if word != "ok")
        return f"no {statistic} of {signal.replace('_', ' ')} in the Record" + (
            f" ({found})" if found else ", statistics= or layers= left it out"
        )

    @cached_property
    def modules(self) -> tuple[Site, ...]:
        """Every call of every watched module, in the order in which the forward pass ends them."""
        found: dict[Site, None] = {}
        for rows in self._tables.values():
            for entry in rows.entries():
                if entry[3] != "Parameter":
                    found[Site(*_key(entry[:5]))] = None
        return _in_forward_order(tuple(found))

    @cached_property
    def parameters(self) -> tuple[Site, ...]:
        """Every parameter."""
        found: dict[Site, None] = {}
        for rows in self._tables.values():
            for entry in rows.entries():
                if entry[3] == "Parameter":
                    found[Site(*_key(entry[:5]))] = None
        return tuple(found)

    @cached_property
    def _index(self) -> dict[tuple[int, str, str], dict[Site, int]]:
        index: dict[tuple[int, str, str], dict[Site, int]] = {}
        for key, rows in self._tables.items():
            for i, entry in enumerate(rows.entries()):
                index.setdefault((key, entry[5], entry[6]), {})[Site(*_key(entry[:5]))] = i
        return index

    def _rows(self, table: int, signal: str, statistic: str) -> dict[Site, int]:
        return self._index.get((table, signal, statistic), {})

    def _read(self, signal: str, statistic: str) -> tuple[Grid, npt.NDArray[np.object_]]:
        sites = self.modules if signal in ("activation", "output_grad") else self.parameters
        held = {s for key in self._tables for s in self._rows(key, signal, statistic)}
        sites = tuple(site for site in sites if site in held)
        column = {site: i for i, site in enumerate(sites)}
        value = np.full((len(self.steps), len(sites)), np.nan)
        words = np.full(value.shape, NOT_RECORDED, dtype=object)
        where: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        for key in self._tables:
            rows = self._rows(key, signal, statistic)
            where[key] = (
                np.asarray([column[site] for site in rows], dtype=np.int64),
                np.asarray(list(rows.values()), dtype=np.int64),
            )
        for s, step in enumerate(self.steps):
            columns, rows = where[id(step.rows)]
            value[s, columns] = step.value[rows]
            words[s, columns] = np.asarray(step.statuses, dtype=object)[step.status[rows]]
        return Grid(sites, value, np.asarray(words == OK, dtype=np.bool_)), words


def _key(entry: Entry) -> Entry:
    # NaN is not equal to itself, and a site must be: one NaN object for all.
    trunk, depth, layer, kind, call = entry
    return trunk, math.nan if depth != depth else depth, layer, kind, call


def _in_forward_order(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """A module ends after those inside it; siblings in the order of depth, else of definition.

    The Record lists modules in the order of definition, which is that of the forward pass in most
    models. Where two siblings have a depth it is known, and they take each other's places.
    """
    first: dict[str, int] = {}
    depth: dict[str, float] = {}
    for i, site in enumerate(sites):
        if site.type == "Stream":  # stands first in a Record, before what makes it
            continue
        path = site.layer
        while True:  # a container's place is that of its first module
            first.setdefault(path, i)
            if site.depth == site.depth:
                depth[path] = min(depth.get(path, math.inf), site.depth)
            if not path:
                break
            path = path.rpartition(".")[0]
    children: dict[str, list[str]] = {}
    for path in sorted(first, key=first.__getitem__):
        if path:
            children.setdefault(path.rpartition(".")[0], []).append(path)
    rank: dict[str, int] = {}

    def visit(path: str) -> None:
        below = children.get(path, [])
        places = [i for i, child in enumerate(below) if child in depth]
        ordered = sorted((below[i] for i in places), key=depth.__getitem__)
        for i, child in zip(places, ordered, strict=True):
            below[i] = child
        for child in below:
            visit(child)
        rank[path] = len(rank)

    visit("")

    def order(site: Site) -> tuple[float, int, int]:
        # A trunk's input comes before anything inside its first block.
        if site.type == "Stream":
            inside = [at for path, at in rank.items() if f"{path}.".startswith(f"{site.layer}.")]
            return min(inside, default=0) - 0.5, 0, 0
        return rank[site.layer], site.call, 1

    ordered = sorted(sites, key=order)
    # A block that is called again has a depth per call: along a trunk, depth is the order in time.
    for trunk in dict.fromkeys(site.trunk for site in ordered if site.trunk):
        places = [i for i, site in enumerate(ordered) if site.trunk == trunk and site.depth == site.depth]
        by_depth = sorted((ordered[i] for i in places), key=lambda site: site.depth)
        for i, site in zip(places, by_depth, strict=True):
            ordered[i] = site
    return tuple(ordered)


def spans(names: Sequence[str], most: int = 4) -> str:
    """Names in short: the first few and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
