"""From the open step to a finished one: of this process, or with the values of all ranks."""

from __future__ import annotations

from dataclasses import replace

from gradscope.collect.faults import Faults
from gradscope.collect.merging import Samples, packed, unpacked
from gradscope.collect.open_step import OpenStep
from gradscope.collect.parts import Parts
from gradscope.collect.passes import Pass
from gradscope.collect.ranks import LOCAL, Ranks
from gradscope.record import Step

__all__ = ["Builder"]


class Builder:
    """Makes a `Step` of what its parts have of the open one.

    Args:
        ranks: what is known of the other ranks.
        faults: counts an error here, of which the other ranks hear.
    """

    def __init__(self, ranks: Ranks, faults: Faults) -> None:
        self._ranks = ranks
        self._faults = faults

    def build(
        self, parts: Parts, open_step: OpenStep, index: int, replicate: int, *, first: bool
    ) -> Step | None:
        """The step with what it has; None where it is none.

        Args:
            parts: of the recorder.
            open_step: the step that is under way, or over.
            index: its number.
            replicate: the replicate's number.
            first: whether no step came before it.
        """
        passes = open_step.passes_that_count()
        if parts.optimizers.seen and not first and not open_step.stepped:
            if not any(p.accumulated for p in passes) or parts.accumulation.cleared():
                return None  # after the last step: an evaluation, or gradients thrown away
        if open_step.pooled is not None:
            return replace(open_step.pooled, wall_time_s=open_step.wall_time_s)
        if not passes:
            return None
        samples = self._samples(parts, open_step, passes)
        refusal = LOCAL if self._ranks.many else None
        return self._step(parts, open_step, samples, index, replicate, refusal)

    def pooled(self, parts: Parts, open_step: OpenStep, index: int, replicate: int) -> Step | None:
        """The step with the values of all ranks; None where they could not be had."""
        passes, ranks = open_step.passes_that_count(), self._ranks.parallelism.ranks
        layout, rows = b"", None
        try:
            samples = self._samples(parts, open_step, passes)
            layout, rows = packed(parts.assembler.for_other_ranks(samples, passes, ranks))
        except Exception as error:
            self._faults.note(-1, error, during=open_step.newest)
        found = self._ranks.exchange(index, layout, rows)
        if found is None:
            return None
        every = [unpacked(*part) for part in found]
        if any(other.identity != every[0].identity for other in every):
            return None  # the model was changed, on one rank only
        return self._step(parts, open_step, parts.assembler.merged(every), index, replicate)

    @staticmethod
    def _samples(parts: Parts, open_step: OpenStep, passes: list[Pass]) -> Samples:
        optimizers = parts.optimizers
        found = parts.assembler.samples(passes, optimizers.readings, skipped=optimizers.skipped)
        return found if open_step.loss is None else replace(found, loss=open_step.loss)

    def _step(
        self,
        parts: Parts,
        open_step: OpenStep,
        samples: Samples,
        index: int,
        replicate: int,
        refusal: str | None = None,
    ) -> Step:
        return parts.assembler.step(
            samples,
            refusal=refusal,
            parameters_too=not self._ranks.replicated,
            step=index,
            replicate=replicate,
            wall_time_s=open_step.wall_time_s,
            learning_rate=parts.optimizers.learning_rate,
        )
