"""Laws of growth of Δ with the number of blocks: one decorated function each.

A law says Δ(L) = b·x(L; shape), or a + b·x(L; shape), where a is what the first and the last block do
differently whatever the depth. The shape of a law is no number or one, which is not fitted but averaged
over: log-uniform inside its bounds before anything is measured. What is made of the laws is in
`gradscope.analysis.extrapolation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["LAWS", "Law", "law"]

Floats = npt.NDArray[np.float64]
Regressor = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """One law of growth.

    Attributes:
        name: its name.
        formula: Δ over L, without what the ends add.
        meaning: what follows it.
        source: where it is derived or seen.
        shape: name of the shape's number; empty where there is none.
        bounds: (low, high) of the shape, both positive.
        in_depths: whether the bounds are multiples of the deepest depth that was measured.
        only_ends: whether Δ is a alone, with no x.
        x: (depths, shape) → x(L; shape), which broadcasts, is 0 at L = 0 and monotone.
    """

    name: str
    formula: str
    meaning: str
    source: str
    shape: str
    bounds: tuple[float, float]
    in_depths: bool
    only_ends: bool
    x: Regressor


_LAWS: dict[str, Law] = {}

#: Every law by name, the simpler first. Piecewise laws cannot be extrapolated and are not here.
LAWS: Final[Mapping[str, Law]] = MappingProxyType(_LAWS)


def law(
    *,
    name: str,
    formula: str,
    source: str,
    shape: str = "",
    bounds: tuple[float, float] = (1.0, 1.0),
    in_depths: bool = False,
    only_ends: bool = False,
    register: bool = True,
) -> Callable[[Regressor], Law]:
    """Make a law of the decorated function; its docstring is the meaning.

    With ``register=False`` it joins no table and can be passed to ``predict(laws=...)``.
    """

    def make(function: Regressor) -> Law:
        if register and name in _LAWS:
            raise ValueError(f"a law of growth {name!r} is already registered")
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"law {name!r}: bounds are (low, high), both positive; got {bounds}")
        made = Law(
            name=name,
            formula=formula,
            meaning=inspect.getdoc(function) or "",
            source=source,
            shape=shape,
            bounds=bounds,
            in_depths=in_depths,
            only_ends=only_ends,
            x=function,
        )
        if register:
            _LAWS[name] = made
        return made

    return make


@law(
    name="constant",
    formula="a",
    source="DeepNorm: Wang et al. 2022, arXiv:2203.00555",
    only_ends=True,
)
def _constant(depth: Floats, shape: Floats) -> Floats:
    """The ends alone: nothing adds up over depth."""
    return np.zeros_like(depth * shape)


@law(
    name="linear",
    formula="b·L",
    source="plain chains: Schoenholz et al. 2017, arXiv:1611.01232",
)
def _linear(depth: Floats, shape: Floats) -> Floats:
    """Every block multiplies by the same factor."""
    return depth * np.ones_like(shape)


@law(
    name="root",
    formula="b·√L",
    source="residual tanh: Yang & Schoenholz 2017, arXiv:1712.08969",
)
def _root(depth: Floats, shape: Floats) -> Floats:
    """Between a logarithm and a line."""
    return np.sqrt(depth) * np.ones_like(shape)


@law(
    name="logarithm",
    formula="b·ln(1 + L)",
    source="pre-norm, b = ½: Xiong et al. 2020, arXiv:2002.04745",
)
def _logarithm(depth: Floats, shape: Floats) -> Floats:
    """Block l is one of l + 1 equal parts of the stream: a power of the depth."""
    return np.log1p(depth) * np.ones_like(shape)


@law(
    name="power",
    formula="b·L^p",
    source="residual nets between criticality and chaos: Yang & Schoenholz 2017, arXiv:1712.08969",
    shape="p",
    bounds=(0.3, 3.0),
)
def _power(depth: Floats, shape: Floats) -> Floats:
    """A power of its own, of Δ itself, slower or faster than a line."""
    return depth**shape


@law(
    name="saturating",
    formula="b·(1 − e^(−L/τ))",
    source="a fixed point, reached within τ blocks: Schoenholz et al. 2017, arXiv:1611.01232",
    shape="τ",
    bounds=(1 / 8, 4.0),
    in_depths=True,
)
def _saturating(depth: Floats, shape: Floats) -> Floats:
    """Levels off: blocks beyond a few τ change nothing more."""
    return -np.expm1(-depth / shape)


@law(
    name="take-off",
    formula="b·(e^(L/τ) − 1)",
    source="skips without norms, whose stream grows by a factor per block: He et al. 2016, "
    "arXiv:1603.05027; Zhang et al. 2019, arXiv:1901.09321",
    shape="τ",
    bounds=(1 / 2, 4.0),
    in_depths=True,
)
def _take_off(depth: Floats, shape: Floats) -> Floats:
    """Every block adds more than the one before it, by the same factor."""
    return np.expm1(depth / shape)
