"""What plain autograd says about every module of an unwatched copy: the values that a Record must hold.

Nothing here is shared with the recorder. When a module returns, the place of its output in the graph is
noted, and what the model goes on with is that output plus a leaf of zeros: a tensor of its own, so that
nothing done in place later changes the place that was noted. ``torch.autograd.grad`` at that place is the
truth. Re-entrant checkpointing knows ``backward()`` only: there the leaf's ``.grad`` is. Every number is
computed from whole tensors in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradscope.experiment.batches import mapped

__all__ = ["INPUT", "Expected", "expected_values", "tensor_statistics", "wide"]

#: The number that stands for a module's first input among the numbers of its calls.
INPUT: Final = -1
#: layer, call, signal, statistic
Key = tuple[str, int, str, str]


@dataclass(slots=True)
class _Call:
    values: list[Tensor] = field(default_factory=list)
    edges: list[GradientEdge | None] = field(default_factory=list)
    leaves: list[Tensor | None] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    without_grad: bool = False


@dataclass(slots=True, kw_only=True)
class Expected:
    """What the copy's own autograd gave.

    Attributes:
        values: by (layer, call, signal, statistic); parameters have call 0.
        scale: for each value the size against which its rounding is judged.
        activation: the output of each (layer, call), the tensor that the values are of.
        gradient: its gradient.
        parameter_gradient: the gradient of each parameter that has one.
        unsure: (layer, call) whose calls cannot be told apart, and why.
        called: names of all modules that were called.
        loss: the loss.
    """

    values: dict[Key, float] = field(default_factory=dict)
    scale: dict[Key, float] = field(default_factory=dict)
    activation: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    gradient: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    unsure: dict[tuple[str, int], str] = field(default_factory=dict)
    parameter_gradient: dict[str, Tensor] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    loss: float = math.nan

    def put(self, row: tuple[str, int], signal: str, x: Tensor) -> None:
        """All statistics of one tensor."""
        for statistic, (value, scale) in tensor_statistics(x).items():
            self.values[*row, signal, statistic] = value
            self.scale[*row, signal, statistic] = scale

    def add(self, row: tuple[str, int], call: _Call) -> None:
        """The primary tensor of a call, and its gradient."""
        primary = _primary(call)
        if primary is None:
            return
        tensor, gradient = primary
        self.activation[row] = tensor
        self.put(row, "activation", tensor)
        if gradient is not None:
            self.gradient[row] = gradient
            self.put(row, "output_grad", gradient)


class _Twin:
    """Hooks on a copy that put a leaf of zeros on every output."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.calls: dict[str, list[_Call]] = {}
        self.inputs: dict[str, _Call] = {}
        self.recomputed: set[str] = set()
        self.forward = True

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Called when a module returns."""
        calls = self.calls.setdefault(self.names[id(module)], [])
        if not self.forward:
            return self._recomputed(self.names[id(module)], output)
        call = _Call()
        calls.append(call)
        return self._with_leaves(call, output)

    def entry(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called when one of the modules is about to run whose input is wanted, the first time."""
        name = self.names[id(module)]
        if name in self.inputs or not self.forward:
            return None
        found = [t for t in _tensors((args, kwargs)) if t.dim() > 1][:1]
        if not found:
            return None
        call = self.inputs[name] = _Call()
        leaves = {id(found[0]): self._with_leaves(call, found[0])}
        return mapped((args, kwargs), lambda t, path: leaves.get(id(t), t))

    def _with_leaves(self, call: _Call, output: Any) -> Any:
        def add(tensor: Tensor, path: str) -> Tensor:
            if not tensor.is_floating_point() and not tensor.is_complex():
                return tensor
            call.values.append(tensor.detach().clone())
            if not tensor.requires_grad:
                call.leaves.append(None)
                call.edges.append(None)
                return tensor
            call.edges.append(get_gradient_edge(tensor))
            call.without_grad = call.without_grad or not torch.is_grad_enabled()
            leaf = torch.zeros_like(tensor, requires_grad=True)
            call.leaves.append(leaf)
            return tensor + leaf

        return mapped(output, add)

    def _recomputed(self, name: str, output: Any) -> Any:
        """Inside the backward pass: checkpointing runs the forward again.

        Under re-entrant checkpointing the first forward had no graph, and this one has it.
        """
        self.recomputed.add(name)
        calls = self.calls[name]
        if len(calls) != 1 or any(leaf is not None for leaf in calls[0].leaves):
            return mapped(output, lambda t, path: t + 0 if t.requires_grad else t)
        call = _Call()
        changed = self._with_leaves(call, output)
        calls[0].leaves = call.leaves
        return changed


