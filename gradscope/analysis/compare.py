"""Two Records of the same model, before and after a change: which layer departed first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.arguments import as_record, check_coverage
from gradscope.analysis.comparison import Comparison, Departure
from gradscope.analysis.gate.decision import COMPARABLE, Place
from gradscope.analysis.gate.moderated import Moments, moderated_t
from gradscope.analysis.matching import Feature, Pair, pairs_of, trunks_of
from gradscope.analysis.renaming import parameters_of_both
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["TOLERANCE", "compare"]

Floats = npt.NDArray[np.float64]

#: Smallest change that departs, nats: between single runs and paired replicates, where only rounding
#: differs; and between other initialisations or batches.
TOLERANCE: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "paired": MappingProxyType(
            dict.fromkeys(("activation", "peak", "flow", "parameter gradient"), 0.02)
        ),
        "replicates": MappingProxyType({"activation": 0.05, "flow": 0.05, "parameter gradient": 0.20}),
    }
)
#: An absolute level scatters more over replicates than increments do: so many times the tolerance.
_LEVEL: Final = 3.0
#: No spread over replicates is taken to be smaller: nats, what rounding leaves in float32.
_FLOOR: Final = 1e-4
#: Nats: replicates that differ by less in every number are the same.
_SAME: Final = 1e-6
_PASSES: Final = ("activation", "peak", "flow", "parameter gradient")


def compare(
    record: Record,
    baseline: Record,
    *,
    tolerance: float | Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Which layer of a record departs first from a baseline, by how much, and with what uncertainty.

    Compared at every step that both have, in natural logarithms: the root mean square of the activation
    (its level at the trunk's input, increments ln(h_{l+1}/h_l) above), increments of the gradient flow
    r_l = ln(g_l/g_{l+1}), and every block's parameter gradient over the gradient at its output,
    ln‖∇W‖ − ln(√n ‖δ‖) with n positions. Gradients enter as ratios, which depend neither on the loss's
    denominator nor on the batch size; the level of the flow at the loss end is compared too where both
    Records know it. A number on one side only (0, NaN, no gradient path) departs.

    - One replicate on either side: a change above the tolerance departs. Of the same seed, so do changes
      of the largest activation over the root mean square, which see through a norm.
    - Replicates of the same seeds and batches: their differences must be clear too, by Student's t over
      the pairs.
    - Other replicates, at least two on each side: Student's t with a pooled variance that the layers of
      one quantity lend each other (`gradscope.analysis.gate.moderated`; Smyth 2004).

    With replicates the probability is Bonferroni's over all numbers. The first layer is that of the first
    step that departs: forward-first by activations, else the gradient nearest the loss, else parameters.
    Where replicates do not pair, gradients are named by the clearest change instead. With replicates no
    block is called the first where at least half of the blocks depart on both sides of it. Norms alone
    can misname the block of a post-norm net, whose norms reset every level.

    ::

        comparison = gradscope.compare(gradscope.Record.load("run.jsonl"), baseline)
        print(comparison)
        assert comparison.same

    Args:
        record: what is judged.
        baseline: what it is compared with.
        tolerance: the smallest change that departs, in nats: one number, or by quantity (``activation``,
            ``peak``, ``flow``, ``parameter gradient``). None: .02 for single runs and paired replicates;
            otherwise .05, and .20 for parameter gradients. Levels have three times as much between
            replicates that do not pair.
        confidence: 1 − the probability of a departure in two Records of one model, all tests together.

    Returns:
        A `Comparison`.

    Raises:
        QuantityError: no common step, no common trunk, replicates of another kind, or replicates that are
            one and the same on one side alone.
        ValueError, TypeError: a tolerance or confidence that is none.
    """
    sides = (as_record(record, "compare"), as_record(baseline, "compare"))
    check_coverage(confidence)
    kinds = [str(side.header.get("replicates", "run")) for side in sides]
    if kinds[0] != kinds[1]:
        raise QuantityError(
            f"the replicates of the record are of kind {kinds[0]!r}, those of the baseline {kinds[1]!r}: "
            "their spread says different things. Measure both in the same way."
        )
    steps = sorted(set.intersection(*({s.step for s in side.steps} for side in sides)))
    if not steps:
        raise QuantityError("the two Records have no step in common, so nothing can be compared.")
    trunks, added_trunks, removed_trunks = trunks_of(*sides)
    paired = _same_seeds(*sides)
    if paired:
        sides = _common_replicates(*sides)
    several = min(_least_replicates(side, steps) for side in sides) > 1
    method = "one run each" if not several else "paired replicates" if paired else "replicates"
    limits = _limits(tolerance, TOLERANCE["paired" if paired else "replicates"])
    notes = list(_notes(*sides, method, paired))
    pairs: list[Pair] = []
    renamed: dict[str, str] = {}
    added, removed = dict.fromkeys(added_trunks), dict.fromkeys(removed_trunks)
    for mine, theirs in trunks:
        found = pairs_of(*sides, mine, theirs, with_peak=paired)
        for pair in found:
            renamed |= pair.renamed
            added |= dict.fromkeys(pair.added)
            removed |= dict.fromkeys(pair.removed)
        pairs += found
    named = parameters_of_both(*sides, renamed)
    renamed |= named.renamed
    added |= dict.fromkeys(_outside(named.added, added))
    removed |= dict.fromkeys(_outside(named.removed, removed))
    if not pairs:
        raise QuantityError("the two Records hold no quantity over depth that both have.")
    departures, features, left_out, seen = _departures(
        pairs, steps, method, limits, 1 - confidence, paired=paired
    )
    if left_out:
        notes.append(f"{left_out} numbers are not compared: absent, 0 or not finite on a side")
    first = departures[0].step if departures else None
    place = _place([d for d in departures if d.step == first], pairs)
    return Comparison(
        models=(
            str(sides[0].header.get("model", "a model")),
            str(sides[1].header.get("model", "a model")),
        ),
        method=method,
        steps=tuple(steps),
        features=features,
        departures=departures,
        blocks=(len(place.departing), place.blocks),
        wide=method != "one run each" and place.blocks > 2 and place.wide,
        renamed=tuple(renamed.items()),
        added=tuple(added),
        removed=tuple(removed),
        resolution=seen,
        notes=tuple(notes),
    )


