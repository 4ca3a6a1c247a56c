"""Slow, obvious twins: what gradscope measures, once more, in plain numpy float64 and plain autograd.

Nothing here imports gradscope. `twin` hooks nothing but outputs, asks ``torch.autograd.grad`` for the
gradients, and writes every formula down as it stands in a textbook.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Key = tuple[str, str, int, str, str]  # layer, type, call, signal, statistic


# -- statistics of one array -----------------------------------------------------------------------


def l2(x: np.ndarray) -> float:
    """Two-pass: divided by the largest element first, so that nothing leaves float64."""
    x = np.asarray(x, dtype=np.float64).ravel()
    if x.size == 0:
        return 0.0
    largest = np.abs(x).max()
    if largest == 0 or not np.isfinite(largest):
        return float(largest)
    return float(largest * math.sqrt(math.fsum((x / largest) ** 2)))


def mean(x: np.ndarray) -> float:
    return math.fsum(x.ravel()) / x.size if np.isfinite(x).all() else float(np.mean(x))


def variance(x: np.ndarray) -> float:
    """Unbiased, about the mean. In units of the largest element, squared last."""
    x = x.ravel()
    largest = np.abs(x).max()
    if not np.isfinite(largest):
        return math.nan
    if largest == 0:
        return 0.0
    unit = x / largest
    centre = math.fsum(unit) / x.size
    return largest * (largest * math.fsum((unit - centre) ** 2) / (x.size - 1))


def kurtosis(x: np.ndarray) -> float:
    largest = np.abs(x).max()
    if largest == 0 or not np.isfinite(largest):
        return math.nan
    unit = x.ravel() / largest
    return float(np.mean(unit**4) / np.mean(unit**2) ** 2)


def token_variance(positions: np.ndarray) -> float:
    """[positions, features]."""
    return float(np.mean([np.mean((p - np.mean(p)) ** 2) for p in positions]))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    if l2(a) == 0 or l2(b) == 0:
        return math.nan
    return float(np.dot(a / l2(a), b / l2(b)))


def token_cosine(sequences: list[np.ndarray]) -> float:
    """Mean over tokens of the mean cosine with the other tokens of their sequence ([T, d] each)."""
    found: list[float] = []
    for x in sequences:
        for i in range(len(x)):
            others = [cosine(x[i], x[j]) for j in range(len(x)) if j != i]
            if others:
                found.append(float(np.mean(others)))
    return float(np.mean(found)) if found else math.nan


def input_cosine(positions: np.ndarray, origin: np.ndarray) -> float:
    return float(np.mean([cosine(a, b) for a, b in zip(positions, origin, strict=True)]))


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """From what of b is along a and what is across, in radians."""
    along = np.dot(b, a) / l2(a)
    return math.atan2(l2(b - along * a / l2(a)), along)


def mean_over_tokens(function: Callable[..., float], *tensors: np.ndarray) -> float:
    """The mean of a function of one position of each, [positions, features]."""
    return float(np.mean([function(*at) for at in zip(*tensors, strict=True)]))


def pair(h: np.ndarray, following: np.ndarray) -> dict[str, float]:
    """Those of two stream positions, [positions, features]."""
    return {
        "cosine_next": mean_over_tokens(cosine, h, following),
        "angle_next": mean_over_tokens(angle, h, following),
        **contribution(h, following - h),
    }


def contribution(h: np.ndarray, change: np.ndarray) -> dict[str, float]:
    """Those of what is added to a stream position, [positions, features]."""
    return {
        "relative_contribution": mean_over_tokens(lambda x, f: l2(f) / l2(x), h, change),
        "residual_cosine": mean_over_tokens(lambda x, f: cosine(f, x), h, change),
    }


def token_centred_l2(sequences: list[np.ndarray]) -> float:
    """[T, d] each: without their mean token."""
    return l2(np.concatenate([(x - np.mean(x, axis=0)).ravel() for x in sequences if len(x)]))


def sample_dot(samples: list[np.ndarray]) -> float:
    """Each sample with the mean of the others."""
    total = 0.0
    for i, x in enumerate(samples):
        others = np.mean([y for j, y in enumerate(samples) if j != i], axis=0)
        total += float(np.sum(x * others))
    return total


def positions(x: np.ndarray, feature_axis: int = -1, valid: np.ndarray | None = None) -> np.ndarray:
    """[positions, features], padding left out."""
    x = np.moveaxis(x, feature_axis, -1) if x.ndim > 1 else x.reshape(1, -1)
    if valid is not None:
        return x[valid]
    return x.reshape(-1, x.shape[-1])


def statistics(
    x: np.ndarray, feature_axis: int = -1, valid: np.ndarray | None = None
) -> dict[str, float]:
    """Those of every tensor, padding left out of all of them."""
    x = np.asarray(x, dtype=np.float64)
    at = positions(x, feature_axis, valid)
    found = {
        "l2": l2(at),
        "count": float(at.size),
        "tokens": float(len(at)),
        "mean": mean(at),
        "absmax": float(np.abs(at).max()),
        "zeros": float(np.sum(at == 0)),
        "nonfinite": float(np.sum(~np.isfinite(at))),
        "kurtosis": kurtosis(at),
    }
    if at.size > 1:
        found["variance"] = variance(at)
    return found


# -- effective depth -------------------------------------------------------------------------------


def depth_by_deletion(
    model: nn.Module, run: Callable[[nn.Module], Tensor], first: str, branches: list[str]
) -> tuple[float, int]:
    """Σ_i (1 − ⟨g, g_without_i⟩/‖g‖²) over all calls of these modules, and how many calls there are.

    g is the gradient at the input of ``first``; for g_without_i one call's output is detached. One
    forward and backward pass per call.
    """
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    count, without = 0, -1
    h: list[Tensor] = []

    def detach(module: nn.Module, args: Any, out: Any) -> Any:
        nonlocal count
        count += 1
        if count - 1 != without:
            return out
        return out.detach() if isinstance(out, Tensor) else (out[0].detach(), *out[1:])

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if h:
            return None
        values = list(args) or [kwargs["hidden_states"]]
        h.append(values[0].detach().requires_grad_())
        if args:
            return (h[0] * 1, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": h[0] * 1}

    for name in branches:
        modules[name].register_forward_hook(detach)
    modules[first].register_forward_pre_hook(enter, with_kwargs=True)

    def gradient(which: int) -> Tensor:
        nonlocal count, without
        count, without = 0, which
        h.clear()
        value = run(model)
        (found,) = torch.autograd.grad(value, h, allow_unused=True, materialize_grads=True)
        return found.double()

    g = gradient(-1)
    n = count
    return sum(1 - float((g * gradient(i)).sum() / g.square().sum()) for i in range(n)), n


# -- a whole model ---------------------------------------------------------------------------------


def floats_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in floats_in(item)]
    return []


@dataclass
class Twin:
    """What an independent run found.

    ``value`` holds every number that can be had; ``depth`` the depth of rows on the axis; ``scale``
    the size that an error of a value is to be measured against, where that is not the value itself.
    """

    value: dict[Key, float]
    depth: dict[Key, tuple[str, float]]
    scale: dict[Key, float]
    unit_skip: dict[Key, float]


def twin(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    trunk: str,
    blocks: list[str],
    branches: Mapping[str, float] = {},
    skips: tuple[int, ...] = (),
    sequence_first: bool = False,
    packed: Mapping[str, int] = {},
    first: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Twin:
    """All values of one forward and backward pass of an unwatched copy, float64 unless said.

    Args:
        model: any model; left alone.
        run: model -> scalar loss.
        trunk: name of the trunk.
        blocks: names of its blocks, in forward order.
        branches: depth of each branch by name.
        skips: the positions l for which h_{l+1} is h_l plus something.
        sequence_first: whether sequences are [T, B, d].
        packed: parameters that hold query, key and value one after the other along an axis.
        first: the module whose input is the trunk's; None for the first block.
        dtype: of the copy.
    """
    model = copy.deepcopy(model).to(dtype)
    names = {m: n for n, m in model.named_modules()}
    seen: list[tuple[str, str, int, list[Tensor]]] = []
    calls: dict[str, int] = {}
    stream: list[Tensor] = []

    def output(module: nn.Module, args: Any, out: Any) -> None:
        name = names[module]
        seen.append((name, type(module).__name__, calls.get(name, 0), floats_in(out)))
        calls[name] = calls.get(name, 0) + 1
        if name in blocks:
            stream.append(floats_in(out)[0])

    def block_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not stream:
            stream.append(floats_in([*args, *kwargs.values()])[0])

    handles = [m.register_forward_hook(output) for m in model.modules()]
    handles.append(
        model.get_submodule(first or blocks[0]).register_forward_pre_hook(block_input, with_kwargs=True)
    )
    loss = run(model)
    for handle in handles:
        handle.remove()

    tensors = [t for _, _, _, found in seen for t in found] + stream
    wanted = [t for t in tensors if t.requires_grad] + [p for p in model.parameters() if p.requires_grad]
    unique = list({id(t): t for t in wanted}.values())
    gradients = torch.autograd.grad(loss, unique, allow_unused=True)
    gradient = {id(t): g for t, g in zip(unique, gradients, strict=True)}

    value: dict[Key, float] = {}
    depth: dict[Key, tuple[str, float]] = {}
    scale: dict[Key, float] = {}
    unit_skip: dict[Key, float] = {}

    def put(row: tuple[str, str, int], signal: str, numbers: dict[str, float], unit: float) -> None:
        for statistic, number in numbers.items():
            key = (*row, signal, statistic)
            value[key] = number
            if statistic == "mean":
                scale[key] = unit
            elif statistic == "token_variance":
                scale[key] = unit**2
        if row in places:
            depth[(*row, signal, "l2")] = places[row]

    places: dict[tuple[str, str, int], tuple[str, float]] = {}
    primaries: list[tuple[tuple[str, str, int], Tensor | None]] = []
    for name, kind, call, found in seen:
        carrying = [t for t in found if gradient.get(id(t)) is not None] or found[:1]
        primaries.append(((name, kind, call), carrying[0] if carrying else None))
        if name in branches:
            places[name, kind, call] = (trunk, branches[name])
    stream_rows = [(blocks[0], "Stream", 0)]
    stream_rows += [(b, type(model.get_submodule(b)).__name__, 0) for b in blocks]
    for level, (row, tensor) in enumerate(zip(stream_rows, stream, strict=True)):
        places[row] = (trunk, float(level))
        if level == 0:
            primaries.append((row, tensor))

    for row, tensor in primaries:
        if tensor is None:
            continue
        for signal, t in (("activation", tensor), ("output_grad", gradient.get(id(tensor)))):
            if t is None:
                continue
            x = t.detach().numpy()
            numbers = statistics(x)
            if signal == "activation" and positions(x).shape[1] > 1:
                numbers["token_variance"] = token_variance(positions(x))
            put(row, signal, numbers, numbers["l2"] / math.sqrt(numbers["count"]))

    def sequences(t: Tensor) -> list[np.ndarray]:
        x = t.detach().numpy()
        return list(np.moveaxis(x, 1, 0) if sequence_first else x)

    for level, (row, h) in enumerate(zip(stream_rows, stream, strict=True)):
        if h.dim() == 3:
            value[*row, "activation", "token_cosine"] = token_cosine(sequences(h))
            value[*row, "activation", "token_centred_l2"] = token_centred_l2(sequences(h))
            scale[*row, "activation", "token_centred_l2"] = l2(h.detach().numpy())
        g = gradient.get(id(h))
        if g is not None:
            value[*row, "output_grad", "sample_dot"] = sample_dot(
                sequences(g) if h.dim() == 3 else list(g.numpy())
            )
            scale[*row, "output_grad", "sample_dot"] = l2(g.numpy()) ** 2
        if h.shape == stream[0].shape:
            at, origin = (positions(t.detach().numpy()) for t in (h, stream[0]))
            value[*row, "activation", "input_cosine"] = input_cosine(at, origin)
        if level + 1 < len(stream):
            pairs = {
                "activation": (h, stream[level + 1]),
                "output_grad": (gradient.get(id(h)), gradient.get(id(stream[level + 1]))),
            }
            for signal, (here, after) in pairs.items():
                if here is None or after is None or here.shape != after.shape:
                    continue
                a, b = here.detach().numpy().ravel(), after.detach().numpy().ravel()
                value[*row, signal, "dot_next"] = math.fsum(a * b)
                value[*row, signal, "diff_next_l2"] = l2(b - a)
                scale[*row, signal, "dot_next"] = l2(a) * l2(b)
                scale[*row, signal, "diff_next_l2"] = l2(a) + l2(b)
            after = stream[level + 1]
            if after.shape == h.shape:
                at, next_at = (positions(t.detach().numpy()) for t in (h, after))
                for statistic, number in pair(at, next_at).items():
                    value[*row, "activation", statistic] = number
                    # Of directions: known to the last digit of 1, and of what a difference leaves over.
                    scale[*row, "activation", statistic] = max(abs(number), 1.0)
            if level in skips:
                unit_skip[*row, "activation", "unit_skip"] = 1.0
    value.update(unit_skip)
    for row, tensor in primaries:
        if row[0] in branches and tensor is not None:
            before = stream[math.ceil(branches[row[0]] - 1e-9) - 1]
            if tensor.shape == before.shape:
                h, f = (positions(t.detach().numpy()) for t in (before, tensor))
                for statistic, number in contribution(h, f).items():
                    value[*row, "activation", statistic] = number
                    scale[*row, "activation", statistic] = max(abs(number), 1.0)

    for name, parameter in model.named_parameters():
        g = gradient.get(id(parameter))
        row = (name, "Parameter", 0)
        if g is None:
            continue
        value[*row, "param_grad", "l2"] = l2(g.numpy())
        value[*row, "param_grad", "nonfinite"] = float((~torch.isfinite(g)).sum())
        for signal in ("param_grad", "weight", "update"):
            value[*row, signal, "count"] = float(parameter.numel())
        if name in packed:
            for statistic, third in zip(
                ("query_l2", "key_l2", "value_l2"), np.split(g.numpy(), 3, packed[name]), strict=True
            ):
                value[*row, "param_grad", statistic] = l2(third)
    return Twin(value=value, depth=depth, scale=scale, unit_skip=unit_skip)
