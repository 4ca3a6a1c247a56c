"""σ_w² = fan_in · Var W and σ_b² of the common initialisations of a linear layer, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gradscope.errors import QuantityError

__all__ = ["INITIALISATIONS", "Initialisation", "bias_variance_of", "weight_variance_of"]

Variance = Callable[[int, int], float]

#: Standard deviation of GPT-2's and BERT's weights.
_NORMAL_SD: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialisation:
    """How the weights of a linear layer are drawn, as far as mean-field theory sees it.

    Attributes:
        name: its name.
        meaning: the distribution of a weight and of a bias.
        source: where it is defined.
        weight: (fan_in, fan_out) → Var W of one weight.
        bias: (fan_in, fan_out) → the variance of a bias.
    """

    name: str
    meaning: str
    source: str
    weight: Variance
    bias: Variance = lambda fan_in, fan_out: 0.0


_TABLE: Final = (
    Initialisation(
        name="torch",
        meaning="torch.nn.Linear's default, weights and biases uniform in ±1/√fan_in",
        source="torch.nn.Linear.reset_parameters: kaiming_uniform_ with a = √5",
        weight=lambda fan_in, fan_out: 1 / (3 * fan_in),
        bias=lambda fan_in, fan_out: 1 / (3 * fan_in),
    ),
    Initialisation(
        name="xavier",
        meaning="variance 2/(fan_in + fan_out), uniform or normal; biases 0",
        source="Glorot & Bengio 2010",
        weight=lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    ),
    Initialisation(
        name="he",
        meaning="variance 2/fan_in, uniform or normal; biases 0",
        source="He et al. 2015, arXiv:1502.01852",
        weight=lambda fan_in, fan_out: 2 / fan_in,
    ),
    Initialisation(
        name="lecun",
        meaning="variance 1/fan_in, uniform or normal; biases 0",
        source="LeCun et al. 1998, Efficient BackProp",
        weight=lambda fan_in, fan_out: 1 / fan_in,
    ),
    Initialisation(
        name="normal",
        meaning=f"N(0, {_NORMAL_SD:g}²) whatever the width; biases 0",
        source="Radford et al. 2019 (GPT-2)",
        weight=lambda fan_in, fan_out: _NORMAL_SD**2,
    ),
    Initialisation(
        name="orthogonal",
        meaning="orthonormal rows or columns, whichever are fewer; biases 0",
        source="Saxe et al. 2014, arXiv:1312.6120",
        weight=lambda fan_in, fan_out: 1 / max(fan_in, fan_out),
    ),
)

#: Every initialisation by name; those of `gradscope.reference` have the same names.
INITIALISATIONS: Final[Mapping[str, Initialisation]] = MappingProxyType({i.name: i for i in _TABLE})

_OTHER_NAMES: Final = {
    "default": "torch",
    "glorot": "xavier",
    "xavier_uniform": "xavier",
    "xavier_normal": "xavier",
    "kaiming": "he",
    "he_uniform": "he",
    "he_normal": "he",
    "lecun_normal": "lecun",
    "lecun_uniform": "lecun",
}


def weight_variance_of(initialisation: str, fan_in: int, fan_out: int, *, gain: float = 1.0) -> float:
    """σ_w² = gain² · fan_in · Var W, the factor of mean-field theory.

    1/3 for torch's default, 2 for He, 1 for LeCun and for square Xavier and orthogonal layers,
    .0004 · fan_in for N(0, .02²). An orthogonal matrix has the mean-field limit of a Gaussian one with
    the same variance; its fluctuations are smaller (Pennington et al. 2017, arXiv:1711.04735).

    Args:
        initialisation: a name in `INITIALISATIONS`, or another usual one (``kaiming``, ``glorot``).
        fan_in: features of the layer's input.
        fan_out: features of its output.
        gain: factor on the weights, as in ``torch.nn.init``; He's √2 is in it already.

    Raises:
        QuantityError: no such initialisation.
    """
    found = _find(initialisation, fan_in, fan_out)
    return gain**2 * fan_in * found.weight(fan_in, fan_out)


def bias_variance_of(initialisation: str, fan_in: int, fan_out: int) -> float:
    """σ_b²: 1/(3 fan_in) for torch's default, 0 for all others.

    Raises:
        QuantityError: no such initialisation.
    """
    return _find(initialisation, fan_in, fan_out).bias(fan_in, fan_out)


def _find(name: str, fan_in: int, fan_out: int) -> Initialisation:
    if fan_in < 1 or fan_out < 1:
        raise ValueError(f"fan_in and fan_out are numbers of features, ≥ 1; got {fan_in} and {fan_out}")
    found = INITIALISATIONS.get(_OTHER_NAMES.get(name, name))
    if found is None:
        raise QuantityError(
            f"no initialisation {name!r}; the initialisations are {', '.join(INITIALISATIONS)}. Of any "
            "other, σ_w² is fan_in times the variance of one weight."
        )
    return found
