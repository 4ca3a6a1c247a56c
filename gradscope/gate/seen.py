"""What replicates showed, one row each: a `Baseline` is made of any of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.analysis.gate.features import Features, read_features
from gradscope.analysis.view import View
from gradscope.experiment.checksum import digest
from gradscope.experiment.replicate import ParameterFacts, Replicate
from gradscope.gate.baseline import PAIRED, Baseline, Expected, ParameterRow
from gradscope.record import Record

__all__ = ["Seen"]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """R replicates of one model.

    Attributes:
        kind: ``initialisation`` or ``batch``.
        fingerprint: what was measured, and with what, but for the loss.
        seeds: [R].
        loss: [R].
        features: R rows.
        parameters: [R] name → exact facts.
        gradient: name → [R] ``ok``, or why there is no gradient.
        nonfinite: [R], whether there was a NaN or an infinity.
        activation: [R] block → checksum.
        output_grad: [R] the same of the gradient there.
        random: [R] digest of the random state that the forward pass begins with; "" where it draws
            nothing.
    """

    kind: str
    fingerprint: Mapping[str, str]
    seeds: tuple[int, ...]
    loss: npt.NDArray[np.float64]
    features: Features
    parameters: tuple[Mapping[str, ParameterFacts], ...]
    gradient: Mapping[str, tuple[str, ...]]
    nonfinite: npt.NDArray[np.bool_]
    activation: tuple[Mapping[str, float], ...]
    output_grad: tuple[Mapping[str, float], ...]
    random: tuple[str, ...]

    @classmethod
    def of(cls, replicates: Sequence[Replicate], record: Record, batch: Any) -> Seen:
        """What they showed.

        Args:
            replicates: of one model.
            record: theirs, joined.
            batch: the batch, or the first of them.
        """
        view = View(record)
        words = view.words("param_grad", "l2")
        sites = view.grid("param_grad", "l2").sites
        signals = ("activation", "output_grad", "param_grad")
        bad = [(view.grid(s, "nonfinite").value > 0).any(axis=1) for s in signals]
        losses = [math.nan if s.loss is None else s.loss for s in record.steps]
        return cls(
            kind=str(record.header["replicates"]),
            fingerprint=_fingerprint(record, batch),
            seeds=tuple(r.seed for r in replicates),
            loss=np.asarray(losses, dtype=np.float64),
            features=read_features(record),
            parameters=tuple(r.parameters for r in replicates),
            gradient={site.layer: tuple(map(str, words[:, i])) for i, site in enumerate(sites)},
            nonfinite=np.any(bad, axis=0),
            activation=tuple(r.activation for r in replicates),
            output_grad=tuple(r.output_grad for r in replicates),
            random=tuple(r.random or "" for r in replicates),
        )

    def baseline(self, rows: Sequence[int], batches: Sequence[str] = ()) -> Baseline:
        """Some of the replicates as a baseline without summary, effective depth and architecture.

        Args:
            rows: which; the first are kept one by one.
            batches: digests, where replicates are batches.
        """
        paired = list(rows)[:PAIRED]
        features = self.features.take(rows)
        several = {"batch": "one per replicate"} if batches else {}
        seen = [x for x in self.loss[list(rows)].tolist() if not math.isnan(x)]
        loss = float(np.mean(seen)) if seen else math.nan
        return Baseline(
            kind=self.kind,
            fingerprint={**self.fingerprint, **several, "loss": f"{loss:.4g}"},
            summary={},
            effective_depth=(),
            seeds=tuple(self.seeds[i] for i in rows),
            batches=tuple(batches),
            blocks=features.blocks,
            architecture={},
            parameters={name: self._parameter(name, rows) for name in self.parameters[rows[0]]},
            features=Expected.all_of(features),
            nonfinite=bool(self.nonfinite[list(rows)].any()),
            activation=_checksums([self.activation[i] for i in paired]),
            output_grad=_checksums([self.output_grad[i] for i in paired]),
            random=tuple(self.random[i] for i in paired if self.random[i]),
        )

    def _parameter(self, name: str, rows: Sequence[int]) -> ParameterRow:
        same = [self.parameters[i][name] for i in rows if name in self.parameters[i]]
        shares = {x.zero_rows for x in same}
        share = shares.pop() if len(shares) == 1 else math.nan
        words = self.gradient.get(name)
        said = set() if words is None else {words[i] for i in rows}
        return ParameterRow(
            shape=same[0].shape,
            trained=same[0].requires_grad,
            gradient=said.pop() if len(said) == 1 else "mixed",
            zero_rows=None if math.isnan(share) else share,
            constant=same[0].constant,
            checksum=tuple(x.checksum for x in same[:PAIRED]),
        )


def _checksums(found: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(one.get(name, math.nan) for one in found) for name in found[0]}


def _fingerprint(record: Record, batch: Any) -> dict[str, str]:
    header = record.header
    content, tensors = digest(batch)
    versions = header["versions"]
    return {
        "model": str(header["model"]),
        "blocks": ", ".join(f"{name}: {n}" for name, n in header["trunks"].items()),
        "batch": content,
        "batch tensors": tensors,
        "loss": "",
        "mode": str(header["mode"]),
        "dtype": str(header["dtype"]),
        "device": str(header["device"]),
        "torch": str(versions["torch"]),
        "gradscope": str(versions["gradscope"]),
    }