def _must_differ(numbers: list[tuple[Feature, Floats, Floats]]) -> None:
    """Five times the same is no evidence: an initialisation that does not follow the seed is one."""
    same = [all(float(np.ptp(item[side])) < _SAME for item in numbers) for side in (1, 2)]
    if same[0] != same[1]:
        raise QuantityError(
            f"the replicates of the {'record' if same[0] else 'baseline'} are one and the same, and the "
            "other side's differ: the function that made the model sets a seed of its own, or loads "
            "weights. Measure it without, or compare the model on several batches."
        )


def _departures(
    pairs: list[Pair],
    steps: list[int],
    method: str,
    limits: Mapping[str, float],
    alpha: float,
    *,
    paired: bool,
) -> tuple[tuple[Departure, ...], int, int, tuple[tuple[str, float], ...]]:
    """The departures in order, how many numbers were compared and left out, and the resolution."""
    left_out = 0
    tested: list[tuple[int, Feature, float, float, float, float, float]] = []
    found: list[Departure] = []
    for step in steps:
        here: list[tuple[Feature, Floats, Floats]] = []
        for pair in pairs:
            for feature, expected, obtained in pair.states(step):
                found.append(
                    Departure(step=step, expected=expected, obtained=obtained, **feature._asdict())
                )
            every = list(pair.features(step))
            here += [one for one in every if np.isfinite(one[1]).all() and np.isfinite(one[2]).all()]
            left_out += len(every)
        left_out -= len(here)
        if here and method != "one run each":
            _must_differ(here)
        for (feature, run, base), numbers in zip(here, _changes(here, method), strict=True):
            tested.append((step, feature, float(run.mean()), float(base.mean()), *numbers))
    sizes: dict[str, list[float]] = {}
    for step, feature, obtained, expected, change, error, degrees in tested:
        limit = limits[feature.quantity]
        if feature.kind == "level" and not paired:
            limit *= _LEVEL
        probability = math.nan
        if math.isfinite(error):
            critical = _critical(degrees, alpha / len(tested)) * error
            probability = min(1.0, len(tested) * _tail(abs(change) / error, degrees))
            sizes.setdefault(feature.quantity, []).append(max(limit, critical))
        else:
            sizes.setdefault(feature.quantity, []).append(limit)
        if abs(change) > limit and not probability > alpha:
            numbers = {"change": change, "error": error, "probability": probability}
            found.append(
                Departure(step=step, expected=expected, obtained=obtained, **numbers, **feature._asdict())
            )
    resolution = tuple((name, float(np.median(values))) for name, values in sizes.items())
    order = _by_size if method == "replicates" else _by_pass
    trunks = list(dict.fromkeys(pair.trunk for pair in pairs))
    ordered = sorted(found, key=lambda departure: order(departure, trunks))
    return tuple(ordered), len(tested), left_out, resolution


def _outside(parameters: list[str], layers: Iterable[str]) -> list[str]:
    """Those that lie in none of the layers."""
    return [name for name in parameters if not any(name.startswith(f"{layer}.") for layer in layers)]


def _same_seeds(run: Record, base: Record) -> bool:
    """Whether replicate r of both was made under the same seed, as far as the headers say."""
    first = [dict(side.header.get("seeds") or {}) for side in (run, base)]
    for seeds in first:
        seeds.pop("replicates", None)  # how many there are
    common = set.intersection(*({(s.step, s.replicate) for s in side.steps} for side in (run, base)))
    return bool(first[0]) and first[0] == first[1] and bool(common)


def _common_replicates(run: Record, base: Record) -> tuple[Record, Record]:
    common = set.intersection(*({(s.step, s.replicate) for s in side.steps} for side in (run, base)))
    kept = [
        replace(side, steps=tuple(s for s in side.steps if (s.step, s.replicate) in common))
        for side in (run, base)
    ]
    return kept[0], kept[1]


