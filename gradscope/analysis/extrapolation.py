"""Δ at a depth that was not measured: all laws of growth, averaged, each with the weight it is left.

With K depths, m_k the mean over n_k replicates and v_k its variance, a law with its shape given says

    m = b·x + a + D + noise,   b·x(L_K) ~ N(0, S²),   a = 0 or a ~ N(0, S²/4),   noise ~ N(0, diag v),

where S is the size of what was measured. D is how far a law is from the truth, because *a law is only a
law*: what it says of the stretch between two measured depths is off by a share of it that is N(0, η²),
independently from stretch to stretch, and beyond the deepest measurement by as much again for every
doubling of the depth; a, too, wanders by η|a| with every doubling. η is not known; it is averaged over
`DISCREPANCIES`, and the measurements weigh it: laws that follow them closely, and that foresee the
deeper ones from the shallower (which is what a marginal likelihood is a product of), leave little to it.

All is linear and Gaussian given law, ends, shape and η: the marginal likelihood is the weight, with
Student's t because σ² comes from ν degrees of freedom (Zellner 1971, An Introduction to Bayesian
Inference in Econometrics, ch. 3; averaging: Hoeting et al. 1999, Statistical Science 14:382;
discrepancy: Kennedy & O'Hagan 2001, J. R. Stat. Soc. B 63:425). Intervals are quantiles of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.analysis.growth import Law
from gradscope.analysis.mixture import Mixture, least_kept
from gradscope.analysis.spread import Spread, fit_spread

__all__ = ["DISCREPANCIES", "Growth", "fit_growth"]

Floats = npt.NDArray[np.float64]

#: η → its weight before anything is measured.
DISCREPANCIES: Final[Mapping[float, float]] = {
    0.0: 0.3,
    0.01: 0.2,
    0.03: 0.2,
    0.1: 0.15,
    0.2: 0.1,
    0.4: 0.05,
}

#: Standard deviation of the intercept, as a share of the size S of what was measured.
_ENDS_SIZE: Final = 0.5

#: Values of a shape, laid over its bounds; then again, at most so often, about those within e^−10 of the
#: likeliest, until a third of the values are.
_SHAPES: Final = 25
_REFINEMENTS: Final = 7
_REACH: Final = 10.0

#: Components that have this share together, the least ones, are dropped.
_DROPPED: Final = 2e-4

#: No law is more exact than this share of the largest Δ.
_EXACT: Final = 1e-6

#: The best law's misfit of the replicates' means is worth a note below this p-value.
_MISFIT: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Means:
    """What was measured: K depths, the means there and their variances, from ν degrees of freedom."""

    depths: Floats
    mean: Floats
    variance: Floats
    degrees: float

    @property
    def size(self) -> float:
        """S²: mean square of what was measured, its errors included."""
        return float(np.mean(self.mean**2) + np.max(self.variance))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Components:
    """One law with all given but its coefficients, C times: each a Gaussian process over depth.

    Attributes:
        law: the law.
        ends: whether it has an intercept.
        shape: [C] the shape.
        eta: [C] the discrepancy η.
        slope: [C] b, of x over x(L_K), where η = 0: the discrepancy is a share of it.
        level: [C] a, likewise.
        log_weight: [C] ln(prior × marginal likelihood).
        misfit: [C] mᵀG⁻¹m, G the covariance of m: the sum of squares in units of σ².
    """

    law: Law
    ends: bool
    shape: Floats
    eta: Floats
    slope: Floats
    level: Floats
    log_weight: Floats
    misfit: Floats

    @property
    def name(self) -> str:
        """Of the law, and whether the ends have a part."""
        return self.law.name + (" + ends" if self.ends and not self.law.only_ends else "")

    @property
    def formula(self) -> str:
        """Δ over L."""
        return ("a + " if self.ends and not self.law.only_ends else "") + self.law.formula

    def regressor(self, means: _Means, depths: Floats) -> Floats:
        """[C, P] x at any depths, 1 at the deepest that was measured."""
        if self.law.only_ends:
            return np.zeros((len(self.shape), len(depths)))
        shape = self.shape[:, None]
        return self.law.x(depths[None, :], shape) / self.law.x(means.depths[None, -1:], shape)

    def ends_variance(self, means: _Means) -> float:
        """Prior variance of the intercept."""
        share = 1.0 if self.law.only_ends else _ENDS_SIZE
        return share**2 * means.size if self.ends else 0.0

    def prior(self, means: _Means, depths: Floats) -> tuple[Floats, Floats, Floats]:
        """Prior covariances of Δ: among the K depths, with P others; variances there."""
        inside, outside = self.regressor(means, means.depths), self.regressor(means, depths)
        ends = self.ends_variance(means)
        among = means.size * inside[:, :, None] * inside[:, None, :] + ends
        across = means.size * outside[:, :, None] * inside[:, None, :] + ends
        own = means.size * outside**2 + ends
        # D is a walk, of b·x and of a, each with a clock of its own.
        doublings = (np.log2(each / means.depths[0])[None, :] for each in (means.depths, depths))
        for coefficient, (clock, other) in (
            (self.slope, _clock(means.depths, inside, depths, outside)),
            (self.level, doublings),
        ):
            scale = (self.eta * coefficient) ** 2
            among = among + scale[:, None, None] * np.minimum(clock[:, :, None], clock[:, None, :])
            shared = np.maximum(0.0, np.minimum(other[:, :, None], clock[:, None, :]))
            across = across + scale[:, None, None] * shared
            own = own + scale[:, None] * np.abs(other)
        return among, across, own

    def weighed(self, means: _Means) -> _Components:
        """With coefficients, misfit, and the marginal likelihood in the weight."""
        noise = np.diag(means.variance)
        none = means.depths[:0]
        plain = replace(self, eta=np.zeros_like(self.eta)).prior(means, none)[0] + noise
        solved = np.linalg.solve(plain, means.mean[:, None])[:, :, 0]
        x = self.regressor(means, means.depths)
        known = replace(
            self,
            slope=means.size * np.einsum("ck,ck->c", x, solved),
            level=self.ends_variance(means) * solved.sum(1),
        )
        covariance = known.prior(means, none)[0] + noise
        misfit = np.linalg.solve(covariance, means.mean[:, None])[:, :, 0] @ means.mean
        power = (means.degrees + len(means.mean)) / 2
        likelihood = -np.linalg.slogdet(covariance)[1] / 2 - power * np.log1p(misfit / means.degrees)
        return replace(known, log_weight=self.log_weight + likelihood, misfit=misfit)

    def at(self, means: _Means, depths: Floats) -> tuple[Floats, Floats]:
        """Posterior centre and variance of Δ at any depths, [C, P] each."""
        among, across, own = self.prior(means, depths)
        solved = np.linalg.solve(among + np.diag(means.variance), np.swapaxes(across, 1, 2))  # [C, K, P]
        left = np.maximum(own - np.einsum("cpk,ckp->cp", across, solved), 0.0)
        inflation = (means.degrees + self.misfit) / (means.degrees + len(means.mean))
        return np.einsum("ckp,k->cp", solved, means.mean), left * inflation[:, None]

    def take(self, keep: npt.NDArray[np.bool_]) -> _Components:
        """Those only."""
        fields = ("shape", "eta", "slope", "level", "log_weight", "misfit")
        return replace(self, **{name: getattr(self, name)[keep] for name in fields})


def _clock(known: Floats, inside: Floats, depths: Floats, outside: Floats) -> tuple[Floats, Floats]:
    """Time of the walk that a law's x takes: at the K measured depths [C, K], and at P others [C, P].

    A stretch between neighbouring measured depths (the first begins at 0) takes (Δx)², in proportion to
    x inside it; beyond the deepest (Δx)² times the number of doublings, at least one.
    """
    steps = np.diff(inside, axis=1, prepend=0.0)
    clock = np.cumsum(steps**2, axis=1)
    following = np.searchsorted(known, depths)  # the stretch that a depth is in
    beyond = following == len(known)
    stretch = np.where(beyond, len(known) - 1, following)
    start = np.where(stretch > 0, inside[:, stretch - 1], 0.0)
    begun = np.where(stretch > 0, clock[:, stretch - 1], 0.0)
    within = begun + steps[:, stretch] * (outside - start)
    doublings = np.maximum(1.0, np.log2(np.maximum(depths, known[-1]) / known[-1]))
    after = clock[:, -1:] + (outside - inside[:, -1:]) ** 2 * doublings
    return clock, np.where(beyond, after, within)


def _averaged(law: Law, ends: bool, means: _Means) -> _Components:
    """One law over its shapes, on a logarithmic grid that is each discrepancy's own, and over these."""
    eta, weight = (np.asarray(list(part)) for part in (DISCREPANCIES, DISCREPANCIES.values()))
    scale = float(means.depths[-1]) if law.in_depths else 1.0
    low, high = (math.log(scale * bound) for bound in law.bounds)
    shapes = _SHAPES if high > low else 1

    def laid(logs: Floats, step: Floats) -> _Components:
        """Over ln(shape) [η, shapes] on an even grid."""
        share = weight * (step / (high - low) if high > low else 1.0)
        blank = np.zeros(logs.size)
        return _Components(
            law=law,
            ends=ends,
            shape=np.exp(logs).ravel(),
            eta=np.repeat(eta, shapes),
            slope=blank,
            level=blank,
            log_weight=np.repeat(np.log(share), shapes),
            misfit=blank,
        ).weighed(means)

    first, last = np.full(len(eta), low), np.full(len(eta), high)
    logs, step = np.linspace(first, last, shapes, axis=1), (last - first) / max(shapes - 1, 1)
    found = laid(logs, step)
    for _ in range(_REFINEMENTS):
        heights = found.log_weight.reshape(logs.shape)
        near = heights > heights.max(1, keepdims=True) - _REACH
        if (near.sum(1) > shapes / 3).all():
            break
        first = np.maximum(low, np.where(near, logs, math.inf).min(1) - step)
        last = np.minimum(high, np.where(near, logs, -math.inf).max(1) + step)
        logs, step = np.linspace(first, last, shapes, axis=1), (last - first) / (shapes - 1)
        found = laid(logs, step)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Growth:
    """Δ over depths, all laws averaged.

    Attributes:
        quantity: the quantity's name.
        kind: what a replicate is.
        replicates: their number over all depths.
        misfit: p-value of the replicates' means under the law that fits them best, without discrepancy.
        weights: law → its weight.
        formulas: law → its formula.
    """

    quantity: str
    kind: str
    replicates: int
    misfit: float
    weights: Mapping[str, float]
    formulas: Mapping[str, str]
    _means: _Means
    _components: tuple[_Components, ...]
    _spread: Spread

    @property
    def depths(self) -> Floats:
        """[K] the depths that were measured, ascending."""
        return self._means.depths

    def of_mean(self, depths: Floats) -> Mixture:
        """The distribution of Δ in the mean over initialisations, at each of these depths [P]."""
        found = [each.at(self._means, depths) for each in self._components]
        weight = np.exp(np.concatenate([each.log_weight for each in self._components]))
        rounding = float(np.min(self._means.variance))  # a law that is exact has no width of its own
        return Mixture(
            weight=weight / weight.sum(),
            centre=np.concatenate([centre for centre, _ in found]),
            scale=np.sqrt(np.concatenate([variance for _, variance in found]) + 1e-6 * rounding),
            degrees=self._means.degrees,
        )

    def of_one(self, depths: Floats) -> Mixture:
        """The same of one new network: the spread over replicates added."""
        return self.of_mean(depths).with_spread(self._spread.weight, self._spread.at(depths), _DROPPED)

    def notes(self, depth: float) -> tuple[str, ...]:
        """How far this is from what was measured, and what else is to be known."""
        notes: list[str] = []
        if self.kind != "initialisation":
            notes.append(f"replicates are of the kind {self.kind!r}: about these models, no architecture")
        if self.misfit < _MISFIT:
            notes.append(
                f"no law of growth explains what was measured (p = {self.misfit:.1g}): intervals are "
                "wider by what the laws miss, and hold if they miss no more elsewhere"
            )
        if not self.depths[0] <= depth <= self.depths[-1]:
            far = depth / self.depths[-1] if depth > self.depths[-1] else self.depths[0] / depth
            notes.append(f"extrapolated by a factor of {far:.2g} in depth")
        if len(self.depths) < 3:
            notes.append(
                "two depths cannot tell laws apart, so that the interval spans most of them: measure "
                "a third"
            )
        return tuple(notes)


