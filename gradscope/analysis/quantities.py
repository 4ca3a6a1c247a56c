"""The derived quantities: one decorated function each, from a Record's raw statistics.

δ_l is the gradient of the loss with respect to the residual stream h_l, l = 0 (the first block's
input) .. L (the last block's output). A quantity is a function of one `Trunk`; it never reads
anything but stored statistics, so it can be had from a saved Record without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from gradscope.analysis.arguments import meant
from gradscope.analysis.trunk import (
    NO_PARAMETERS,
    NOT_RECORDED,
    Floats,
    Place,
    Trunk,
    Values,
    combine,
    norm,
    ratio,
)
from gradscope.errors import QuantityError

__all__ = [
    "QKV_NAMES",
    "QUANTITIES",
    "Quantity",
    "find_quantity",
    "quantity",
    "underflown",
    "with_unit_skip",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One derived quantity.

    Attributes:
        name: the word that `gradscope.profile` and the plots take.
        label: what an axis says.
        unit: its unit; ``loss/…`` units become ``relative`` where the loss's denominator is unknown.
        meaning: formula, reading and limits.
        source: where it is defined.
        log: whether it lives on a logarithmic scale (positive, judged by ratios).
        over: what it has one value for: ``stream`` positions l = 0..L, ``pairs`` (l, l + 1) at l,
            ``branches`` at k + j/m, or ``blocks`` at k + 1.
        with_loss: whether it is proportional to the loss, so that its level is known only up to one
            factor per step while the loss's denominator is not.
        power: 2 where it is an energy (a square of the signal), so that ½ ln of it is in nats of
            amplitude; else 1.
        forward: whether it travels with the forward pass, from the input end to the loss end, and not
            with the backward pass.
        function: one trunk → a value or a reason per (step, depth).
    """

    name: str
    label: str
    unit: str
    meaning: str
    source: str
    log: bool
    over: Literal["stream", "pairs", "branches", "blocks"]
    with_loss: bool
    power: int
    forward: bool
    function: Callable[[Trunk], Values]


_QUANTITIES: dict[str, Quantity] = {}

#: Every derived quantity by name. Plots, tables and documentation follow from it.
QUANTITIES: Final[Mapping[str, Quantity]] = MappingProxyType(_QUANTITIES)

#: Names of separate query, key and value modules, or of parameters that end in ``_weight``.
QKV_NAMES: Final[tuple[tuple[str, str, str], ...]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
)

#: Inner products whose norms multiply to less than this many times count × the smallest normal
#: number have lost digits to underflow (relative error 1e-4 and more).
_UNDERFLOW_MARGIN: Final = 1e4


def quantity(
    *,
    label: str,
    unit: str,
    source: str,
    over: Literal["stream", "pairs", "branches", "blocks"] = "stream",
    log: bool = True,
    with_loss: bool = False,
    power: int = 1,
    forward: bool = False,
) -> Callable[[Callable[[Trunk], Values]], Callable[[Trunk], Values]]:
    """Register the decorated function under its own name; its docstring is the meaning."""

    def register(function: Callable[[Trunk], Values]) -> Callable[[Trunk], Values]:
        name = function.__name__
        if name in _QUANTITIES:
            raise ValueError(f"a quantity {name!r} is already registered")
        _QUANTITIES[name] = Quantity(
            name=name,
            label=label,
            unit=unit,
            meaning=inspect.getdoc(function) or "",
            source=source,
            log=log,
            over=over,
            with_loss=with_loss,
            power=power,
            forward=forward,
            function=function,
        )
        return function

    return register


def find_quantity(name: str) -> Quantity:
    """The quantity of that name.

    Raises:
        QuantityError: there is none; the message lists the names, the nearest first.
        TypeError: the name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"a quantity is given by its name, such as 'grad_l2'; got {name!r}")
    if name not in QUANTITIES:
        raise QuantityError(
            f"no quantity {name!r}. {meant(name, QUANTITIES)}The quantities are "
            f"{', '.join(sorted(QUANTITIES))}."
        )
    return QUANTITIES[name]


# -- gradients on the stream ---------------------------------------------------------------


def _flow(trunk: Trunk, l2: Values, tokens: Values) -> Values:
    denominator = trunk.record.header.get("loss_denominator")
    factor = 1.0 if denominator is None else float(denominator)
    flow = combine(lambda x, n: factor * x / np.sqrt(n), l2, tokens)
    return flow.without(tokens.value == 0, "no valid positions")


@quantity(
    label="gradient flow",
    unit="loss/activation",
    source="root mean square over positions of ‖δ‖₂ per loss term; He et al. 2015, arXiv:1502.01852",
    with_loss=True,
)
def grad_l2(trunk: Trunk) -> Values:
    """The flow, N·√(Σ‖δ_l[b,t]‖² / n_valid): gradient norm per position, free of the batch size.

    N is the loss's denominator (1 for a sum, the number of loss terms for a mean), n_valid the
    number of positions. Where N is unknown it is taken as 1, and levels are known up to one factor
    per step; ratios over depth do not depend on it. The norm is over features, because isometries
    preserve it across unequal widths.
    """
    return _flow(trunk, trunk.at_stream("output_grad", "l2"), trunk.at_stream("output_grad", "tokens"))


@quantity(
    label="gradient flow per element",
    unit="loss/activation",
    source="grad_l2/√d",
    with_loss=True,
)
def grad_rms(trunk: Trunk) -> Values:
    """grad_l2/√d, with d = count/tokens features: for questions of a dtype's range."""
    count, tokens = trunk.at_stream("output_grad", "count"), trunk.at_stream("output_grad", "tokens")
    return combine(lambda g, c, n: g / np.sqrt(c / n), grad_l2(trunk), count, tokens)


