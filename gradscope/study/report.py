"""The study's report, `study.md`: sentences and tables computed from the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from gradscope.study import claims_at_initialisation as at_initialisation
from gradscope.study import claims_in_training as in_training
from gradscope.study.summary import AtInitialisation, InTraining, Study, paired_difference
from gradscope.study.training import BETAS, EPSILON, WEIGHT_DECAY
from gradscope.study.verdict_table import verdict_section
from gradscope.study.words import factor_text, interval_text, number_text

__all__ = ["report"]

#: The pairs that differ in the skip alone: with, without.
PAIRS: Final = (("skip", "no_skip"), ("pre_norm", "no_skip_pre_norm"))

INITIALISATION_PICTURES: Final = (
    "depth_gradient.png",
    "gradient_ratio.png",
    "activation_variance.png",
    "effective_depth.png",
)
TRAINING_PICTURES: Final = ("loss_curves.png", "heatmap.png")

INITIALIZATION_LABELS: Final[Mapping[str, str]] = {
    "torch": "torch's default",
    "xavier": "Xavier",
    "normal": "N(0, .02)",
    "he": "He",
}


# -- the report ----------------------------------------------------------------------------------


def report(study: Study, pictures: Mapping[str, str]) -> str:
    """The text of `study.md`.

    Args:
        study: everything measured.
        pictures: caption by file name, in the order in which they were drawn.
    """
    sections = (
        _opening(study),
        _section("At initialisation", _initialisation_claims(study)),
        _pictures(
            pictures,
            (
                "depth_gradient.png",
                "gradient_ratio.png",
                "activation_variance.png",
                "effective_depth.png",
            ),
        ),
        "### Other initialisations\n\n" + _initialization_table(study),
        "### Every variant at torch's default initialisation\n\n" + _variant_table(study),
        verdict_section(study),
        _section("In training", _training_claims(study)),
        _pictures(pictures, TRAINING_PICTURES),
        _training_tables(study),
        _READING.format(steps=study.plan.steps, epsilon=EPSILON),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


_OPENING: Final = """\
# Depth study

Written by `gradscope study`{plan_note} from what it measured: every sentence below is chosen by a rule
from the numbers, and the rules stand in `gradscope/study/claims_at_initialisation.py` and
`claims_in_training.py`. Square brackets hold 95 % intervals, Student's t over seeds. {code}.

**Nets.** Causal transformers on bytes, {width} features, {heads} heads, context {context}.
**At initialisation**, in float64, denormals kept: {variants} variants at {depths} blocks, {seeds} seeds
each, one forward and backward pass over {measure_batch} × {context} bytes of real text; and
{initialization_variants} of the variants under {initializations} further initialisations.
**In training**, in float32: {training_variants} variants at {training_depths} blocks, {steps} steps of
{batch} × {context} bytes, AdamW (betas {betas}, epsilon {epsilon:g}, weight decay {weight_decay:g}),
{warmup_steps} steps of linear warm-up and a constant rate after it, no clipping. {rates} {rate_seeds}
Under one seed every variant sees the same batches in the same order. The training processes flush
denormals to zero, which CPUs compute several times slower; the Records say so (`flush_denormal`).

