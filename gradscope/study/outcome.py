"""What the study's units give beside their Records: plain numbers, free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["InitialisationOutcome", "Outcome", "TrainingOutcome"]


@dataclass(frozen=True, kw_only=True)
class InitialisationOutcome:
    """What an `InitialisationUnit` gave beside its Record.

    Attributes:
        branches: number of residual branches n.
        effective_depth: D of each seed; None where it could not be had (see the status) and for
            units that do not ask for it.
        effective_depth_status: ``ok``, or why D is absent, one per seed.
        cpu_time_s: CPU seconds that the unit took, whatever else the machine did.
    """

    branches: int
    effective_depth: tuple[float | None, ...]
    effective_depth_status: tuple[str, ...]
    cpu_time_s: float


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What a `TrainingUnit` gave beside its Record.

    Attributes:
        train_loss: the loss of each step's batch, before the step; nats per byte.
        validation_step: number of optimizer steps taken before each validation loss.
        validation_loss: nats per byte.
        diverged_at: the step at which the loss was NaN or infinite and the run ended, or None.
        flush_denormal: whether denormal numbers were flushed to zero, as tried out.
        cpu_time_s: CPU seconds that the unit took, whatever else the machine did.
    """

    train_loss: tuple[float, ...]
    validation_step: tuple[int, ...]
    validation_loss: tuple[float, ...]
    diverged_at: int | None
    flush_denormal: bool
    cpu_time_s: float

    @property
    def final_loss(self) -> float:
        """The last validation loss; infinite for a run that diverged."""
        return self.validation_loss[-1] if self.diverged_at is None else math.inf


Outcome = InitialisationOutcome | TrainingOutcome
