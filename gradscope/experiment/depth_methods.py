"""Everything that is called a depth, by name: ``gradscope.effective_depth(..., method="...")``.

The methods answer different questions in different units: path lengths in branches, positions and counts
in blocks. Their values lie on no common scale, and a result says its method, its unit and the end of its
scale wherever it is printed. A method is one decorated function in one of the files of `HOMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gradscope.collect.arguments import Mask

__all__ = [
    "HOMES",
    "DepthMethod",
    "DepthReading",
    "DepthRequest",
    "NamedDepth",
    "depth_by",
    "depth_method",
    "depth_methods",
]

#: The files whose decorated functions are the methods.
HOMES: Final = ("gradscope.experiment.gradient_depths", "gradscope.experiment.layer_depths")


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRequest:
    """What a method is asked about, as it was given to `gradscope.effective_depth`.

    Attributes:
        model: the model, not yet copied or changed.
        batch: the batch.
        loss: ``loss(model, batch)``; None for the model's own.
        trunk: the trunk by name; None: the one that the loss hangs on.
        modules: names of the modules whose outputs are the branches; None: they are found.
        batch_dim: the dimension of the samples.
        mask: positions of padding to leave out of means over activations; None: there are none.
    """

    model: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor] | None
    trunk: str | None = None
    modules: str | Sequence[str] | None = None
    batch_dim: int = 0
    mask: Mask | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthReading:
    """What a method found.

    Attributes:
        value: the depth; NaN where ``status`` is not ``ok``.
        most: the end of the scale: how many branches, blocks or layers there are.
        evidence: the arrays that the value was computed from, by name.
        reading_point: where it was read.
        status: ``ok``, or why there is no value.
    """

    value: float
    most: float
    evidence: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    reading_point: str
    status: str = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthMethod:
    """One row of the table.

    Attributes:
        name: what ``method=`` takes.
        formula: how the value is computed.
        unit: what it counts.
        citation: where it is from.
        read: measures it.
        activations: whether it is read from activations, which takes ``mask`` and no ``modules``.
    """

    name: str
    formula: str
    unit: str
    citation: str
    read: Callable[[DepthRequest], DepthReading]
    activations: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NamedDepth:
    """A depth by a named method. Values of different methods lie on different scales.

    Attributes:
        value: the depth, in `unit`; NaN where `status` is not ``ok``.
        most: the end of its scale, in the same unit.
        evidence: the arrays that it was computed from, by name.
        reading_point: where it was read.
        method: the method's name.
        unit: what it counts.
        formula: how it is computed.
        citation: where the method is from.
        status: ``ok``, or why there is no value.
    """

    value: float
    most: float
    evidence: Mapping[str, npt.NDArray[np.float64]]
    reading_point: str
    method: str
    unit: str
    formula: str
    citation: str
    status: str = "ok"

    def __str__(self) -> str:
        if self.status != "ok":
            return f"no depth by {self.method} at the {self.reading_point}: {self.status}"
        return (
            f"depth by {self.method}: {self.value:.4g} of {self.most:g} {self.unit} "
            f"({self.formula}; {self.citation})"
        )


_METHODS: Final[dict[str, DepthMethod]] = {}


def depth_method(
    name: str, *, formula: str, unit: str, citation: str, activations: bool = False
) -> Callable[[Callable[[DepthRequest], DepthReading]], Callable[[DepthRequest], DepthReading]]:
    """Enter a function into the table of methods.

    Raises:
        ValueError: the name is taken.
    """

    def enter(read: Callable[[DepthRequest], DepthReading]) -> Callable[[DepthRequest], DepthReading]:
        if name in _METHODS:
            raise ValueError(f"depth method {name!r} is there already; choose another name")
        _METHODS[name] = DepthMethod(
            name=name,
            formula=formula,
            unit=unit,
            citation=citation,
            read=read,
            activations=activations,
        )
        return read

    return enter


def depth_methods() -> Mapping[str, DepthMethod]:
    """All methods by name."""
    for home in HOMES:
        import_module(home)
    return MappingProxyType(_METHODS)


def depth_by(name: str, request: DepthRequest) -> NamedDepth:
    """A depth by the method of that name.

    Raises:
        ValueError: there is no such method, or it takes no mask, or no modules.
        MeasureError: what the method refuses.
    """
    methods = depth_methods()
    if name not in methods:
        raise ValueError(f"method={name!r} is none of {', '.join(sorted(methods))}")
    method = methods[name]
    if method.activations and request.modules is not None:
        raise ValueError(
            f"{name} is read from the stream between blocks, not from modules=: leave it out"
        )
    if not method.activations and request.mask is not None:
        raise ValueError(f"{name} is read from gradients, which take no mask=: leave it out")
    found = method.read(request)
    return NamedDepth(
        value=found.value,
        most=found.most,
        evidence=MappingProxyType({key: _frozen(array) for key, array in found.evidence.items()}),
        reading_point=found.reading_point,
        method=method.name,
        unit=method.unit,
        formula=method.formula,
        citation=method.citation,
        status=found.status,
    )


def _frozen(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.array(x, dtype=np.float64)
    x.flags.writeable = False
    return x