**Text.** {text}: {train_bytes:,} bytes to train on and {validation_bytes:,} held out, of which
{validation_windows} windows of {context} bytes are the validation set. Byte frequencies alone give
{unigram} nats per byte there, guessing {guessing}."""


def _opening(study: Study) -> str:
    plan, text = study.plan, study.text
    return _OPENING.format(
        plan_note="" if plan.name == "default" else f" (the {plan.name} plan)",
        code=study.code[0].upper() + study.code[1:],
        width=plan.width,
        heads=plan.heads,
        context=plan.context,
        variants=len(plan.variants),
        depths=_numbers(plan.depths),
        seeds=plan.seeds,
        measure_batch=plan.measure_batch,
        initialization_variants=len(plan.initialization_variants),
        initializations=len(plan.initializations),
        training_variants=len(plan.training_variants),
        training_depths=_numbers(plan.training_depths),
        steps=plan.steps,
        batch=plan.batch,
        betas=_numbers(BETAS),
        epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=plan.warmup_steps,
        rates=_rates(study),
        rate_seeds=_seeds(study),
        text=text.name[0].upper() + text.name[1:],
        train_bytes=len(text.train),
        validation_bytes=len(text.validation),
        validation_windows=plan.validation_windows,
        unigram=number_text(study.unigram_nats, 3),
        guessing=number_text(math.log(256), 3),
    )


def _rates(study: Study) -> str:
    plan = study.plan
    by_rates: dict[tuple[float, ...], list[str]] = {}
    for variant in plan.training_variants:
        by_rates.setdefault(plan.rates(variant), []).append(f"“{study.labels[variant]}”")
    if len(by_rates) == 1:
        (rates,) = by_rates
        return f"Every variant tries the learning rates {_numbers(rates)}."
    return (
        "Learning rates tried: "
        + "; ".join(f"{_numbers(rates)} for {', '.join(names)}" for rates, names in by_rates.items())
        + "."
    )


def _seeds(study: Study) -> str:
    plan = study.plan
    best = max(plan.best_seeds, plan.rate_seeds)
    if plan.rate_seeds >= best:
        return (
            f"Each rate is run with {best} seeds; the best rate is that of the lowest mean final\n"
            "validation loss."
        )
    return (
        f"Each rate is run with {_counted(plan.rate_seeds, 'seed')};\nthe rate with the lowest final "
        f"validation loss is the variant's best, and is run with {best} seeds in all\n"
        "(so the first of them had a part in choosing it)."
    )


def _initialisation_claims(study: Study) -> Iterator[str]:
    labels = study.labels
    flows = {v: [a.flow for a in study.by_depth(v)] for v in study.plan.variants}
    tokens = {v: [a.tokens for a in study.by_depth(v)] for v in study.plan.variants}
    if "no_skip" in flows and "pre_norm" in flows:
        yield at_initialisation.contrast(
            labels["no_skip"], flows["no_skip"], labels["pre_norm"], flows["pre_norm"]
        )
    if "no_skip" in flows:
        yield at_initialisation.flow(labels["no_skip"], flows["no_skip"])
        by_initialization = {"torch": flows["no_skip"]} | {
            name: [a.flow for a in study.by_depth("no_skip", name)] for name in study.plan.initializations
        }
        yield at_initialisation.initialisation_dependence(
            labels["no_skip"],
            {INITIALIZATION_LABELS.get(n, n): f for n, f in by_initialization.items() if f},
        )
    for variant in ("no_skip_pre_norm", "no_skip_post_norm"):
        if variant in flows:
            yield at_initialisation.dead_net(labels[variant], flows[variant], tokens[variant])
    if "pre_norm" in flows:
        yield at_initialisation.dead_net(labels["pre_norm"], flows["pre_norm"], tokens["pre_norm"])
        yield at_initialisation.not_flat(labels["pre_norm"], flows["pre_norm"])
    if "post_norm" in flows:
        yield at_initialisation.post_norm_alone(labels["post_norm"], flows["post_norm"])
    others = {labels[v]: f for v, f in flows.items() if v not in ("no_skip", "post_norm")}
    if others:
        yield at_initialisation.grouped_flows(others)
    depth = max(study.plan.depths)
    ends = {labels[v]: study.by_depth(v)[-1] for v in study.plan.variants}
    branches = next(iter(ends.values())).branches
    yield at_initialisation.effective_depths(
        {n: e.effective_depth for n, e in ends.items()}, depth, branches
    )


def _training_claims(study: Study) -> Iterator[str]:
    for depth in study.plan.training_depths:
        trained = {v: study.training[v, depth] for v in study.plan.training_variants}
        head = f"At {depth} blocks. " if len(study.plan.training_depths) > 1 else ""
        for one in trained.values():
            yield head + in_training.learned_context(one.trained, study.unigram_nats)
        for with_skip, without in PAIRS:
            if with_skip in trained and without in trained:
                a, b = trained[with_skip], trained[without]
                yield head + in_training.better_with(
                    a.trained, b.trained, paired_difference(a.best, b.best)
                )
                yield head + in_training.faster_with(a.trained, b.trained)
        yield head + in_training.rate_edges([one.trained for one in trained.values()])
        for one in trained.values():
            for sentence in (
                in_training.flow_change(one.trained.label, one.first, one.last),
                in_training.zeros_in_training(one.trained.label, one.first, one.last),
            ):
                if sentence is not None:
                    yield head + sentence
    if study.plan.robustness:
        depth = max(study.plan.training_depths)
        pair = [study.training[v, depth] for v in ("pre_norm", "post_norm")]
        runs = [[run for at_rate in one.by_rate.values() for run in at_rate] for one in pair]
        difference = paired_difference(*runs, diverged_nats=math.log(256))
        yield in_training.robustness(pair[0].trained.label, pair[1].trained.label, difference, depth)


_INITIALIZATION_TABLE: Final = """\
Mean increment ln(g_l/g_l+1) of the gradient flow per block: below 0 the gradient falls towards the input.
The columns on the right are at L = {depth}: the gradient at the trunk's input over that at its output
(geometric mean over seeds), the mean cosine of different tokens at the end of the trunk, and the gradient
of the query and key weights over that of the value weights in the first and in the last block.

