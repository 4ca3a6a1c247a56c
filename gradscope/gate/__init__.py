"""Gradient health as a regression test: take a baseline once, check against it for ever.

::

    from gradscope import gate

    gate.take(make_model, batch, loss).save("model.gradients.json")

    outcome = gate.check(gate.Baseline.load("model.gradients.json"), make_model, batch, loss)
    assert not outcome.failed, outcome

Three tiers, the first that fails decides. **Exact facts** have no noise: names, ``requires_grad``, which
gradients are absent, NaN, gradient rows that are always zero, the kind of skip and norm per block.
**Same seeds**: where the seeds of the baseline still start with the same weights, only rounding may
differ. **Other seeds**: where the random order changed (another device, a reordered constructor), the
noise of initialisation is modelled (`gradscope.analysis.gate`).

Limits. Seeds are fixed, so that a rare false failure is permanent until the baseline is taken again, and
not flaky. A new batch invalidates a baseline. CUDA draws other numbers than the CPU: initialise on the
CPU, or accept the tier of other seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.gate.baseline import Baseline
from gradscope.gate.outcome import Change, Outcome, Profile

if TYPE_CHECKING:
    from torch import Tensor, nn

    Loss = Callable[[nn.Module, Any], Tensor]

__all__ = ["Baseline", "Change", "Outcome", "Profile", "check", "outdated", "take"]


def take(
    make_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    replicates: int = 20,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
) -> Baseline:
    """Measure what later runs are compared with.

    Args:
        make_model: returns a new model, called once under each seed; or a model, which has no
            initialisation to repeat: then replicates are batches.
        batch: what ``loss`` takes; with a model, an iterable of such batches.
        loss: ``loss(model, batch)`` → scalar tensor; None for ``model(**batch).loss``.
        replicates: seeds, or batches at most. With five, one unlucky baseline in eight fails every later
            run; twenty bring that to one in a hundred.
        seeds: the seeds; None for 0, 1, …
        progress: show how far it is, on a terminal.

    Returns:
        The baseline; print it, and save it beside the test.

    Raises:
        GateError: too few replicates, the same one twice, one batch for a given model, or gradients that
            are no finite number other than 0.
        LayerError: no depth axis in the model.
        MeasureError: a model or loss that cannot be measured (see `gradscope.measure`).
    """
    from gradscope.gate.observe import take as observed

    return observed(make_model, batch, loss, replicates=replicates, seeds=seeds, progress=progress)


def outdated(path: str | os.PathLike[str]) -> bool:
    """Whether a baseline file is of an older version, which is not read and may be replaced.

    Raises:
        GateError: no such file, no baseline, damaged, or of a newer version.
    """
    from gradscope.gate.file import outdated as older

    return older(Path(path))


def check(
    baseline: Baseline,
    make_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    tolerance: str | None = None,
    progress: bool = False,
) -> Outcome:
    """Compare a model with its baseline.

    Args:
        baseline: from `take`, or `Baseline.load`.
        make_model: as for `take`.
        batch: as for `take`: the same.
        loss: as for `take`.
        tolerance: the smallest change worth failing for, per kind of feature:
            ``"flow:20%,delta:.5nat,effective_depth:10%"``. None for the defaults
            (`gradscope.analysis.gate.tolerance`).
        progress: show how far it is, on a terminal.

    Returns:
        The outcome; ``outcome.failed`` and ``print(outcome)``.

    Raises:
        GateError: a tolerance that is not understood, a maker where a model was, or the reverse, or a
            maker whose models all start with the same weights, where the baseline's differ.
        LayerError: no depth axis in the model.
        MeasureError: a model or loss that cannot be measured (see `gradscope.measure`).
    """
    from gradscope.gate.tiers import check as compared

    return compared(baseline, make_model, batch, loss, tolerance=tolerance, progress=progress)
