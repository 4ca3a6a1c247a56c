"""What the study's units say together: intervals over seeds, from the Records and outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.analysis import Interval, Profile, interval, profile
from gradscope.record import Record
from gradscope.study.claims_at_initialisation import Flow, Tokens
from gradscope.study.claims_in_training import Trained
from gradscope.study.outcome import InitialisationOutcome, TrainingOutcome
from gradscope.study.plan import InitialisationUnit, Plan, TrainingUnit
from gradscope.study.text import Text

__all__ = ["AtInitialisation", "InTraining", "Run", "Samples", "Study", "paired_difference"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One number per seed.

    Attributes:
        unit: of the values.
        values: one per seed; NaN where absent (or measured NaN: status ``ok``).
        status: ``ok``, or why the value is absent, one per seed.
    """

    unit: str
    values: tuple[float, ...]
    status: tuple[str, ...]

    @property
    def interval(self) -> Interval:
        """Mean over the seeds that have a value, with its 95 % interval."""
        return interval(self.values)


@dataclass(frozen=True, kw_only=True)
class AtInitialisation:
    """One variant at one depth under one initialisation, over seeds.

    Attributes:
        unit: what was measured.
        branches: number of residual branches n.
        record: the Record.
        flow: Δ and rate of the gradient flow.
        tokens: rank collapse.
        samples: what the table has, seed by seed, by name.
        span: smallest and largest gradient flow, relative to that at the trunk's output.
    """

    unit: InitialisationUnit
    branches: int
    record: Record
    flow: Flow
    tokens: Tokens
    samples: Mapping[str, Samples]
    span: tuple[float, float]

    @classmethod
    def of(
        cls, unit: InitialisationUnit, outcome: InitialisationOutcome, record: Record
    ) -> AtInitialisation:
        """Derive everything from a finished unit."""
        grad = profile(record, "grad_l2")
        delta, increment = grad.delta_per_replicate, grad.mean_increment_per_replicate
        samples = {
            "delta": _derived("nats", delta, "no two finite ends"),
            "mean_increment": _derived("nats/block", increment, "no finite increments"),
            **_ends(record, "grad_l2", grad),
            **_ends(record, "act_var"),
            **_ends(record, "qk_ratio"),
            **_ends(record, "token_cosine"),
        }
        if unit.effective_depth:
            depths = tuple(math.nan if d is None else d for d in outcome.effective_depth)
            samples["effective_depth"] = Samples(
                unit="branches", values=depths, status=outcome.effective_depth_status
            )
        with np.errstate(all="ignore"):
            relative = grad.value / grad.value[:, -1:]
        return cls(
            unit=unit,
            branches=outcome.branches,
            record=record,
            flow=_flow(unit.depth, [grad]),
            tokens=Tokens(
                token_cosine=samples["token_cosine_last"].interval,
                qk_first=samples["qk_ratio_first"].interval,
                qk_last=samples["qk_ratio_last"].interval,
            ),
            samples=samples,
            span=(float(relative.min()), float(relative.max())),
        )

    @property
    def effective_depth(self) -> Interval:
        """D over seeds; without a value where it was not measured."""
        found = self.samples.get("effective_depth")
        return found.interval if found else interval(())

    def geometric_mean(self, name: str) -> float:
        """Geometric mean, exp of the mean of ln, over the seeds of one of the `samples`."""
        with np.errstate(all="ignore"):
            return float(np.exp(np.mean(np.log(self.samples[name].values))))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        unit: what was trained.
        outcome: the losses.
        record: what the watch saw.
        first: gradient flow over depth at the first step.
        last: gradient flow over depth at the last recorded step.
    """

    unit: TrainingUnit
    outcome: TrainingOutcome
    record: Record
    first: Profile
    last: Profile

    @classmethod
    def of(cls, unit: TrainingUnit, outcome: TrainingOutcome, record: Record) -> Run:
        """Derive everything from a finished unit."""
        start = min(step.step for step in record.steps)
        first, last = profile(record, "grad_l2", step=start), profile(record, "grad_l2")
        return cls(unit=unit, outcome=outcome, record=record, first=first, last=last)


@dataclass(frozen=True, kw_only=True)
class InTraining:
    """All runs of one variant at one depth.

    Attributes:
        variant: its name.
        depth: number of blocks.
        by_rate: runs by learning rate, ascending, each by seed.
        trained: the runs at the best rate, for the claims.
        first: gradient flow at the first step of those runs.
        last: gradient flow at their last recorded step.
    """

    variant: str
    depth: int
    by_rate: Mapping[float, tuple[Run, ...]]
    trained: Trained
    first: Flow
    last: Flow

    @property
    def best(self) -> tuple[Run, ...]:
        """The runs at the best learning rate, by seed."""
        return self.by_rate[self.trained.rate]

    @classmethod
    def of(cls, label: str, runs: Mapping[float, tuple[Run, ...]], rate: float) -> InTraining:
        """Derive everything from the finished runs of a variant at a depth.

        Args:
            label: the variant, as plots name it.
            runs: by learning rate, each by seed.
            rate: the best learning rate.
        """
        best = runs[rate]
        unit = best[0].unit
        longest = max(best, key=lambda run: len(run.outcome.validation_step)).outcome
        return cls(
            variant=unit.variant,
            depth=unit.depth,
            by_rate=dict(sorted(runs.items())),
            trained=Trained(
                label=label,
                rate=rate,
                rates=tuple(sorted(runs)),
                steps=longest.validation_step,
                losses={run.unit.seed: run.outcome.validation_loss for run in best},
                final=interval(run.outcome.final_loss for run in best),
            ),
            first=_flow(unit.depth, [run.first for run in best]),
            last=_flow(unit.depth, [run.last for run in best]),
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that the pictures and the report are made of.

    Attributes:
        plan: what was run.
        text: on what.
        code: with which versions.
        labels: of the variants, as plots name them.
        initialisation: by (variant, initialisation, depth).
        training: by (variant, depth).
    """

    plan: Plan
    text: Text
    code: str
    labels: Mapping[str, str]
    initialisation: Mapping[tuple[str, str, int], AtInitialisation]
    training: Mapping[tuple[str, int], InTraining]

    @property
    def unigram_nats(self) -> float:
        """What byte frequencies alone give on the validation windows; nats per byte."""
        plan = self.plan
        return self.text.unigram_nats(windows=plan.validation_windows, context=plan.context)

    def by_depth(self, variant: str, initialization: str = "torch") -> tuple[AtInitialisation, ...]:
        """One variant under one initialisation, by depth, ascending; empty if it was not measured."""
        return tuple(
            self.initialisation[variant, initialization, depth]
            for depth in sorted(self.plan.depths)
            if (variant, initialization, depth) in self.initialisation
        )


