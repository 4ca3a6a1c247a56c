"""How often a gradient baseline fails unchanged code, and what it catches: by replicates really run.

    python tests/benchmarks/gate.py [--replicates 200] [--planted 30] [--pools DIR] [--out FILE]

For each model 200 initialisations for baselines and 200 others for runs are measured once (kept under
``--pools``). A check draws 20 of the first and 5 + 10 of the second, and decides as `gradscope.gate` does
for other seeds. Planted regressions have pools of their own on the run's side: under other seeds, and
under those of the baseline. Whole checks run the code of `gradscope.gate` on replicates drawn from these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gate_models import BLOCK, DEPTH, MODELS, PLANTED, WIDTH
from benchmarks.gate_pools import Pool, Study, given_study, study

from gradscope.analysis.gate.decision import CONFIRM, FIRST_LOOK, SCREEN, Rule, name_place
from gradscope.analysis.gate.features import Features
from gradscope.analysis.gate.moderated import Moments, moderated_t
from gradscope.analysis.gate.tolerance import parse_tolerance
from gradscope.gate.baseline import PAIRED, Baseline
from gradscope.gate.runs import Runs
from gradscope.gate.tiers import judged

BASELINE = 20
BASELINES, CHECKS, RESAMPLED, SAME = 50, 100, 100, 50


# -- resampling ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pools:
    """The features that both pools have in all replicates, and the rule on them."""

    rule: Rule
    base: np.ndarray
    run: np.ndarray
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, base: Features, run: Features) -> Pools:
        at = {f.name: i for i, f in enumerate(run.features)}
        pairs = [
            (i, at[f.name])
            for i, f in enumerate(base.features)
            if f.name in at
            and np.isfinite(base.value[:, i]).all()
            and np.isfinite(run.value[:, at[f.name]]).all()
        ]
        left, right = [i for i, _ in pairs], [j for _, j in pairs]
        rule = Rule.of([base.features[i] for i in left], parse_tolerance(None))
        return cls(rule, base.value[:, left], run.value[:, right], base.blocks)

    def baseline(self, rng: np.random.Generator) -> Moments:
        return Moments.of(self.base[rng.choice(len(self.base), BASELINE, replace=False)])

    def check(self, base: Moments, rng: np.random.Generator) -> tuple[str, str]:
        """Status and the name of the place."""
        drawn = rng.choice(len(self.run), SCREEN + CONFIRM, replace=False)
        flagged, seen = self.rule.screen(base, Moments.of(self.run[drawn[:SCREEN]]))
        if not flagged.any():
            return "passed", ""
        for last in (SCREEN + FIRST_LOOK, SCREEN + CONFIRM):
            further = Moments.of(self.run[drawn[SCREEN:last]])
            status, failed, tested = self.rule.confirm(base, further, flagged, seen.change)
            if status != "open":
                break
        if status != "failed":
            return "suspicious", ""
        size = np.abs(tested.change) / self.rule.smallest
        place = name_place(self.rule.features, failed, np.abs(tested.t), size, self.blocks)
        return "failed", "all" if place.wide else place.layer


def upper(failures: int, checks: int) -> float:
    """Clopper and Pearson's one-sided 95 % bound."""
    return float(stats.beta.ppf(0.95, failures + 1, checks - failures)) if failures < checks else 1.0


def unchanged(
    tested: Pools, baselines: int = BASELINES, checks: int = CHECKS, seed: int = 0
) -> tuple[list[int], int]:
    """Failures of each baseline, and how many checks were suspicious in all."""
    rng = np.random.default_rng(seed)
    failures, suspicious = [], 0
    for _ in range(baselines):
        base = tested.baseline(rng)
        words = [tested.check(base, rng)[0] for _ in range(checks)]
        failures.append(words.count("failed"))
        suspicious += words.count("suspicious")
    return failures, suspicious


