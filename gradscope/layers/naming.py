"""The modules of a model by name.

Names are those of ``named_modules()`` without wrapper prefixes, which are stripped only where
the owner *is* such a wrapper: a user's own attribute called ``module`` survives.
"""

from __future__ import annotations

from typing import Final

from torch import nn

__all__ = ["CONTAINERS", "callable_layers", "class_name", "named_layers"]

# The child that is transparent in a wrapper, by the wrapper's class name (no import needed).
_WRAPPERS: Final = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}
#: torch's containers, which are never called themselves.
CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by clean name, the model itself under "", each module once, in definition order."""
    found: dict[str, nn.Module] = {}
    _walk(model, "", found, set())
    return found


def _walk(module: nn.Module, name: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    # No function inside of `named_layers`: one that calls itself is a cycle, which would keep the model
    # alive until the next garbage collection.
    if id(module) in seen:
        return
    seen.add(id(module))
    transparent = _transparent_child(module)
    if transparent is None or name not in found:
        # A wrapper and its content share a name; the content is what the user knows.
        found[name] = module
    for child_name, child in module._modules.items():
        if child is None:
            continue
        if child_name == transparent:
            found.pop(name, None)
            _walk(child, name, found, seen)
        else:
            _walk(child, f"{name}.{child_name}" if name else child_name, found, seen)


def _transparent_child(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        child = _WRAPPERS.get(cls.__name__)
        if child is not None and child in module._modules:
            return child
    return None


def class_name(module: nn.Module) -> str:
    """The name of its class: under ``fully_shard``, that of the class which FSDP2 puts its own before."""
    cls = type(module)
    if len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule":
        cls = cls.__bases__[1]
    return cls.__name__


def callable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """`named_layers` without the containers that are never called."""
    return {
        name: module
        for name, module in named_layers(model).items()
        if not (
            isinstance(module, CONTAINERS)
            and type(module).forward in (nn.Module.forward, *(c.forward for c in CONTAINERS))
        )
    }
