"""What the study's units say together: intervals over seeds, from the Records and outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.analysis import Interval, Profile, interval, profile
from gradscope.errors import QuantityError
from gradscope.record import Record
from gradscope.study.claims_at_initialisation import Flow, Tokens
from gradscope.study.claims_in_training import Trained
from gradscope.study.outcome import InitialisationOutcome, TrainingOutcome
from gradscope.study.plan import InitialisationUnit, Plan, TrainingUnit
from gradscope.study.text import Text

__all__ = ["AtInitialisation", "InTraining", "Run", "Study", "paired_difference", "per_seed"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AtInitialisation:
    """One variant at one depth under one initialisation, over seeds.

    Attributes:
        unit: what was measured.
        outcome: what came out beside the Record.
        record: the Record.
        grad: the gradient flow over depth.
        flow: its Δ and rate.
        tokens: rank collapse.
        effective_depth: D.
        variance_first: activation variance of h_0, geometric mean over seeds.
        variance_last: activation variance of h_L, likewise.
    """

    unit: InitialisationUnit
    outcome: InitialisationOutcome
    record: Record
    grad: Profile
    flow: Flow
    tokens: Tokens
    effective_depth: Interval
    variance_first: float
    variance_last: float

    @classmethod
    def of(
        cls, unit: InitialisationUnit, outcome: InitialisationOutcome, record: Record
    ) -> AtInitialisation:
        """Derive everything from a finished unit."""
        grad = profile(record, "grad_l2")
        variance = profile(record, "act_var")
        first, last = (
            math.exp(interval(np.log(variance.value[:, i]).tolist()).estimate) for i in (0, -1)
        )
        return cls(
            unit=unit,
            outcome=outcome,
            record=record,
            grad=grad,
            flow=_flow(unit.depth, grad),
            tokens=Tokens(
                token_cosine=_at(record, "token_cosine", -1),
                qk_first=_at(record, "qk_ratio", 0),
                qk_last=_at(record, "qk_ratio", -1),
            ),
            effective_depth=interval(math.nan if d is None else d for d in outcome.effective_depth),
            variance_first=first,
            variance_last=last,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        unit: what was trained.
        outcome: the losses.
        record: what the watch saw.
    """

    unit: TrainingUnit
    outcome: TrainingOutcome
    record: Record

    def profile(self, quantity: str, *, last: bool) -> Profile:
        """A quantity over depth at the first or last step that has it."""
        found = profile(self.record, quantity)
        if not last:
            found = profile(self.record, quantity, step=min(s.step for s in self.record.steps))
        return found


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
            first=_joint_flow(unit.depth, [run.profile("grad_l2", last=False) for run in best]),
            last=_joint_flow(unit.depth, [run.profile("grad_l2", last=True) for run in best]),
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


def per_seed(record: Record, quantity: str, position: int) -> Floats:
    """A quantity at one position (0: first, −1: last) for every seed; all NaN if it cannot be had."""
    try:
        return np.asarray(profile(record, quantity).value[:, position], dtype=np.float64)
    except QuantityError:
        return np.full(1, math.nan)


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


def _at(record: Record, quantity: str, position: int) -> Interval:
    return interval(per_seed(record, quantity, position).tolist())


def _flow(depth: int, grad: Profile) -> Flow:
    return Flow(
        depth=depth,
        delta=grad.delta(),
        increment=grad.mean_increment(),
        zeros=int(grad.zero.sum()),
        values=int(grad.ok.sum()),
    )


def _joint_flow(depth: int, profiles: list[Profile]) -> Flow:
    """The flow over several Records, one per seed."""
    return Flow(
        depth=depth,
        delta=interval(x for p in profiles for x in p.delta_per_replicate.tolist()),
        increment=interval(x for p in profiles for x in p.mean_increment_per_replicate.tolist()),
        zeros=sum(int(p.zero.sum()) for p in profiles),
        values=sum(int(p.ok.sum()) for p in profiles),
    )