def fit_growth(
    depths: Floats, delta: Sequence[Floats], quantity: str, kind: str, laws: Iterable[Law]
) -> Growth:
    """Weigh every law, with and without ends; before anything is measured, all are alike.

    Args:
        depths: [K] numbers of blocks, ascending.
        delta: K arrays, Δ of the replicates at each depth, nats.
        quantity: the quantity's name.
        kind: what a replicate is.
        laws: laws of growth.
    """
    from scipy.special import fdtrc

    spread = fit_spread(depths, delta)
    mean = np.asarray([d.mean() for d in delta])
    counts = np.asarray([len(d) for d in delta], dtype=np.float64)
    largest = float(np.max(np.abs(mean)))
    floor = max(4 * np.finfo(np.float64).eps * max(1.0, largest), _EXACT * largest) ** 2
    means = _Means(
        depths=depths,
        mean=mean,
        variance=np.maximum(spread.weight @ spread.at(depths) / counts, floor),
        degrees=spread.degrees,
    )
    found = [
        _averaged(each, ends, means)
        for each in laws
        for ends in ((True,) if each.only_ends else (False, True))
    ]
    best = max(float(each.log_weight.max()) for each in found)
    total = best + math.log(sum(float(np.exp(each.log_weight - best).sum()) for each in found))
    found = [replace(each, log_weight=each.log_weight - total) for each in found]
    least_weight = least_kept(np.exp(np.concatenate([each.log_weight for each in found])), _DROPPED)
    # A quadratic form of K means over a variance with ν degrees of freedom: F(K, ν).
    least = min(float(each.misfit[each.eta == 0].min()) for each in found) / len(depths)
    return Growth(
        quantity=quantity,
        kind=kind,
        replicates=int(counts.sum()),
        misfit=float(fdtrc(len(depths), spread.degrees, least)),
        weights={each.name: float(np.exp(each.log_weight).sum()) for each in found},
        formulas={each.name: each.formula for each in found},
        _means=means,
        _components=tuple(each.take(np.exp(each.log_weight) >= least_weight) for each in found),
        _spread=spread,
    )
