"""The families of decay: one decorated function each, from positions and shape to a mean curve.

A family's curve is Σ_j b_j·x_j(shape), with b found by generalised least squares, and a shape of no, one
or two numbers that is searched. Positions are given three ways: ``s``, the distance along
the pass (L − l for gradients, l for activations), ``l`` from the input end, ``d`` = L − l from the loss
end. The level c is free in every family and drops out of the increments that are fitted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["FAMILIES", "Family", "Positions", "family"]

Floats = npt.NDArray[np.float64]


class Positions(NamedTuple):
    """Where a curve has its P positions, in the order of the pass.

    Attributes:
        s: distance along the pass, in layers.
        l: depth from the input end.
        d: depth from the loss end.
    """

    s: Floats
    l: Floats  # noqa: E741 - the field's letter for depth
    d: Floats


Basis = Callable[[Positions, Sequence[float]], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of decay.

    Attributes:
        name: its name.
        formula: y over depth, in the words of the field.
        meaning: what follows it and what its parameters are.
        source: where it is derived.
        linear: names of the coefficients b_j, so that y = c + Σ b_j·x_j.
        shape: names of the shape's numbers.
        search: how the shape is found: ``none``, ``continuous`` (optimised inside ``bounds``) or
            ``knots`` (every knot that leaves three points on each side).
        bounds: (low, high) of each shape number; both positive, searched on a logarithmic scale.
        least_bic: how much smaller than every simpler family's the BIC must be.
        basis: (positions, shape) → x [P, len(linear)]; one column more has the coefficient 1.
    """

    name: str
    formula: str
    meaning: str
    source: str
    linear: tuple[str, ...]
    shape: tuple[str, ...]
    search: Literal["none", "continuous", "knots"]
    bounds: tuple[tuple[float, float], ...]
    least_bic: float
    basis: Basis

    @property
    def size(self) -> int:
        """Number of parameters of the mean, the level not counted."""
        return len(self.linear) + len(self.shape)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters but the level."""
        return (*self.linear, *self.shape)


_FAMILIES: dict[str, Family] = {}

#: Every family by name, the simpler first.
FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(_FAMILIES)


def family(
    *,
    name: str,
    formula: str,
    source: str,
    linear: tuple[str, ...] = (),
    shape: tuple[str, ...] = (),
    bounds: tuple[tuple[float, float], ...] = (),
    search: Literal["none", "continuous", "knots"] = "none",
    least_bic: float = 0.0,
    register: bool = True,
) -> Callable[[Basis], Family]:
    """Make a family of the decorated basis function; its docstring is the meaning.

    With ``register=False`` it joins no table and can be passed to ``fit_decay(families=...)``.
    """

    def make(function: Basis) -> Family:
        if register and name in _FAMILIES:
            raise ValueError(f"a decay family {name!r} is already registered")
        if search == "continuous" and len(bounds) != len(shape):
            raise ValueError(f"family {name!r}: {len(shape)} shape numbers and {len(bounds)} bounds")
        made = Family(
            name=name,
            formula=formula,
            meaning=inspect.getdoc(function) or "",
            source=source,
            linear=linear,
            shape=shape,
            search=search,
            bounds=bounds,
            least_bic=least_bic,
            basis=function,
        )
        if register:
            _FAMILIES[name] = made
        return made

    return make


@family(name="flat", formula="c", source="isometry: Saxe et al. 2014, arXiv:1312.6120")
def _flat(at: Positions, shape: Sequence[float]) -> Floats:
    """The amplitude is kept."""
    return np.zeros((len(at.s), 0))


@family(
    name="exponential",
    formula="c − κs, ξ = 1/(2|κ|)",
    source="Schoenholz et al. 2017, arXiv:1611.01232",
    linear=("kappa",),
)
def _exponential(at: Positions, shape: Sequence[float]) -> Floats:
    """The same factor e^(−κ) in every layer: plain nets, ordered (κ > 0) or chaotic (κ < 0)."""
    return -at.s[:, None]


@family(
    name="power-in",
    formula="c − p·ln(1 + l)",
    source="pre-norm at initialisation, p = ½: Xiong et al. 2020, arXiv:2002.04745",
    linear=("p",),
)
def _power_in(at: Positions, shape: Sequence[float]) -> Floats:
    """A power of the depth counted from the input end: branch l is one of l + 1 equal parts."""
    return -np.log1p(at.l)[:, None]


@family(
    name="power-out",
    formula="c − p·ln(1 + d)",
    source="Yang & Schoenholz 2017, arXiv:1712.08969",
    linear=("p",),
)
def _power_out(at: Positions, shape: Sequence[float]) -> Floats:
    """A power of the depth counted from the loss end: at criticality."""
    return -np.log1p(at.d)[:, None]


@family(
    name="stretched",
    formula="c + a·s^β (= ±(s/τ)^β with τ = |a|^(−1/β))",
    source="residual tanh, β = ½: Yang & Schoenholz 2017, arXiv:1712.08969",
    linear=("a",),
    shape=("beta",),
    bounds=((0.1, 3.0),),
    search="continuous",
)
def _stretched(at: Positions, shape: Sequence[float]) -> Floats:
    """Slower than exponential for β < 1 and faster than any power of the depth; β = 1 is exponential."""
    return at.s[:, None] ** shape[0]


@family(
    name="exponential + floor",
    formula="c + ½·ln[(1 − f)·e^(−2κs) + f]",
    source="a skip share f that no layer takes away: Balduzzi et al. 2017, arXiv:1702.08591",
    shape=("kappa", "f"),
    bounds=((1e-3, 10.0), (1e-12, 0.5)),
    search="continuous",
)
def _exponential_floor(at: Positions, shape: Sequence[float]) -> Floats:
    """Decays by κ per layer until the share f of the energy is left, and stays there."""
    kappa, floor = shape
    return 0.5 * np.logaddexp(np.log1p(-floor) - 2 * kappa * at.s, np.log(floor))[:, None]


@family(
    name="piecewise",
    formula="c − κ₁·min(s, k) − κ₂·max(s − k, 0)",
    source="one change of architecture along the depth",
    linear=("kappa_1", "kappa_2"),
    shape=("knot",),
    search="knots",
    least_bic=6.0,
)
def _piecewise(at: Positions, shape: Sequence[float]) -> Floats:
    """Two rates with one knot, at least three points on each side."""
    knot = shape[0]
    return -np.column_stack([np.minimum(at.s, knot), np.maximum(at.s - knot, 0.0)])
