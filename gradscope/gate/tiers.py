"""The check: fingerprint, exact facts, same seeds, other seeds; the first that fails decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from gradscope.analysis.gate.decision import CONFIRM, SCREEN
from gradscope.analysis.gate.moderated import Tested
from gradscope.analysis.gate.tolerance import EFFECTIVE_DEPTH, Tolerance, parse_tolerance
from gradscope.errors import GateError
from gradscope.experiment.checksum import digest
from gradscope.experiment.progress import counted
from gradscope.experiment.replicate import Replicate, Replicates
from gradscope.gate.baseline import PAIRED, Baseline
from gradscope.gate.compare import (
    SAME_SEEDS,
    OtherSeeds,
    first_unpaired,
    floor_of,
    profiles,
    same_seeds,
)
from gradscope.gate.facts import Matched, first_of, match, other_subject, wrong_facts
from gradscope.gate.observe import as_batches, depths, observe, skips
from gradscope.gate.outcome import Change, Outcome

__all__ = ["check"]

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
            f"The baseline's replicates are {baseline.kind}s, and now "
            f"{'a model' if given else 'a function that makes models'} was given: give the same, or take "
            "a new baseline."
        )
    batches = as_batches(batch) if given else []
    runner = Replicates(make_model, batch, loss)
    runs = _Runs(baseline, runner, batch, batches, loss, progress)
    return _Check(baseline, runs, parse_tolerance(tolerance)).outcome()


class _Runs:
    """The replicates of the run, made when they are needed."""

    def __init__(
        self,
        baseline: Baseline,
        runner: Replicates,
        batch: Any,
        batches: list[Any],
        loss: Any,
        progress: bool,
    ) -> None:
        self.runner = runner
        self.loss = loss
        self.made = 0
        self._progress = progress
        self._batch = batch
        self._batches = batches
        self._digests = [digest(item)[0] for item in batches]
        if batches:
            known = {d: i for i, d in enumerate(baseline.batches[:PAIRED])}
            at = {known[d]: n for n, d in enumerate(self._digests) if d in known}
            self.paired = [at[i] for i in sorted(at)] if sorted(at) == list(range(len(known))) else []
            self._fresh = [n for n, d in enumerate(self._digests) if d not in set(baseline.batches)]
        else:
            self.paired = list(baseline.seeds[:PAIRED])
            start = max(baseline.seeds) + 1
            self._fresh = list(range(start, start + SCREEN + CONFIRM))

    @property
    def first(self) -> Any:
        """The batch, or the first of them."""
        return self._batches[0] if self._batches else self._batch

    def batch(self, number: int) -> Any:
        """The batch of that replicate."""
        return self._batches[number] if self._batches else self._batch

    def make(self, numbers: Sequence[int]) -> list[Replicate]:
        """Run them."""
        self.made += len(numbers)
        counting = counted(numbers, "gradient check: replicate", show=self._progress)
        return [self.runner.run(n, self._batches[n] if self._batches else None) for n in counting]

    def fresh(self, stage: int) -> list[int]:
        """The numbers of the replicates that the baseline did not see."""
        return self._fresh[:SCREEN] if stage == 0 else self._fresh[SCREEN : SCREEN + CONFIRM]

    def observed(self, found: Sequence[Replicate]) -> Baseline:
        """What they say."""
        names = [self._digests[r.seed] for r in found] if self._batches else []
        return observe(found, batch=self.first, batches=names, summary=False)


@dataclass(slots=True, eq=False)
class _Check:
    baseline: Baseline
    runs: _Runs
    tolerance: Tolerance

    def outcome(self) -> Outcome:
        """Run as many replicates as it takes."""
        paired = self.runs.paired
        start = paired or self.runs.fresh(0)
        if not start:
            raise GateError(
                "No batch is left to check with: give the baseline's batches, or 15 new ones."
            )
        found = self.runs.make(start[:1])
        one = self.runs.observed(found)
        table = skips(self.runs.runner, found[0], self.runs.batch(start[0]), self.runs.loss)
        one = replace(one, architecture=table)
        matched = match(self.baseline, one)
        other = other_subject(self.baseline, matched.run)
        if other:
            return self._not_applicable(other, one)
        unpaired = first_unpaired(self.baseline, matched.run)
        use_pairs = bool(paired) and not unpaired
        rest = paired[1:] if use_pairs else self.runs.fresh(0)[0 if paired else 1 :]
        more = self.runs.make(rest)
        found = [*found, *more] if use_pairs or not paired else more
        run = replace(self.runs.observed(found), architecture=table)
        matched = match(self.baseline, run)
        if use_pairs:
            unpaired = first_unpaired(self.baseline, matched.run)
            use_pairs = not unpaired
        notes = self._notes(matched)
        wrong = wrong_facts(self.baseline, matched)
        if wrong:
            return self._facts(wrong, matched, notes)
        if use_pairs:
            return self._same(matched, notes)
        if paired:
            given = self.baseline.kind == "batch"
            what = "the weights are others" if given else "other seeds: the random order changed"
            notes.append(f"{what} from {unpaired} on")
        return self._other(matched, notes)

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
            return self._failed("same seeds", _where(place), changes, run, notes)
        floor = floor_of(self.baseline, run)
        if largest > floor:
            notes.append(
                f"the same seeds differ by up to {largest:.2g} nat, more than the {floor:g} that "
                "rounding explains, and less than the smallest change worth failing for"
            )
        kinds = dict.fromkeys(item.feature.kind for item in self.baseline.features)
        return Outcome(
            status="passed",
            reason="The same seeds start with the same weights, and nothing departs (largest change "
            f"{largest:.1e} nat).",
            tier="same seeds",
            notes=tuple(notes),
            resolution={k: self.tolerance.same_seeds(k, SAME_SEEDS) for k in kinds},
            replicates=self.runs.made,
            profiles=profiles(self.baseline, run),
            model=run.fingerprint["model"],
        )

    def _other(self, matched: Matched, notes: list[str]) -> Outcome:
        run = matched.run
        first = OtherSeeds.of(self.baseline, run, self.tolerance)
        flagged, tested = first.rule.screen(first.base, first.run)
        deeper = self._depth_other(notes)
        if deeper:
            return self._failed("other seeds", "", deeper, run, notes)
        if not flagged.any():
            return Outcome(
                status="passed",
                reason="Other seeds than the baseline's, and nothing departs.",
                tier="other seeds",
                notes=tuple(notes),
                resolution=_resolution(first, tested),
                replicates=self.runs.made,
                profiles=profiles(self.baseline, run),
                model=run.fingerprint["model"],
            )
        numbers = self.runs.fresh(1)
        names = {f.name for f, hit in zip(first.rule.features, flagged, strict=True) if hit}
        if len(numbers) >= 3:
            again = match(self.baseline, self.runs.observed(self.runs.make(numbers))).run
            second = OtherSeeds.of(self.baseline, again, self.tolerance)
            flags = second.named(names)
            signs = dict(zip((f.name for f in first.rule.features), tested.change, strict=True))
            before = np.asarray([signs.get(f.name, 0.0) for f in second.rule.features])
            confirmed, later = second.rule.confirm(second.base, second.run, flags, before)
            if confirmed.any():
                place = second.place(confirmed, later, self.baseline.blocks)
                changes = second.changes(confirmed, later, place)
                return self._failed("other seeds", _where(place), changes, again, notes)
            why = f"and {len(numbers)} further ones do not confirm it"
        else:
            why = f"and there were only {len(numbers)} further ones to confirm it with"
        place = first.place(flagged, tested, self.baseline.blocks)
        return Outcome(
            status="suspicious",
            reason=f"{int(flagged.sum())} of {len(flagged)} features stand out in "
            f"{first.run.count} fresh replicates, {why}: this passes.",
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
        begins = f"first at {where}" if where and not where[0].isdigit() else f"in {where or 'the model'}"
        words = {
            "exact facts": f"An exact fact is no longer true, {begins}.",
            "same seeds": f"The same seeds give other values, {begins}.",
            "other seeds": f"Other seeds than the baseline's, and more than their noise, {begins}.",
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
            pairs = [f"{old} → {new}" for old, new in matched.renamed.items()]
            more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
            notes.append(f"renamed: {', '.join(pairs[:4])}{more}")
        old, new = self.baseline.fingerprint, matched.run.fingerprint
        for what in ("torch", "device", "dtype", "model"):
            if old.get(what) != new.get(what):
                notes.append(f"{what}: {old.get(what)} → {new.get(what)}")
        return notes


def _inside(layer: str, where: str) -> bool:
    return bool(where) and (layer == where or layer.startswith(f"{where}."))


def _where(place: Any) -> str:
    return f"{len(place.departing)} of {place.blocks} blocks" if place.wide else place.layer


def _resolution(tier: OtherSeeds, tested: Tested) -> dict[str, float]:
    sizes = tier.rule.resolution(tested)
    kinds: dict[str, list[float]] = {}
    for feature, size in zip(tier.rule.features, sizes.tolist(), strict=True):
        kinds.setdefault(feature.kind, []).append(size)
    return {kind: float(np.median(found)) for kind, found in kinds.items()}
