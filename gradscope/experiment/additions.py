"""The additions of a forward pass, numbered in the order in which Python calls them.

The autograd graph of one pass says which addition joins a skip and a branch
(`gradscope.experiment.sublayers`). Its nodes are gone in the next pass; the number of the addition is the
same there, so that the operand can be read, or taken away, in a pass that has no graph or another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Addition", "Additions"]

#: The functions that Python's + and -, and torch's own names for them, come down to.
_ADDING: Final = frozenset(
    [torch.add, torch.sub, torch.subtract]
    + [getattr(Tensor, name) for name in ("add", "add_", "sub", "sub_", "subtract", "subtract_")]
)


@dataclass(frozen=True, slots=True, eq=False)
class Addition:
    """One addition or subtraction, before it is carried out.

    Attributes:
        number: its place among all of the pass, from 0.
        operands: the first and the second one; a number where no tensor is added.
        in_place: whether it writes into the first.
        alpha: the factor of the second one.
    """

    number: int
    operands: tuple[Any, Any]
    in_place: bool
    alpha: Any = 1


class Additions(TorchFunctionMode):
    """Within it, every addition that Python calls is numbered and shown.

    Additions inside of torch's own functions (``torch.nn.functional``, fused kernels) are not seen.

    Args:
        before: is given each addition, and may return operands that take the place of its own.
        after: is given its number, the operands and the result.

    Attributes:
        count: how many there were.
    """

    def __init__(
        self,
        before: Callable[[Addition], tuple[Any, Any] | None] | None = None,
        after: Callable[[Addition, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.count = 0
        self._before = before
        self._after = after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _ADDING:
            return func(*args, **kwargs)
        first = args[0] if args else kwargs.pop("input", None)
        second = args[1] if len(args) > 1 else kwargs.pop("other", None)
        in_place, alpha = func.__name__.endswith("_"), kwargs.get("alpha", 1)
        addition = Addition(self.count, (first, second), in_place, alpha)
        self.count += 1
        operands = self._before(addition) if self._before is not None else None
        first, second = operands or (first, second)
        result = func(first, second, *args[2:], **kwargs)
        if self._after is not None:
            self._after(addition, result)
        return result
