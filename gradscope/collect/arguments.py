"""What the watched model's own forward says: which tokens count, and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Mask", "scalar_loss", "valid_positions"]

#: What ``mask=`` accepts: the name of the forward argument that holds it, a tensor, or a function of
#: the forward's (args, kwargs). The mask is [batch, tokens], true (or 1) where a token counts.
Mask = str | Tensor | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]


def valid_positions(
    mask: Mask, model: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of one forward as a bool tensor [batch, tokens]; None where this forward has none.

    Raises:
        ValueError: the mask is not [batch, tokens], or the forward has no argument of that name.
    """
    found: Any
    if isinstance(mask, str):
        found = kwargs.get(mask)
        if found is None and model is not None:
            signature = inspect.signature(model.forward)
            variadic = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
            if mask not in signature.parameters and not variadic:
                raise ValueError(
                    f"{type(model).__name__}.forward has no argument {mask!r}; "
                    f"it has {', '.join(signature.parameters)}"
                )
            found = signature.bind(*args, **kwargs).arguments.get(mask)
    elif isinstance(mask, Tensor):
        found = mask
    else:
        found = mask(args, kwargs)
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"a mask is a tensor [batch, tokens]; got {shape}")
    return found != 0


def scalar_loss(output: Any) -> Tensor | float | None:
    """The loss in a model's output (``.loss``, ``["loss"]`` or a scalar output), where there is one."""
    loss = output
    if not isinstance(output, Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        return None
    return loss.detach().item() if loss.device.type == "cpu" else loss.detach().clone()
