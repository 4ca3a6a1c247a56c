"""Names that changed between two versions of a model: which belong together, and how to say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.view import Site, View
from gradscope.record import Record

__all__ = ["Renamed", "paired_off", "parameters_of_both", "renames"]

#: So many are named one by one.
_SHOWN = 4


def paired_off(
    lost: Sequence[str], fresh: Sequence[str], *same: Callable[[str, str], bool]
) -> dict[str, str]:
    """New name → old name: each new one with the first old one left that fits, by each test in turn.

    Args:
        lost: names that are gone, in the order of definition.
        fresh: names that are new.
        same: tests of (old, new), the surest first.
    """
    found: dict[str, str] = {}
    left = list(lost)
    for test in same:
        for new in fresh:
            old = None if new in found else next((name for name in left if test(name, new)), None)
            if old is not None:
                found[new] = old
                left.remove(old)
    return found


def renames(pairs: Iterable[tuple[str, str]]) -> str:
    """Old → new in words; what a container or several blocks have in common is said once.

    >>> renames([("h.0.w", "k.0.w"), ("h.1.w", "k.1.w"), ("h.0.q", "h.0.k"), ("h.1.q", "h.1.k")])
    'h → k, h.*.q → h.*.k'
    """
    found: dict[str, dict[str, None]] = {}
    for old, new in pairs:
        before, after = old.split("."), new.split(".")
        while len(before) > 1 and len(after) > 1 and before[-1] == after[-1]:
            before, after = before[:-1], after[:-1]
        one = f"{'.'.join(before)} → {'.'.join(after)}"
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", one), {})[one] = None
    every = [every if len(ones) > 1 else next(iter(ones)) for every, ones in found.items()]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


@dataclass(frozen=True, slots=True)
class Renamed:
    """The parameters of two Records.

    Attributes:
        renamed: old → new name.
        added: of the record only.
        removed: of the baseline only.
    """

    renamed: dict[str, str]
    added: list[str]
    removed: list[str]


def parameters_of_both(run: Record, base: Record, layers: Mapping[str, str]) -> Renamed:
    """Match parameters by name; by size, place and last word (``weight``); by size, place and module.

    A Record without parameters says nothing of them.

    Args:
        run: the record.
        base: the baseline.
        layers: old → new name of layers that were matched already.
    """
    sides = [_Parameters(View(side)) for side in (run, base)]
    if not sides[0].site or not sides[1].site:
        return Renamed({}, [], [])
    lost = [name for name in sides[1].site if name not in sides[0].site]
    fresh = [name for name in sides[0].site if name not in sides[1].site]

    def alike(old: str, new: str) -> bool:
        return sides[1].place(old) == sides[0].place(new)

    pairs = paired_off(
        lost,
        fresh,
        lambda old, new: alike(old, new) and old.rpartition(".")[2] == new.rpartition(".")[2],
        lambda old, new: alike(old, new) and _moved(old, layers) == new.rpartition(".")[0],
    )
    matched = set(pairs.values())
    return Renamed(
        {old: new for new, old in pairs.items()},
        [name for name in fresh if name not in pairs],
        [name for name in lost if name not in matched],
    )


def _moved(name: str, layers: Mapping[str, str]) -> str:
    """The new name of the module that a parameter is in."""
    owner = name.rpartition(".")[0]
    prefix = max((x for x in layers if f"{owner}.".startswith(f"{x}.")), key=len, default=None)
    return owner if prefix is None else layers[prefix] + owner.removeprefix(prefix)


class _Parameters:
    """The parameters of one Record, with what tells them apart besides their names."""

    def __init__(self, view: View) -> None:
        self.site: dict[str, Site] = {site.layer: site for site in view.parameters}
        self._count: dict[str, float] = {}
        for signal in ("weight", "param_grad"):
            grid = view.grid(signal, "count")
            for i, site in enumerate(grid.sites):
                known = grid.value[:, i][np.isfinite(grid.value[:, i])]
                if len(known) and site.type == "Parameter":
                    self._count.setdefault(site.layer, float(known[0]))

    def place(self, name: str) -> tuple[float, float]:
        """Depth (−1 off the trunks) and number of elements (0 where it is not known)."""
        depth = self.site[name].depth
        return (depth if depth == depth else -1.0, self._count.get(name, 0.0))
