"""The check: fingerprint, exact facts, same seeds, other seeds; the first that fails decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from gradscope.analysis.gate.decision import FIRST_LOOK
from gradscope.analysis.gate.moderated import Tested
from gradscope.analysis.gate.tolerance import EFFECTIVE_DEPTH, Tolerance, parse_tolerance
from gradscope.analysis.renaming import renames
from gradscope.errors import GateError
from gradscope.experiment.replicate import Replicate, Replicates
from gradscope.gate.baseline import Baseline
from gradscope.gate.compare import (
    SAME_SEEDS,
    OtherSeeds,
    first_unpaired,
    floor_of,
    profiles,
    same_seeds,
)
from gradscope.gate.facts import Matched, first_of, match, other_subject, wrong_facts
from gradscope.gate.observe import ONE_START, as_batches, depths
from gradscope.gate.outcome import Change, Outcome
from gradscope.gate.runs import Runs

__all__ = ["check", "judged"]

_PLURAL = {"initialisation": "initialisations", "batch": "batches"}
_REORDERED = (
    "the forward pass draws random numbers (dropout): where it only draws them in another order, this is "
    "no regression. With model.eval() it draws none"
)
_SAME_BATCH = "the batch must be the same in every run: if it is drawn, draw it under a seed of its own"


def check(
    baseline: Baseline,
    make_model: Any,
    batch: Any,
    loss: Any = None,
    *,
    tolerance: str | None = None,
    progress: bool = False,
) -> Outcome:
    """See `gradscope.gate.check`."""
    given = isinstance(make_model, nn.Module)
    if given != (baseline.kind == "batch"):
        raise GateError(
            f"The baseline's replicates are {_PLURAL[baseline.kind]}, and now "
            f"{'a model' if given else 'a function that makes models'} was given: give the same, or "
            "delete the baseline and take a new one."
        )
    batches = as_batches(batch) if given else []
    runner = Replicates(make_model, batch, loss)
    runs = Runs(baseline, runner, batch, batches, loss, progress)
    return judged(baseline, runs, parse_tolerance(tolerance))


def judged(baseline: Baseline, runs: Runs, tolerance: Tolerance) -> Outcome:
    """Compare these replicates with the baseline."""
    return _Check(baseline, runs, tolerance).outcome()


@dataclass(slots=True, eq=False)
class _Check:
    baseline: Baseline
    runs: Runs
    tolerance: Tolerance

    @property
    def _replicates(self) -> str:
        return "batches" if self.baseline.kind == "batch" else "seeds"

    @property
    def _others(self) -> str:
        """What tier 3 compares, as a message begins."""
        if self.baseline.kind == "batch" and not self.runs.fresh(0):
            return "The baseline's batches and other weights"
        return f"Other {self._replicates} than the baseline's"

    def outcome(self) -> Outcome:
        """Run as many replicates as it takes."""
        paired = self.runs.paired
        unpaired = self._unpaired(paired)
        use_pairs = bool(paired) and not unpaired
        numbers = (paired if use_pairs else self.runs.fresh(0)) or paired
        if not numbers:
            raise GateError(
                "No batch is left to check with: give the baseline's batches, or 15 new ones."
            )
        found = self.runs.make(numbers[:1])
        one = self.runs.observed(found)
        table = self.runs.skips(found[0])
        one = replace(one, architecture=table)
        matched = match(self.baseline, one)
        other = other_subject(self.baseline, matched.run)
        if other:
            return self._not_applicable(other, one)
        found += self.runs.make(numbers[1:])
        matched = match(self.baseline, replace(self.runs.observed(found), architecture=table))
        if use_pairs:
            unpaired = first_unpaired(self.baseline, matched.run)
            if unpaired and self.runs.fresh(0):
                use_pairs = False
                found = self.runs.make(self.runs.fresh(0))
                matched = match(self.baseline, replace(self.runs.observed(found), architecture=table))
        notes = self._notes(matched)
        wrong = wrong_facts(self.baseline, matched)
        if wrong:
            return self._facts(wrong, matched, notes)
        if use_pairs and not unpaired:
            return self._same(matched, notes)
        if paired:
            given = self.baseline.kind == "batch"
            what = "the weights are others" if given else "other seeds: the random order changed"
            notes.append(f"{what} from {unpaired} on")
        return self._other(matched, notes)

    def _unpaired(self, paired: Sequence[int]) -> str:
        """The first parameter that starts with other values, read off one initialisation alone."""
        if not paired:
            return ""
        return first_unpaired(self.baseline, match(self.baseline, self.runs.start(self.baseline)).run)

    # -- the tiers -------------------------------------------------------------------------------

    def _not_applicable(self, other: list[Change], run: Baseline) -> Outcome:
        what = ", ".join(dict.fromkeys(c.layer for c in other))
        return Outcome(
            status="not applicable",
            reason=f"The baseline is of something else, nothing was compared: {what} changed.",
            tier="fingerprint",
            changes=tuple(other),
            notes=(_SAME_BATCH,) if any(c.layer == "batch" for c in other) else (),
            replicates=self.runs.made,
            model=run.fingerprint["model"],
        )

    def _facts(self, wrong: list[Change], matched: Matched, notes: list[str]) -> Outcome:
        where = first_of(wrong, self.baseline.blocks)
        ordered = sorted(wrong, key=lambda c: not _inside(c.layer, where))
        return self._failed("exact facts", where, ordered, matched.run, notes)

    def _same(self, matched: Matched, notes: list[str]) -> Outcome:
        run = matched.run
        changes, place, largest = same_seeds(self.baseline, run, self.tolerance)
        changes = [*changes, *self._depth_same(run)]
        if changes:
            if self.baseline.random and run.random and not any(c.feature == "rms" for c in changes):
                notes.append(_REORDERED)
            return self._failed("same seeds", _where(place), changes, run, notes)
        floor = floor_of(self.baseline, run)
        if largest > floor:
            notes.append(
                f"the same {self._replicates} differ by up to {largest:.2g} nat, more than the {floor:g} "
                "that rounding explains, and less than the smallest change worth failing for"
            )
        kinds = dict.fromkeys(item.feature.kind for item in self.baseline.features)
        return Outcome(
            status="passed",
            reason=f"The same {self._replicates} start with the same weights, and nothing departs "
            f"(largest change {largest:.1e} nat).",
            tier="same seeds",
            notes=tuple(notes),
            resolution={k: self.tolerance.same_seeds(k, SAME_SEEDS) for k in kinds},
            replicates=self.runs.made,
            profiles=profiles(self.baseline, run),
            model=run.fingerprint["model"],
        )

    def _other(self, matched: Matched, notes: list[str]) -> Outcome:
        run = matched.run
        if _repeats(self.baseline, run):
            raise GateError(f"{ONE_START}. The baseline's replicates differ.")
        first = OtherSeeds.of(self.baseline, run, self.tolerance)
        flagged, tested = first.rule.screen(first.base, first.run)
        deeper = self._depth_other(notes)
        if deeper:
            return self._failed("other seeds", "", deeper, run, notes)
        if not flagged.any():
            return Outcome(
                status="passed",
                reason=f"{self._others}, and nothing departs.",
                tier="other seeds",
                notes=tuple(notes),
                resolution=_resolution(first, tested),
                replicates=self.runs.made,
                profiles=profiles(self.baseline, run),
                model=run.fingerprint["model"],
            )
        numbers = self.runs.fresh(1)
        names = {f.name for f, hit in zip(first.rule.features, flagged, strict=True) if hit}
        if len(numbers) >= FIRST_LOOK:
            signs = dict(zip((f.name for f in first.rule.features), tested.change, strict=True))
            further: list[Replicate] = []
            status = "open"
            while status == "open" and len(further) < len(numbers):
                until = len(numbers) if further else FIRST_LOOK
                further += self.runs.make(numbers[len(further) : until])
                again = match(self.baseline, self.runs.observed(further)).run
                second = OtherSeeds.of(self.baseline, again, self.tolerance)
                before = np.asarray([signs.get(f.name, 0.0) for f in second.rule.features])
                flags = second.named(names)
                status, departs, later = second.rule.confirm(second.base, second.run, flags, before)
                if status == "failed":
                    place = second.place(departs, later, self.baseline.blocks)
                    changes = second.changes(departs, later, place)
                    return self._failed("other seeds", _where(place), changes, again, notes)
            why = f"and {len(further)} further ones do not confirm it"
        else:
            departs = first.rule.clear(tested)
            if departs.any():
                place = first.place(departs, tested, self.baseline.blocks)
                changes = first.changes(departs, tested, place)
                return self._failed("other seeds", _where(place), changes, run, notes)
            why = f"and there were only {len(numbers)} further ones to confirm it with"
        place = first.place(flagged, tested, self.baseline.blocks)
        return Outcome(
            status="suspicious",
            reason=f"{int(flagged.sum())} of {len(flagged)} features stand out in "
            f"{first.run.count} replicates, {why}: this passes.",
            tier="other seeds",
            where=_where(place),
            changes=tuple(first.changes(flagged, tested, place)),
            notes=tuple(notes),
            resolution=_resolution(first, tested),
            replicates=self.runs.made,
            profiles=profiles(self.baseline, run),
            model=run.fingerprint["model"],
        )

    def _failed(
        self, tier: str, where: str, changes: Sequence[Change], run: Baseline, notes: list[str]
    ) -> Outcome:
        begins = f"in {where or 'the model'}"
        if where and not where.endswith(" blocks"):
            begins = f"first at {where}"
        words = {
            "exact facts": f"An exact fact is no longer true, {begins}.",
            "same seeds": f"The same {self._replicates} give other values, {begins}.",
            "other seeds": f"{self._others}, and more than their noise, {begins}.",
        }
        return Outcome(
            status="failed",
            reason=words[tier],
            tier=tier,
            where=where,
            changes=tuple(changes),
            notes=tuple(notes),
            replicates=self.runs.made,
            profiles=profiles(self.baseline, run),
            model=run.fingerprint["model"],
        )

    # -- effective depth -------------------------------------------------------------------------

    def _depth_same(self, run: Baseline) -> list[Change]:
        limit = self.tolerance.given.get(EFFECTIVE_DEPTH)
        if limit is None:
            return []
        return self._depth_change(limit, self.runs.paired, paired=True)

    def _depth_other(self, notes: list[str]) -> list[Change]:
        limit = self.tolerance.given.get(EFFECTIVE_DEPTH)
        if limit is None:
            return []
        return self._depth_change(limit, self.runs.fresh(0), paired=False)

    def _depth_change(self, limit: float, numbers: Sequence[int], *, paired: bool) -> list[Change]:
        from scipy.stats import ttest_ind

        old = np.asarray(self.baseline.effective_depth)
        batches = [self.runs.batch(n) for n in numbers]
        new = np.asarray(depths(self.runs.runner, numbers, batches, self.runs.loss)[0])
        if not len(old):
            why = self.baseline.summary.get("D", "none")
            raise GateError(
                f"effective_depth: the baseline has none for this model; leave it out. D: {why}"
            )
        if not len(new):
            obtained, change, p = "none", math.nan, 0.0
        else:
            change = (
                float(np.log(np.mean(new) / np.mean(old)))
                if np.mean(new) * np.mean(old) > 0
                else math.inf
            )
            obtained = f"{np.mean(new):.4g}"
            test: Any = ttest_ind(old, new)
            p = 0.0 if paired else float(test.pvalue)
            if abs(change) <= limit or p > 0.01:
                return []
        return [
            Change(
                layer="the model",
                feature=EFFECTIVE_DEPTH,
                expected=f"{np.mean(old):.4g}",
                obtained=obtained,
                change=change,
                tolerance=limit,
                probability=p,
            )
        ]

    def _notes(self, matched: Matched) -> list[str]:
        notes: list[str] = []
        if matched.renamed:
            notes.append(f"renamed: {renames(matched.renamed.items())}")
        old, new = self.baseline.fingerprint, matched.run.fingerprint
        for what in ("torch", "device", "dtype", "model"):
            if old.get(what) != new.get(what):
                notes.append(f"{what}: {old.get(what)} → {new.get(what)}")
        draws = [bool(b.random) for b in (self.baseline, matched.run)]
        if draws[0] != draws[1]:
            words = ("draws none", "draws random numbers")
            notes.append(f"the forward pass (dropout): {words[draws[0]]} → {words[draws[1]]}")
        return notes


def _repeats(baseline: Baseline, run: Baseline) -> bool:
    """Whether a run's initialisations are one and the same, where the baseline's differ."""
    if baseline.kind == "batch" or len(run.seeds) < 2:
        return False
    now = {item.feature.name: item for item in run.features if item.state == "value"}
    both = [(x, now[x.feature.name]) for x in baseline.features if x.spread and x.feature.name in now]
    weights = [pair for pair in both if pair[0].feature.kind == "rms"]
    return bool(both) and not any(new.spread for _, new in weights or both)


def _inside(layer: str, where: str) -> bool:
    return bool(where) and (layer == where or layer.startswith(f"{where}."))


def _where(place: Any) -> str:
    return f"{len(place.departing)} of {place.blocks} blocks" if place.wide else place.layer


def _resolution(tier: OtherSeeds, tested: Tested) -> dict[str, float]:
    sizes = tier.rule.resolution(tested, (tier.base.count, tier.run.count))
    kinds: dict[str, list[float]] = {}
    for feature, size in zip(tier.rule.features, sizes.tolist(), strict=True):
        kinds.setdefault(feature.kind, []).append(size)
    return {kind: float(np.median(found)) for kind, found in kinds.items()}
