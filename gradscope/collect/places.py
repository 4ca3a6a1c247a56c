"""Where on the depth axis the calls of a step were: trunk and depth of each, and which comes next."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from gradscope.collect.passes import Pass
from gradscope.layers import Layer

__all__ = [
    "Places",
    "added_outputs",
    "agreed",
    "changing_successors",
    "following_in",
    "other_successors",
    "places_of",
]

Key = tuple[int, int]
Place = tuple[str, float]
Places = dict[Key, Place]

_NOWHERE: Final = ("", math.nan)


def places_of(
    passes: Sequence[Pass], layers: Sequence[Layer], trunks: Sequence[str], verified: Mapping[int, bool]
) -> dict[Key, Place]:
    """Trunk and depth of every (site, call) on the axis.

    A call that is at one depth in one micro-batch and at another in the next (blocks in random order) is
    on no axis: its values are of both.

    Args:
        passes: the passes of a step.
        layers: the watched layers.
        trunks: their trunks' names, in the order that negative sites count them.
        verified: for each branch site, whether the graph showed that its output is added.
    """
    axis = _Axis.of(passes, layers, trunks, verified)
    places: dict[Key, Place] = {}
    for p in passes:
        places.update(agreed(places, axis.of_pass(p)))
    return axis.with_uncalled(places)


def agreed(found: Mapping[Key, Place], more: Mapping[Key, Place]) -> dict[Key, Place]:
    """The places of ``more``; none where ``found`` has another one."""
    return {key: place if found.get(key, place) == place else _NOWHERE for key, place in more.items()}


@dataclass(frozen=True, slots=True)
class _Axis:
    """What places are made of.

    Attributes:
        layers: the watched layers.
        trunks: their trunks' names.
        blocks: the site of each block, by trunk and number.
        branches: the sites of each block's branches, in the order in which they run.
    """

    layers: Sequence[Layer]
    trunks: Sequence[str]
    blocks: dict[tuple[str, int], int]
    branches: dict[tuple[str, int], list[int]]

    @classmethod
    def of(
        cls,
        passes: Sequence[Pass],
        layers: Sequence[Layer],
        trunks: Sequence[str],
        verified: Mapping[int, bool],
    ) -> _Axis:
        branches: dict[tuple[str, int], list[int]] = {}
        for site, (layer, shown) in enumerate(zip(layers, _shown(layers, verified), strict=True)):
            if layer.branch is not None and layer.block is not None and shown:
                branches.setdefault((layer.trunk, layer.block), []).append(site)
        # Sites are in the order of definition, which need not be that of the forward pass.
        came: dict[int, int] = {}
        for call in (c for p in passes for c in p.calls):
            came.setdefault(call.site, len(came))
        for siblings in branches.values():
            siblings.sort(key=lambda site: came.get(site, len(came)))
        blocks = {
            (x.trunk, x.block): s for s, x in enumerate(layers) if x.block is not None and x.is_block
        }
        return cls(layers, trunks, blocks, branches)

    def of_pass(self, p: Pass) -> dict[Key, Place]:
        """Those of one forward pass."""
        places: dict[Key, Place] = {}
        for trunk, state in p.trunks.items():
            blocks = [c for c in state.calls if c.site >= 0]
            numbers = [self.layers[c.site].block or 0 for c in blocks]
            # Blocks that a pass leaves out (LayerDrop) keep their depth; where blocks are called again,
            # or in another order than that of their definition, calls have depths in forward order.
            defined = all(a < b for a, b in pairwise(numbers))
            for order, (call, number) in enumerate(zip(blocks, numbers, strict=True)):
                places[call.site, call.index] = (trunk, (number if defined else order) + 1.0)
            # 0, unless the user chose later blocks only.
            start = min(x.block or 0 for x in self.layers if x.is_block and x.trunk == trunk)
            places[-1 - self.trunks.index(trunk), 0] = (trunk, float(start))
        for call in p.calls:
            layer = self.layers[call.site] if call.site >= 0 else None
            if layer is None or layer.branch is None or layer.block is None:
                continue
            if call.site in self.branches.get((layer.trunk, layer.block), []):
                place = self._of_branch(call.site, places, call.block_call)
                if place is not None:
                    places[call.site, call.index] = place
        return places

    def with_uncalled(self, places: dict[Key, Place]) -> dict[Key, Place]:
        """The same with blocks and branches that were not called, where no other is in their place."""
        taken = set(places.values())
        for (trunk, number), site in self.blocks.items():
            place = (trunk, number + 1.0)
            if (site, 0) not in places and place not in taken:
                places[site, 0] = place
        for siblings in self.branches.values():
            for site in siblings:
                place = None if (site, 0) in places else self._of_branch(site, places)
                if place is not None:
                    places[site, 0] = place
        return places

    def _of_branch(self, site: int, places: dict[Key, Place], during: int = 0) -> Place | None:
        """The place of a branch that ran during this call of its block; None where the block has none."""
        layer = self.layers[site]
        number = layer.block or 0
        siblings = self.branches[layer.trunk, number]
        parent = self.blocks.get((layer.trunk, number))
        above = (layer.trunk, number + 1.0) if parent is None else places.get((parent, during), _NOWHERE)
        share = (siblings.index(site) + 1) / len(siblings)
        return (layer.trunk, above[1] - 1 + share) if above[0] else None


def _shown(layers: Sequence[Layer], verified: Mapping[int, bool]) -> list[bool]:
    """For each site, whether it is a branch: what the graph showed.

    Where that could not be seen, what it showed in all other blocks: a trunk whose input is a
    constant (frozen embeddings) hides the stream in its first block.
    """
    blocks = {(x.trunk, x.block): x.name for x in layers if x.is_block}
    places = [(x.trunk, x.name.removeprefix(blocks.get((x.trunk, x.block), ""))) for x in layers]
    elsewhere: dict[tuple[str, str], bool] = {}
    for site, shown in verified.items():
        elsewhere[places[site]] = elsewhere.get(places[site], True) and shown
    return [verified.get(site, elsewhere.get(place, False)) for site, place in enumerate(places)]


# -- the next position -----------------------------------------------------------------------------


def following_in(p: Pass) -> dict[Key, Key]:
    """The next stream position of each that has one, in one pass."""
    return {
        (here.site, here.index): (after.site, after.index)
        for state in p.trunks.values()
        for here, after in pairwise(state.calls)
    }


def changing_successors(keys: Sequence[Key], passes: Sequence[Pass]) -> np.ndarray:
    """[keys]: the positions that some micro-batch has without the next one of another (LayerDrop)."""
    if len(passes) < 2:
        return np.zeros(len(keys), dtype=bool)
    following = [following_in(p) for p in passes]
    called = [{(call.site, call.index) for call in p.calls} for p in passes]
    return np.array([other_successors(key, following, called) for key in keys], dtype=bool)


def other_successors(
    key: Key, following: Sequence[Mapping[Key, Key]], called: Sequence[Collection[Key]]
) -> bool:
    """Whether a stream position and its next one are not the same two in all parts of a batch.

    Args:
        key: the position.
        following: the next position of each, in each part.
        called: what each part called.
    """
    after = {f.get(key) for f, c in zip(following, called, strict=True) if key in c}
    if len(after) != 1:
        return len(after) > 1
    (next_key,) = after
    return next_key is not None and any(next_key in c and key not in c for c in called)


def added_outputs(
    keys: Sequence[Key], passes: Sequence[Pass], added: Mapping[Key, bool]
) -> tuple[np.ndarray, np.ndarray]:
    """[keys] twice: the positions of which the pair with the next one, or they themselves, are no stream.

    Args:
        keys: the positions.
        passes: the passes of a step.
        added: for each call of a block, whether its output is added to what it read, by what reads next.
            Of the last one that cannot be seen: it is taken to be as the one before it.
    """
    pairs: set[Key] = set()
    outputs: set[Key] = set()
    if any(added.values()):
        for state in (s for p in passes for s in p.trunks.values()):
            calls = [(call.site, call.index) for call in state.calls]
            outputs.update(key for key in calls if added.get(key))
            outputs.update(b for a, b in zip(calls[-2:], calls[-1:], strict=False) if added.get(a))
            pairs.update(a for a, b in pairwise(calls) if a in outputs or b in outputs)
    first, second = (np.array([key in found for key in keys], dtype=bool) for found in (pairs, outputs))
    return first, second