"""

_EFFECTIVE_DEPTH: Final = """\
D is the mean number of residual branches that the gradient at the trunk's input has crossed, of n = 2 L
(`gradscope.effective_depth`). It says how deep a net is for its gradient and is no score: without skips
D = n by definition, and a net whose branches are silent has D = 0.

"""


def _initialization_table(study: Study) -> str:
    plan = study.plan
    header = ["initialisation", "variant", *(f"nats per block, L = {d}" for d in sorted(plan.depths))]
    header += ["first/last", "token cosine", "q-k/v first", "q-k/v last"]
    rows: list[list[str]] = []
    for initialization in ("torch", *plan.initializations):
        for variant in plan.initialization_variants:
            found = study.by_depth(variant, initialization)
            if found:
                rows.append(
                    [
                        INITIALIZATION_LABELS.get(initialization, initialization),
                        study.labels[variant],
                        *(_increment(a) for a in found),
                        *_ends(found[-1]),
                    ]
                )
    return _INITIALIZATION_TABLE.format(depth=max(plan.depths)) + _markdown(header, rows)


def _variant_table(study: Study) -> str:
    depth = max(study.plan.depths)
    header = ["variant", *(f"nats per block, L = {d}" for d in sorted(study.plan.depths))]
    header += ["first/last", "token cosine", "q-k/v first", "q-k/v last", "act_var h_0 → h_L"]
    rows: list[list[str]] = []
    for variant in study.plan.variants:
        found = study.by_depth(variant)
        end = found[-1]
        first, last = (_short(end.geometric_mean(f"act_var_{where}")) for where in ("first", "last"))
        rows.append(
            [study.labels[variant], *(_increment(a) for a in found), *_ends(end), f"{first} → {last}"]
        )
    depths = [
        [study.labels[v], *(_depth_cell(a) for a in study.by_depth(v))] for v in study.plan.variants
    ]
    return (
        f"As above; the columns on the right are at L = {depth}.\n\n"
        + _markdown(header, rows)
        + "\n\n### Effective depth\n\n"
        + _EFFECTIVE_DEPTH
        + _markdown(["variant", *(f"D, n = {2 * d}" for d in sorted(study.plan.depths))], depths)
    )


def _training_tables(study: Study) -> str:
    parts: list[str] = []
    for depth in study.plan.training_depths:
        seeds = study.plan.rate_seeds
        rows = [_training_row(study.training[v, depth], seeds) for v in study.plan.training_variants]
        header = [
            "variant",
            f"final validation loss by learning rate ({_counted(seeds, 'seed')})",
            "best rate",
            "final validation loss",
            "Δ first step",
            "Δ last step",
        ]
        parts.append(
            f"### Training at {depth} blocks\n\n"
            "Losses in nats per byte; Δ in nats, over the runs at the best rate.\n\n"
            + _markdown(header, rows)
        )
    return "\n\n".join(parts)


def _training_row(one: InTraining, seeds: int) -> list[str]:
    tried = ", ".join(
        f"{rate:g}: {_loss(sum(run.outcome.final_loss for run in runs[:seeds]) / seeds)}"
        for rate, runs in one.by_rate.items()
    )
    edge = one.trained.rate in (one.trained.rates[0], one.trained.rates[-1])
    return [
        one.trained.label,
        tried,
        f"{one.trained.rate:g}{' (edge)' if edge and len(one.trained.rates) > 1 else ''}",
        interval_text(one.trained.final, 3) if math.isfinite(one.trained.final.estimate) else "diverged",
        _delta(one.first),
        _delta(one.last),
    ]


_READING: Final = """\
## How to read this

