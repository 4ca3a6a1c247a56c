"""What a health rule is, and what it finds. A rule of one's own is one decorated function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from gradscope.analysis.view import Site, View

__all__ = [
    "RULES",
    "SEVERITIES",
    "Finding",
    "Limits",
    "NotChecked",
    "Rule",
    "Severity",
    "Threshold",
    "register",
    "rule",
]

Severity = Literal["critical", "warning", "note"]

#: From the gravest. A ``note`` is worth knowing and no fault.
SEVERITIES: Final[tuple[Severity, ...]] = ("critical", "warning", "note")


class NotChecked(NamedTuple):
    """A rule that could not look, at all or at something, and why."""

    rule: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A number that a rule compares with.

    Attributes:
        value: the number.
        unit: its unit; ``1`` for a ratio.
        source: where it is from: a paper, or why it is this number.
    """

    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        rule: the rule's name.
        title: what it is, in a few words.
        severity: ``critical`` (training is or will be lost), ``warning`` or ``note``.
        trunk: the trunk's name; empty off the depth axis.
        layers: names of the layers, first the one where it starts.
        depths: their depths l; NaN off the axis.
        steps: first and last step at which it was seen.
        value: the measured number that was compared.
        threshold: what it was compared with.
        threshold_source: where the threshold is from.
        unit: unit of both.
        message: what was seen and where, value against threshold.
        cause: the likely cause.
        remedy: what to do.
        citation: the paper or text behind the rule.
        because_of: index, in `Diagnosis.findings`, of the finding that explains this one; None for a
            root cause.
    """

    rule: str
    title: str
    severity: Severity
    trunk: str
    layers: tuple[str, ...]
    depths: tuple[float, ...]
    steps: tuple[int, int]
    value: float
    threshold: float
    threshold_source: str
    unit: str
    message: str
    cause: str
    remedy: str
    citation: str
    because_of: int | None = None


Judge = Callable[["View", "Limits"], Iterable["Finding | NotChecked"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One health rule.

    Attributes:
        name: the word that ``thresholds=`` and `Finding.rule` use.
        title: what it finds, in a few words.
        severity: that of its findings, unless one says otherwise.
        meaning: what it looks at, with formula and limits: the function's docstring.
        citation: the paper or text behind it.
        thresholds: the numbers that it compares with, by name.
        needs: (signal, statistic) pairs without any value of which it cannot look.
        explained_by: names of the rules whose earlier findings explain those of this one.
        function: (view, limits) → the findings, and `NotChecked` for what it could not judge.
    """

    name: str
    title: str
    severity: Severity
    meaning: str
    citation: str
    thresholds: Mapping[str, Threshold]
    needs: tuple[tuple[str, str], ...]
    explained_by: tuple[str, ...]
    function: Judge

    def __call__(self, view: View, limits: Limits) -> Iterable[Finding | NotChecked]:
        """What the rule finds."""
        return self.function(view, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A rule's thresholds in this diagnosis, and the maker of its findings.

    ``limits["high"]`` is the number.
    """

    rule: Rule
    overridden: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.overridden.get(name, self.rule.thresholds[name].value)

    def finding(
        self,
        threshold: str,
        *,
        value: float,
        message: str,
        cause: str,
        remedy: str,
        steps: tuple[int, int],
        sites: Sequence[Site] = (),
        trunk: str | None = None,
        title: str | None = None,
        severity: Severity | None = None,
        limit: float | None = None,
        because_of: int | None = None,
    ) -> Finding:
        """A finding of this rule.

        Args:
            threshold: name of the threshold that was crossed.
            value: the number that crossed it.
            message: what was seen and where, value against threshold.
            cause: the likely cause.
            remedy: what to do.
            steps: first and last step.
            sites: the layers, first the one where it starts.
            trunk: None: that of the first site.
            title: None: the rule's.
            severity: None: the rule's.
            limit: the number compared with, where it follows from the threshold and the data.
            because_of: leave it out; `diagnose` fills it in.
        """
        source = self.rule.thresholds[threshold]
        return Finding(
            rule=self.rule.name,
            title=title or self.rule.title,
            severity=severity or self.rule.severity,
            trunk=(sites[0].trunk if sites else "") if trunk is None else trunk,
            layers=tuple(dict.fromkeys(site.name for site in sites)),
            depths=tuple({site.name: site.depth for site in reversed(sites)}[n] for n in _names(sites)),
            steps=steps,
            value=value,
            threshold=self[threshold] if limit is None else limit,
            threshold_source="given by the caller" if threshold in self.overridden else source.source,
            unit=source.unit,
            message=message,
            cause=cause,
            remedy=remedy,
            citation=self.rule.citation,
            because_of=because_of,
        )

    def not_checked(self, reason: str) -> NotChecked:
        """The statement that this rule could not look."""
        return NotChecked(self.rule.name, reason)


def _names(sites: Sequence[Site]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(site.name for site in sites))


_RULES: dict[str, Rule] = {}

#: Every rule of the house by name, causes before their symptoms.
RULES: Final[Mapping[str, Rule]] = MappingProxyType(_RULES)


def rule(
    *,
    name: str,
    title: str,
    citation: str,
    thresholds: Mapping[str, Threshold],
    severity: Severity = "warning",
    needs: Sequence[tuple[str, str]] = (),
    explained_by: Sequence[str] = (),
) -> Callable[[Judge], Rule]:
    """Make a `Rule` of a function (view, limits) → findings; its docstring is the meaning.

    A rule of one's own is given to `diagnose`, beside those of the house::

        @gradscope.analysis.rule(
            name="loud",
            title="loud layer",
            citation="my notes",
            thresholds={"high": Threshold(value=50.0, unit="activation", source="my notes")},
            needs=[("activation", "absmax")],
        )
        def loud(view, limits):
            grid = view.grid("activation", "absmax")
            for site, column in zip(grid.sites, grid.value.T):
                if column.max() > limits["high"]:
                    yield limits.finding("high", value=column.max(), sites=[site], ...)

        gradscope.diagnose(record, rules=[*gradscope.analysis.RULES.values(), loud])

    Args:
        name: the word that ``thresholds=`` and `Finding.rule` use.
        title: what it finds, in a few words.
        citation: the paper or text behind it.
        thresholds: the numbers that it compares with, by name.
        severity: of its findings.
        needs: (signal, statistic) pairs without which it cannot look.
        explained_by: names of the rules whose earlier findings explain those of this one.

    Raises:
        ValueError: an unknown severity.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity!r} is none of {', '.join(SEVERITIES)}")

    def made(function: Judge) -> Rule:
        return Rule(
            name=name,
            title=title,
            severity=severity,
            meaning=inspect.getdoc(function) or "",
            citation=citation,
            thresholds=MappingProxyType(dict(thresholds)),
            needs=tuple(needs),
            explained_by=tuple(explained_by),
            function=function,
        )

    return made


def register(made: Rule) -> Rule:
    """Put a rule of the house into `RULES`: from then on it runs by default."""
    if made.name in _RULES:
        raise ValueError(f"a rule {made.name!r} is already registered")
    _RULES[made.name] = made
    return made