def paired_difference(a: Sequence[Run], b: Sequence[Run], *, diverged_nats: float = math.inf) -> Interval:
    """Final validation loss of a minus that of b, paired by seed, with its 95 % interval.

    Where several runs share a seed (several learning rates), the worst of them counts.

    Args:
        a: runs of one variant.
        b: runs of another.
        diverged_nats: what a run that diverged counts as. Infinite, it leaves the interval open, so
            that no claim follows.
    """

    def worst_by_seed(runs: Sequence[Run]) -> dict[int, float]:
        worst: dict[int, float] = {}
        for run in runs:
            loss = run.outcome.final_loss
            loss = loss if math.isfinite(loss) else diverged_nats
            worst[run.unit.seed] = max(worst.get(run.unit.seed, -math.inf), loss)
        return worst

    first, second = worst_by_seed(a), worst_by_seed(b)
    with np.errstate(invalid="ignore"):
        return interval(
            float(np.subtract(first[s], second[s])) for s in sorted(first.keys() & second.keys())
        )


def _derived(unit: str, values: Floats, why: str) -> Samples:
    """Values of which NaN means that there was nothing to derive them from."""
    return Samples(
        unit=unit,
        values=tuple(values.tolist()),
        status=tuple("ok" if value == value else why for value in values.tolist()),
    )


def _ends(record: Record, quantity: str, found: Profile | None = None) -> dict[str, Samples]:
    """A quantity at its first and its last position, seed by seed."""
    found = found or profile(record, quantity)
    return {
        f"{quantity}_{where}": Samples(
            unit=found.unit,
            values=tuple(found.value[:, position].tolist()),
            status=tuple(found.status[:, position].tolist()),
        )
        for where, position in (("first", 0), ("last", -1))
    }


def _flow(depth: int, profiles: Sequence[Profile]) -> Flow:
    """The gradient flow of one variant at one depth, over all replicates of all profiles."""
    finite = [np.isfinite(p.value) for p in profiles]
    return Flow(
        depth=depth,
        delta=interval(x for p in profiles for x in p.delta_per_replicate.tolist()),
        increment=interval(x for p in profiles for x in p.mean_increment_per_replicate.tolist()),
        zeros=sum(int(p.zero.sum()) for p in profiles),
        nonfinite=sum(int((p.ok & ~f).sum()) for p, f in zip(profiles, finite, strict=True)),
        values=sum(int(p.ok.sum()) for p in profiles),
    )
