"""Everything on a model, and of torch, on which a hook can leave a trace."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

__all__ = ["differences", "traces"]

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


def traces(model: nn.Module) -> dict[str, Any]:
    """Hooks, attributes and flags of every module and parameter, and torch's global hooks."""
    found: dict[str, Any] = {"the model's mode": model.training}
    for name, module in model.named_modules():
        where = name or "the model"
        state = vars(module)
        found[f"attributes of {where}"] = sorted(state)
        for attribute, value in state.items():
            if "hook" in attribute and isinstance(value, dict):
                found[f"{attribute} of {where}"] = list(value.items())  # pyright: ignore[reportUnknownArgumentType]
    for name, parameter in model.named_parameters():
        found[f"hooks of {name}"] = [
            list((getattr(parameter, attribute, None) or {}).items())
            for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ]
        found[f"requires_grad of {name}"] = parameter.requires_grad
    optimizers = sys.modules["torch.optim.optimizer"]
    for attribute in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        found[f"torch.optim's {attribute}"] = list(getattr(optimizers, attribute).items())
    for attribute in _GLOBAL:
        found[f"torch.nn's {attribute}"] = list(getattr(torch.nn.modules.module, attribute).items())
    scaler = torch.amp.GradScaler
    found["torch.amp.GradScaler"] = sorted((k, id(v)) for k, v in vars(scaler).items())
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
