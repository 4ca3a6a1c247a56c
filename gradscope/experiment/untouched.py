"""How an experiment runs a model that must stay as it is: a copy, nothing random, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import own_random_state
from gradscope.layers import named_layers

__all__ = ["refuse_coupled_samples", "shared_copy", "undisturbed", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind torch.compile and data parallelism: neither belongs to what is measured.

    Raises:
        TypeError: it is no model.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        kind = "the class" if isinstance(given, type) else "an object of type"
        name = (given if isinstance(given, type) else type(given)).__name__
        raise TypeError(
            f"The model is an nn.Module instance; got {kind} {name}. A maker is called first."
        )
    child = {
        "OptimizedModule": "_orig_mod",
        "DistributedDataParallel": "module",
        "DataParallel": "module",
    }
    while (name := child.get(type(model).__name__)) in model._modules:  # pyright: ignore[reportPrivateUsage]
        model = model.get_submodule(name)
    return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with its own buffers and hooks that shares the parameters, which are never written."""
    try:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:
        raise MeasureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the model "
            "itself is never run: its buffers and your hooks would see it. Measure a plain copy of it."
        ) from error


_STOCHASTIC_CLASS: Final = ("dropout", "droppath", "dropconnect", "drop_path", "stochasticdepth")


def refuse_coupled_samples(model: nn.Module) -> None:
    """Refuse a model whose samples see each other, or are treated at random.

    Raises:
        MeasureError: BatchNorm on batch statistics, or active dropout.
    """
    for name, module in named_layers(model).items():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            if module.training or module.running_mean is None:
                fix = (
                    "Write model.eval()."
                    if module.running_mean is not None
                    else "It keeps no running statistics: replace it by a GroupNorm or LayerNorm."
                )
                raise MeasureError(
                    f"{where} normalises by the statistics of the batch, so that its samples are not "
                    f"independent of each other. {fix}"
                )
        if not module.training:
            continue
        stochastic = any(word in type(module).__name__.lower() for word in _STOCHASTIC_CLASS)
        for attribute, value in vars(module).items():
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and 0 < value <= 1
                and ("drop" in attribute.lower() or (stochastic and attribute in ("p", "rate", "prob")))
            ):
                raise MeasureError(
                    f"{where} has {attribute}={value:g} and is in training mode: dropout makes "
                    "another model of each forward pass. Write model.eval()."
                )


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Gradients on; every random state as it was, afterwards."""
    with ExitStack() as stack:
        stack.enter_context(own_random_state((*model.parameters(), *model.buffers())))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any(type(m).__name__ == "OptimizedModule" for m in model.modules()):
            # A compiled part would run without the hooks, that were not there when it was traced.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
