"""How often the verdict is wrong, how often it is silent, how often the intervals cover: by simulation.

    python tests/benchmarks/calibration.py [--simulations 4000] [--fits 300] [--workers N] [--out FILE]

Profiles are simulated whose truth is known: a mean curve plus a random walk over depth (sd per layer
.06 or .2) plus measurement noise (sd 0 or .1), the nulls on the boundary of the rule (true Δ = ∓3), where
a false verdict is most likely. The same profiles are judged by gradscope through its public functions and
by the two rules in common use, which are written out here: the ratio of the endpoints, and a line by
ordinary least squares. The table goes to standard output, and to ``--out``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gradscope

THRESHOLD = 3.0
LAYERS = (12, 24, 48)
WALKS = (0.06, 0.2)
NOISES = (0.0, 0.1)


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation."""

    layers: int
    replicates: int
    walk: float
    noise: float


def profiles(
    mean: np.ndarray, cell: Cell, simulations: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Arrays [R, L + 1] of positive values whose logarithms are mean + walk + noise, input end first."""
    for _ in range(simulations):
        steps = rng.normal(0.0, cell.walk, (cell.replicates, cell.layers))
        y = np.zeros((cell.replicates, cell.layers + 1))
        y[:, 1:] = np.cumsum(steps, axis=1)
        yield np.exp(mean + y + rng.normal(0.0, cell.noise, y.shape))


def best_possible(cell: Cell) -> float:
    """Share of flat profiles that a rule could call preserved that is *told* the spread of Δ.

    |Δ̂| + 1.96·s/√R < 3, with Δ̂ normal of standard deviation s/√R: no rule that keeps both errors at
    2.5 % and must estimate s does better.
    """
    from scipy.stats import norm

    error = math.sqrt((cell.layers * cell.walk**2 + 2 * cell.noise**2) / cell.replicates)
    return max(0.0, 2 * float(norm.cdf(THRESHOLD / error - norm.ppf(0.975))) - 1)


def slope(cell: Cell, delta: float) -> np.ndarray:
    """A mean curve, input end first, that changes by Δ from the loss to the input."""
    return -delta * np.arange(cell.layers + 1) / cell.layers


# -- three ways to a verdict: word, interval of Δ ----------------------------------------------------

Judge = Callable[[np.ndarray], tuple[str, float, float]]


def by_gradscope(values: np.ndarray) -> tuple[str, float, float]:
    """The library, through its public function."""
    found = gradscope.verdict(values)
    return found.word, found.delta.low, found.delta.high


def by_endpoints(values: np.ndarray) -> tuple[str, float, float]:
    """The rule of most tools: the ratio of the first layer's norm to the last's, against e^±3."""
    delta = float(np.log(values[:, 0].mean() / values[:, -1].mean()))
    word = "vanishing" if delta < -THRESHOLD else "exploding" if delta > THRESHOLD else "preserved"
    return word, delta, delta


def by_least_squares(values: np.ndarray) -> tuple[str, float, float]:
    """A line through the mean log-profile by ordinary least squares; slope × L with its t interval."""
    from scipy.stats import linregress, t

    y = np.log(values).mean(0)
    x = np.arange(len(y), dtype=float)
    line = linregress(x, y)
    length = len(y) - 1
    half = float(t.ppf(0.975, len(y) - 2)) * float(line.stderr) * length
    low, high = -float(line.slope) * length - half, -float(line.slope) * length + half
    if high < -THRESHOLD:
        return "vanishing", low, high
    if low > THRESHOLD:
        return "exploding", low, high
    return ("preserved" if low > -THRESHOLD and high < THRESHOLD else "inconclusive"), low, high


JUDGES: dict[str, Judge] = {
    "gradscope": by_gradscope,
    "endpoint ratio": by_endpoints,
    "least squares": by_least_squares,
}


@dataclass(frozen=True)
class Rates:
    """Shares of the words over the simulations of one cell, and of intervals that hold the truth."""

    vanishing: float
    exploding: float
    preserved: float
    inconclusive: float
    covered: float
    drift: float


def rates(judge: str, cell: Cell, delta: float, simulations: int, seed: int) -> Rates:
    """Judge profiles whose true change is Δ by the rule of that name."""
    rng = np.random.default_rng([seed, cell.layers, cell.replicates, int(1000 * cell.walk)])
    words: Counter[str] = Counter()
    covered = drift = 0
    for values in profiles(slope(cell, delta), cell, simulations, rng):
        word, low, high = JUDGES[judge](values)
        words[word] += 1
        covered += low <= delta <= high
        drift += not low <= 0 <= high
    share = {word: words[word] / simulations for word in words}
    return Rates(
        vanishing=share.get("vanishing", 0.0),
        exploding=share.get("exploding", 0.0),
        preserved=share.get("preserved", 0.0),
        inconclusive=share.get("inconclusive", 0.0),
        covered=covered / simulations,
        drift=drift / simulations,
    )


def allowed(rate: float, simulations: int) -> float:
    """The rate plus two standard errors of a share of so many simulations."""
    return rate + 2 * math.sqrt(rate * (1 - rate) / simulations)


# -- increments that are no independent Gaussians --------------------------------------------------------

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def _shared(correlation: float) -> Draw:
    """Every two increments of a replicate have this correlation."""

    def draw(rng: np.random.Generator, replicates: int, layers: int) -> np.ndarray:
        own = rng.normal(0.0, math.sqrt(1 - correlation), (replicates, layers))
        return own + rng.normal(0.0, math.sqrt(correlation), (replicates, 1))

    return draw


def _neighbours(correlation: float) -> Draw:
    """Autoregressive of order one over depth."""

    def draw(rng: np.random.Generator, replicates: int, layers: int) -> np.ndarray:
        z = rng.normal(0.0, 1.0, (replicates, layers))
        for i in range(1, layers):
            z[:, i] = correlation * z[:, i - 1] + math.sqrt(1 - correlation**2) * z[:, i]
        return z

    return draw


def _one_layer(factor: float) -> Draw:
    """The first increment is so many times as variable as the others."""

    def draw(rng: np.random.Generator, replicates: int, layers: int) -> np.ndarray:
        z = rng.normal(0.0, 1.0, (replicates, layers))
        z[:, 0] *= factor
        return z

    return draw


#: Other laws of the increments, in units of the walk's sd.
OTHER_WALKS: dict[str, Draw] = {
    "independent": _shared(0.0),
    "correlation .02 between all": _shared(0.02),
    "correlation .05 between all": _shared(0.05),
    "correlation .1 between all": _shared(0.1),
    "correlation .2 between all": _shared(0.2),
    "autoregressive, .3": _neighbours(0.3),
    "autoregressive, .6": _neighbours(0.6),
    "one layer 5 times as variable": _one_layer(5.0),
    "one layer 20 times as variable": _one_layer(20.0),
    "Student's t, 3 degrees": lambda rng, r, n: rng.standard_t(3, (r, n)) / math.sqrt(3),
}


def false_share(increments: str, layers: int, replicates: int, simulations: int, seed: int) -> float:
    """How often Δ = −3 is called vanishing or preserved, the larger of both, walk sd .1."""
    draw = OTHER_WALKS[increments]
    rng = np.random.default_rng([seed, layers, replicates])
    mean = slope(Cell(layers, replicates, 0.1, 0.0), -THRESHOLD)
    words: Counter[str] = Counter()
    for _ in range(simulations):
        y = np.zeros((replicates, layers + 1))
        y[:, 1:] = np.cumsum(0.1 * draw(rng, replicates, layers), axis=1)
        words[gradscope.verdict(np.exp(mean + y)).word] += 1
    return max(words["vanishing"], words["preserved"]) / simulations


# -- families ----------------------------------------------------------------------------------------

#: Mean curves, input end first: at .1 nat per layer, and pre-norm's p = ½.
CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flat": lambda depth: 0.0 * depth,
    "exponential": lambda depth: 0.1 * depth,
    "power-in": lambda depth: -0.5 * np.log1p(depth),
}


def family_by_gradscope(values: np.ndarray) -> str:
    """The library's choice among all seven families."""
    return gradscope.fit_decay(values).family


def _basis(layers: int) -> dict[str, list[np.ndarray]]:
    """The families as columns along the pass: a grid of shapes each."""
    s = np.arange(layers + 1.0)
    depth = s[::-1]
    return {
        "flat": [np.zeros((layers + 1, 0))],
        "exponential": [s[:, None]],
        "power-in": [np.log1p(depth)[:, None]],
        "power-out": [np.log1p(s)[:, None]],
        "stretched": [s[:, None] ** b for b in np.geomspace(0.1, 3.0, 25)],
        "piecewise": [
            np.column_stack([np.minimum(s, k), np.maximum(s - k, 0)]) for k in range(2, layers - 1)
        ],
    }


def family_by_textbook(values: np.ndarray, *, walk: bool) -> str:
    """Gaussian maximum likelihood on the mean log-profile: written out, without gradscope.

    With ``walk`` generalised least squares under σ_m²I + σ_r² min(s, s′), the ratio profiled over
    {0, .1, 1, 10, ∞} and BIC, piecewise at ΔBIC > 6; without, ordinary least squares and AICc.
    """
    y = np.log(values).mean(0)[::-1]
    n = len(y)
    s = np.arange(n, dtype=float)
    ratios = (0.0, 0.1, 1.0, 10.0, math.inf) if walk else (0.0,)
    best, chosen = math.inf, ""
    for name, designs in _basis(n - 1).items():
        for columns in designs:
            x = np.column_stack([np.ones(n), columns])
            size = x.shape[1] + 1 + (1 if walk else 0) + (name in ("stretched", "piecewise"))
            for ratio in ratios:
                if math.isinf(ratio):
                    covariance = np.minimum.outer(s, s) + 1e-6 * np.eye(n)
                else:
                    covariance = np.eye(n) + ratio * np.minimum.outer(s, s)
                factor = np.linalg.cholesky(covariance)
                u, v = np.linalg.solve(factor, y), np.linalg.solve(factor, x)
                residual = u - v @ np.linalg.lstsq(v, u, rcond=None)[0]
                score = n * math.log(float(residual @ residual) / n)
                score += 2 * float(np.log(np.diag(factor)).sum())
                if walk:
                    score += size * math.log(n) + (6 if name == "piecewise" else 0)
                else:
                    score += 2 * size + 2 * size * (size + 1) / max(n - size - 1, 1)
                if score < best:
                    best, chosen = score, name
    return chosen


#: Ways to a family, by name.
CHOOSERS: dict[str, Callable[[np.ndarray], str]] = {
    "gradscope": family_by_gradscope,
    "GLS, BIC": lambda v: family_by_textbook(v, walk=True),
    "OLS, AICc": lambda v: family_by_textbook(v, walk=False),
}


def family_rates(chooser: str, curve: str, cell: Cell, fits: int, seed: int) -> Counter[str]:
    """How often each family is chosen, by the way of that name, for profiles of one."""
    choose = CHOOSERS[chooser]
    rng = np.random.default_rng([seed, cell.layers, cell.replicates, int(1000 * cell.noise)])
    mean = CURVES[curve](np.arange(cell.layers + 1.0))
    return Counter(choose(values) for values in profiles(mean, cell, fits, rng))


# -- the table ---------------------------------------------------------------------------------------


def cells(replicates: int) -> list[Cell]:
    """Every setting with so many replicates."""
    return [Cell(n, replicates, walk, noise) for n in LAYERS for walk in WALKS for noise in NOISES]


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _worst(found: list[Rates], name: str, worst: Callable[[list[float]], float] = max) -> str:
    return _percent(worst([float(getattr(rate, name)) for rate in found]))


@dataclass(frozen=True)
class Job:
    """One call of `rates`, `false_share` or `family_rates`: its function's name and arguments."""

    function: str
    arguments: tuple[Any, ...]

    def run(self) -> Any:
        """What the call returns."""
        functions = {"rates": rates, "false_share": false_share, "family_rates": family_rates}
        return functions[self.function](*self.arguments)


def _run(job: Job) -> Any:
    return job.run()


class Plan:
    """Notes every job that a report asks for; asked again with the results, it gives them."""

    def __init__(self, results: Mapping[Job, Any] | None = None) -> None:
        self.results = results
        self.jobs: list[Job] = []

    def rates(self, judge: str, cell: Cell, delta: float, simulations: int, seed: int) -> Rates:
        """`rates`, or zeros while planning."""
        found = self._ask("rates", judge, cell, delta, simulations, seed)
        return found if isinstance(found, Rates) else Rates(0, 0, 0, 0, 0, 0)

    def false_share(self, name: str, layers: int, replicates: int, simulations: int, seed: int) -> float:
        """`false_share`, or 0 while planning."""
        found = self._ask("false_share", name, layers, replicates, simulations, seed)
        return found if isinstance(found, float) else 0.0

    def family_rates(self, name: str, curve: str, cell: Cell, fits: int, seed: int) -> Counter[str]:
        """`family_rates`, or none while planning."""
        found = self._ask("family_rates", name, curve, cell, fits, seed)
        return found if isinstance(found, Counter) else Counter()

    def _ask(self, function: str, *arguments: Any) -> Any:
        job = Job(function, arguments)
        self.jobs.append(job)
        return None if self.results is None else self.results[job]


def simulated(jobs: list[Job], workers: int, progress: Callable[[str], None]) -> dict[Job, Any]:
    """The results of the jobs, several at a time."""
    found: dict[Job, Any] = {}
    with ProcessPoolExecutor(workers) as pool:
        for job, result in zip(jobs, pool.map(_run, jobs), strict=True):
            found[job] = result
            progress(f"{len(found)} of {len(jobs)}: {job.function} {job.arguments}")
    return found


def report(simulations: int, fits: int, plan: Plan) -> list[str]:
    """The lines of the Markdown table."""
    lines = [
        "# Calibration of the verdict",
        "",
        f"{simulations} simulated profiles per setting: 12, 24 and 48 layers, random-walk sd .06 and .2",
        "per layer, measurement noise 0 and .1, twelve settings for each number of replicates. All",
        "numbers are percentages. Made by `python tests/benchmarks/calibration.py`.",
        "",
        "## All settings together",
        "",
        "*False* is the share of `vanishing` or `exploding` for a true Δ of ∓3, the larger of both, in",
        "the worst of the twelve settings (nominal 2.5); *false preserved* the same for `preserved`.",
        "*Flat kept* is the share of `preserved` for Δ = 0, in the mean over the settings and in the",
        "worst; *at best* what a rule could reach that is told the spread of Δ and keeps both errors at",
        "2.5 %.",
        "*Coverage* of Δ, and with it of ξ = L/(2|Δ|), is the smallest and largest over the settings",
        "(nominal 95). *Drift* is how often a flat profile is said to have a slope at the 5 % level:",
        "that the interval of Δ excludes 0, or that the fitted line's p-value is below .05.",
        "",
    ]
    summary: list[list[str]] = []
    details: list[list[str]] = []
    for name in JUDGES:
        for replicates in (1, 3, 5):
            down = [plan.rates(name, c, -THRESHOLD, simulations, 1) for c in cells(replicates)]
            up = [plan.rates(name, c, THRESHOLD, simulations, 2) for c in cells(replicates)]
            flat = [plan.rates(name, c, 0.0, simulations, 3) for c in cells(replicates)]
            false = [max(d.vanishing, u.exploding) for d, u in zip(down, up, strict=True)]
            kept = [f.preserved for f in flat]
            both = [*down, *up]
            coverage = (
                "–"
                if name == "endpoint ratio"
                else (f"{_worst(both, 'covered', min)}–{_worst(both, 'covered')}")
            )
            summary.append(
                [
                    f"{name}, {replicates} replicate{'s' * (replicates > 1)}",
                    _percent(max(false)),
                    _worst(both, "preserved"),
                    f"{_percent(sum(kept) / len(kept))} / {_percent(min(kept))}",
                    _percent(min(best_possible(c) for c in cells(replicates))),
                    coverage,
                    "–"
                    if name == "endpoint ratio"
                    else f"{_worst(flat, 'drift', min)}–{_worst(flat, 'drift')}",
                ]
            )
            if name == "gradscope":
                for c, d, u, f in zip(cells(replicates), down, up, flat, strict=True):
                    details.append(
                        [
                            f"{replicates} × {c.layers} layers, sd {c.walk:g}, noise {c.noise:g}",
                            _percent(d.vanishing),
                            _percent(u.exploding),
                            _percent(max(d.preserved, u.preserved)),
                            _percent(f.preserved),
                            _percent(best_possible(c)),
                            _percent(f.inconclusive),
                            f"{_percent(d.covered)}, {_percent(u.covered)}",
                        ]
                    )
    head = [
        "rule",
        "false",
        "false preserved",
        "flat kept: mean / worst",
        "worst, at best",
        "coverage of Δ and ξ",
        "drift",
    ]
    lines += _table(head, summary)
    lines += [
        "## Power",
        "",
        "Share of `vanishing` for a true Δ beyond the threshold, and beside it the share of",
    ]
    lines += ["`inconclusive`; the mean over the twelve settings, five replicates (three).", ""]
    power: list[list[str]] = []
    for name in JUDGES:
        row = [name]
        for delta in (3.5, 4.0, 5.0, 6.0):
            entries: list[str] = []
            for replicates in (5, 3):
                found = [plan.rates(name, c, -delta, simulations // 4, 4) for c in cells(replicates)]
                mean = [
                    sum(getattr(r, w) for r in found) / len(found) for w in ("vanishing", "inconclusive")
                ]
                entries.append(f"{100 * mean[0]:.0f} / {100 * mean[1]:.0f}")
            row.append(f"{entries[0]} ({entries[1]})")
        power.append(row)
    lines += _table(["rule", *(f"Δ = −{d:g}" for d in (3.5, 4, 5, 6))], power)
    lines += [
        "## Increments that are not independent",
        "",
        "Share of `vanishing` or `preserved` for a true Δ of −3, the larger of both (nominal 2.5): the",
        "increments' sd is .1, and they are no independent Gaussians. From five replicates on the",
        "increments' own variance moderates that over replicates, which is where it can be wrong.",
        "",
    ]
    rows: list[list[str]] = []
    for name in OTHER_WALKS:
        shares = [
            plan.false_share(name, layers, replicates, simulations, 6)
            for layers in LAYERS
            for replicates in (3, 5, 10)
        ]
        rows.append([name, *(_percent(share) for share in shares)])
    lines += _table(["increments", *(f"{n} layers, {r}" for n in LAYERS for r in (3, 5, 10))], rows)
    lines += [
        "## Family of decay",
        "",
        f"Share of the true family among all, {fits} profiles per entry, random-walk",
    ]
    lines += [
        "sd .06; without / with measurement noise of .1. *GLS, BIC*: maximum likelihood with random-walk",
        "covariance, on the mean profile. *OLS, AICc*: the same with independent noise.",
        "",
    ]
    rows = []
    for curve in CURVES:
        for replicates in (1, 5):
            for layers in LAYERS:
                row = [f"{curve}, {layers} layers, {replicates} replicate{'s' * (replicates > 1)}"]
                for name in CHOOSERS:
                    shares = [
                        plan.family_rates(name, curve, Cell(layers, replicates, 0.06, noise), fits, 5)[
                            curve
                        ]
                        / fits
                        for noise in NOISES
                    ]
                    row.append(" / ".join(f"{100 * share:.0f}" for share in shares))
                rows.append(row)
    lines += _table(["truth", *CHOOSERS], rows)
    lines += ["## Every setting of the verdict", ""]
    lines += _table(
        [
            "replicates × setting",
            "vanishing at −3",
            "exploding at +3",
            "preserved at ∓3",
            "flat: preserved",
            "at best",
            "flat: inconclusive",
            "coverage at −3, +3",
        ],
        details,
    )
    return lines


def main() -> None:
    """Parse the command line, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--simulations", type=int, default=4000, help="profiles per setting (4000)")
    parser.add_argument("--fits", type=int, default=300, help="profiles per entry of the families (300)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)"
    )
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    plan = Plan()
    report(arguments.simulations, arguments.fits, plan)
    results = simulated(
        plan.jobs, arguments.workers, lambda text: print(text, file=sys.stderr, flush=True)
    )
    lines = report(arguments.simulations, arguments.fits, Plan(results))
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
