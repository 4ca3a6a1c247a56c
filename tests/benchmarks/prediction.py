"""How well depths 6, 12 and 24 predict depth 48: reference variants, really built.

    python tests/benchmarks/prediction.py [--seeds 40] [--resamples 100] [--out FILE]

Every reference variant is measured at initialisation at 6, 12, 24 and 48 blocks with many seeds. Then
five seeds per depth are drawn again and again, depth 48 is predicted from 6, 12 and 24, and the
prediction is held against all the nets that were built there: the share of single nets inside the
interval for one net (nominal 95), and how often the interval of the mean holds the measured mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import gradscope
from gradscope import reference

DEPTHS = (6, 12, 24)
TARGET = 48
REPLICATES = 5


@dataclass(frozen=True)
class Row:
    """One variant: what was measured at the target, and how often predictions held it."""

    variant: str
    mean: float
    sd: float
    predicted: float
    single: float
    expected: float
    width: float


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
    built = {depth: norms(variant, depth, seeds, 1000 * depth) for depth in (*DEPTHS, TARGET)}
    truth = np.log(built[TARGET][:, 0] / built[TARGET][:, -1])
    rng = np.random.default_rng(0)
    single: list[float] = []
    expected: list[bool] = []
    centre: list[float] = []
    width: list[float] = []
    for _ in range(resamples):
        sources = [built[d][rng.choice(seeds, REPLICATES, replace=False)] for d in DEPTHS]
        found = gradscope.predict(sources, TARGET)
        # A net without any spread is predicted to within the rounding of its logarithms.
        slack = 1e-9
        inside = (truth >= found.single.low - slack) & (truth <= found.single.high + slack)
        single.append(float(inside.mean()))
        expected.append(found.expected.low - slack <= truth.mean() <= found.expected.high + slack)
        centre.append(found.expected.estimate)
        width.append(found.single.high - found.single.low)
    return Row(
        variant=variant,
        mean=float(truth.mean()),
        sd=float(truth.std(ddof=1)),
        predicted=float(np.median(centre)),
        single=float(np.mean(single)),
        expected=float(np.mean(expected)),
        width=float(np.median(width)),
    )


def report(
    variants: Sequence[str], seeds: int, resamples: int, progress: Callable[[str], None]
) -> list[str]:
    """The lines of the Markdown table."""
    lines = [
        "# Predicting depth 48 from depths 6, 12 and 24",
        "",
        f"Reference transformers at torch's default initialisation, width 32, {seeds} seeds per depth;",
        f"{resamples} predictions from five seeds per depth each. Δ in nats; *one net* is the share of",
        "the nets built at 48 blocks inside the 95 % interval for one net, *mean* how often the 95 %",
        "interval of the mean holds the measured mean. Made by `python tests/benchmarks/prediction.py`.",
        "",
        "| variant | Δ at 48, mean ± sd | predicted (median) | one net [%] | mean [%] | width |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in variants:
        progress(variant)
        row = judged(variant, seeds, resamples)
        lines.append(
            f"| {row.variant} | {row.mean:.3f} ± {row.sd:.3f} | {row.predicted:.3f} | "
            f"{100 * row.single:.0f} | {100 * row.expected:.0f} | {row.width:.3g} |"
        )
    return lines


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=40, help="seeds per depth (40)")
    parser.add_argument("--resamples", type=int, default=100, help="predictions per variant (100)")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    lines = report(
        list(reference.VARIANTS),
        arguments.seeds,
        arguments.resamples,
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
