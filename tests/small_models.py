"""Small models in float64, the oracle that differentiates an unwatched copy, and readers of a Record."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope.collect.recorder import Recorder
from gradscope.record import Record

WIDTH = 6


class Block(nn.Module):
    """x + F(x), with F a module of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    """embed -> blocks -> head, with any blocks."""

    def __init__(self, *blocks: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(blocks or (Block(width) for _ in range(3)))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def stack(*blocks: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Stack:
    torch.manual_seed(seed)
    if blocks:
        return Stack(*blocks).to(dtype)
    return Stack().to(dtype)


def batch(seed: int = 0, size: int = 5, tokens: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, tokens, 3, dtype=dtype, generator=generator)


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate)


def square_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@dataclass
class Truth:
    """Norms by torch.autograd.grad; lists are by call. None: no gradient reaches it."""

    activation: dict[str, list[float]] = field(default_factory=dict)
    output_grad: dict[str, list[float | None]] = field(default_factory=dict)
    param_grad: dict[str, float | None] = field(default_factory=dict)


def truth(
    model: nn.Module,
    *batches: Any,
    loss: Callable[[nn.Module, Any], Tensor] = square_loss,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float64,
    tensor_of: Callable[[Any], Any] = lambda output: output,
) -> Truth:
    """Differentiates an unwatched float64 copy; several batches are pooled as one accumulated step.

    ``tensor_of`` finds the tensor in an output that is no tensor.

    Not for modules whose output is changed in place afterwards: it would differentiate the change.
    """
    twin = copy.deepcopy(model).to(dtype)
    parameters = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = tensor_of(output)
            if isinstance(found, Tensor):
                outputs.setdefault(name, []).append(found)

        return hook

    for name, module in twin.named_modules():
        if layers is None or name in layers:
            module.register_forward_hook(keep(name))
    squares: dict[tuple[str, int], list[float | None]] = {}
    forward: dict[tuple[str, int], list[float]] = {}
    total: dict[str, Tensor | None] = dict.fromkeys(parameters)
    for x in batches:
        outputs.clear()
        value = loss(twin, x)
        sites = [(n, i, t) for n, ts in outputs.items() for i, t in enumerate(ts)]
        wanted = [t for _, _, t in sites if t.requires_grad]
        gradients = iter(torch.autograd.grad(value, [*wanted, *parameters.values()], allow_unused=True))
        for name, i, t in sites:
            g = next(gradients) if t.requires_grad else None
            squares.setdefault((name, i), []).append(None if g is None else g.abs().square().sum().item())
            forward.setdefault((name, i), []).append(t.detach().abs().square().sum().item())
        for name in parameters:
            g = next(gradients)
            if g is not None:
                before = total[name]
                total[name] = g if before is None else before + g
    found = Truth()
    for (name, _), values in sorted(squares.items()):
        here = [v for v in values if v is not None]
        found.output_grad.setdefault(name, []).append(math.sqrt(sum(here)) if here else None)
    for (name, _), values in sorted(forward.items()):
        found.activation.setdefault(name, []).append(math.sqrt(sum(values)))
    for name, g in total.items():
        found.param_grad[name] = None if g is None else g.norm().item()
    return found


def cell(
    record: Record,
    layer: str,
    signal: str,
    statistic: str = "l2",
    *,
    step: int | None = None,
    call: int = 0,
) -> tuple[float, str]:
    """One value and its status; the last step unless told."""
    step = record.steps[-1].step if step is None else step
    rows = record.table(layer=layer, signal=signal, statistic=statistic, step=step, call=call)
    chosen = [i for i, kind in enumerate(rows["type"]) if kind != "Stream"]
    assert len(chosen) == 1, f"{len(chosen)} rows for {layer!r} {signal} {statistic} call {call}"
    return float(rows["value"][chosen[0]]), str(rows["status"][chosen[0]])


def value(record: Record, layer: str, signal: str, statistic: str = "l2", **where: Any) -> float:
    found, status = cell(record, layer, signal, statistic, **where)
    assert status == "ok", f"{layer} {signal} {statistic}: {status}"
    return found


def status(record: Record, layer: str, signal: str, statistic: str = "l2", **where: Any) -> str:
    found, word = cell(record, layer, signal, statistic, **where)
    assert word == "ok" or math.isnan(found)
    return word


def assert_equal(found: float, expected: float, relative: float = 1e-9) -> None:
    assert math.isclose(found, expected, rel_tol=relative, abs_tol=1e-300), f"{found!r} != {expected!r}"


def assert_true(
    record: Record,
    expected: Truth,
    *,
    step: int | None = None,
    relative: float = 1e-9,
    skip: Sequence[str] = (),
) -> int:
    """Every recorded norm of the step is the truth's or absent where that has none; how many were."""
    step = record.steps[-1].step if step is None else step
    compared = 0
    layers = set(record.table(step=step)["layer"].tolist())
    for signal, by_layer in (("activation", expected.activation), ("output_grad", expected.output_grad)):
        for layer, calls in by_layer.items():
            if layer not in layers or layer in skip:
                continue
            for call, norm in enumerate(calls):
                if norm is None:
                    assert status(record, layer, signal, step=step, call=call) != "ok"
                else:
                    assert_equal(value(record, layer, signal, step=step, call=call), norm, relative)
                    compared += 1
    for name, norm in expected.param_grad.items():
        if name in skip:
            continue
        if norm is None:
            assert status(record, name, "param_grad", step=step) != "ok"
        else:
            assert_equal(value(record, name, "param_grad", step=step), norm, relative)
            compared += 1
    return compared


def hooks_of(model: nn.Module) -> list[int]:
    """The sizes of every hook dictionary of every module."""
    return [
        len(getattr(module, name))
        for module in model.modules()
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_always_called",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ]


@pytest.fixture(autouse=True)
def no_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gradscope hides its own errors from the training; where this is imported, they are heard."""
    heard: list[BaseException] = []
    original = Recorder.note_fault

    def fault(self: Recorder, site: int, error: Exception, *others: Any) -> None:
        heard.append(error)
        original(self, site, error, *others)

    monkeypatch.setattr(Recorder, "note_fault", fault)
    yield
    assert not heard, heard