@quantity(
    label="gradient flow at the branch output",
    unit="loss/activation",
    source="grad_l2, read at the branch output",
    over="branches",
    with_loss=True,
)
def branch_grad_l2(trunk: Trunk) -> Values:
    """grad_l2 with the gradient read at a branch's output, before it joins the stream.

    Where the skip adds the branch with coefficient 1, it equals the gradient of the sum.
    """
    return _flow(
        trunk, trunk.at_branches("output_grad", "l2"), trunk.at_branches("output_grad", "tokens")
    )


@quantity(
    label="share of exactly zero gradient elements",
    unit="1",
    source="zeros/count of the stored statistics",
    log=False,
)
def grad_zero_share(trunk: Trunk) -> Values:
    """Share of the elements of δ_l that are exactly 0: underflow, or zero by construction."""
    return ratio(
        trunk.at_stream("output_grad", "zeros"),
        trunk.at_stream("output_grad", "count"),
        "no valid positions",
    )


@quantity(
    label="gradient cosine of neighbours",
    unit="1",
    source="cos(δ_l, δ_{l+1}) over the whole batch",
    over="pairs",
    log=False,
)
def gradient_cosine(trunk: Trunk) -> Values:
    """⟨δ_l, δ_{l+1}⟩/(‖δ_l‖·‖δ_{l+1}‖): 1 where the gradient passes unchanged in direction.

    Absent where a norm is 0 (no direction), and where the inner product itself has underflowed.
    """
    l2, following = trunk.pairs(trunk.at_stream("output_grad", "l2"))
    dot, _ = trunk.pairs(trunk.at_stream("output_grad", "dot_next"))
    count, _ = trunk.pairs(trunk.at_stream("output_grad", "count"))
    cosine = combine(lambda d, a, b: d / a / b, dot, l2, following)
    cosine = cosine.without((l2.value == 0) | (following.value == 0), "zero gradient")
    return cosine.without(underflown(l2.value, following.value, count.value), "underflow")


def underflown(a: Floats, b: Floats, count: Floats) -> np.ndarray:
    """Where an inner product of vectors with these norms has lost digits to underflow."""
    with np.errstate(all="ignore"):
        return a < _UNDERFLOW_MARGIN * count * np.finfo(np.float64).tiny / b


def with_unit_skip(trunk: Trunk, values: Values) -> Values:
    """Absent where the next position is not proven to be this one plus something."""
    skip, _ = trunk.pairs(trunk.at_stream("activation", "unit_skip"))
    skip = skip.without(skip.value != 1, "no unit skip")
    # The skip's own reason comes first: without a skip the formula has no meaning at all.
    return combine(lambda _, v: v, skip, values)


@quantity(
    label="skip share of the gradient's energy",
    unit="1",
    source="counterfactual of the residual sum (He et al. 2016, arXiv:1603.05027)",
    over="pairs",
    log=False,
)
def skip_share(trunk: Trunk) -> Values:
    """‖δ_{l+1}‖²/(‖δ_{l+1}‖² + ‖F'ᵀδ_{l+1}‖²), with F'ᵀδ_{l+1} = δ_l − δ_{l+1}.

    How much of the gradient's energy at h_l came by the skip rather than by the branch. Holds only
    where h_{l+1} = h_l + F(h_l) with coefficient 1 and no other consumer of h_l; absent elsewhere.
    It leaves the cross term out: the two energies do not sum to ‖δ_l‖².
    """
    branch, _ = trunk.pairs(trunk.at_stream("output_grad", "diff_next_l2"))
    _, skip = trunk.pairs(trunk.at_stream("output_grad", "l2"))

    def share(s: Floats, f: Floats) -> Floats:
        # Scaled by the larger of both, so that the squares neither under- nor overflow.
        largest = np.maximum(s, f)
        return (s / largest) ** 2 / ((s / largest) ** 2 + (f / largest) ** 2)

    value = combine(share, skip, branch)
    value = value.without((skip.value == 0) & (branch.value == 0), "zero gradient")
    return with_unit_skip(trunk, value)


