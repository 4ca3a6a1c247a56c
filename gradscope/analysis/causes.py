"""Findings in order: what replicates have in common once, and symptoms under their causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradscope.analysis.finding import SEVERITIES, Finding, Rule

__all__ = ["over_replicates", "under_their_causes"]


def over_replicates(found: Sequence[Finding], replicates: int) -> list[Finding]:
    """The same finding of several replicates once: that with the most layers, over the steps of all.

    The same is: of one rule, with one title, the same first layer, and steps that overlap.
    """
    if replicates < 2:
        return list(found)
    kept: list[tuple[Finding, int]] = []
    for finding in found:
        for i, (other, count) in enumerate(kept):
            if _same(finding, other):
                widest = max(other, finding, key=lambda item: len(item.layers))
                steps = (
                    min(other.steps[0], finding.steps[0]),
                    max(other.steps[1], finding.steps[1]),
                )
                kept[i] = replace(widest, steps=steps), count + 1
                break
        else:
            kept.append((finding, 1))
    many = "{} One of {} such findings over the replicates."
    return [replace(f, message=many.format(f.message, n)) if n > 1 else f for f, n in kept]


def _same(a: Finding, b: Finding) -> bool:
    together = a.steps[0] <= b.steps[1] and b.steps[0] <= a.steps[1]
    return together and (a.rule, a.title, a.trunk, a.layers[:1]) == (
        b.rule,
        b.title,
        b.trunk,
        b.layers[:1],
    )


def under_their_causes(found: Sequence[Finding], asked: Mapping[str, Rule]) -> tuple[Finding, ...]:
    """Each finding under the one that explains it, root causes first.

    A cause is a finding of one of the rules in ``explained_by`` that began no later, on the same trunk
    or off the axis. Of several, the one whose rule stands first in ``explained_by``. Causes precede
    their symptoms in one total order (first step, then the order of the rules), so that no circle arises.
    """
    place = {name: i for i, name in enumerate(asked)}
    order = sorted(range(len(found)), key=lambda i: (found[i].steps[0], place[found[i].rule], i))
    cause: dict[int, int | None] = {}
    for position, i in enumerate(order):
        wanted = asked[found[i].rule].explained_by
        candidates = [j for j in order[:position] if _explains(found[j], found[i], wanted)]
        cause[i] = min(candidates, key=lambda j: wanted.index(found[j].rule), default=None)
    below: dict[int | None, list[int]] = {}
    for i in order:
        below.setdefault(cause[i], []).append(i)

    def gravest(i: int) -> int:
        return min([SEVERITIES.index(found[i].severity), *(gravest(j) for j in below.get(i, []))])

    result: list[Finding] = []

    def place_under(i: int, above: int | None) -> None:
        at = len(result)
        result.append(replace(found[i], because_of=above))
        for j in sorted(below.get(i, []), key=gravest):
            place_under(j, at)

    for i in sorted(below.get(None, []), key=gravest):  # stable: by time within one severity
        place_under(i, None)
    return tuple(result)


def _explains(cause: Finding, symptom: Finding, wanted: tuple[str, ...]) -> bool:
    if cause.rule not in wanted or cause.severity == "note":
        return False
    # NaN does not stay on its trunk: it reaches the loss, and from there every gradient.
    together = cause.trunk == symptom.trunk or "" in (cause.trunk, symptom.trunk)
    return together or cause.severity == "critical"
