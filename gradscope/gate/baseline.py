"""What later runs are compared with: how 20 replicates of a model behaved, in one small file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.gate.features import Feature, Features
from gradscope.analysis.wording import wrapped

__all__ = ["PAIRED", "Baseline", "Expected", "ParameterRow", "state_of"]

#: So many replicates are kept one by one, to be compared under the same seeds.
PAIRED: Final = 5
#: Nats: less is what rounding leaves of values that are the same.
_NO_SPREAD: Final = 1e-6


def state_of(column: npt.NDArray[np.float64]) -> str:
    """Of one feature over replicates: ``value``, ``zero``, ``absent``, ``not finite`` or ``mixed``."""
    kinds = {
        "value"
        if math.isfinite(x)
        else "zero"
        if x == -math.inf
        else "absent"
        if x != x
        else "not finite"
        for x in column.tolist()
    }
    return kinds.pop() if len(kinds) == 1 else "mixed"


@dataclass(frozen=True, slots=True)
class Expected:
    """One feature over the replicates of the baseline.

    Attributes:
        feature: which.
        state: see `state_of`; only a ``value`` is compared as a number.
        mean: over replicates, nats.
        spread: standard deviation over replicates, nats.
        paired: the value of each of the first replicates.
    """

    feature: Feature
    state: str
    mean: float = 0.0
    spread: float = 0.0
    paired: tuple[float, ...] = ()

    @classmethod
    def all_of(cls, features: Features) -> tuple[Expected, ...]:
        """Every feature of the replicates, rounded as the file keeps it."""
        value = features.value
        finite = np.where(np.isfinite(value), value, 0.0)
        mean = np.mean(finite, axis=0)
        spreads = np.std(finite, axis=0, ddof=1) if len(value) > 1 else np.zeros_like(mean)
        found: list[Expected] = []
        for i, feature in enumerate(features.features):
            state = state_of(value[:, i])
            if state != "value":
                found.append(cls(feature, state))
                continue
            spread = float(spreads[i]) if spreads[i] > _NO_SPREAD else 0.0
            paired = tuple(round(x, 4) for x in value[:PAIRED, i].tolist())
            found.append(cls(feature, state, round(float(mean[i]), 4), float(f"{spread:.3g}"), paired))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """What is exactly known of one parameter over all replicates.

    Attributes:
        shape: its shape.
        trained: ``requires_grad``.
        gradient: ``ok``, or why there is none.
        zero_rows: share of its gradient's rows that are exactly zero; None where it is another share in
            each replicate, or there is no gradient.
        constant: whether all elements are equal at the start.
        checksum: of its values, for each of the first replicates.
    """

    shape: tuple[int, ...]
    trained: bool
    gradient: str
    zero_rows: float | None
    constant: bool
    checksum: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """How a model's gradients behaved, to be compared with later runs.

    Attributes:
        kind: ``initialisation`` (replicates are seeds) or ``batch`` (a given model; they are batches).
        fingerprint: what was measured, and with what: model, blocks, batch, loss, mode, dtype, device,
            versions.
        summary: for the reader: family of decay, Δ in nats with its interval, depth scale ξ, effective
            depth D, or why there is none.
        effective_depth: D of each of the first replicates, branches; empty where there is none.
        seeds: of the replicates; of a given model, the number of each batch.
        batches: digest of each batch of a given model; empty for a maker.
        blocks: names, forward order.
        architecture: block → kinds of skip and norm; empty where they could not be read.
        parameters: name → exact facts.
        features: what is compared.
        nonfinite: whether any replicate had a NaN or an infinity.
        activation: block → checksum of its output in each of the first replicates.
        output_grad: the same of the gradient there.
        random: digest of the random state that each of their forward passes begins with; empty where they
            draw nothing, as without dropout.
    """

    kind: str
    fingerprint: Mapping[str, str]
    summary: Mapping[str, str]
    effective_depth: tuple[float, ...]
    seeds: tuple[int, ...]
    batches: tuple[str, ...]
    blocks: tuple[str, ...]
    architecture: Mapping[str, str]
    parameters: Mapping[str, ParameterRow]
    features: tuple[Expected, ...]
    nonfinite: bool
    activation: Mapping[str, Sequence[float]]
    output_grad: Mapping[str, Sequence[float]]
    random: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = {"initialisation": "initialisations", "batch": "batches of one model"}[self.kind]
        model = self.fingerprint.get("model", "a model")
        lines = [
            f"gradient baseline of {model}: {len(self.blocks)} blocks, "
            f"{len(self.seeds)} {what}, {len(self.features)} features",
            *(
                line
                for name, value in self.summary.items()
                for line in wrapped(f"{name}: {value}", indent="  ")
            ),
        ]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON with one line per feature, atomically.

        A baseline of this version or an older one is replaced; anything else is left alone.

        Raises:
            GateError: the path holds something else, a damaged or a newer baseline, or cannot be written.
        """
        from gradscope.gate.file import write

        return write(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Baseline:
        """Read it.

        Raises:
            GateError: no such file, no baseline, damaged, or of a newer or older version.
        """
        from gradscope.gate.file import read

        return read(Path(path))
