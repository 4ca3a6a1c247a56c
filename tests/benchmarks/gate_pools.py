"""Replicates of the studied models, measured once and kept in files."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.gate_models import MODELS, PLANTED, planted, subject, text, transformer
from torch import Tensor, nn

from gradscope.analysis.gate.features import Features
from gradscope.experiment.replicate import Replicates, joined
from gradscope.gate.baseline import Baseline
from gradscope.gate.observe import skips
from gradscope.gate.seen import Seen
from gradscope.reference import next_token_loss


@dataclass(frozen=True)
class Pool:
    """Replicates of one model, and its architecture table."""

    seen: Seen
    table: dict[str, str]

    @property
    def features(self) -> Features:
        return self.seen.features

    def baseline(self, rows: list[int]) -> Baseline:
        """What these of them say."""
        names = [str(self.seen.seeds[i]) for i in rows] if self.seen.kind == "batch" else []
        return replace(self.seen.baseline(rows, names), architecture=self.table)


def pool(
    path: Path, make: Callable[[], nn.Module], batch: Any, loss: Any, seeds: range, checksums: int = 0
) -> Pool:
    """These seeds measured, the first with checksums; or read."""
    if path.exists():
        return pickle.loads(path.read_bytes())
    runner = Replicates(make, batch, loss)
    given = isinstance(make, nn.Module)
    found = [
        runner.run(n, batch[n] if given else None, checksums=i < checksums) for i, n in enumerate(seeds)
    ]
    one = batch[seeds[0]] if given else batch
    seen = Seen.of(found, joined(found), one)
    measured = Pool(seen, dict(skips(runner, found[0], one, loss)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(measured))
    return measured


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


@dataclass(frozen=True)
class Study:
    """The pools of one model: for baselines, for runs, and of each regression under both seeds."""

    base: Pool
    run: Pool
    same: dict[str, Pool]
    other: dict[str, Pool]


def study(name: str, replicates: int, number: int, pools: Path) -> Study:
    """Initialisations of a model, and of the planted ones where it is a transformer."""
    make, batch, loss = subject(name)
    paired = number // 2
    stem = name.replace(" ", "-").replace(",", "").replace("/", "-")
    base = pool(pools / f"{stem}-base", make, batch, loss, range(replicates), paired)
    run = pool(pools / f"{stem}-run", make, batch, loss, range(1000, 1000 + replicates))
    same, other = {}, {}
    for i, what in enumerate(PLANTED if name in MODELS[:2] else ()):
        maker = planted(make, what)
        same[what] = pool(pools / f"{stem}-same-{i}", maker, batch, loss, range(paired), paired)
        seeds = range(2000, 2000 + number)
        other[what] = pool(pools / f"{stem}-other-{i}", maker, batch, loss, seeds)
    return Study(base, run, same, other)


def given_study(replicates: int, number: int, pools: Path) -> Study:
    """Batches of a given model: for baselines; and others, of the same model and of planted ones."""
    starts = np.random.default_rng(0).permutation(3300)[: 2 * replicates + 100] * 132
    batches = [text(start=int(start)) for start in starts]
    model = trained(batches)
    paired, others = number // 2, range(replicates, 2 * replicates)
    about = (batches, next_token_loss)
    base = pool(pools / "given-base", model, *about, range(replicates), paired)
    run = pool(pools / "given-run", model, *about, others)
    same, other = {}, {}
    for i, what in enumerate(PLANTED):
        faulty = planted(functools.partial(copy.deepcopy, model), what)()
        same[what] = pool(pools / f"given-same-{i}", faulty, *about, range(paired), paired)
        other[what] = pool(pools / f"given-other-{i}", faulty, *about, others[:number])
    return Study(base, run, same, other)
