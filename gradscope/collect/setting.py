"""The setting of a watch: what was chosen, what the header says, and where no hook can see."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradscope.errors import GradscopeError
from gradscope.layers import Layer, class_name, named_layers
from gradscope.record import STATISTICS

__all__ = [
    "chosen_statistics",
    "compiled_sites",
    "describe",
    "device_of",
    "forget_compiled_code",
    "linear_sites",
]


def chosen_statistics(chosen: Iterable[str] | None) -> frozenset[str]:
    """The statistics to keep: those that were chosen, None for all, and what everything derives from.

    Raises:
        GradscopeError: there is no statistic of such a name.
    """
    if chosen is None:
        return frozenset(STATISTICS)
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    unknown = [n for n in chosen if n not in STATISTICS]
    if unknown:
        raise GradscopeError(
            f"statistics= has no {', '.join(map(repr, unknown))}; choose from {', '.join(STATISTICS)}."
        )
    # The norms and counts behind every derived quantity are always kept.
    return frozenset(chosen) | {"l2", "count", "tokens"}


def describe(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Any]:
    """The entries of a Record's header that model and machine determine."""
    from gradscope import __version__

    parameters = list(model.parameters())
    blocks: dict[str, int] = {}
    for layer in layers:
        if layer.is_block:
            blocks[layer.trunk] = blocks.get(layer.trunk, 0) + 1
    return {
        "model": class_name(named_layers(model).get("", model)),
        "versions": {
            "gradscope": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or None,
        # Seen in the forward pass: autocast makes it another one.
        "activation_dtype": None,
        "autocast_dtype": None,
        "device": ", ".join(sorted({p.device.type for p in parameters})) or None,
        # Seen in the first forward: the model may be wrapped after it is watched.
        "parallelism": "single process",
        "seeds": {"torch": torch.initial_seed()},
        "mode": "train" if model.training else "eval",
        "loss_denominator": None,
        "replicates": "run",
        # There is no getter: the smallest subnormal survives a product with one, or it does not.
        "flush_denormal": bool(torch.tensor(1e-45).mul(torch.ones(())).item() == 0.0),
        "trunks": blocks,
    }


def compiled_sites(model: nn.Module, layers: Sequence[Layer]) -> frozenset[int]:
    """The watched layers that lie inside a compiled module."""
    modules = named_layers(model)
    roots: list[nn.Module] = []
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule":
            roots.extend(m for n, m in module._modules.items() if n == "_orig_mod" and m is not None)
        elif getattr(module, "_compiled_call_impl", None) is not None:
            roots.append(module)
    inside = {id(m) for root in roots for m in root.modules()}
    return frozenset(s for s, layer in enumerate(layers) if id(modules[layer.name]) in inside)


def scripted_sites(modules: Sequence[nn.Module]) -> frozenset[int]:
    """Which of the modules are TorchScript's, which take no hooks."""
    return frozenset(s for s, module in enumerate(modules) if is_scripted(module))


def is_scripted(module: nn.Module) -> bool:
    """Whether it is a module of TorchScript's; a traced model is none, what is in it is."""
    return isinstance(module, torch.jit.ScriptModule) and not isinstance(
        module, torch.jit.TopLevelTracedModule
    )


def linear_sites(modules: Sequence[nn.Module]) -> frozenset[int]:
    """Which of the modules have an output that is an `nn.Linear`'s."""
    return frozenset(s for s, module in enumerate(modules) if _ends_linear(module))


def _ends_linear(module: nn.Module) -> bool:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return getattr(type(module), "forward", None) is nn.Linear.forward  # a scripted class has none


def device_of(model: nn.Module) -> torch.device:
    """The device of its first parameter; the CPU where it has none, or is not there yet."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def forget_compiled_code() -> bool:
    """Drop what torch.compile has made so far; whether there was anything.

    Compiled code has no guard on the hooks of a module: without this, those of a watch would never be
    called in it, and nobody would be told.
    """
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None or not frames.FRAME_COUNTER:
        return False
    torch._dynamo.reset()
    return True
