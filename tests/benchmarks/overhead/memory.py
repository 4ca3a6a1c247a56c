"""The most memory that a step takes, and the least time that reading it would take."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.overhead.turns import Subject
from benchmarks.overhead.workloads import Training
from torch import Tensor, nn

from gradscope.experiment.doctor.training import peak_on_cpu


def peak_bytes(subject: Subject) -> int:
    """The peak of torch's allocator over one step, parameters and optimizer state included."""
    device = subject.training.device
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return subject.training.resident_bytes() + peak_on_cpu(subject.step)


def bandwidth(device: str, mebibytes: int = 256, repeats: int = 9) -> float:
    """Bytes per second at which one sum or inner product reads memory, the best of several."""
    x = torch.ones(mebibytes * 2**18, device=device)
    best = float("inf")
    for read in (torch.sum, lambda x: torch.dot(x, x)):
        for _ in range(repeats):
            _wait(device)
            start = time.perf_counter()
            read(x)
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return x.numel() * x.element_size() / best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def watched_bytes(training: Training, modules: list[nn.Module]) -> int:
    """Outputs of the modules and their gradients, each tensor once, and the parameters' gradients."""
    seen: dict[tuple[int, torch.Size], int] = {}
    kept: list[Tensor] = []  # else their memory would be used again, and its address
    gradients = 0

    def note(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal gradients
        if isinstance(output, tuple):
            output = output[0]
        if not isinstance(output, Tensor):
            return  # the output of a whole model: its logits are its head's
        key = (output.data_ptr(), output.shape)
        if key not in seen:
            seen[key] = output.numel() * output.element_size()
            gradients += seen[key] if output.requires_grad else 0
            kept.append(output)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        training.loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    grads = (p.grad for p in training.model.parameters() if p.grad is not None)
    parameters = sum(g.numel() * g.element_size() for g in grads)
    training.optimizer.zero_grad()
    return sum(seen.values()) + gradients + parameters