def expected_values(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    names: dict[str, nn.Module],
    inputs: Mapping[str, str],
) -> Expected:
    """Run one forward and backward on a model that nobody else uses.

    Args:
        model: the copy; its gradients may be written.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)`` → scalar tensor.
        names: its modules by name.
        inputs: names under which a first input is wanted, with the call `INPUT`, and the modules
            whose input it is.
    """
    try:
        return _run(model, batch, loss, names, inputs, reentrant=False)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return _run(model, batch, loss, names, inputs, reentrant=True)


def _run(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    names: dict[str, nn.Module],
    inputs: Mapping[str, str],
    *,
    reentrant: bool,
) -> Expected:
    twin = _Twin({id(module): name for name, module in names.items()})
    handles: list[Any] = [module.register_forward_hook(twin.hook) for module in names.values()]
    handles += [names[n].register_forward_pre_hook(twin.entry, with_kwargs=True) for n in inputs.values()]
    parameters = {n: p for n, p in _parameters(names) if p.requires_grad}
    try:
        value = loss(model, batch)
        twin.forward = False
        calls = [*twin.inputs.values(), *(call for of in twin.calls.values() for call in of)]
        if reentrant:
            value.backward()
            for call in calls:
                call.gradients = [None if leaf is None else leaf.grad for leaf in call.leaves]
            gradients = {n: p.grad for n, p in parameters.items()}
        else:
            edges: list[Any] = [edge for call in calls for edge in call.edges if edge is not None]
            found_gradients = torch.autograd.grad(
                value, [*edges, *parameters.values()], allow_unused=True
            )
            rest = iter(found_gradients)
            for call in calls:
                call.gradients = [None if edge is None else next(rest) for edge in call.edges]
            gradients = dict(zip(parameters, rest, strict=True))
    finally:
        for handle in handles:
            handle.remove()
    found = Expected(loss=float(value.detach()))
    for name, module in inputs.items():
        if module in twin.inputs:
            found.add((name, INPUT), twin.inputs[module])
            if reentrant and twin.inputs[module].without_grad:
                found.unsure[name, INPUT] = "its leaf was added where no graph is made"
    for name, calls in twin.calls.items():
        found.called.add(name)
        for index, call in enumerate(calls):
            if len(calls) > 1 and name in twin.recomputed:
                found.unsure[name, index] = "called several times under checkpointing"
            found.add((name, index), call)
    for name, gradient in gradients.items():
        if gradient is not None:
            sparse = gradient.is_sparse
            found.parameter_gradient[name] = gradient.coalesce().values() if sparse else gradient
    return found


def _primary(call: _Call) -> tuple[Tensor, Tensor | None] | None:
    """The first tensor that received a gradient; else the first that could have, else the first."""
    for value, gradient in zip(call.values, call.gradients, strict=True):
        if gradient is not None:
            return value, gradient
    carrying = [v for v, leaf in zip(call.values, call.leaves, strict=True) if leaf is not None]
    rest = carrying or call.values
    return (rest[0], None) if rest else None


def _parameters(names: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for owner, module in names.items():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{owner}.{attribute}" if owner else attribute, parameter


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def wide(x: Tensor) -> Tensor:
    """On the host, in float64."""
    return x.detach().to("cpu", torch.float64)


def tensor_statistics(x: Tensor) -> dict[str, tuple[float, float]]:
    """By name: the value, and the size against which its rounding is judged."""
    if x.is_complex() or x.numel() == 0 or x.is_sparse:
        return {}
    x = wide(x).reshape(-1)
    count = x.numel()
    finite = bool(torch.isfinite(x).all())
    size = float(x.abs().max())
    unit = x / size if finite and size > 0 else x  # squares of small values would underflow
    by = size if finite and size > 0 else 1.0
    l2 = by * float(unit.square().sum().sqrt())
    found = {
        "count": (float(count), 1.0),
        "zeros": (float((x == 0).sum()), 1.0),
        "nonfinite": (float((~torch.isfinite(x)).sum()), 1.0),
    }
    if not finite:
        worst = math.nan if bool(torch.isnan(x).any()) else math.inf
        found |= {name: (worst, math.inf) for name in ("l2", "absmax")}
        found |= {name: (math.nan, math.inf) for name in ("variance", "kurtosis")}
        return found | {"mean": (float(x.mean()), math.inf)}
    square = by * by * float(unit.square().mean())
    found["l2"] = (l2, l2)
    found["absmax"] = (size, size)
    found["mean"] = (by * float(unit.mean()), l2 / math.sqrt(count))
    if count > 1:
        found["variance"] = (by * by * float(unit.var()), square)
    kurtosis = float(unit.pow(4).mean() / unit.square().mean() ** 2)  # NaN of zeros alone
    found["kurtosis"] = (kurtosis, kurtosis)
    return found
