"""How well depths 6, 12 and 24 predict depth 48: known laws, and reference variants really built.

    python tests/benchmarks/prediction.py [--seeds 40] [--resamples 100] [--simulations 200] [--out FILE]

Known laws: Δ of five replicates per depth is drawn about a law, again and again, and the prediction is
held against the law and against new draws at depth 48.

Reference variants: each is measured at initialisation at 6, 12, 24 and 48 blocks with many seeds. Then
five seeds per depth are drawn again and again, depth 48 is predicted from 6, 12 and 24, and the
prediction is held against all the nets that were built there.

Beside each stands the rule in common use, a straight line through all replicates.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

import gradscope
from gradscope import reference

DEPTHS = (6, 12, 24)
TARGET = 48
REPLICATES = 5


#: What Δ may follow over depth; replicates lie about it with a variance of .06² nats² per block.
TRUTHS: dict[str, Callable[[float], float]] = {
    "flat: −.4": lambda depth: -0.4,
    "linear: −L/4": lambda depth: -depth / 4,
    "linear with ends: −2 − L/4": lambda depth: -2 - depth / 4,
    "logarithm: ½ ln(1 + L)": lambda depth: 0.5 * math.log1p(depth),
    "root: .8 √L": lambda depth: 0.8 * math.sqrt(depth),
    "power: .05 L^1.5": lambda depth: 0.05 * depth**1.5,
    "saturating: −2 (1 − e^(−L/12))": lambda depth: -2 * (1 - math.exp(-depth / 12)),
    "saturating: −3 (1 − e^(−L/6))": lambda depth: -3 * (1 - math.exp(-depth / 6)),
    "take-off: ½ (e^(L/24) − 1)": lambda depth: 0.5 * (math.exp(depth / 24) - 1),
    "take-off: .2 (e^(L/16) − 1)": lambda depth: 0.2 * (math.exp(depth / 16) - 1),
}
WALK = 0.06


@dataclass(frozen=True)
class Row:
    """One truth: what was measured at the target, and how often predictions held it."""

    truth: str
    mean: float
    sd: float
    predicted: float
    single: float
    expected: float
    width: float
    line_single: float
    line_expected: float
    line_width: float


def by_line(delta: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Least squares a + b·L through all replicates: centre, half width of one net and of the mean."""
    x = np.repeat(np.asarray(DEPTHS, dtype=float), [len(d) for d in delta])
    design = np.column_stack([np.ones_like(x), x])
    y = np.concatenate(delta)
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    degrees = len(y) - 2
    variance = float(np.sum((y - design @ coefficients) ** 2)) / degrees
    row = np.asarray([1.0, TARGET])
    leverage = float(row @ np.linalg.inv(design.T @ design) @ row)
    reach = float(stdtrit(degrees, 0.975))
    spread = math.sqrt(variance)
    return (
        float(row @ coefficients),
        reach * spread * math.sqrt(1 + leverage),
        reach * spread * leverage**0.5,
    )


def held(truth: str, draws: Iterator[tuple[list[np.ndarray], np.ndarray]], mean: float) -> Row:
    """Predictions from five replicates per depth, against Δ of nets at the target and their mean."""
    columns: list[tuple[float, ...]] = []
    spreads: list[float] = []
    for delta, built in draws:
        sources = [
            np.exp(np.linspace(1, 0, depth + 1) * each[:, None])
            for depth, each in zip(DEPTHS, delta, strict=True)
        ]
        found = gradscope.predict(sources, TARGET)
        centre, one, average = by_line(delta)
        # A net without any spread is predicted to within the rounding of its logarithms.
        slack = 1e-9
        inside = (built >= found.single.low - slack) & (built <= found.single.high + slack)
        columns.append(
            (
                found.expected.estimate,
                float(inside.mean()),
                found.expected.low - slack <= mean <= found.expected.high + slack,
                found.single.high - found.single.low,
                float(np.mean(np.abs(built - centre) <= one + slack)),
                abs(mean - centre) <= average + slack,
                2 * one,
            )
        )
        spreads.append(float(built.std(ddof=1)))
    values = np.asarray(columns, dtype=float)
    shares = values.mean(0)
    middles = np.median(values, axis=0)
    return Row(
        truth=truth,
        mean=mean,
        sd=float(np.mean(spreads)),
        predicted=float(middles[0]),
        single=float(shares[1]),
        expected=float(shares[2]),
        width=float(middles[3]),
        line_single=float(shares[4]),
        line_expected=float(shares[5]),
        line_width=float(middles[6]),
    )


