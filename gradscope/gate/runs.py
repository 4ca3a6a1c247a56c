"""The replicates of a run that is compared with a baseline, made when they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradscope.analysis.gate.decision import CONFIRM, SCREEN
from gradscope.experiment.checksum import digest
from gradscope.experiment.progress import counted
from gradscope.experiment.replicate import Replicate, Replicates
from gradscope.gate.baseline import PAIRED, Baseline
from gradscope.gate.observe import bare, observe, skips

__all__ = ["Runs"]


class Runs:
    """Replicates under the seeds, or on the batches, of the baseline, and under fresh ones."""

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
        self._seed: dict[int, int] = {}
        if batches:
            known = {d: i for i, d in enumerate(baseline.batches[:PAIRED])}
            at = {known[d]: n for n, d in enumerate(self._digests) if d in known}
            self.paired = [at[i] for i in sorted(at)] if sorted(at) == list(range(len(known))) else []
            self._fresh = [n for n, d in enumerate(self._digests) if d not in set(baseline.batches)]
            # A batch keeps its seed wherever it stands now, or dropout would draw other numbers.
            self._seed = {n: len(baseline.seeds) + n for n in range(len(batches))}
            self._seed |= {n: baseline.seeds[known[self._digests[n]]] for n in self.paired}
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
        batches = self._batches
        return [
            self.runner.run(
                self._seed[n] if batches else n,
                batches[n] if batches else None,
                checksums=n in self.paired,
            )
            for n in counting
        ]

    def start(self, baseline: Baseline) -> Baseline:
        """What the first paired initialisation says of the parameters, without running it."""
        return bare(self.runner, self.paired[0], baseline)

    def skips(self, found: Replicate) -> Mapping[str, str]:
        """The architecture table of that replicate's model."""
        return skips(self.runner, found, self.batch(self._number(found)), self.loss)

    def fresh(self, stage: int) -> list[int]:
        """The numbers of the replicates that the baseline did not see."""
        return self._fresh[:SCREEN] if stage == 0 else self._fresh[SCREEN : SCREEN + CONFIRM]

    def _number(self, found: Replicate) -> int:
        """Where its batch stands; its seed, where replicates are initialisations."""
        return next((n for n, seed in self._seed.items() if seed == found.seed), found.seed)

    def observed(self, found: Sequence[Replicate]) -> Baseline:
        """What they say."""
        names = [self._digests[self._number(r)] for r in found] if self._batches else []
        return observe(found, batch=self.first, batches=names, summary=False)
