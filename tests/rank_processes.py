"""Two processes under torch.distributed (gloo), and the training that they share with one process."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gradscope

WIDTH, TOKENS, BATCH, BLOCKS, STEPS = 8, 5, 8, 3, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """A pre-norm transformer whose loss is the mean over all elements; ``skip`` leaves a block out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 3)
        self.skip: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for n, block in enumerate(self.blocks):
            if n != self.skip:
                x = block(x)
        return self.head(x)


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(dtype: torch.dtype = torch.float64, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (steps, BATCH, TOKENS)
    x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    # The two halves of each batch are of very different size.
    x[:, : BATCH // 2] *= 3
    return [(a.to(dtype), b.to(dtype)) for a, b in zip(x, y, strict=True)]


def share(batch: tuple[Tensor, Tensor], rank: int, world: int = 2) -> tuple[Tensor, Tensor]:
    size = BATCH // world
    return batch[0][rank * size : (rank + 1) * size], batch[1][rank * size : (rank + 1) * size]


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    *,
    micro: int = 1,
    loss: Callable[[Any, Any], Tensor] = loss_of,
    sync: Callable[[bool], Any] | None = None,
    clip: float | None = None,
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] = lambda m: [sgd(m)],
    watched: nn.Module | None = None,
    **options: Any,
) -> gradscope.Record:
    """Train watched; ``sync(last)`` is a context around the micro-batches of a step."""
    torch.manual_seed(2)
    stepping = optimizers(model)
    options = {"slow_every": 2, "warn": False, **options}
    with gradscope.watch(watched or model, **options) as scope:
        for x, y in data:
            parts = list(zip(x.chunk(micro), y.chunk(micro), strict=True))
            total = 0.0
            for n, part in enumerate(parts):
                around = contextlib.nullcontext() if sync is None else sync(n == len(parts) - 1)
                with around or contextlib.nullcontext():
                    value = loss(model, part) / micro
                    value.backward()
                total += value.item()
            scope.log(loss=total)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for optimizer in stepping:
                optimizer.step()
                optimizer.zero_grad()
    assert not scope.faults, scope.faults
    return scope.record


def alone(**options: Any) -> gradscope.Record:
    """The same training in one process, on the whole batches."""
    return train(net(), batches(), **options)


# -- processes -------------------------------------------------------------------------------------------

Case = Callable[[int], Any]


def run(cases: Mapping[str, Case], tmp: Path, *, seconds: float = 60) -> dict[str, list[Any]]:
    """Every case on two ranks, one after the other in one pair of processes.

    Returns:
        what each case returned on rank 0 and rank 1; where it raised, the traceback.
    """
    tmp.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, cases, tmp), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    late = [n for n, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    found = [dict(_results(tmp / f"rank{rank}")) for rank in (0, 1)]
    missing = f"no answer (late: {late})"
    return {name: [ours.get(name, missing) for ours in found] for name in cases}


def _results(path: Path) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(EOFError, FileNotFoundError), path.open("rb") as file:
        while True:
            yield pickle.load(file)


def _work(rank: int, cases: Mapping[str, Case], tmp: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(tmp / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with (tmp / f"rank{rank}").open("wb") as file:
        for name, case in cases.items():
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    result = case(rank)
                if isinstance(result, gradscope.Record):
                    words = [str(w.message) for w in said if w.category is gradscope.GradscopeWarning]
                    result = (result, words)
            except Exception:
                result = traceback.format_exc()
            pickle.dump((name, copy.copy(result)), file)
            file.flush()
    dist.destroy_process_group()
