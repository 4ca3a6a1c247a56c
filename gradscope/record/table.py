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
        unit: ``signal`` (the unit of the tensor), ``signal^2``, ``elements``, ``positions``, ``rad`` or
            ``1``.
        meaning: one sentence with the formula.
        where: ``all`` rows of those signals, ``stream`` (positions of the residual stream only),
            ``axis`` (those and the branches) or ``packed`` (parameters that hold query, key and value
            together).
        slow: recorded on every tenth recorded step only, because it costs more.
        directions: whether it is made of directions, which a token that is exactly zero does not have:
            absent then, as ``zero token``.
        pooled: how micro-batches of one step become one value: ``sum``, ``norm`` (root of the sum of
            squares), ``mean`` (over positions) or ``own`` (a rule of its own, or never pooled).
    """

    name: str
    signals: tuple[str, ...]
    unit: str
    meaning: str
    where: str = "all"
    slow: bool = False
    directions: bool = False
    pooled: str = "own"


_TENSOR = ("activation", "output_grad")
_ANY = ("activation", "output_grad", "param_grad", "weight", "update")

#: Every stored statistic, in the order of the Record's rows. Kernels, documentation, plots and
#: contract tests follow from this table.
STATISTICS: Final[Mapping[str, Statistic]] = MappingProxyType(
    {
        s.name: s
        for s in (
            Statistic(
                name="l2",
                signals=_ANY,
                unit="signal",
                meaning="Frobenius norm, sqrt(sum x^2)",
                pooled="norm",
            ),
            Statistic(
                name="count", signals=_ANY, unit="elements", meaning="number of elements", pooled="sum"
            ),
            Statistic(
                name="tokens",
                signals=_TENSOR,
                unit="positions",
                meaning="number of positions: elements / features (channels for convolutions)",
                pooled="sum",
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
            Statistic(
                name="zeros", signals=_TENSOR, unit="elements", meaning="elements exactly 0", pooled="sum"
            ),
            Statistic(
                name="nonfinite",
                signals=("activation", "output_grad", "param_grad"),
                unit="elements",
                meaning="elements that are NaN or infinite",
                pooled="sum",
            ),
            Statistic(
                name="dot_next",
                signals=_TENSOR,
                unit="signal^2",
                meaning="inner product with the same signal at the next stream position",
                where="stream",
                pooled="sum",
            ),
            Statistic(
                name="diff_next_l2",
                signals=_TENSOR,
                unit="signal",
                meaning="norm of the difference to the same signal at the next stream position",
                where="stream",
                pooled="norm",
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
                pooled="mean",
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
                pooled="mean",
                directions=True,
            ),
            Statistic(
                name="input_cosine",
                signals=("activation",),
                unit="1",
                meaning="input presence: mean over tokens of the cosine with the trunk's input h_0",
                where="stream",
                slow=True,
                pooled="mean",
                directions=True,
            ),
            Statistic(
                name="cosine_next",
                signals=("activation",),
                unit="1",
                meaning="mean over tokens of the cosine with the next stream position",
                where="stream",
                slow=True,
                directions=True,
                pooled="mean",
            ),
            Statistic(
                name="angle_next",
                signals=("activation",),
                unit="rad",
                meaning="mean over tokens of the angle to the next stream position",
                where="stream",
                slow=True,
                directions=True,
                pooled="mean",
            ),
            Statistic(
                name="relative_contribution",
                signals=("activation",),
                unit="1",
                meaning=(
                    "mean over tokens of |F|/|h|: on the stream F is the difference to the next position "
                    "and h this one, at a branch F is its output and h the input of its block"
                ),
                where="axis",
                slow=True,
                directions=True,
                pooled="mean",
            ),
            Statistic(
                name="residual_cosine",
                signals=("activation",),
                unit="1",
                meaning="mean over tokens of cos(F, h), with F and h as for relative_contribution",
                where="axis",
                slow=True,
                directions=True,
                pooled="mean",
            ),
            Statistic(
                name="token_centred_l2",
                signals=("activation",),
                unit="signal",
                meaning=(
                    "Frobenius norm of what is left of each sequence's tokens without their mean, "
                    "sqrt(sum_b |X_b - 1 m_b^T|^2)"
                ),
                where="stream",
                slow=True,
                pooled="norm",
            ),
            Statistic(
                name="sample_dot",
                signals=("output_grad",),
                unit="signal^2",
                meaning=(
                    "sum over samples of the inner product with the mean of the other samples' gradients"
                ),
                where="stream",
                slow=True,
                pooled="sum",
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
