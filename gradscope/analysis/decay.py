"""Which family a profile's decay follows, how fast, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from gradscope.analysis.change import Change, DepthScale, end_to_end
from gradscope.analysis.curve import MINIMUM_LAYERS, Curve, Source, as_curve
from gradscope.analysis.families import FAMILIES, Family, Positions
from gradscope.analysis.least_squares import (
    Fitted,
    Problem,
    fit_family,
    huber_weights,
    mean_increments,
    shrunk_covariance,
)
from gradscope.analysis.profile import Interval, interval
from gradscope.analysis.walk import NOISE_RATIOS, Noise, noise_ratio

__all__ = ["REPLICATES_FOR_COVARIANCE", "DecayFit", "fit_curve", "fit_decay"]

Floats = npt.NDArray[np.float64]

#: With so many replicates the increments' covariance is estimated from them instead of assumed.
REPLICATES_FOR_COVARIANCE: Final = 10

_ONE_REPLICATE: Final = (
    "one replicate: the interval of Δ rests on the spread of its own increments (Newey and West), and "
    "says nothing of other initialisations; parameters have none. Measure 5 replicates"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class DecayFit:
    """The decay of one quantity along its pass: a gradient from the loss, an activation from the input.

    Attributes:
        status: ``ok``, or why there is no fit (``not enough layers: …``); then numbers are NaN, and
            ``family`` is empty.
        quantity: the quantity's name.
        trunk: the trunk's name.
        forward: whether the pass is the forward pass.
        kind: what a replicate is: ``initialisation`` (a claim about the architecture), ``batch`` or
            ``run`` (about this model only).
        replicates: R.
        family: name of the family with the smallest BIC.
        formula: its formula.
        weights: family → its share of exp(−BIC/2), the posterior over families under equal priors.
        bic: family → BIC, smaller is better (piecewise carries a handicap of 6).
        parameters: parameter → estimate with interval (per replicate, then Student's t).
        delta: Δ = y_end − y_start along the pass in nats, from the ends, whatever the family.
        increment: Δ per layer, r̄.
        depth_scale: ξ̂ = 1/(2|r̄|) in layers, by inversion of r̄'s interval.
        noise: σ_r and σ_m of the chosen fit; NaN for an empirical covariance.
        covariance: ``random walk`` or ``empirical``.
        depth: [P] depths that were fitted, in the order of the pass.
        y: [R, P] the logarithms, nats.
        fitted: [P] the fitted curve, nats.
        residuals: [R, P − 1] whitened residuals of the increments, of unit variance.
        huber: [R, P − 1] weights of the increments; below 1 where no family explains one.
        dropped: what was left out and why.
        notes: what to know when reading the numbers.
    """

    status: str
    quantity: str
    trunk: str
    forward: bool
    kind: str
    replicates: int
    family: str
    formula: str
    weights: Mapping[str, float]
    bic: Mapping[str, float]
    parameters: Mapping[str, Interval]
    delta: Interval
    increment: Interval
    depth_scale: DepthScale
    noise: Noise
    covariance: str
    depth: Floats
    y: Floats
    fitted: Floats
    residuals: Floats
    huber: Floats
    dropped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is a fit."""
        return self.status == "ok"

    def __str__(self) -> str:
        what = f"{self.quantity} over {self.trunk}" if self.trunk else self.quantity
        if not self.ok:
            return f"{what}: {self.status}"
        lines = [
            f"{what}: {self.family}, y = {self.formula} (weight {self.weights[self.family]:.2f})",
            *(f"  {name} = {value}" for name, value in self.parameters.items()),
            f"  Δ = {self.delta} nats, depth scale {self.depth_scale}",
        ]
        others = sorted(self.weights, key=lambda f: -self.weights[f])
        rest = [
            f"{f} {self.weights[f]:.2f}" for f in others if f != self.family and self.weights[f] >= 0.01
        ]
        if rest:
            lines.append(f"  other families: {', '.join(rest)}")
        lines += [f"  left out: {text}" for text in self.dropped]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def fit_decay(
    source: Source,
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
    families: Iterable[str | Family] | None = None,
    covariance: Literal["auto", "random walk", "empirical"] = "auto",
    confidence: float = 0.95,
) -> DecayFit:
    """Fit all families of decay by generalised least squares and choose by BIC.

    The noise is that of a random walk over depth seen through measurement noise,
    Cov(y) = σ_m² I + σ_r² min(s, s'); σ_m²/σ_r² is profiled and counted as a parameter. With ten or more
    replicates a shrunk empirical covariance takes its place. Increments that no family explains get Huber
    weights; no layer is ever rejected, because a step in a profile is permanent.

    ::

        fit = gradscope.fit_decay(record)
        print(fit)                     # family, rate, Δ, depth scale, each with its interval
        fit.parameters["kappa"]

    Args:
        source: a `Record`, a `Profile`, or an array [R, P] of values from the input to the loss.
        quantity: a name in `gradscope.analysis.QUANTITIES` that has a logarithm.
        trunk: the trunk, where the Record has several.
        step: as in `gradscope.profile`.
        families: names in `gradscope.analysis.FAMILIES` or families of your own; None for all.
        covariance: ``random walk``, ``empirical``, or ``auto`` (empirical from ten replicates on).
        confidence: coverage of the intervals.

    Returns:
        A `DecayFit`; with fewer than four layers its ``status`` says so and nothing is raised.

    Raises:
        QuantityError: the quantity has no logarithm, or the Record cannot give it.
        ValueError: an unknown family.
    """
    curve = as_curve(source, quantity, trunk=trunk, step=step)
    return fit_curve(curve, families=families, covariance=covariance, confidence=confidence)


def fit_curve(
    curve: Curve,
    *,
    families: Iterable[str | Family] | None = None,
    covariance: Literal["auto", "random walk", "empirical"] = "auto",
    confidence: float = 0.95,
) -> DecayFit:
    """`fit_decay` of a curve that is at hand."""
    if covariance not in ("auto", "random walk", "empirical"):
        raise ValueError(f'covariance= is "auto", "random walk" or "empirical"; got {covariance!r}')
    chosen = _families([families] if isinstance(families, str) else families)
    used = curve.take(curve.complete)
    change = end_to_end(curve, confidence)
    if change is None or used.layer_count < MINIMUM_LAYERS:
        return _no_fit(curve, used, change, confidence)
    # Counted on the whole curve: a position that was dropped at an end moves no origin.
    kept = curve.complete
    at = Positions(curve.distance[kept], curve.from_input[kept], curve.from_loss[kept])
    gaps, z = np.diff(at.s), np.diff(used.y, axis=1)
    start_ratio = noise_ratio(z, gaps)
    huber = huber_weights(z, at, chosen, start_ratio)
    empirical = covariance == "empirical" or (
        covariance == "auto" and len(z) >= REPLICATES_FOR_COVARIANCE
    )
    if empirical and len(z) < REPLICATES_FOR_COVARIANCE:
        raise ValueError(
            f"an empirical covariance needs {REPLICATES_FOR_COVARIANCE} replicates; there are {len(z)}. "
            'Write covariance="random walk", or measure more.'
        )
    if empirical:
        given = shrunk_covariance(z, gaps, start_ratio)
        problems = {math.nan: Problem.of(z, at, ratio=0.0, weights=huber, covariance=given)}
    else:
        problems = {ratio: Problem.of(z, at, ratio=ratio, weights=huber) for ratio in NOISE_RATIOS}
    found = {family.name: _best_ratio(family, problems) for family in chosen}
    fits = {name: best for name, best in found.items() if best is not None}
    bic = {
        name: fit.deviance
        + _penalty(fit.family.size + (1 if empirical else 2), z.size)
        + fit.family.least_bic
        for name, (_, fit) in fits.items()
    }
    best = min(bic, key=lambda name: bic[name])
    ratio, fit = fits[best]
    problem = problems[ratio]
    scale = math.sqrt(max(fit.square / (z.size - fit.family.size), problem.floor))
    shares = {name: math.exp(-(value - bic[best]) / 2) for name, value in bic.items()}
    total = sum(shares.values())
    level = float(np.mean(used.y - np.concatenate([[0.0], np.cumsum(fit.mean)])))
    residuals = np.einsum("rij,rj->ri", problem.whiten, z - fit.mean) / scale
    return DecayFit(
        status="ok",
        quantity=curve.quantity,
        trunk=curve.trunk,
        forward=curve.forward,
        kind=curve.kind,
        replicates=curve.replicates,
        family=best,
        formula=fit.family.formula,
        weights={name: share / total for name, share in shares.items()},
        bic=bic,
        parameters=_parameters(fit, problem, confidence),
        delta=change.delta,
        increment=change.increment,
        depth_scale=change.depth_scale,
        noise=Noise(walk=math.nan, measurement=math.nan) if empirical else Noise.of(scale, ratio),
        covariance="empirical" if empirical else "random walk",
        depth=used.depth,
        y=used.y,
        fitted=level + np.concatenate([[0.0], np.cumsum(fit.mean)]),
        residuals=residuals,
        huber=huber,
        dropped=curve.dropped(),
        notes=(*_notes(curve), *_outlying(used, huber)),
    )


#: McQuarrie's factor n/(n − k − 2) is kept below this: with half a dozen increments it would diverge,
#: and call every profile flat.
_LARGEST_CORRECTION: Final = 3.0


def _penalty(parameters: int, size: int) -> float:
    """k·ln(n)·n/(n − k − 2), Schwarz's penalty corrected for small samples, the factor at most 3.

    McQuarrie 1999 (Statistics & Probability Letters 44:79). Without the correction one flat profile of
    twelve layers is called something else in half of the cases.
    """
    room = size - parameters - 2
    factor = min(size / room, _LARGEST_CORRECTION) if room > 0 else _LARGEST_CORRECTION
    return parameters * math.log(size) * factor


def _families(families: Iterable[str | Family] | None) -> list[Family]:
    if families is None:
        return list(FAMILIES.values())
    if not isinstance(families, Iterable):
        raise TypeError(f"families= is a family's name, or several names or families; got {families!r}")
    chosen: list[Family] = []
    for each in families:
        if isinstance(each, Family):
            chosen.append(each)
        elif each in FAMILIES:
            chosen.append(FAMILIES[each])
        else:
            raise ValueError(f"no family {each!r}; the families are {', '.join(FAMILIES)}")
    if not chosen:
        raise ValueError("families= is empty: there is nothing to fit")
    return chosen


def _best_ratio(family: Family, problems: Mapping[float, Problem]) -> tuple[float, Fitted] | None:
    fits = [(ratio, fit_family(family, problem)) for ratio, problem in problems.items()]
    present = [(ratio, fit) for ratio, fit in fits if fit is not None]
    return min(present, key=lambda pair: pair[1].deviance) if present else None


def _parameters(fit: Fitted, problem: Problem, confidence: float) -> dict[str, Interval]:
    """Every parameter with its interval.

    Each replicate's own estimate is one Gauss–Newton step from the common one (for linear families that
    is the generalised least squares of this replicate alone); Student's t over them. One replicate has no
    interval: the model's own covariance, s²(JᵀV⁻¹J)⁻¹, was seen to cover 67 to 95 % instead of 95,
    because the ratio of the noises is then a guess.
    """
    family = fit.family
    names = family.linear + (() if family.search == "knots" else family.shape)
    values = np.asarray([*fit.coefficients, *(() if family.search == "knots" else fit.shape)])
    result: dict[str, Interval] = {}
    if names:
        jacobian = _jacobian(fit, problem.at, len(names))
        white = problem.whiten @ jacobian  # [R, n, p]
        u = np.einsum("rij,rj->ri", problem.whiten, problem.z - fit.mean)
        information = np.einsum("rip,riq->rpq", white, white)
        identified = bool((np.linalg.cond(information) < 1 / (1e3 * np.finfo(np.float64).eps)).all())
        steps = np.full((len(u), len(names)), np.nan)
        if identified:
            inverse = np.linalg.inv(information)
            steps = np.einsum("rpq,riq,ri->rp", inverse, white, u)
        for j, name in enumerate(names):
            estimate = float(values[j])
            if len(u) > 1:
                spread = interval(steps[:, j], confidence)
                low, high = estimate + spread.low, estimate + spread.high
            else:
                low = high = math.nan
            result[name] = Interval(
                estimate=estimate, low=low, high=high, confidence=confidence, count=len(u)
            )
    if family.search == "knots":
        result[family.shape[0]] = Interval(
            estimate=fit.shape[0],
            low=min(fit.knots),
            high=max(fit.knots),
            confidence=0.95,
            count=len(problem.z),
        )
    return result


def _jacobian(fit: Fitted, at: Positions, size: int) -> Floats:
    """∂ mean increments/∂ parameters, [n, p]; central differences in the shape."""
    columns = np.diff(fit.family.basis(at, fit.shape), axis=0)[:, : len(fit.coefficients)]
    parts = [columns]
    for j in range(size - len(fit.coefficients)):
        step = 1e-5 * fit.shape[j]
        up, down = list(fit.shape), list(fit.shape)
        up[j] += step
        down[j] -= step
        difference = mean_increments(fit.family, at, fit.coefficients, up) - mean_increments(
            fit.family, at, fit.coefficients, down
        )
        parts.append((difference / (2 * step))[:, None])
    return np.hstack(parts)


def _notes(curve: Curve) -> list[str]:
    notes = list(curve.notes)
    if curve.replicates == 1:
        notes.append(_ONE_REPLICATE)
    return notes


#: A weight below this is a residual of more than eight robust standard deviations: worth a note.
_OUTLYING: Final = 0.25


def _outlying(used: Curve, huber: Floats) -> list[str]:
    """Steps of the profile that no family explains, by the layers on both sides."""
    mean = huber.mean(0)
    at = np.flatnonzero(mean < _OUTLYING)
    if not len(at):
        return []
    words = [f"{used.depth[i]:g}→{used.depth[i + 1]:g}" for i in at[:5]]
    return [f"increments that no family explains, down-weighted: depth {', '.join(words)}"]


def _no_fit(curve: Curve, used: Curve, change: Change | None, confidence: float) -> DecayFit:
    nothing = Interval(
        estimate=math.nan, low=math.nan, high=math.nan, confidence=confidence, count=curve.replicates
    )
    increment = change.increment if change else nothing
    why = curve.dropped()
    blank = np.zeros((curve.replicates, max(len(used.depth) - 1, 0)))
    status = f"not enough layers: {used.layer_count} with values in every replicate, and a fit needs "
    return DecayFit(
        status=f"{status}{MINIMUM_LAYERS}" + (f" ({'; '.join(why)})" if why else ""),
        quantity=curve.quantity,
        trunk=curve.trunk,
        forward=curve.forward,
        kind=curve.kind,
        replicates=curve.replicates,
        family="",
        formula="",
        weights={},
        bic={},
        parameters={},
        delta=change.delta if change else nothing,
        increment=increment,
        depth_scale=change.depth_scale if change else replace(DepthScale.of(nothing)),
        noise=Noise(walk=math.nan, measurement=math.nan),
        covariance="",
        depth=used.depth,
        y=used.y,
        fitted=np.full(len(used.depth), np.nan),
        residuals=blank,
        huber=blank + 1.0,
        dropped=why,
        notes=tuple(_notes(curve)),
    )
