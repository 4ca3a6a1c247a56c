"""Gradient health as an assertion: rules that need no baseline.

`assert_healthy` measures a model and fails with what the health rules find.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn

    from gradscope.analysis import Diagnosis, Finding
    from gradscope.collect.arguments import Mask
    from gradscope.layers import Selection

__all__ = ["assert_healthy"]

_FAILING: Final[Mapping[str, frozenset[str]]] = {
    "critical": frozenset({"critical"}),
    "warning": frozenset({"critical", "warning"}),
    "note": frozenset({"critical", "warning", "note"}),
}


def assert_healthy(
    model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    allow: str | Iterable[str] = (),
    fail_on: Literal["critical", "warning", "note"] = "warning",
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
    replicates: int = 5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    layers: Selection | None = None,
    mask: Mask | None = None,
) -> Diagnosis:
    """Fail where a health rule finds something: vanishing, dead, non-finite, cut off, and the rest.

    Measures as `gradscope.measure` does and asks every rule of `gradscope.diagnose`::

        def test_gradients():
            assert_healthy(MyTransformer, batch, loss)
            assert_healthy(MyTransformer, batch, loss, allow=["massive_activations", "blocks.0"])

    Args:
        model: a function that returns a new model (each replicate is an initialisation), or a model (each
            replicate is a batch).
        batch: what ``loss`` takes; with a model, also a list of such batches.
        loss: function (model, batch) → scalar tensor; None for ``model(**batch).loss``.
        allow: what is no failure: names of rules (``"massive_activations"``), globs over the names of
            layers (``"blocks.0"``, ``"encoder.**"``; ``*`` is one part of a name, ``**`` any number),
            or both (``"saturation:blocks.*"``). A finding is allowed where all its layers are, and what
            it explains is allowed with it.
        fail_on: the mildest severity that fails.
        thresholds: rule → threshold → number, instead of the rule's own.
        replicates: number of initialisations; of batches, at most so many.
        seed: replicate r is made under ``seed + r``.
        dtype: convert model and batch, e.g. to ``torch.float64``.
        layers: what to measure, as in `gradscope.watch`.
        mask: padding to leave out, as in `gradscope.watch`.

    Returns:
        The whole `Diagnosis`, with what was allowed and what could not be checked.

    Raises:
        AssertionError: a finding that is not allowed, or no rule could look. The message says what,
            where, since when, the measured value against its threshold, the likely cause, what to do,
            and the line that allows it.
        ValueError: an entry of ``allow`` names no rule and no layer, or an unknown ``fail_on``.
        MeasureError, LayerError: the model cannot be measured.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    from gradscope.analysis import diagnose
    from gradscope.experiment.measure import measure

    if fail_on not in _FAILING:
        raise ValueError(f"fail_on={fail_on!r} is none of {', '.join(map(repr, _FAILING))}")
    record = measure(model, batch, loss, replicates, seed=seed, dtype=dtype, layers=layers, mask=mask)
    names = {name for step in record.steps for name in step.rows.layer}
    permits = [_permit(word, names) for word in ([allow] if isinstance(allow, str) else allow)]
    diagnosis = diagnose(record, thresholds=thresholds)
    if diagnosis.word in ("nothing recorded", "nothing checked"):
        raise AssertionError(f"Nothing can be said of the model's gradients.\n{diagnosis}")
    allowed = _allowed(diagnosis.findings, permits)
    failing = [
        i
        for i, finding in enumerate(diagnosis.findings)
        if finding.severity in _FAILING[fail_on] and i not in allowed
    ]
    if failing:
        raise AssertionError(_message(diagnosis, failing, len(allowed)))
    return diagnosis


@dataclass(frozen=True, slots=True)
class _Permit:
    """One entry of ``allow``: a rule, None for every rule; and the layers, None for all."""

    rule: str | None
    layers: frozenset[str] | None

    def covers(self, finding: Finding) -> bool:
        if self.rule is not None and finding.rule != self.rule:
            return False
        return self.layers is None or (bool(finding.layers) and self.layers.issuperset(finding.layers))


def _permit(word: str, names: set[str]) -> _Permit:
    from gradscope.analysis import RULES
    from gradscope.layers.selection import glob

    if not isinstance(word, str):
        raise TypeError(f"allow= takes names of rules and globs over layers; got {word!r}")
    if word in RULES:
        return _Permit(word, None)
    rule, colon, pattern = word.rpartition(":")
    matched = frozenset(filter(glob(pattern).fullmatch, names))
    if (colon and rule not in RULES) or not matched:
        what = rule if colon and rule not in RULES else pattern
        known = [*RULES, *names] if not colon else list(RULES) if what == rule else list(names)
        near = difflib.get_close_matches(what, sorted(known), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"allow={word!r}: {what!r} names no rule and matches no measured layer.{hint} The rules are "
            f"{', '.join(RULES)}."
        )
    return _Permit(rule if colon else None, matched)


def _allowed(findings: tuple[Finding, ...], permits: list[_Permit]) -> set[int]:
    """The findings that an entry covers, and those that they explain: causes stand before symptoms."""
    found: set[int] = set()
    for i, finding in enumerate(findings):
        if finding.because_of in found or any(permit.covers(finding) for permit in permits):
            found.add(i)
    return found


def _message(diagnosis: Diagnosis, failing: list[int], allowed: int) -> str:
    """The failing findings under their causes, and how one of them is allowed."""
    shown = set(failing)
    for i in failing:  # a mild cause is shown with its grave symptom
        above = diagnosis.findings[i].because_of
        while above is not None:
            shown.add(above)
            above = diagnosis.findings[above].because_of
    place = {old: new for new, old in enumerate(sorted(shown))}
    findings = tuple(
        replace(finding, because_of=None if finding.because_of is None else place[finding.because_of])
        for finding in (diagnosis.findings[i] for i in sorted(shown))
    )
    rules = list(dict.fromkeys(diagnosis.findings[i].rule for i in failing))
    lines = [str(replace(diagnosis, findings=findings, not_checked=()))]
    if allowed:
        lines.append(f"{allowed} finding{'s' * (allowed != 1)} allowed by allow=.")
    lines.append(f"If this is meant to be so: assert_healthy(..., allow={rules!r})")
    return "\n".join(lines)
