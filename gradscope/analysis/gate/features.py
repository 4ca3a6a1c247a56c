"""The quantities that a gradient baseline holds, one number per layer and replicate, in nats.

Levels along the depth are correlated (.90 to .99 between neighbours) and their increments are not, so
increments are what is tested. With g_l = ‖δ_l‖ the norm of the gradient at stream position l, h_l the
stream there and W a parameter:

============== ================================================ ============================
kind           value                                            one per
============== ================================================ ============================
``flow``       ln g_k − ln g_{k+1}                              block k
``act``        ln v_{k+1} − ln v_k, v the token variance        block k
``upd``        ln ‖h_{k+1} − h_k‖ − ln ‖h_k‖                    block k
``gup``        ln ‖δ_k − δ_{k+1}‖ − ln ‖δ_{k+1}‖                block k
``endpoint``   ln g_L and ln v_0                                trunk
``delta``      ln g_0 − ln g_L                                  trunk
``param_grad`` ln ‖∇W‖ − ln g at the output of W's block        parameter (packed QKV: third)
``rms``        ln RMS(W)                                        parameter
``mean``       mean over the blocks of one of these             kind, and parameter role
============== ================================================ ============================

A value that is exactly zero by construction is −inf here, what does not exist is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.trunk import Trunk
from gradscope.analysis.view import Site, View
from gradscope.record import Record

__all__ = ["KINDS", "LEAST_LAYERS", "Feature", "Features", "read_features", "role_of"]

Floats = npt.NDArray[np.float64]

#: Every kind, in the order of the tables.
KINDS: Final = ("flow", "act", "upd", "gup", "endpoint", "delta", "param_grad", "rms", "mean")

#: Roles with fewer layers have no mean over blocks.
LEAST_LAYERS: Final = 4

#: A gradient so much smaller than that of the weight beside it, in units of the dtype's epsilon, is
#: what rounding leaves of an exact zero (a key's bias, a bias in front of a norm): its logarithm says
#: nothing.
_ROUNDING_EPSILONS: Final = 256.0
_EPSILON: Final = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_LARGEST_ROUNDING: Final = 0.05


@dataclass(frozen=True, slots=True)
class Feature:
    """What one number is about.

    Attributes:
        kind: one of `KINDS`.
        layer: a block, a parameter (with ``[query]``, ``[key]`` or ``[value]`` for a third of a packed
            one), a trunk, or a role for ``mean``.
        role: what it has in common with others that lie at other depths; the variance is moderated by
            those.
        block: index of the block in ``Features.blocks``; −1 for none.
    """

    kind: str
    layer: str
    role: str
    block: int = -1

    @property
    def name(self) -> str:
        """Kind and layer, unique in a baseline."""
        return f"{self.kind} {self.layer}"


def role_of(kind: str, layer: str, block: str) -> str:
    """What a feature has in common with those of other blocks: its name with the block's number left out.

    >>> role_of("rms", "blocks.3.query.weight", "blocks.3"), role_of("flow", "blocks.3", "blocks.3")
    ('rms blocks.*.query.weight', 'flow blocks.*')
    """
    block = block.partition(" call ")[0]
    own = layer.partition(" call ")[0]
    if not block or not own.startswith(block):
        return f"{kind} {layer}"
    parent = block.rpartition(".")[0]
    return f"{kind} {parent}{'.' if parent else ''}*{own.removeprefix(block)}"


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """All features of R replicates.

    Attributes:
        features: F of them.
        value: [R, F] nats; −inf for an exact zero, NaN for what is absent.
        blocks: names of all blocks, forward order.
    """

    features: tuple[Feature, ...]
    value: Floats
    blocks: tuple[str, ...]

    def __len__(self) -> int:
        """R."""
        return len(self.value)

    def take(self, rows: Sequence[int]) -> Features:
        """Some of the replicates."""
        return Features(self.features, self.value[list(rows)], self.blocks)


@dataclass(slots=True)
class _Table:
    """Features as they are found.

    Attributes:
        features: so far.
        columns: [R] each.
        blocks: names, forward order.
        index: (trunk, depth of its output) → index of the block.
        level: (trunk, depth) → [R] ln of the gradient's norm there.
    """

    features: list[Feature] = field(default_factory=list[Feature])
    columns: list[Floats] = field(default_factory=list[Floats])
    blocks: list[str] = field(default_factory=list[str])
    index: dict[tuple[str, float], int] = field(default_factory=dict[tuple[str, float], int])
    level: dict[tuple[str, float], Floats] = field(default_factory=dict[tuple[str, float], Floats])

    def add(self, kind: str, layer: str, column: Floats, block: int = -1) -> None:
        if not np.isnan(column).all():
            name = self.blocks[block] if block >= 0 else ""
            self.features.append(Feature(kind, layer, role_of(kind, layer, name), block))
            self.columns.append(column)


def read_features(record: Record) -> Features:
    """The features of a Record of `gradscope.measure`: one row per replicate.

    Args:
        record: with the statistics l2, count, token_variance and diff_next_l2, one step per replicate.
    """
    view = View(record)
    table = _Table()
    with np.errstate(all="ignore"):
        for name in view.trunks:
            _read_trunk(view.trunk(name), table)
        _read_weights(view, table)
        _read_gradients(view, table)
        _add_means(table)
    value = np.column_stack(table.columns) if table.columns else np.empty((len(view.steps), 0))
    return Features(tuple(table.features), value, tuple(table.blocks))


def _read_trunk(trunk: Trunk, table: _Table) -> None:
    places = trunk.stream
    if not places:
        return
    gradient = np.log(trunk.at_stream("output_grad", "l2").value)
    stream = np.log(trunk.at_stream("activation", "l2").value)
    variance = np.log(trunk.at_stream("activation", "token_variance").value)
    forward = np.log(trunk.at_stream("activation", "diff_next_l2").value)
    backward = np.log(trunk.at_stream("output_grad", "diff_next_l2").value)
    for i, place in enumerate(places):
        table.level[trunk.name, place.depth] = gradient[:, i]
        if place.depth < 1:
            continue
        name = f"{place.layer} call {place.call}" if place.call else place.layer
        block = table.index[trunk.name, place.depth] = len(table.blocks)
        table.blocks.append(name)
        if i == 0 or places[i - 1].depth != place.depth - 1:
            continue
        for kind, column in (
            ("flow", gradient[:, i - 1] - gradient[:, i]),
            ("act", variance[:, i] - variance[:, i - 1]),
            ("upd", forward[:, i - 1] - stream[:, i - 1]),
            ("gup", backward[:, i - 1] - gradient[:, i]),
        ):
            table.add(kind, name, column, block)
    for kind, what, column in (
        ("endpoint", ": gradient at the end", gradient[:, -1]),
        ("endpoint", ": activation at the start", variance[:, 0]),
        ("delta", "", gradient[:, 0] - gradient[:, -1]),
    ):
        table.add(kind, trunk.name + what, column)


def _block(table: _Table, site: Site) -> int:
    return table.index.get((site.trunk, _output(site)), -1)


def _output(site: Site) -> float:
    """Depth of the output of the block that a parameter belongs to."""
    return float(math.ceil(site.depth - 1e-9)) if site.depth == site.depth else math.nan


def _read_weights(view: View, table: _Table) -> None:
    norm, count = view.grid("weight", "l2"), view.grid("weight", "count")
    size = {site: count.value[:, i] for i, site in enumerate(count.sites)}
    for i, site in enumerate(norm.sites):
        column = np.log(norm.value[:, i]) - 0.5 * np.log(size[site])
        table.add("rms", site.layer, column, _block(table, site))


def _read_gradients(view: View, table: _Table) -> None:
    eps = _EPSILON.get(str(view.record.header.get("dtype")), _EPSILON["bfloat16"])
    floor = math.log(min(_ROUNDING_EPSILONS * eps, _LARGEST_ROUNDING))
    packed = {site for site in view.grid("param_grad", "query_l2").sites}
    for part in ("", "query", "key", "value"):
        grid = view.grid("param_grad", f"{part}_l2" if part else "l2")
        value = np.log(grid.value)
        largest: dict[str, Floats] = {}
        for i, site in enumerate(grid.sites):
            largest[site.owner] = np.fmax(largest.get(site.owner, value[:, i]), value[:, i])
        for i, site in enumerate(grid.sites):
            level = _level(view, table, site)
            if level is None or (not part and site in packed):
                continue
            column = value[:, i] - level
            rounding = np.isfinite(column) & (value[:, i] < largest[site.owner] + floor)
            suffix = f"[{part}]" if part else ""
            column = np.where(rounding, np.nan, column)
            table.add("param_grad", site.layer + suffix, column, _block(table, site))


def _level(view: View, table: _Table, site: Site) -> Floats | None:
    """The level ln g at the output of the parameter's block; off the trunks, at the end that it is on."""
    if site.trunk:
        return table.level.get((site.trunk, _output(site)))
    if not table.level:
        return None
    parameters = view.parameters
    inside = [i for i, other in enumerate(parameters) if other.trunk]
    before = bool(inside) and parameters.index(site) < inside[0]
    keys = sorted(table.level, key=lambda key: (view.trunks.index(key[0]), key[1]))
    order = keys if before else keys[::-1]
    return next((table.level[key] for key in order if not np.isnan(table.level[key]).all()), None)


def _add_means(table: _Table) -> None:
    """The mean over the blocks of each role: what all blocks have in common is seen best there."""
    roles: dict[str, list[int]] = {}
    for i, feature in enumerate(table.features):
        if feature.block >= 0:
            roles.setdefault(feature.role, []).append(i)
    for role, members in roles.items():
        if len(members) >= LEAST_LAYERS:
            column = np.mean([table.columns[i] for i in members], axis=0)
            table.add("mean", role, column)
