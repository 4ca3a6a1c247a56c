"""The table of statistics: every word that a Record's rows may carry, with unit and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["SIGNALS", "STATISTICS", "Statistic"]

SIGNALS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "activation": "a module's output in the forward pass",
        "output_grad": "the gradient of the loss with respect to a module's output",
        "param_grad": "the gradient of the loss with respect to a parameter",
        "weight": "a parameter's value before the optimizer's step",
        "update": "the change of a parameter in the optimizer's step",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """One stored statistic: its name, the signals it exists for, its unit and its meaning.

    Attributes:
        name: the word in the Record's ``statistic`` column.
        signals: the signals it is stored for.
        unit: ``signal`` (the unit of the tensor), ``signal^2``, ``elements``, ``positions`` or ``1``.
        meaning: one sentence with the formula.
        where: ``all`` rows of those signals, ``stream`` (positions of the residual stream only) or
            ``packed`` (parameters that hold query, key and value together).
        slow: recorded on every tenth recorded step only, because it costs more.
    """

    name: str
    signals: tuple[str, ...]
    unit: str
    meaning: str
    where: str = "all"
    slow: bool = False


_TENSOR = ("activation", "output_grad")
_ANY = ("activation", "output_grad", "param_grad", "weight", "update")

#: Every stored statistic, in the order of the Record's rows. Kernels, documentation, plots and
#: contract tests follow from this table.
STATISTICS: Final[Mapping[str, Statistic]] = MappingProxyType(
    {
        s.name: s
        for s in (
            Statistic(name="l2", signals=_ANY, unit="signal", meaning="Frobenius norm, sqrt(sum x^2)"),
            Statistic(name="count", signals=_ANY, unit="elements", meaning="number of elements"),
            Statistic(
                name="tokens",
                signals=_TENSOR,
                unit="positions",
                meaning="number of positions: elements / features (channels for convolutions)",
            ),
            Statistic(name="mean", signals=_TENSOR, unit="signal", meaning="mean over all elements"),
            Statistic(
                name="variance",
                signals=_TENSOR,
                unit="signal^2",
                meaning="variance over all elements, sum (x - mean)^2 / (count - 1)",
            ),
            Statistic(
                name="absmax",
                signals=_TENSOR,
                unit="signal",
                meaning="largest absolute value",
            ),
            Statistic(name="zeros", signals=_TENSOR, unit="elements", meaning="elements exactly 0"),
            Statistic(
                name="nonfinite",
                signals=("activation", "output_grad", "param_grad"),
                unit="elements",
                meaning="elements that are NaN or infinite",
            ),
            Statistic(
                name="dot_next",
                signals=_TENSOR,
                unit="signal^2",
                meaning="inner product with the same signal at the next stream position",
                where="stream",
            ),
            Statistic(
                name="diff_next_l2",
                signals=_TENSOR,
                unit="signal",
                meaning="norm of the difference to the same signal at the next stream position",
                where="stream",
            ),
            Statistic(
                name="unit_skip",
                signals=("activation",),
                unit="1",
                meaning=(
                    "1 where the next stream position is this one plus something, seen in the autograd "
                    "graph: adds only, coefficient 1, no other consumer; else absent"
                ),
                where="stream",
            ),
            Statistic(
                name="token_variance",
                signals=("activation",),
                unit="signal^2",
                meaning="mean over positions of the (biased) variance over features: act_var",
                slow=True,
            ),
            Statistic(
                name="kurtosis",
                signals=_TENSOR,
                unit="1",
                meaning="E x^4 / (E x^2)^2, uncentred (3 for a Gaussian)",
                slow=True,
            ),
            Statistic(
                name="token_cosine",
                signals=("activation",),
                unit="1",
                meaning="mean cosine between different tokens of one sequence (1: rank collapse)",
                where="stream",
                slow=True,
            ),
            Statistic(
                name="input_cosine",
                signals=("activation",),
                unit="1",
                meaning="input presence: mean over tokens of the cosine with the trunk's input h_0",
                where="stream",
                slow=True,
            ),
            Statistic(
                name="l2_at_step",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of .grad when the optimizer steps (after clipping)",
                slow=True,
            ),
            Statistic(
                name="query_l2",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of the query third of a packed projection",
                where="packed",
            ),
            Statistic(
                name="key_l2",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of the key third of a packed projection",
                where="packed",
            ),
            Statistic(
                name="value_l2",
                signals=("param_grad",),
                unit="signal",
                meaning="Frobenius norm of the value third of a packed projection",
                where="packed",
            ),
        )
    }
)
