"""What experiments do with a batch and around a run: map its tensors, copy it, keep the caller's dice."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gradscope.collect.tensors import tensors_in
from gradscope.errors import MeasureError

__all__ = [
    "first_float",
    "loss_or_own",
    "mapped",
    "model_loss",
    "own_batch",
    "own_random_state",
    "part_of",
    "replaced",
    "sample_count",
]


def mapped(value: Any, function: Callable[[Tensor, str], Any], path: str = "") -> Any:
    """The same structure of tuples, lists, mappings and dataclasses, with its tensors mapped."""
    if isinstance(value, Tensor):
        return function(value, path)
    it: Any = value  # its items are of any type
    if isinstance(value, MutableMapping):  # before dataclasses: Hugging Face's outputs are both
        result: Any = copy.copy(it)
        for key in it:
            result[key] = mapped(it[key], function, f"{path}[{key!r}]")
        return result
    if isinstance(value, Mapping):
        return {key: mapped(it[key], function, f"{path}[{key!r}]") for key in it}
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function, f"{path}[{i}]") for i, item in enumerate(it)]
        make: Any = getattr(it, "_make", it.__class__)  # named tuples take their items one by one
        return make(items)
    if is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in fields(value):
            item = mapped(getattr(value, field.name), function, f"{path}.{field.name}")
            object.__setattr__(result, field.name, item)
        return result
    return value


def own_batch(batch: Any) -> Any:
    """The batch on tensors of its own, which a loss may write to; with its need of gradients."""
    return mapped(
        batch, lambda tensor, path: tensor.detach().clone().requires_grad_(tensor.requires_grad)
    )


def first_float(value: Any) -> Tensor | None:
    """The first real floating-point tensor of a nested structure."""
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point()), None)


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """The same structure with one tensor in the place of another."""
    return mapped(value, lambda tensor, path: new if tensor is old else tensor)


def sample_count(batch: Any, dim: int) -> int:
    """The number of samples that all tensors of the batch hold along one dimension.

    Raises:
        MeasureError: none, or different numbers, or a tensor without that dimension.
    """
    sizes: dict[str, int] = {}

    def check(tensor: Tensor, path: str) -> Tensor:
        if tensor.dim() and not 0 <= dim < tensor.dim():
            raise MeasureError(
                f"batch{path} has shape {tuple(tensor.shape)}, and so no batch_dim={dim} along which to "
                "copy it. Say which dimension the samples lie along, or give what is the same for all of "
                "them inside the loss: loss=lambda model, batch: ..."
            )
        if tensor.dim():
            sizes[path] = tensor.shape[dim]
        return tensor

    mapped(batch, check)
    if not sizes or 0 in sizes.values():
        what = "is empty" if sizes else f"({type(batch).__name__}) holds no tensor that could be copied"
        raise MeasureError(f"The batch {what}: give tensors with samples along batch_dim={dim}.")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"batch{path}: {size}" for path, size in sizes.items())
        raise MeasureError(
            f"The tensors of the batch have different sizes along batch_dim={dim} ({listed}): which hold "
            "samples cannot be told. Expand those that are shared to one row per sample."
        )
    return next(iter(sizes.values()))


def part_of(batch: Any, dim: int, start: int, stop: int) -> Any:
    """The samples from ``start`` to before ``stop``, on tensors of their own."""
    return mapped(
        batch,
        lambda tensor, path: (
            tensor.detach().narrow(dim, start, stop - start) if tensor.dim() else tensor.detach()
        ).clone(),
    )


def loss_or_own(loss: Callable[[Any, Any], Tensor] | None, batch: Any) -> Callable[[Any, Any], Tensor]:
    """The loss that was given, or else the model's own, which needs a mapping.

    Raises:
        MeasureError: no loss was given, and the batch is no mapping.
        TypeError: the loss is no function.
    """
    if loss is not None and not callable(loss):
        raise TypeError(
            f"loss={loss!r} is no function. Write loss=lambda model, batch: ..., returning a scalar "
            "tensor."
        )
    if loss is None and not isinstance(batch, Mapping):
        raise MeasureError(
            f"Without loss=, model(**batch).loss is called, and the batch is no mapping but a "
            f"{type(batch).__name__}. Write loss=lambda model, batch: ..., returning a scalar tensor."
        )
    return loss or model_loss


def model_loss(model: Any, batch: Any) -> Tensor:
    """The default loss: ``model(**batch).loss``, as transformers models return it.

    Raises:
        MeasureError: the batch is no mapping, or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise MeasureError(
            "Without loss=, the batch must be a mapping of the model's arguments with labels, because "
            f"the loss is model(**batch).loss; the batch is a {type(batch).__name__}. Write "
            "loss=lambda model, batch: ..."
        )
    output = model(**batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None:
        raise MeasureError(
            f"model(**batch) returned a {type(output).__name__} without a loss. Put labels into the "
            "batch, or write loss=lambda model, batch: ..."
        )
    return found


@contextmanager
def own_random_state(tensors: Iterable[Tensor] = ()) -> Generator[None]:
    """Whatever is drawn inside, the caller's random state is afterwards as it was.

    Args:
        tensors: the state of the devices that these are on is kept as well; that of the CPU, of
            Python's ``random`` and of numpy always are.
    """
    devices: dict[str, set[int]] = {}
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            devices.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    if torch.cuda.is_available():
        # A model that is made inside may draw on any of them.
        devices["cuda"] = set(range(torch.cuda.device_count()))
    python, legacy = random.getstate(), np.random.get_state()
    fork = cast(Any, torch.random).fork_rng
    with ExitStack() as stack:
        stack.enter_context(fork(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(fork(devices=sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