def smallest_change(tested: Pools, draws: int = 200, seed: int = 1) -> dict[str, tuple[float, float]]:
    """Kind → the change of one feature caught with 95 % power, nats: median and largest over features.

    A change c added to one feature is flagged and confirmed from the c on where both tests pass.
    """
    rng = np.random.default_rng(seed)
    rule, needed = tested.rule, []
    m = len(rule.features)
    for _ in range(draws):
        base = tested.baseline(rng)
        drawn = rng.choice(len(tested.run), SCREEN + CONFIRM, replace=False)
        least = np.zeros(m)
        for part, level, share in ((drawn[:SCREEN], 0.1 / rule.tests, 0.5), (drawn[SCREEN:], 0.01, 1.0)):
            found = moderated_t(base, Moments.of(tested.run[part]), rule.role)
            critical = stats.t.isf(level / 2, found.degrees) * found.error
            least = np.maximum(least, np.maximum(critical, share * rule.smallest) - found.change)
        needed.append(least)
    power = np.quantile(needed, 0.95, axis=0)
    kinds: dict[str, list[float]] = {}
    for feature, size in zip(rule.features, power.tolist(), strict=True):
        kinds.setdefault(feature.kind, []).append(size)
    return {kind: (float(np.median(x)), float(np.max(x))) for kind, x in kinds.items()}


def named_right(place: str, everywhere: bool) -> bool:
    if everywhere:
        return place == "all" or place.endswith(" blocks")
    return place == f"blocks.{BLOCK}"


def resampled(tested: Pools, name: str, checks: int = RESAMPLED, seed: int = 2) -> tuple[float, float]:
    """Share caught among other seeds without exact facts, and the share of those that are named right."""
    rng = np.random.default_rng(seed)
    found = [tested.check(tested.baseline(rng), rng) for _ in range(checks)]
    caught = [place for status, place in found if status == "failed"]
    right = sum(named_right(place, PLANTED[name][1]) for place in caught)
    return len(caught) / checks, right / max(len(caught), 1)


# -- whole checks --------------------------------------------------------------------------------


class Drawn(Runs):
    """Replicates drawn from a pool, in place of replicates that are made."""

    def __init__(self, found: Pool, paired: list[int], fresh: list[int]) -> None:
        self.found, self.paired, self._fresh, self.made = found, paired, fresh, 0

    def make(self, numbers: Any) -> list[Any]:
        self.made += len(numbers)
        return list(numbers)

    def start(self, baseline: Baseline) -> Baseline:
        return self.found.baseline(self.paired[:1])

    def skips(self, found: Any) -> dict[str, str]:
        return self.found.table

    def observed(self, found: Any) -> Baseline:
        return self.found.baseline(list(found))


@dataclass(frozen=True)
class Whole:
    """Of whole checks: the share that fails, of these the share that is named right, and the tiers."""

    caught: float
    right: float
    tiers: tuple[str, ...]

    def cells(self) -> list[str]:
        return [f"{self.caught:.0%}", f"{self.right:.0%}" if self.caught else "–", ", ".join(self.tiers)]