@quantity(
    label="local depth",
    unit="branches",
    source="first-order part of d ln‖g(t)‖/d ln t for one block (Veit et al. 2016, arXiv:1605.06431)",
    over="pairs",
    log=False,
)
def local_depth(trunk: Trunk) -> Values:
    """1 − ⟨δ_l, δ_{l+1}⟩/‖δ_l‖²: what one ordinary backward tells about the depth added by a block.

    0 where the block passes the gradient unchanged. Its sum over depth is a local estimate, not the
    effective depth. Restricted like `skip_share` to proven unit skips.
    """
    l2, following = trunk.pairs(trunk.at_stream("output_grad", "l2"))
    dot, _ = trunk.pairs(trunk.at_stream("output_grad", "dot_next"))
    count, _ = trunk.pairs(trunk.at_stream("output_grad", "count"))
    value = combine(lambda d, a: 1.0 - d / a / a, dot, l2).without(l2.value == 0, "zero gradient")
    lost = (following.value > 0) & underflown(l2.value, l2.value, count.value)
    return with_unit_skip(trunk, value.without(lost, "underflow"))


# -- activations on the stream -------------------------------------------------------------


@quantity(
    label="activation variance",
    unit="activation²",
    source="Xiong et al. 2020, arXiv:2002.04745, Lemma 2",
    power=2,
    forward=True,
)
def act_var(trunk: Trunk) -> Values:
    """Mean over positions of the biased variance over features of h_l."""
    return trunk.at_stream("activation", "token_variance")


@quantity(
    label="activation variance at the branch output",
    unit="activation²",
    source="act_var, read at the branch output",
    over="branches",
    power=2,
    forward=True,
)
def branch_act_var(trunk: Trunk) -> Values:
    """Mean over positions of the biased variance over features of a branch's output."""
    return trunk.at_branches("activation", "token_variance")


@quantity(
    label="activation mean square",
    unit="activation²",
    source="E h²: Poole et al. 2016, arXiv:1606.05340",
    power=2,
    forward=True,
)
def act_mean_square(trunk: Trunk) -> Values:
    """‖h_l‖²/count, the length q of mean-field theory; differs from the variance by the mean."""
    return combine(
        lambda x, n: (x / np.sqrt(n)) ** 2,
        trunk.at_stream("activation", "l2"),
        trunk.at_stream("activation", "count"),
    )


@quantity(
    label="activation root mean square",
    unit="activation",
    source="√(E h²): Poole et al. 2016, arXiv:1606.05340",
    forward=True,
)
def act_rms(trunk: Trunk) -> Values:
    """‖h_l‖/√count, the root of `act_mean_square`, whose square it outranges."""
    return combine(
        lambda x, n: x / np.sqrt(n),
        trunk.at_stream("activation", "l2"),
        trunk.at_stream("activation", "count"),
    )


@quantity(
    label="activation variance over all elements",
    unit="activation²",
    source="Glorot & Bengio 2010",
    power=2,
    forward=True,
)
def act_variance(trunk: Trunk) -> Values:
    """Variance of h_l over all its elements, Σ(x − mean)²/(count − 1)."""
    return trunk.at_stream("activation", "variance")


@quantity(label="activation kurtosis", unit="1", source="He et al. 2024, arXiv:2405.19279", forward=True)
def kurtosis(trunk: Trunk) -> Values:
    """E x⁴/(E x²)² of h_l, uncentred: 3 for a Gaussian, large where few features carry the norm."""
    return trunk.at_stream("activation", "kurtosis")


@quantity(
    label="largest activation over RMS",
    unit="1",
    source="Sun et al. 2024, arXiv:2402.17762",
    forward=True,
)
def max_to_rms(trunk: Trunk) -> Values:
    """max|x|/√(E x²) of h_l: massive activations show as values in the hundreds."""
    rms = combine(
        lambda x, n: x / np.sqrt(n),
        trunk.at_stream("activation", "l2"),
        trunk.at_stream("activation", "count"),
    )
    return ratio(trunk.at_stream("activation", "absmax"), rms, "zero activation")


