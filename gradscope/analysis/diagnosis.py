"""What is wrong in a Record, where, since when, why, and what to do."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Final, Literal

from gradscope.analysis import rules as _rules
from gradscope.analysis.arguments import as_record, meant
from gradscope.analysis.causes import over_replicates, under_their_causes
from gradscope.analysis.finding import (
    RULES,
    SEVERITIES,
    Finding,
    Limits,
    NotChecked,
    Rule,
    Severity,
    Threshold,
    register,
    rule,
)
from gradscope.analysis.view import View
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = [
    "RULES",
    "Diagnosis",
    "Finding",
    "Limits",
    "NotChecked",
    "Rule",
    "Severity",
    "Threshold",
    "diagnose",
    "register",
    "rule",
]

# Importing the package is what fills RULES.
assert _rules.__name__

_WIDTH: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Diagnosis:
    """What the health rules found in a Record.

    Attributes:
        model: the model's name.
        steps: first and last step of the Record.
        findings: root causes first, the gravest first; under each the findings that it explains
            (their ``because_of`` is its index).
        not_checked: (rule, reason) for every rule that could not look, at all or at something. A rule
            that is neither here nor among the findings has looked and found nothing.
        checked: names of the rules that were asked.
        values: number of values in the Record that were measured, over all steps.
    """

    model: str
    steps: tuple[int, int]
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    checked: tuple[str, ...]
    values: int

    @property
    def word(self) -> Literal["healthy", "unhealthy", "nothing recorded", "nothing checked"]:
        """``unhealthy``: a finding is worse than a note. ``healthy``: none is, and rules have looked.

        ``nothing recorded`` where no value was measured, ``nothing checked`` where every rule says that
        it could not look, at all or at something.
        """
        if any(finding.severity != "note" for finding in self.findings):
            return "unhealthy"
        if not self.values:
            return "nothing recorded"
        blind = {item.rule for item in self.not_checked}
        return "healthy" if self.findings or set(self.checked) - blind else "nothing checked"

    @property
    def healthy(self) -> bool:
        """Whether rules have looked and no finding is worse than a note.

        What could not be checked is in ``not_checked``. False too where nothing was recorded or checked:
        `word` tells these from a fault.
        """
        return self.word == "healthy"

    @property
    def roots(self) -> tuple[Finding, ...]:
        """The findings that no other explains."""
        return tuple(finding for finding in self.findings if finding.because_of is None)

    def of(self, name: str) -> tuple[Finding, ...]:
        """The findings of one rule."""
        return tuple(finding for finding in self.findings if finding.rule == name)

    @property
    def blind_spots(self) -> tuple[tuple[str, str], ...]:
        """(names of rules, reason), those with the same reason together: `not_checked` in short."""
        by_reason: dict[str, list[str]] = {}
        for item in self.not_checked:
            by_reason.setdefault(item.reason, []).append(item.rule)
        return tuple((", ".join(names), reason) for reason, names in by_reason.items())

    def depth_of(self, finding: Finding) -> int:
        """How many findings stand above this one: 0 for a root cause."""
        above = 0
        while finding.because_of is not None:
            finding = self.findings[finding.because_of]
            above += 1
        return above

    @property
    def summary(self) -> str:
        """One line: how many findings of which severity, and how many rules could not look."""
        counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        found = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        first, last = self.steps
        where = f"{self.model}, step {first}" if first == last else f"{self.model}, steps {first}–{last}"
        blind = len({item.rule for item in self.not_checked})
        looked = f"{len(self.checked)} rules, {blind} of them not or not fully judged"
        if not found:
            found = "no value was measured" if not self.values else "nothing found"
        return f"{where}: {self.word}: {found} ({looked})"

    def __str__(self) -> str:
        lines = [self.summary]
        for finding in self.findings:
            indent = "    " * self.depth_of(finding)
            mark = "because of this: " if finding.because_of is not None else ""
            lines.append(f"{indent}{mark}{finding.severity.upper()} {finding.title} [{finding.rule}]")
            for label, text in _paragraphs(finding):
                body = f"{label}{text}"
                lines += textwrap.wrap(
                    body,
                    _WIDTH - len(indent),
                    initial_indent=f"{indent}  ",
                    subsequent_indent=f"{indent}    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        if self.not_checked:
            lines.append("not checked:")
            for names, reason in self.blind_spots:
                lines += textwrap.wrap(
                    f"{names}: {reason}",
                    _WIDTH,
                    initial_indent="  ",
                    subsequent_indent="    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Diagnosis of {self.summary}>"


def _paragraphs(finding: Finding) -> Iterator[tuple[str, str]]:
    yield "", finding.message
    if finding.because_of is None:
        yield "cause: ", finding.cause
        yield "do: ", finding.remedy
        yield "threshold: ", f"{finding.threshold:.4g} {_unit(finding.unit)}({finding.threshold_source})"
        if finding.citation != finding.threshold_source:
            yield "source: ", finding.citation


def _unit(unit: str) -> str:
    return "" if unit == "1" else f"{unit} "


def diagnose(
    record: Record,
    *,
    rules: Iterable[Rule] | None = None,
    trunk: str | None = None,
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
) -> Diagnosis:
    """What is wrong in a Record: every health rule, with the causes before their symptoms.

    A pure function of the Record: a saved one can be judged later, elsewhere, without torch.

    ::

        diagnosis = gradscope.diagnose(record)
        print(diagnosis)
        assert diagnosis.healthy
        gradscope.diagnose(record, thresholds={"update_ratio": {"high": 0.3}})

    Args:
        record: what was measured, by `gradscope.watch` or `gradscope.measure`.
        rules: the rules to ask; None for all of `RULES`.
        trunk: keep only findings on this trunk, and those off the depth axis.
        thresholds: rule → threshold → number, instead of the rule's own.

    Returns:
        A `Diagnosis`: the findings, what could not be checked, and whether the model is healthy.

    Raises:
        QuantityError: the Record holds no step, or not that trunk.
        ValueError: an unknown rule or threshold, no rule at all, or two rules of one name.
        TypeError: no Record, or rules or thresholds of another shape.
    """
    if not as_record(record, "diagnose").steps:
        raise QuantityError(
            "the Record holds no step, so there is nothing to diagnose. A step is complete when the next "
            "one begins, when the scope is closed, or when scope.step() is called."
        )
    if trunk is not None and trunk not in record.trunks:
        known = ", ".join(map(repr, record.trunks)) or "none"
        raise QuantityError(f"no trunk {trunk!r} in this Record; its trunks are {known}.")
    asked = _by_name(RULES.values() if rules is None else rules)
    overridden = _checked_thresholds(asked, {} if thresholds is None else thresholds)
    view = View(record)
    found: list[Finding] = []
    blind: list[NotChecked] = []
    for item in asked.values():
        missing = [need for need in item.needs if not view.has(*need)]
        if missing:
            blind.append(NotChecked(item.name, view.why_absent(*missing[0])))
            continue
        for result in item(view, Limits(rule=item, overridden=overridden.get(item.name, {}))):
            if isinstance(result, NotChecked):
                blind.append(result)
            elif trunk is None or result.trunk in (trunk, ""):
                found.append(result)
    return Diagnosis(
        model=str(record.header.get("model", "a model")),
        steps=view.span(range(len(view.steps))),
        findings=under_their_causes(over_replicates(found, len(view.runs)), asked),
        not_checked=tuple(dict.fromkeys(blind)),
        checked=tuple(asked),
        values=sum(int((step.status == 0).sum()) for step in record.steps),
    )


def _by_name(rules: Iterable[Rule]) -> dict[str, Rule]:
    rules = rules.values() if isinstance(rules, Mapping) else rules
    if isinstance(rules, Rule | str) or not isinstance(rules, Iterable):
        raise TypeError(
            f"rules= takes several rules, such as [gradscope.analysis.RULES['vanishing']]; got {rules!r}"
        )
    asked: dict[str, Rule] = {}
    for item in rules:
        if isinstance(item, str) and item in RULES:
            raise ValueError(
                f"rules= takes rules, not their names: [gradscope.analysis.RULES[{item!r}], …]"
            )
        if not isinstance(item, Rule):
            raise ValueError(
                f"rules= takes rules made by the decorator gradscope.analysis.rule(...); got {item!r}. "
                "Those of the house are gradscope.analysis.RULES.values()."
            )
        if asked.setdefault(item.name, item) is not item:
            raise ValueError(f"rules= holds two rules named {item.name!r}: leave one out")
    if not asked:
        raise ValueError("rules= is empty: there is no rule to ask. None asks all of the house.")
    return asked


_SHAPE: Final = 'thresholds= is rule → threshold → number, such as {"vanishing": {"nats": 2.0}}'


def _checked_thresholds(
    asked: Mapping[str, Rule], thresholds: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    if not isinstance(thresholds, Mapping):
        raise TypeError(f"{_SHAPE}; got {thresholds!r}")
    checked: dict[str, dict[str, float]] = {}
    for name, values in thresholds.items():
        if name not in asked:
            raise ValueError(
                f"thresholds= names no rule {name!r}. {meant(name, asked)}The rules are "
                f"{', '.join(asked)}"
            )
        known = asked[name].thresholds
        if not isinstance(values, Mapping):
            one = next(iter(known))
            raise TypeError(
                f"{_SHAPE}; got {values!r} for {name!r}. Write {{{name!r}: {{{one!r}: {values!r}}}}}: "
                f"its thresholds are {', '.join(known)}."
            )
        for key, value in values.items():
            if key not in known:
                raise ValueError(
                    f"the rule {name!r} has no threshold {key!r}. {meant(key, known)}It has "
                    f"{', '.join(known) or 'none'}"
                )
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"the threshold {key!r} of {name!r} is a number; got {value!r}")
            if not (0 <= value < math.inf and (value > 0 or known[key].value == 0)):
                raise ValueError(f"the threshold {key!r} of {name!r} is a number above 0; got {value}")
        checked[name] = {key: float(value) for key, value in values.items()}
    return checked