def _least_replicates(record: Record, steps: list[int]) -> int:
    return min(len({s.replicate for s in record.steps if s.step == n}) for n in steps)


def _changes(
    tested: list[tuple[Feature, Floats, Floats]], method: str
) -> list[tuple[float, float, float]]:
    """Change, its standard error and degrees of freedom; NaN errors where nothing says how sure."""
    if method != "replicates" or not tested:
        return [_changed(run, base, method) for _, run, base in tested]
    names = [(feature.trunk, feature.quantity, feature.kind) for feature, _, _ in tested]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    run, base = (Moments.of(np.column_stack([one[side] for one in tested])) for side in (1, 2))
    found = moderated_t(base, run, np.asarray([number[name] for name in names], dtype=np.int64))
    columns = (found.change, found.error, found.degrees)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _changed(run: Floats, base: Floats, method: str) -> tuple[float, float, float]:
    change = float(run.mean() - base.mean())
    if method == "one run each":
        return change, math.nan, math.nan
    spread = max(float(np.std(run - base, ddof=1)), _FLOOR)
    return change, spread / math.sqrt(len(run)), len(run) - 1


def _place(departures: list[Departure], pairs: list[Pair]) -> Place:
    """The first departure's block among all, and which depart by a comparable part of the largest change.

    In units of what is worth failing for over other seeds; what has no number departs by more than all
    numbers.
    """
    trunks = list(dict.fromkeys(pair.trunk for pair in pairs))
    blocks = {(p.trunk, math.ceil(d - 1e-9)) for p in pairs for d in p.depth if d > 0}
    every = sorted(blocks, key=lambda block: (trunks.index(block[0]), block[1]))
    number = {block: i for i, block in enumerate(every)}
    scale = TOLERANCE["replicates"]
    least = min(scale.values())
    sizes: dict[int, float] = {}
    for d in departures:
        block = number.get((d.trunk, math.ceil(d.depth - 1e-9)), -1)
        size = math.inf if d.kind == "state" else abs(d.change) / scale.get(d.quantity, least)
        if block >= 0:
            sizes[block] = max(sizes.get(block, 0.0), size)
    enough = COMPARABLE * max(sizes.values(), default=0.0)
    first = departures[0] if departures else None
    at = -1 if first is None else number.get((first.trunk, math.ceil(first.depth - 1e-9)), -1)
    departing = frozenset(block for block, size in sizes.items() if size >= enough)
    return Place("" if first is None else first.layer, at, departing, len(every))


def _tail(t: float, degrees: float) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(degrees, -t))


def _critical(degrees: float, alpha: float) -> float:
    from scipy.special import stdtrit

    return -float(stdtrit(degrees, alpha / 2))


def _by_pass(d: Departure, trunks: list[str]) -> tuple[float, ...]:
    """Forward by activations, then backward from the loss: the order in which a step computes."""
    rank, trunk = _PASSES.index(d.quantity), trunks.index(d.trunk)
    if rank < _PASSES.index("flow"):
        return (d.step, 0, trunk, d.depth, rank)
    return (d.step, rank, -trunk, -d.depth)


def _by_size(d: Departure, trunks: list[str]) -> tuple[float, ...]:
    """Forward by activations, then the clearest change: increments have no memory over depth."""
    if d.quantity == "activation":
        return (d.step, 0, trunks.index(d.trunk), d.depth)
    return (d.step, 1, -abs(d.change) / d.error if math.isfinite(d.error) else -math.inf)


def _limits(
    given: float | Mapping[str, float] | None, default: Mapping[str, float]
) -> Mapping[str, float]:
    if given is None:
        return default
    wanted = dict(given) if isinstance(given, Mapping) else dict.fromkeys(default, given)
    for name, nats in wanted.items():
        if name not in _PASSES:
            raise ValueError(f"tolerance= names no quantity {name!r}; they are {', '.join(_PASSES)}")
        if isinstance(nats, bool) or not isinstance(nats, int | float):
            raise TypeError(
                f"tolerance= is a number of nats, or one by quantity; got {nats!r} for {name!r}"
            )
        if not 0 <= nats < math.inf:
            raise ValueError(f"tolerance= is a number of nats, 0 or more; got {nats} for {name!r}")
    return {**default, **wanted}


def _notes(run: Record, base: Record, method: str, paired: bool) -> Iterator[str]:
    if method == "one run each":
        yield "one replicate on a side: no probability; every change above the tolerance departs"
        if not paired:
            yield "the seeds differ: what departs may be no more than another initialisation"
    if None in (run.header.get("loss_denominator"), base.header.get("loss_denominator")):
        yield (
            "the loss's denominator is not known on both sides: the level of the gradient is not "
            "compared, its ratios over depth are"
        )
    for name in ("dtype", "device", "mode", "versions"):
        mine, theirs = run.header.get(name), base.header.get(name)
        if mine != theirs:
            yield f"another {name}: {_plain(mine)} against {_plain(theirs)}"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