- Δ = ln(g_0/g_L), with g_l the gradient flow: the norm of ∂loss/∂h_l per position, times the number of
  loss terms. h_0 is the first block's input, h_L the last block's output. The increment per block is Δ
  over L.
- At initialisation a replicate is a fresh initialisation on one and the same batch: the intervals are
  about the architecture at this width and on this text. In training a replicate is a run; few of them
  give wide intervals, and what does not stand out from them is not claimed.
- A preserved norm of the gradient alone does not say that a net can learn. Where all tokens have become
  one (token cosine 1), queries and keys get no gradient, and the net is dead whatever the norm.
- AdamW makes steps of one size whatever the gradient's, but only while it is above epsilon
  ({epsilon:g}): a parameter whose gradient lies far below hardly moves.
- {steps} steps of a small net are the start of training. What holds there need not hold at the end.
- An exact 0 in a Record is a measured zero (underflow, or by construction), a missing value has a status
  that says why, and NaN with status `ok` is a measured NaN.
- `table.csv` has the numbers seed by seed, `records/` everything that was measured:
  `gradscope show records/FILE.jsonl`, or `gradscope.Record.load` in Python."""


# -- pieces --------------------------------------------------------------------------------------


def _section(title: str, sentences: Iterable[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def _pictures(pictures: Mapping[str, str], names: Iterable[str]) -> str:
    return "\n\n".join(f"![{_alt(n)}]({n})\n\n*{pictures[n]}*" for n in names if n in pictures)


def _alt(name: str) -> str:
    words = name.removesuffix(".png").replace("_", " ")
    return words[0].upper() + words[1:]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _increment(one: AtInitialisation) -> str:
    flow = one.flow
    left_out = [f"{flow.zeros} zeros"] * bool(flow.zeros) + [f"{flow.nonfinite} overflown"] * bool(
        flow.nonfinite
    )
    text = interval_text(flow.increment, 3)
    return f"{text} ({' and '.join(left_out)} left out)" if left_out else text


def _ends(one: AtInitialisation) -> list[str]:
    tokens = one.tokens
    delta = one.flow.delta.estimate
    ratio = "overflow" if one.flow.nonfinite and not math.isfinite(delta) else factor_text(delta)
    return [
        ratio,
        *(_short(x.estimate) for x in (tokens.token_cosine, tokens.qk_first, tokens.qk_last)),
    ]


def _depth_cell(one: AtInitialisation) -> str:
    status = one.samples["effective_depth"].status
    why = next((word for word in status if word != "ok"), None)
    return interval_text(one.effective_depth) if why is None else f"absent: {why}"


def _delta(flow: at_initialisation.Flow) -> str:
    if flow.zeros:
        return f"{interval_text(flow.delta)} ({flow.zeros} of {flow.values} exactly 0)"
    return interval_text(flow.delta)


def _loss(value: float) -> str:
    return number_text(value, 3) if math.isfinite(value) else "diverged"


def _short(x: float) -> str:
    return f"{x:.3g}".replace("-", "−") if x == x else "absent"


def _numbers(numbers: Iterable[float]) -> str:
    words = [f"{n:g}" for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _counted(count: int, noun: str) -> str:
    return f"{'one' if count == 1 else count} {noun}{'s' * (count != 1)}"
