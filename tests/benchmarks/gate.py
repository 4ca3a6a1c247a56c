"""How often a gradient baseline fails unchanged code, and what it catches: by replicates really run.

    python tests/benchmarks/gate.py [--replicates 200] [--planted 30] [--pools DIR] [--out FILE]

For each model 200 initialisations for baselines and 200 others for runs are measured once (kept under
``--pools``). A check draws 20 of the first and 5 + 10 of the second, and decides as `gradscope.gate` does
for other seeds. Planted regressions have a pool of their own on the run's side.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from gradscope.analysis.gate.decision import CONFIRM, FIRST_LOOK, SCREEN, Rule, name_place
from gradscope.analysis.gate.features import Feature, Features, read_features
from gradscope.analysis.gate.moderated import Moments, moderated_t
from gradscope.analysis.gate.tolerance import parse_tolerance
from gradscope.experiment.replicate import Replicates, joined
from gradscope.reference import Transformer, next_token_loss

DEPTH, WIDTH, HEADS, BLOCK, BASELINE = 12, 64, 4, 5, 20
BASELINES, CHECKS, RESAMPLED = 50, 100, 100
MODELS = ("pre-norm", "post-norm", "MLP", "GPT-2")


# -- models --------------------------------------------------------------------------------------


def text(rows: int = 4, length: int = 32, start: int = 0) -> tuple[Tensor, Tensor]:
    """Real prose as bytes: inputs and targets [rows, length]."""
    prose = "".join(topics[key] for key in sorted(topics)).encode()[start : start + rows * (length + 1)]
    tokens = torch.tensor(list(prose)).view(rows, length + 1)
    return tokens[:, :-1], tokens[:, 1:]


def transformer(variant: str, **options: Any) -> Transformer:
    return Transformer(variant, depth=DEPTH, width=WIDTH, heads=HEADS, context=32, **options)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=32, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def mlp() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(24)])


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def subject(name: str) -> tuple[Callable[[], nn.Module], Any, Any]:
    """Maker, batch and loss."""
    if name == "MLP":
        return mlp, torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3)), square
    inputs, targets = text()
    if name == "GPT-2":
        return gpt2, {"input_ids": inputs, "labels": inputs}, None
    variant = name.replace("-", "_")
    return functools.partial(transformer, variant), (inputs, targets), next_token_loss


# -- planted regressions -------------------------------------------------------------------------


class _WrongBackward(torch.autograd.Function):
    """The identity, whose backward pass forgets the first head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[..., : WIDTH // HEADS] = 0
        return gradient


def _sublayers(block: Any) -> tuple[Any, Any]:
    return block.attention, block.feed_forward


def no_skip(block: Any) -> None:
    for sublayer in _sublayers(block):
        sublayer.skip = "none"


def scale(factor: float, block: Any) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def detach(block: Any) -> None:
    block.feed_forward.branch.register_forward_hook(lambda module, args, output: output.detach())


def half_detach(block: Any) -> None:
    block.feed_forward.branch.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


def move_norm(block: Any) -> None:
    for sublayer in _sublayers(block):
        if sublayer.norm is None:
            sublayer.norm = sublayer.branch.norm
            del sublayer.branch.norm
        else:
            steps = dict(sublayer.branch.named_children())
            norm, sublayer.norm = sublayer.norm, None
            for name in steps:
                delattr(sublayer.branch, name)
            for name, module in {"norm": norm, **steps}.items():
                sublayer.branch.add_module(name, module)


def freeze(block: Any) -> None:
    block.attention.requires_grad_(False)


def zero_head(block: Any) -> None:
    function = block.attention.branch.function
    for projection in (function.query, function.key, function.value):
        projection.register_forward_hook(lambda module, args, output: _WrongBackward.apply(output))


def to_tanh(block: Any) -> None:
    block.feed_forward.branch.function.activation = nn.Tanh()


def sharp(block: Any) -> None:
    factor = (WIDTH // HEADS) ** -0.5
    block.attention.branch.function.query.register_forward_hook(
        lambda module, args, output: output * factor
    )


PLANTED: dict[str, tuple[Callable[[Any], None], bool]] = {
    "skip removed": (no_skip, False),
    "initialisation × 1.3": (functools.partial(scale, 1.3), False),
    "initialisation × 1.1": (functools.partial(scale, 1.1), False),
    "branch detached": (detach, False),
    "branch's input detached": (half_detach, False),
    "norm moved, one block": (move_norm, False),
    "norm moved, all blocks": (move_norm, True),
    "frozen layer": (freeze, False),
    "one head's gradient 0": (zero_head, False),
    "GELU → tanh, one block": (to_tanh, False),
    "GELU → tanh, all blocks": (to_tanh, True),
    "scale 1/√d → 1/d, one block": (sharp, False),
    "scale 1/√d → 1/d, all blocks": (sharp, True),
}


def planted(make: Callable[[], nn.Module], name: str, *, later: bool = False) -> Callable[[], nn.Module]:
    """A maker of the model with one regression; ``later``: drawn later in the random order."""
    fault, everywhere = PLANTED[name]

    def maker() -> nn.Module:
        if later:
            torch.rand(3)
        model: Any = make()
        for block in model.blocks if everywhere else [model.blocks[BLOCK]]:
            fault(block)
        return model

    return maker


# -- pools ---------------------------------------------------------------------------------------


def pool(path: Path, make: Callable[[], nn.Module], batch: Any, loss: Any, seeds: range) -> Features:
    """The features of these seeds, measured or read."""
    if path.exists():
        held = np.load(path)
        columns = [held[key].tolist() for key in ("kind", "layer", "role", "block")]
        features = tuple(Feature(*row) for row in zip(*columns, strict=True))
        return Features(features, held["value"], tuple(held["blocks"].tolist()))
    runner = Replicates(make, batch, loss)
    given = isinstance(make, nn.Module)
    found = read_features(joined([runner.run(n, batch[n] if given else None) for n in seeds]))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        value=found.value,
        blocks=list(found.blocks),
        **{key: [getattr(f, key) for f in found.features] for key in ("kind", "layer", "role", "block")},
    )
    return found


def trained(batches: list[tuple[Tensor, Tensor]], steps: int = 100) -> nn.Module:
    """A pre-norm model in the middle of its training: the given model."""
    torch.manual_seed(0)
    model = transformer("pre_norm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches[-steps:]:
        next_token_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def given_pools(replicates: int, number: int, pools: Path) -> tuple[Features, dict[str, Features]]:
    """Batches for baselines; and others, of the same model and of planted ones."""
    starts = np.random.default_rng(0).permutation(3300)[: 2 * replicates + 100] * 132
    batches = [text(start=int(start)) for start in starts]
    model = trained(batches)
    base = pool(pools / "given-base.npz", model, batches, next_token_loss, range(replicates))
    others = range(replicates, 2 * replicates)
    found = {"": pool(pools / "given-run.npz", model, batches, next_token_loss, others)}
    for i, name in enumerate(PLANTED):
        fault = planted(functools.partial(copy.deepcopy, model), name)
        path = pools / f"given-planted-{i}.npz"
        found[name] = pool(path, fault(), batches, next_token_loss, others[:number])
    return base, found


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
        for part, level, share in ((drawn[:SCREEN], 0.05 / m, 0.5), (drawn[SCREEN:], 0.01, 1.0)):
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
    tests: dict[str, Pools] = {}
    held: dict[str, Features] = {}
    for name in MODELS:
        what = subject(name)
        held[name] = pool(pools / f"{name}-base.npz", *what, range(replicates))
        run = pool(pools / f"{name}-run.npz", *what, range(1000, 1000 + replicates))
        tests[name] = Pools.of(held[name], run)
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
    yield "\n## Planted regressions, by the noise of other seeds alone\n"
    yield (
        f"In block {BLOCK}, or in all: how many of {RESAMPLED} checks resampled from {number} replicates "
        "of the changed model fail by the third tier, and how many of these name the block (for all "
        "blocks: say so). A whole check looks at exact facts first: they see a frozen layer and a head "
        "without gradient, and name the block of a post-norm net that lost its skip.\n"
    )
    rows = []
    for name in MODELS[:2]:
        make, batch, loss = subject(name)
        for i, what in enumerate(PLANTED):
            path = pools / f"{name}-planted-{i}.npz"
            run = pool(path, planted(make, what), batch, loss, range(2000, 2000 + number))
            caught, right = resampled(Pools.of(held[name], run), what)
            rows.append([name, what, f"{caught:.0%}", f"{right:.0%}" if caught else "–"])
    yield table(["model", "regression", "caught", "of these named right"], rows)
    yield "\n## A given model: replicates are batches, the run's are others\n"
    base, found = given_pools(replicates, number, pools)
    yield _false_failures({"given": Pools.of(base, found[""])})
    yield ""
    rows = []
    for what in PLANTED:
        caught, right = resampled(Pools.of(base, found[what]), what)
        rows.append([what, f"{caught:.0%}", f"{right:.0%}" if caught else "–"])
    yield table(["regression", "caught", "of these named right"], rows)


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
