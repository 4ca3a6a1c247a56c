"""What a recorder says to the user about a watch: the warnings, and that each kind comes once."""

from __future__ import annotations

import logging
import warnings

from gradscope.errors import GradscopeWarning, LayerError

__all__ = [
    "Voice",
    "compiled_around",
    "compiled_before",
    "misfit_mask",
    "no_layers_left",
    "no_mask",
    "no_optimizer",
    "nothing_came",
]


class Voice:
    """Warns once of each kind of thing, and never raises."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, kind: str, message: str) -> None:
        """Warn with this message, unless a thing of this kind was said before."""
        if kind in self._said:
            return
        self._said.add(kind)
        try:
            warnings.warn(message, GradscopeWarning, stacklevel=2)
        except GradscopeWarning:
            # An "error" filter makes the warning raise; it must be heard, and must not end training.
            logging.getLogger("gradscope").warning(message)


def no_optimizer(backwards: int) -> tuple[str, str]:
    """(kind, message) for so many backward passes without any optimizer's step."""
    return (
        "no optimizer",
        f"gradscope has seen {backwards} backward passes and no optimizer of torch.optim "
        "that steps the watched parameters. Say where a step ends: scope.step() after each "
        "update. Until then every backward pass counts as one step.",
    )


def compiled_around() -> tuple[str, str]:
    """(kind, message) for a model that is called inside of a larger compiled function."""
    return (
        "compiled around",
        "The watched model is called inside of a larger function that is compiled (a training step): "
        "where its forward begins and ends cannot be seen, and the values of its layers are absent as "
        "'compiled'. The parameters' gradients are read when the optimizer steps. To have the layers, "
        "compile the model (torch.compile(model)) instead of the function around it.",
    )


def compiled_before(layers: int) -> tuple[str, str]:
    """(kind, message) for a model that was compiled, and run, before it was watched."""
    return (
        "compiled before",
        f"{layers} watched layers were compiled before they were watched; compiled code calls no "
        "hooks that come later. gradscope has dropped what torch.compile made so far "
        "(torch._dynamo.reset()), and the next call compiles again. Watch first, then compile.",
    )


def no_layers_left(error: LayerError) -> tuple[str, str]:
    """(kind, message) for a model that was changed so that it has none of the chosen layers any more."""
    return (
        "no layers left",
        f"The watched model was changed, and its layers are gone: {error} Until they are back, only "
        "parameters are recorded.",
    )


def misfit_mask(shape: list[int]) -> tuple[str, str]:
    """(kind, message) for a mask of a shape that no watched layer's output has."""
    return (
        "mask",
        f"mask= gave a tensor of shape {shape}, which is [batch, tokens] of no watched layer's "
        "output; nothing can be left out by it, and the step's values are absent. A tensor given "
        "as mask= must fit every batch; name the forward's argument instead: "
        'mask="attention_mask".',
    )


def no_mask(mask: object, forwards: int) -> tuple[str, str]:
    """(kind, message) for a mask that no forward had."""
    return (
        "no mask",
        f"mask={mask!r} was given, and none of {forwards} forward calls had it: "
        "padding, if there is any, is in the values. Pass the mask to the model under that name.",
    )


def nothing_came(
    *, layers: int, compiled: int, forwards: int, steps: int, reached: bool
) -> tuple[str, str] | None:
    """(kind, message) for a watch that saw nothing: why that is, and what to write; else None.

    Args:
        layers: the number of watched layers.
        compiled: how many of them lie inside a compiled module.
        forwards: the number of forward calls seen.
        steps: the number of steps recorded.
        reached: whether a gradient came to any watched layer.
    """
    watched = f"{layers} layers watched"
    if compiled and not reached:
        return (
            "compiled",
            f"{watched}, {compiled} of them inside a compiled module, and no gradient came out of it: "
            "their values are absent as 'compiled'. Was loss.backward() called on its output? Watch and "
            "train the model uncompiled for a while, or report what it is compiled with.",
        )
    if not forwards and not steps:
        return (
            "no forward",
            f"{watched}, 0 forward calls in grad mode. Either the model was never called, or only "
            "under torch.no_grad(), or inside of a larger compiled function. "
            "Run the model's training loop inside `with gradscope.watch(model):`.",
        )
    if reached:
        return None
    calls = "1 forward call" if forwards == 1 else f"{forwards} forward calls"
    return (
        "no backward",
        f"{watched}, {calls}, 0 backward passes through them. Either "
        "loss.backward() was never called while the model was watched, or the loss does not "
        "depend on any watched layer (detached? another model's output?).",
    )