def simulated(truth: str, simulations: int) -> Row:
    """Hold predictions of a law that is known against it."""
    law = TRUTHS[truth]
    rng = np.random.default_rng(1)

    def draws() -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        for _ in range(simulations):
            yield (
                [rng.normal(law(d), WALK * math.sqrt(d), REPLICATES) for d in DEPTHS],
                rng.normal(law(TARGET), WALK * math.sqrt(TARGET), 1000),
            )

    return held(truth, draws(), law(TARGET))


def norms(variant: str, depth: int, seeds: int, first_seed: int, width: int = 32) -> np.ndarray:
    """Gradient flow [seeds, depth + 1] of freshly initialised nets, input end first, in float64."""
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    record = gradscope.measure(
        lambda: reference.Transformer(variant, depth=depth, width=width),
        (tokens[:, :-1], tokens[:, 1:]),
        reference.next_token_loss,
        seeds,
        seed=first_seed,
        dtype=torch.float64,
        statistics=["l2"],
    )
    return np.asarray(gradscope.profile(record).value)


def judged(variant: str, seeds: int, resamples: int) -> Row:
    """Measure one variant and hold predictions from five seeds per depth against the target."""
    built = {
        depth: np.log(found[:, 0] / found[:, -1])
        for depth in (*DEPTHS, TARGET)
        for found in [norms(variant, depth, seeds, 1000 * depth)]
    }
    rng = np.random.default_rng(0)
    draws = (
        ([built[d][rng.choice(seeds, REPLICATES, replace=False)] for d in DEPTHS], built[TARGET])
        for _ in range(resamples)
    )
    return held(variant, draws, float(built[TARGET].mean()))


def table(first: str, rows: Iterable[Row]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [
        f"| {first} | Δ at 48, mean ± sd | predicted (median) | one net [%] | mean [%] | width "
        "| line: one net [%] | line: mean [%] | line: width |",
        "| --- " + "| ---: " * 8 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row.truth} | {row.mean:.3f} ± {row.sd:.3f} | {row.predicted:.3f} "
            f"| {100 * row.single:.0f} | {100 * row.expected:.0f} | {row.width:.3g} "
            f"| {100 * row.line_single:.0f} | {100 * row.line_expected:.0f} | {row.line_width:.3g} |"
        )
    return lines


def report(
    variants: Sequence[str],
    seeds: int,
    resamples: int,
    simulations: int,
    progress: Callable[[str], None],
) -> list[str]:
    """The lines of the Markdown file."""

    def rows(names: Iterable[str], of: Callable[[str], Row]) -> Iterator[Row]:
        for name in names:
            progress(name)
            yield of(name)

    return [
        "# Predicting depth 48 from depths 6, 12 and 24",
        "",
        "Five replicates per depth, Δ in nats. *One net* is the share of nets at 48 blocks inside the",
        "95 % interval for one net, *mean* how often the 95 % interval of the mean holds the mean there,",
        "*width* the median width of the interval for one net (the least possible is 3.9 sd). *Line* is",
        "the same of a straight line through all replicates by least squares. Made by",
        "`python tests/benchmarks/prediction.py`.",
        "",
        "## Reference transformers, really built",
        "",
        f"At torch's default initialisation, width 32, {seeds} seeds per depth; {resamples} predictions,",
        "each from five of these seeds per depth.",
        "",
        *table("variant", rows(variants, lambda name: judged(name, seeds, resamples))),
        "",
        "## Known laws",
        "",
        f"{simulations} simulations; the variance over replicates is .06² nats² per block.",
        "",
        *table("law", rows(TRUTHS, lambda name: simulated(name, simulations))),
    ]


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=40, help="seeds per depth (40)")
    parser.add_argument("--resamples", type=int, default=100, help="predictions per variant (100)")
    parser.add_argument("--simulations", type=int, default=200, help="simulations per law (200)")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    lines = report(
        list(reference.VARIANTS),
        arguments.seeds,
        arguments.resamples,
        arguments.simulations,
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