@quantity(
    label="share of exactly zero activations",
    unit="1",
    source="zeros/count of the stored statistics",
    log=False,
    forward=True,
)
def zero_share(trunk: Trunk) -> Values:
    """Share of the elements of h_l that are exactly 0 (dead units, underflow)."""
    return ratio(
        trunk.at_stream("activation", "zeros"),
        trunk.at_stream("activation", "count"),
        "no valid positions",
    )


# -- parameters, by block ------------------------------------------------------------------


@quantity(
    label="parameter gradient norm",
    unit="loss/weight",
    source="Xiong et al. 2020, arXiv:2002.04745, Theorem 1",
    over="blocks",
    with_loss=True,
)
def param_grad(trunk: Trunk) -> Values:
    """‖∂loss/∂W‖_F over all parameters of a block, √(Σ of squares), raw.

    Before clipping; parameters without a gradient by design (frozen, not called) are left out.
    Not interchangeable with the flow: it also holds the activations that enter the block.
    """
    return trunk.per_block(trunk.of_parameters("param_grad", "l2"))


@quantity(
    label="update-to-weight ratio",
    unit="1",
    source="Karpathy, CS231n notes, 'Neural Networks 3: ratio of weights:updates'",
    over="blocks",
)
def update_ratio(trunk: Trunk) -> Values:
    """‖ΔW‖_F/‖W‖_F over a block's parameters: of updates, not gradients; around 1e-3 is usual."""
    update, weight = trunk.of_parameters("update", "l2"), trunk.of_parameters("weight", "l2")
    # Both norms are over the same parameters: those that have an update and a weight.
    update, weight = (
        combine(lambda u, _: u, update, weight),
        combine(lambda _, w: w, update, weight),
    )
    return ratio(trunk.per_block(update), trunk.per_block(weight), "zero weight")


def _roles(trunk: Trunk) -> dict[int, tuple[int, int, int]]:
    """The index of the query parameter → those of query, key and value, where all three exist."""
    names = {p.layer: i for i, p in enumerate(trunk.parameters)}
    found: dict[int, tuple[int, int, int]] = {}
    for name, index in names.items():
        for query, key, value in QKV_NAMES:
            tail = query if query.endswith("_weight") else f"{query}.weight"
            if name != tail and not name.endswith(f".{tail}"):
                continue
            stem = name[: -len(tail)]
            others = [
                names.get(stem + key + tail[len(query) :]),
                names.get(stem + value + tail[len(query) :]),
            ]
            if others[0] is not None and others[1] is not None:
                found[index] = (index, others[0], others[1])
    return found


@quantity(
    label="query-key over value gradient",
    unit="1",
    source="Noci et al. 2022, arXiv:2206.03126",
    over="blocks",
)
def qk_ratio(trunk: Trunk) -> Values:
    """‖∇[W_Q; W_K]‖_F/‖∇W_V‖_F of a block's attention; towards 0 under rank collapse.

    From separate query, key and value weights found by name (`QKV_NAMES`), or from the thirds of a
    packed projection. Several attentions in one block are stacked. Not corrected for unequal sizes
    (grouped-query attention). Absent where one of the three is.
    """
    roles = _roles(trunk)
    packed = trunk.has("param_grad", "query_l2")
    if not roles and not packed:
        raise QuantityError(
            f"the parameters of trunk {trunk.name!r} hold no query, key and value that are known: "
            "neither a known packed projection nor separate weights with one of these names: "
            f"{'; '.join(', '.join(names) for names in QKV_NAMES)}."
        )
    parts: list[tuple[Values, Values]] = []
    if roles:
        l2 = trunk.of_parameters("param_grad", "l2")
        query, key, value = (l2.take(list(column)) for column in zip(*roles.values(), strict=True))
        parts.append((_stacked(query, key), value))
    if packed:
        query, key, value = (
            trunk.of_parameters("param_grad", f"{r}_l2") for r in ("query", "key", "value")
        )
        held = [i for i in range(len(query.places)) if (query.status[:, i] != NOT_RECORDED).any()]
        parts.append((_stacked(query.take(held), key.take(held)), value.take(held)))
    top, bottom = (_joined([part[side] for part in parts]) for side in (0, 1))
    result = ratio(
        trunk.per_block(top, partial=False), trunk.per_block(bottom, partial=False), "zero gradient"
    )
    status = result.status.copy()
    status[status == NO_PARAMETERS] = "no attention"
    return Values(result.places, result.value, status)


def _stacked(a: Values, b: Values) -> Values:
    return combine(lambda x, y: norm(np.stack([x, y], axis=-1)), a, b)


def _joined(parts: list[Values]) -> Values:
    places: tuple[Place, ...] = tuple(p for part in parts for p in part.places)
    return Values(
        places, np.hstack([p.value for p in parts]), np.hstack([p.status for p in parts]).astype(object)
    )
