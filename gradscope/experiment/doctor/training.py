"""Copies of a model that train with and without the watch: what differs, and what does it cost?"""

from __future__ import annotations

import math
import os
import random
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.collect.recorder import Recorder
from gradscope.collect.schedule import Schedule
from gradscope.experiment.batches import mapped, own_batch
from gradscope.experiment.doctor.report import Check
from gradscope.layers import Selection, named_layers

__all__ = ["Setup", "bit_identity", "memory", "overhead", "peak_on_cpu", "retention"]

_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is run: the caller's model, which is only copied, and how.

    Attributes:
        copy: makes a copy of the model.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)`` → scalar tensor.
        optimizer: makes an optimizer of parameters.
        layers: what is watched.
    """

    copy: Callable[[], nn.Module]
    batch: Any
    loss: Callable[[Any, Any], Tensor]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    layers: Selection | None = None

    def own_batch(self) -> Any:
        """The batch on tensors of its own."""
        return own_batch(self.batch)

    def watch(self, model: nn.Module, **options: Any) -> Recorder:
        """Watch a copy as ``gradscope.watch`` does."""
        return Recorder(model, layers=self.layers, warn=False, alone=True, **options)


@dataclass(slots=True)
class Trainer:
    """One copy and its optimizer."""

    setup: Setup
    model: nn.Module
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.setup.optimizer(trained)

    def step(self) -> Tensor:
        """One training step; returns the loss."""
        value = self.setup.loss(self.model, self.setup.own_batch())
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.detach()


def _state(setup: Setup, *, watched: bool) -> dict[str, Any]:
    trainer = Trainer(setup, setup.copy())
    recorder = setup.watch(trainer.model) if watched else None
    losses = [trainer.step() for _ in range(_STEPS)]
    if recorder is not None:
        recorder.close(quiet=True)
    generator: Any = np.random.get_state()
    return {
        "losses": losses,
        **{f"the parameter {n}": p.detach() for n, p in trainer.model.named_parameters()},
        **{f"the buffer {n}": b for n, b in trainer.model.named_buffers()},
        "torch's random state": torch.get_rng_state(),
        "numpy's random state": (generator[1].tolist(), generator[2]),
        "Python's random state": random.getstate(),
    }


def bit_identity(setup: Setup, dice: Callable[[], Any]) -> Check:
    """Losses, parameters, buffers and random states after some steps, watched and unwatched."""
    name = "bit-identical training"
    with dice():
        plain = _state(setup, watched=False)
    with dice():
        again = _state(setup, watched=False)
    with dice():
        watched = _state(setup, watched=True)
    noisy = [n for n in plain if not _same(plain[n], again[n])]
    if noisy:
        said = f"two unwatched runs differ in {noisy[0]} already: set torch.use_deterministic_algorithms"
        return Check(name=name, ok=None, detail=said)
    different = [n for n in plain if not _same(plain[n], watched[n])]
    if different:
        return Check(name=name, ok=False, detail=f"after {_STEPS} steps {_listed(different)} differ")
    said = f"losses, parameters, buffers and random states after {_STEPS} steps"
    return Check(name=name, ok=True, detail=said)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, list) and a and isinstance(a[0], Tensor):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _bits(x: Tensor) -> Tensor:
    # NaN equals itself here: what is compared is the run, not the number.
    return torch.nan_to_num(x, nan=1.25e-3) if x.is_floating_point() else x


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def retention(setup: Setup) -> Check:
    """Whether the outputs of all modules are freed after the step, as they are without the watch."""
    kept = {watched: _alive_after_a_step(setup, watched=watched) for watched in (False, True)}
    more = [name for name in kept[True] if name not in kept[False]]
    name = "nothing retained"
    if more:
        return Check(name=name, ok=False, detail=f"the outputs of {_listed(more)} outlive the step")
    return Check(name=name, ok=True, detail="every output is freed when it is without the watch")


def _alive_after_a_step(setup: Setup, *, watched: bool) -> list[str]:
    trainer = Trainer(setup, setup.copy())
    recorder = setup.watch(trainer.model) if watched else None
    outputs: list[tuple[str, weakref.ref[Tensor]]] = []
    for name, module in named_layers(trainer.model).items():

        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            mapped(output, lambda t, path: outputs.append((name, weakref.ref(t))) or t)

        module.register_forward_hook(note)
    loss = trainer.step()
    alive = [name or "the model" for name, tensor in outputs if tensor() is not None]
    del loss
    if recorder is not None:
        recorder.close(quiet=True)
    return alive


def memory(setup: Setup) -> Check:
    """The peak of one recorded step without slow statistics, as a ratio."""
    peaks = [_peak(setup, watched=watched) for watched in (False, True)]
    name = "peak memory"
    if not all(peaks):
        return Check(name=name, ok=None, detail="cannot be measured on this device")
    said = f"{peaks[1] / peaks[0]:.3f} of the unwatched step's {peaks[0] / 2**20:.1f} MiB"
    return Check(name=name, ok=None, detail=said)


def _peak(setup: Setup, *, watched: bool) -> int:
    trainer = Trainer(setup, setup.copy())
    device = next((p.device for p in trainer.model.parameters()), torch.device("cpu"))
    recorder = (
        setup.watch(trainer.model, schedule=Schedule(every=1, slow_every=1000), update=False)
        if watched
        else None
    )
    try:
        trainer.step()
        trainer.step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            trainer.step()
            return torch.cuda.max_memory_allocated(device)
        return peak_on_cpu(trainer.step) if device.type == "cpu" else 0
    finally:
        if recorder is not None:
            recorder.close(quiet=True)


def peak_on_cpu(step: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator holds during a call beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results: Any = seen.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@contextmanager
def _quiet_profiler() -> Generator[None]:
    # Kineto writes to the terminal when it starts, unless it is told not to.
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def overhead(setup: Setup, seconds: float) -> Check:
    """Watched over unwatched time per step, of interleaved pairs; median and its 95 % interval."""
    trainers = [Trainer(setup, setup.copy()) for _ in range(2)]
    recorder = setup.watch(trainers[1].model)
    ratios: list[float] = []
    try:
        for trainer in trainers:
            trainer.step()
        end = time.perf_counter() + seconds
        while len(ratios) < 6 or (time.perf_counter() < end and len(ratios) < 400):
            order = (0, 1) if len(ratios) % 2 == 0 else (1, 0)
            times = [0.0, 0.0]
            for which in order:
                times[which] = _timed(trainers[which])
            ratios.append(times[1] / times[0])
    finally:
        recorder.close(quiet=True)
    ratios.sort()
    # Order statistics that hold the median with 95 %: the sign test.
    n = len(ratios)
    low = max(int(n / 2 - 0.98 * math.sqrt(n)), 0)
    said = (
        f"watched/unwatched step {median(ratios):.3f} [{ratios[low]:.3f}, {ratios[n - 1 - low]:.3f}], "
        f"{n} interleaved pairs"
    )
    return Check(name="overhead", ok=None, detail=said)


def _timed(trainer: Trainer) -> float:
    cuda = torch.cuda.is_available() and any(p.is_cuda for p in trainer.model.parameters())
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
