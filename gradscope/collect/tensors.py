"""What gradscope asks of a user's tensors: which there are in an output, and what was written to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["all_tensors_in", "first_tensor", "is_plain", "tensors_in", "version_of", "writes_of"]


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """The floating-point tensors of a nested structure, in order; other objects are not entered."""
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and value.device.type != "meta":
            yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None), depth - 1)


def all_tensors_in(value: Any) -> list[Tensor]:
    """The same as a list, sooner where the value is a tensor itself."""
    if type(value) is Tensor and value.is_floating_point() and not value.is_meta:
        return [value]
    return list(tensors_in(value))


def first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """The primary input of a block: its first floating-point tensor of two or more axes."""
    for source in (args, kwargs):
        for tensor in tensors_in(source):
            if tensor.dim() >= 2:
                return tensor
    return next(tensors_in(args), None)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is dense, and of one shape."""
    return tensor.layout is torch.strided and not tensor.is_nested


def version_of(tensor: Tensor) -> float:
    """How often it was written to; of a tensor that does not count that, a number equal to none."""
    try:
        return tensor._version
    except RuntimeError:  # made under inference_mode
        return math.nan


def writes_of(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor of no elements whose version counts the writes to this one, and that version now."""
    counter = tensor.detach()
    counter.data = tensor.new_empty(0)
    return counter, counter._version
