"""The study's verdicts: forward and backward, every variant at every depth, corrected together."""

from __future__ import annotations

from typing import Final

from gradscope.analysis import Verdict, verdicts
from gradscope.study.summary import Study
from gradscope.study.words import number_text

__all__ = ["verdict_rows", "verdict_section"]

_TEXT: Final = """\
`gradscope.verdict` on the seeds of each variant at torch's default initialisation: *vanishing* or
*exploding* where the 95 % interval of Δ lies beyond 3 nats, *preserved* where it lies inside (*flat*:
within a factor of two), otherwise *inconclusive*; then Δ. Gradient and activation (as amplitude, from the
input to the loss) apart; Holm's correction over all {count} verdicts of this table, so that none stands
out by the number of tries. A verdict is about the norm alone: the token cosine above tells which nets are
preserved but dead. The family is that of the gradient's decay at {depth} blocks, with its weight.

"""


def verdict_rows(study: Study) -> tuple[list[str], list[list[str]], int]:
    """Header and rows of the table, and the number of verdicts in it."""
    found = {
        (one.unit.variant, one.unit.depth): one.record
        for variant in study.plan.variants
        for one in study.by_depth(variant)
    }
    names = {f"{variant} {depth}": key for key in found for variant, depth in [key]}
    given = verdicts({name: found[key] for name, key in names.items()})
    depths = sorted(study.plan.depths)
    header = [
        "variant",
        *(f"gradient, L = {d}" for d in depths),
        *(f"activation, L = {d}" for d in depths),
    ]
    header.append("family")
    rows: list[list[str]] = []
    for variant in study.plan.variants:
        cells = [
            _cell(given[f"{variant} {depth}", quantity]) if (variant, depth) in found else "not measured"
            for quantity in ("grad_l2", "act_mean_square")
            for depth in depths
        ]
        rows.append([study.labels[variant], *cells, _family(given[f"{variant} {depths[-1]}", "grad_l2"])])
    return header, rows, len(given)


def verdict_section(study: Study) -> str:
    """The section's text and table, Markdown."""
    header, rows, count = verdict_rows(study)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "### Verdicts\n\n" + _TEXT.format(count=count, depth=max(study.plan.depths)) + table


def _cell(found: Verdict) -> str:
    detail = f" ({found.detail})" if found.detail else ""
    estimate = found.delta.estimate
    return (
        f"{found.word}{detail}"
        if estimate != estimate
        else (f"{found.word}{detail}, {number_text(estimate, 2)}")
    )


def _family(found: Verdict) -> str:
    fit = found.fit
    return f"{fit.family} ({fit.weights[fit.family]:.2f})" if fit.ok else fit.status.split(":")[0]