def whole(
    held: Study, what: str, *, same: bool, baselines: int = 10, checks: int = RESAMPLED, seed: int = 3
) -> Whole:
    """Checks of a planted model as a user gets them, under the baseline's seeds or under others."""
    rng = np.random.default_rng(seed)
    run = held.same[what] if same else held.other[what]
    pairs = len(held.same[what].seen.seeds)
    tiers: dict[str, int] = {}
    caught = right = 0
    for _ in range(baselines):
        first = rng.choice(pairs, PAIRED, replace=False).tolist()
        rest = [i for i in rng.permutation(len(held.base.seen.seeds)).tolist() if i not in first]
        baseline = held.base.baseline([*first, *rest[: BASELINE - PAIRED]])
        for _ in range(1 if same else checks // baselines):
            fresh = rng.permutation(len(run.seen.seeds)).tolist()
            drawn = Drawn(run, first if same else [], [] if same else fresh)
            outcome = judged(baseline, drawn, parse_tolerance(None))
            if outcome.failed:
                tiers[outcome.tier] = tiers.get(outcome.tier, 0) + 1
                caught += 1
                right += named_right(outcome.where, PLANTED[what][1])
    count = baselines * (1 if same else checks // baselines)
    return Whole(caught / count, right / max(caught, 1), tuple(sorted(tiers, key=lambda t: -tiers[t])))


# -- tables --------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def report(replicates: int, number: int, pools: Path) -> Iterator[str]:
    yield "# What a gradient baseline fails and what it catches\n"
    yield (
        f"Nets of {DEPTH} blocks and width {WIDTH} (reference transformers, a random GPT-2) on text, "
        f"and a 24-layer tanh MLP. {replicates} initialisations for baselines, {replicates} others "
        f"for runs; a check draws {BASELINE} of the first and {SCREEN} + {CONFIRM} of the second. Checks "
        "that share replicates are not independent; the bounds treat them as if they were. *Given, other "
        "batches*: a pre-norm model after 100 steps of training, where replicates are batches of text. "
        "Made by `python tests/benchmarks/gate.py`.\n"
    )
    held = {name: study(name, replicates, number, pools) for name in MODELS}
    tests = {name: Pools.of(found.base.features, found.run.features) for name, found in held.items()}
    yield "## Unchanged code, other seeds\n"
    yield _false_failures(tests)
    yield "\nWith the same seeds unchanged code gives the same numbers on one machine, and passes.\n"
    yield "## Smallest change of one layer caught with 95 % power, other seeds [nat]\n"
    sizes = {name: smallest_change(tested) for name, tested in tests.items()}
    kinds = list(dict.fromkeys(kind for found in sizes.values() for kind in found))
    yield "Median over layers (largest). A constant (a norm's weight) counts as a layer.\n"
    yield table(
        ["model", *kinds],
        [
            [name, *(f"{found[k][0]:.3f} ({found[k][1]:.2f})" if k in found else "–" for k in kinds)]
            for name, found in sizes.items()
        ],
    )
    yield (
        "\nHow small depends on the model and the batch. PyTorch's default initialisation of the MLP "
        "makes all samples alike, and what is left of their gradients varies with the weights.\n"
    )
    yield "## Planted regressions\n"
    yield (
        f"In block {BLOCK}, or in all. *Same seeds*: {SAME} baselines, and the changed model under their "
        f"seeds. *Other seeds*: {RESAMPLED} checks resampled from {number} replicates of the changed "
        "model. Both are whole checks, as a user gets them: exact facts first. *By noise alone*: the "
        "third tier without exact facts. *Named right*: the share of the failing checks that name the "
        "block, or for a change of all blocks say so.\n"
    )
    yield _planted({name: held[name] for name in MODELS[:2]})
    yield "\n## A given model: replicates are batches, the run's are others\n"
    found = given_study(replicates, number, pools)
    yield _false_failures({"given": Pools.of(found.base.features, found.run.features)})
    yield "\n*Same batches*: the changed model on the baseline's batches; *other batches*: on others.\n"
    yield _planted({"given": found}).replace(" seeds", " batches")


def _planted(held: dict[str, Study]) -> str:
    rows = []
    for name, found in held.items():
        for what in PLANTED:
            same = whole(found, what, same=True, baselines=SAME)
            other = whole(found, what, same=False)
            alone = Pools.of(found.base.features, found.other[what].features)
            caught, right = resampled(alone, what)
            noise = [f"{caught:.0%}", f"{right:.0%}" if caught else "–"]
            rows.append([name, what, *same.cells(), *other.cells(), *noise])
    head = ["model", "regression"]
    for kind in ("same seeds", "other seeds"):
        head += [f"{kind}: caught", "named right", "by"]
    return table([*head, "by noise alone: caught", "named right"], rows)


def _false_failures(tests: dict[str, Pools]) -> str:
    rows = []
    for name, tested in tests.items():
        failures, suspicious = unchanged(tested)
        total = BASELINES * CHECKS
        rows.append(
            [
                name,
                str(len(tested.rule.features)),
                str(total),
                f"{sum(failures) / total:.2%}",
                f"{upper(sum(failures), total):.2%}",
                f"{max(failures) / CHECKS:.0%}",
                f"{suspicious / total:.2%}",
            ]
        )
    head = ["model", "features", "checks", "failed", "upper bound", "worst of 50 baselines", "suspicious"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--planted", type=int, default=30)
    parser.add_argument("--pools", type=Path, default=Path("pools"))
    parser.add_argument("--out", type=Path, default=Path("figures/gate.md"))
    given = parser.parse_args()
    with given.out.open("w", encoding="utf-8") as file:
        for part in report(given.replicates, given.planted, given.pools):
            print(part, flush=True)
            file.write(f"{part}\n")
            file.flush()


if __name__ == "__main__":
    main()
