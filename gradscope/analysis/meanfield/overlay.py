"""Mean-field theory over depth: the profile that it expects, and that profile over a measured one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from gradscope.analysis.curve import Curve, Source, as_curve
from gradscope.analysis.meanfield.activations import Activation, Function, find_activation
from gradscope.analysis.meanfield.gaussian import square_in_range
from gradscope.analysis.meanfield.theory import MeanField
from gradscope.errors import QuantityError

__all__ = [
    "Block",
    "FiniteWidthDrift",
    "Overlay",
    "TheoryProfile",
    "finite_width_drift",
    "overlay",
    "theory_profile",
]

Floats = npt.NDArray[np.float64]

#: What one block computes: φ(W h + b), so that the stream holds activations, or W φ(h) + b, so that it
#: holds pre-activations.
Block = Literal["activation last", "activation first"]

#: The quantities that the theory knows along the stream.
_KNOWN: Final = ("grad_l2", "act_mean_square")


@dataclass(frozen=True, slots=True, kw_only=True)
class FiniteWidthDrift:
    """How far E ln‖δ‖ falls behind ½ ln E‖δ‖² in one layer of finite width.

    Attributes:
        per_layer: nats per layer, < 0; NaN where it is not known.
        status: ``ok``, or why it is not known.
    """

    per_layer: float
    status: str


def finite_width_drift(
    activation: str | Activation | tuple[Function, Function], width: int
) -> FiniteWidthDrift:
    """The drift per layer of E ln‖δ‖ against ½ ln E‖δ‖², known for linear and ReLU layers.

    Linear: ½[ψ(n/2) + ln(2/n)] = −1/(2n) − O(1/n²), exact for Gaussian weights. ReLU: −5/(4n) to first
    order (Hanin 2018, arXiv:1801.03744). Neither depends on σ_w². It is that of one position's gradient:
    the root mean square over many positions with different directions drifts less.

    Args:
        activation: as in `mean_field`.
        width: n, features of the layer's input.
    """
    if width < 1:
        raise ValueError(f"width is a number of features, ≥ 1; got {width}")
    found = find_activation(activation)
    slopes = found.slopes(far=False)
    if found.scale_free and slopes[0] == slopes[1]:
        from scipy.special import digamma

        return FiniteWidthDrift(
            per_layer=0.5 * (float(digamma(width / 2)) + math.log(2 / width)), status="ok"
        )
    if found.scale_free and 0 in slopes:
        return FiniteWidthDrift(per_layer=-5 / (4 * width), status="ok")
    return FiniteWidthDrift(
        per_layer=math.nan, status=f"not known for {found.name}: only for linear and ReLU layers"
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TheoryProfile:
    """What mean-field theory expects along the stream h_0 .. h_L of a plain net, infinitely wide.

    Attributes:
        depth: [L + 1] stream depth l.
        log_gradient: [L + 1] ln‖δ_l‖ in nats, 0 at the loss end l = L.
        mean_square: [L + 1] E h_l²; NaN where neither the input's nor a fixed point is known.
        length: [L] variance q of the pre-activations at which block k = 0 .. L − 1 works; NaN likewise.
        increments: [L] r_k = ½ ln χ(q_k), nats: ln‖δ_k‖ − ln‖δ_{k+1}‖.
        stationary: whether every layer was taken to be at q*.
    """

    depth: Floats
    log_gradient: Floats
    mean_square: Floats
    length: Floats
    increments: Floats
    stationary: bool


def theory_profile(
    field: MeanField,
    depth: int,
    *,
    input_mean_square: float | None = None,
    block: Block = "activation last",
) -> TheoryProfile:
    """The expected profiles of gradients and activations over L plain layers of one activation.

    ln‖δ_l‖ = Σ_{k ≥ l} ½ ln χ(q_k), with χ(q) = σ_w² E φ′(√q z)² and q_k from the length map, iterated
    from the input: the transient towards q* is in it (Schoenholz et al. 2017, arXiv:1611.01232).

    Args:
        field: from `mean_field`.
        depth: L, the number of blocks, each one layer of weights and one activation.
        input_mean_square: E h_0², the mean square of the first block's input. None: all layers are at
            q*, as they are in the deep part of a net.
        block: ``activation last`` for φ(W h + b), as in Sequential(Linear, Tanh); ``activation first``
            for W φ(h) + b.

    Raises:
        QuantityError: no ``input_mean_square``, and q* is not one that all layers can be at; or lengths
            that leave float64 on the way (an activation that grows faster than linearly).
    """
    if depth < 1:
        raise ValueError(f"depth is a number of blocks, ≥ 1; got {depth}")
    if block not in ("activation last", "activation first"):
        raise ValueError(f"block is 'activation last' or 'activation first'; got {block!r}")
    layer = field.layer
    if input_mean_square is None:
        length, square = _stationary(field, block)
        lengths, squares = np.full(depth, length), np.full(depth + 1, square)
        increments = np.full(depth, field.increment)
    else:
        if not (math.isfinite(input_mean_square) and input_mean_square > 0):
            raise ValueError(f"input_mean_square is E h_0², finite and > 0; got {input_mean_square}")
        squares, lengths = np.empty(depth + 1), np.empty(depth)
        squares[0] = input_mean_square
        for k in range(depth):
            if block == "activation last":
                lengths[k] = layer.weight_variance * squares[k] + layer.bias_variance
            else:
                lengths[k] = squares[k]
            if not square_in_range(layer.activation.phi, float(lengths[k])):
                raise QuantityError(
                    f"the expected activations leave float64 in block {k}, at a length of "
                    f"q = {lengths[k]:.3g}: {layer.activation.name} grows too fast for this depth."
                )
            if block == "activation last":
                squares[k + 1] = layer.mean_square(float(lengths[k]))
            else:
                squares[k + 1] = layer.length(float(lengths[k]))
        with np.errstate(divide="ignore"):
            increments = 0.5 * np.log([layer.chi(q) for q in lengths.tolist()])
    gradient = np.zeros(depth + 1)
    gradient[:-1] = np.cumsum(increments[::-1])[::-1]
    return TheoryProfile(
        depth=np.arange(depth + 1, dtype=np.float64),
        log_gradient=gradient,
        mean_square=squares,
        length=lengths,
        increments=increments,
        stationary=input_mean_square is None,
    )


def _stationary(field: MeanField, block: Block) -> tuple[float, float]:
    """The q and E h² of a net whose layers are all at q*; NaN where χ does not need them."""
    q = field.q_star
    if math.isfinite(q) and q > 0:
        return q, (q if block == "activation first" else field.layer.mean_square(q))
    if field.activation.scale_free:
        return math.nan, math.nan
    raise QuantityError(
        f"the layers of this net are not all at one length q (q* = {q:g}"
        + (f": {field.reasons['q_star']}" if "q_star" in field.reasons else ", a limit never reached")
        + "), so the expected profile depends on the input. Give its mean square: input_mean_square=…."
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Overlay:
    """A theoretical profile laid over a measured one, in nats of amplitude, by ascending depth.

    Attributes:
        quantity: the measured quantity: ``grad_l2`` or ``act_mean_square`` (as ½ ln).
        trunk: the trunk's name.
        depth: [P] stream depth l.
        measured: [P] mean over replicates of the logarithm; NaN where a replicate has no finite one.
        theory: [P] the theory's, set equal to the measurement at the anchor; drift included.
        difference: [P] measured − theory; 0 at the anchor.
        standard_error: [P] of the difference, over replicates; NaN with one replicate.
        replicates: R.
        anchor: the depth where both are equal.
        drift: the finite width's drift, counted from the anchor where its status is ``ok``.
        max_abs_difference: largest |difference|, nats.
        notes: what to know when reading the numbers.
    """

    quantity: str
    trunk: str
    depth: Floats
    measured: Floats
    theory: Floats
    difference: Floats
    standard_error: Floats
    replicates: int
    anchor: float
    drift: FiniteWidthDrift
    max_abs_difference: float
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        text = (
            f"<Overlay of mean-field theory on {self.quantity} over {self.trunk or 'an array'}: depths "
            f"{self.depth[0]:g} to {self.depth[-1]:g}, largest difference "
            f"{self.max_abs_difference:.3g} nats"
        )
        return "; ".join([text, *self.notes]) + ">"


def overlay(
    profile: Source,
    field: MeanField,
    *,
    quantity: str = "grad_l2",
    input_mean_square: float | None = None,
    block: Block = "activation last",
    width: int | None = None,
) -> Overlay:
    """Lay mean-field theory over a measured profile of a plain net.

    Both are equal where the signal enters: a gradient at the loss end, an activation at the input end.
    What theory says of E‖δ‖² and a measurement of E ln‖δ‖ differ by the finite width's drift, which is
    counted in only here, and only where ``width`` is given.

    Args:
        profile: a `Profile` of ``grad_l2`` or ``act_mean_square``, or a Record, or an array [R, P].
        field: from `mean_field`.
        quantity: what to take from a Record, or what an array holds.
        input_mean_square: as in `theory_profile`.
        block: as in `theory_profile`.
        width: n; where given, the drift of one position's signal is counted in, if it is known.

    Raises:
        QuantityError: the theory has no such quantity, q* is not one that all layers can be at, or
            fewer than two positions have a finite logarithm in every replicate.
    """
    curve = as_curve(profile, quantity)
    if curve.quantity not in _KNOWN:
        raise QuantityError(
            f"mean-field theory has no profile of {curve.quantity}; "
            f"it has those of {' and '.join(_KNOWN)}."
        )
    complete = np.flatnonzero(curve.complete)
    if len(complete) < 2:
        raise QuantityError(
            f"{len(complete)} positions have a finite {curve.quantity} in every replicate, and an "
            f"overlay needs two: {'; '.join(curve.dropped()) or 'the profile is shorter'}."
        )
    expected = theory_profile(
        field, int(curve.depth.max()), input_mean_square=input_mean_square, block=block
    )
    notes = [*curve.notes, *(f"left out: {text}" for text in curve.dropped())]
    amplitude = _amplitude(curve, field, expected)
    if expected.stationary:
        notes.append(
            "every layer was taken to be at q*: input_mean_square= puts the approach to it in the theory"
        )
    drift = FiniteWidthDrift(per_layer=math.nan, status="no width given")
    if width is not None:
        drift = finite_width_drift(field.activation, width)
        if curve.forward and field.bias_variance > 0 and drift.status == "ok":
            drift = FiniteWidthDrift(per_layer=math.nan, status="not known for activations with biases")
        notes.append(
            "the drift is that of one position: the mean over many drifts less"
            if drift.status == "ok"
            else f"no drift is counted in: {drift.status}"
        )
    anchor = complete[0]  # a curve runs along its pass
    if drift.status == "ok":
        amplitude = amplitude + drift.per_layer * curve.distance
    relative = curve.y[:, complete] - curve.y[:, [anchor]] - (amplitude[complete] - amplitude[anchor])
    level = float(curve.y[:, anchor].mean())
    columns = {name: np.full(len(curve.depth), math.nan) for name in ("measured", "difference", "error")}
    columns["measured"][complete] = curve.y[:, complete].mean(0)
    columns["difference"][complete] = relative.mean(0)
    if curve.replicates > 1:
        columns["error"][complete] = relative.std(0, ddof=1) / math.sqrt(curve.replicates)
    ascending = np.argsort(curve.depth)
    return Overlay(
        quantity=curve.quantity,
        trunk=curve.trunk,
        depth=curve.depth[ascending],
        measured=columns["measured"][ascending],
        theory=(level + amplitude - amplitude[anchor])[ascending],
        difference=columns["difference"][ascending],
        standard_error=columns["error"][ascending],
        replicates=curve.replicates,
        anchor=float(curve.depth[anchor]),
        drift=drift,
        max_abs_difference=float(np.abs(relative.mean(0)).max()),
        notes=tuple(notes),
    )


def _amplitude(curve: Curve, field: MeanField, expected: TheoryProfile) -> Floats:
    """Logarithm of the expected amplitude at the curve's positions. [P]."""
    at = curve.depth.astype(np.int64)
    if not curve.forward:
        return expected.log_gradient[at]
    if expected.stationary and math.isnan(expected.mean_square[0]):
        # Scale-free: activations grow by the factor of ‖δ‖² in each layer, if nothing is added.
        if field.bias_variance > 0:
            raise QuantityError(
                "activations of this net are not stationary: their profile depends on the input. Give "
                "its mean square: input_mean_square=…."
            )
        return 0.5 * math.log(field.chi_1) * at.astype(np.float64)
    with np.errstate(divide="ignore"):
        return 0.5 * np.log(expected.mean_square[at])
