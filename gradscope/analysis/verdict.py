"""One word for what a signal does over depth, with the evidence, or the statement that none is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Final

from gradscope.analysis.arguments import check_coverage
from gradscope.analysis.change import DepthScale, end_to_end
from gradscope.analysis.curve import MINIMUM_LAYERS, Curve, Source, as_curve
from gradscope.analysis.decay import DecayFit, fit_curve
from gradscope.analysis.judgement import FLAT, THRESHOLD, Word, by_bound, by_interval, not_finite
from gradscope.analysis.profile import Interval, Profile
from gradscope.errors import QuantityError
from gradscope.record import Record

__all__ = ["FLAT", "THRESHOLD", "Verdict", "Verdicts", "Word", "verdict", "verdicts"]

#: What a claim is about, by the kind of replicate.
CLAIMS: Final[Mapping[str, str]] = {
    "initialisation": "this architecture",
    "batch": "this model only (replicates are batches)",
    "run": "this model only (one run)",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Verdict:
    """What a signal does over the depth of one trunk, and how sure that is.

    Attributes:
        word: ``vanishing``: the upper end of Δ's interval is below −threshold; ``exploding``: its
            lower end is above; ``preserved``: it lies inside; otherwise ``inconclusive``.
        detail: of ``preserved``: ``flat`` (inside ±ln 2) or ``drifting``. Of ``vanishing``: ``underflow``
            where exact zeros bound Δ after a decay to the dtype's floor, ``cut`` where they follow values
            far above it. Of ``exploding``: ``overflow``. Else empty.
        reason: why, in words; for ``inconclusive`` what would settle it.
        model: the name that the caller gave it; empty for one alone.
        quantity: the quantity's name.
        forward: whether the pass is the forward pass.
        trunk: the trunk's name.
        kind: what a replicate is: ``initialisation``, ``batch`` or ``run``.
        replicates: R.
        delta: Δ = ln(amplitude at the end of the pass/at its start), nats, with its interval.
        length: layers between the two.
        depth_scale: ξ̂ in layers.
        threshold: nats.
        p_value: one-sided probability of data as clear as these if the word were wrong (for
            ``inconclusive`` the smallest of the three words'); 0 for bounds from exact zeros.
        adjusted_p_value: the same after Holm's correction over the ``comparisons``.
        comparisons: number of models × quantities that were judged together.
        curve: the logarithms that were judged.
    """

    word: Word
    detail: str
    reason: str
    model: str
    quantity: str
    forward: bool
    trunk: str
    kind: str
    replicates: int
    delta: Interval
    length: float
    depth_scale: DepthScale
    threshold: float
    p_value: float
    adjusted_p_value: float
    comparisons: int
    curve: Curve

    @property
    def depth_ratio(self) -> float:
        """L/(6ξ̂) = |Δ|/3: above 1, the trunk is deeper than a signal passes in trainable nets."""
        return abs(self.delta.estimate) / 3

    @property
    def without_first_block(self) -> Verdict | None:
        """The verdict on all other blocks, where the first one alone makes this one what it is.

        That is where this one is ``vanishing`` or ``exploding``, h_1 .. h_L by themselves change by less
        than the threshold, and the first block changes the signal by more than they do. Its input h_0
        has a scale of its own: embeddings are often drawn much smaller than what blocks put out, and
        the first norm then multiplies gradients by the ratio (Takase et al. 2023, arXiv:2312.16903).
        None everywhere else.
        """
        judged = self.word in ("vanishing", "exploding") and math.isfinite(self.delta.estimate)
        if not judged or not (self.curve.depth == 0).any():
            return None
        others = _judged(
            self.curve.take(self.curve.depth > 0), self.model, self.threshold, self.delta.confidence
        )
        rest = others.delta.estimate
        alone = abs(rest) < min(self.threshold, abs(self.delta.estimate - rest))  # False for NaN
        return others if alone and others.word in ("preserved", "inconclusive") else None

    @property
    def claim(self) -> str:
        """What the verdict is about: the architecture, or this model only."""
        if self.replicates == 1 and self.kind == "initialisation":
            return "this model only (one initialisation)"
        return CLAIMS.get(self.kind, self.kind)

    @property
    def fit(self) -> DecayFit:
        """The families of decay, fitted to the same curve (takes a moment)."""
        return fit_curve(self.curve, confidence=self.delta.confidence)

    def __str__(self) -> str:
        what = f"{self.quantity} over {self.trunk}" if self.trunk else self.quantity
        what = f"{self.model}: {what}" if self.model else what
        word = f"{self.word} ({self.detail})" if self.detail else self.word
        if math.isnan(self.delta.estimate):
            return f"{what}: {word}. {self.reason}"
        fit = self.fit
        lines = [
            f"{what}: {word}. {self.reason}",
            f"  Δ = {self.delta} nats over {self.length:g} layers, depth scale {self.depth_scale}, "
            f"L/(6ξ) = {self.depth_ratio:.2g}",
            f"  family: {fit.family} (weight {fit.weights[fit.family]:.2f})"
            if fit.ok
            else f"  no family: {fit.status}",
            f"  about {self.claim}; threshold {self.threshold:g} nats (6ξ rule, arXiv:1611.01232)",
        ]
        if self.comparisons > 1:
            lines.append(
                f"  p = {self.p_value:.3g}, after Holm's correction over {self.comparisons} comparisons "
                f"{self.adjusted_p_value:.3g}"
            )
        others = self.without_first_block
        if others is not None:
            lines.append(
                f"  it is the first block that does this: from its output on, {others.word}, "
                f"Δ = {others.delta} nats"
            )
        lines += [f"  left out: {text}" for text in self.curve.dropped()]
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Verdicts:
    """Verdicts that were given together, so that none is right by number of tries alone."""

    items: tuple[Verdict, ...]

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[str, str] | tuple[str, str, str]) -> Verdict:
        """The verdict of (model, quantity), or (model, quantity, trunk) where a model has several."""
        found = [v for v in self.items if (v.model, v.quantity, v.trunk)[: len(key)] == key]
        if len(found) != 1:
            trunks = ", ".join(repr(v.trunk) for v in found)
            raise KeyError(f"{key}: {f'one for each trunk, {trunks}' if found else 'no such verdict'}")
        return found[0]

    def __str__(self) -> str:
        rows = [("model", "trunk", "quantity", "verdict", "Δ [nats]", "interval", "L/(6ξ)", "p (Holm)")]
        for v in self.items:
            word = f"{v.word} ({v.detail})" if v.detail else v.word
            rows.append(
                (
                    v.model,
                    v.trunk,
                    v.quantity,
                    word,
                    f"{v.delta.estimate:.3g}",
                    f"[{v.delta.low:.3g}, {v.delta.high:.3g}]",
                    f"{v.depth_ratio:.2g}",
                    f"{v.adjusted_p_value:.2g}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    __repr__ = __str__


def verdict(
    source: Source,
    quantity: str = "grad_l2",
    *,
    trunk: str | None = None,
    step: int | Sequence[int] | None = None,
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
) -> Verdict:
    """Whether a signal vanishes, explodes or is preserved over the depth of a trunk.

    The backward signal by default (``grad_l2``); ``act_mean_square`` for the forward one, as amplitude
    (½ ln of the mean square). Δ = ln of its amplitude at the end of the pass over that at its start, per
    replicate, with Student's t interval over replicates. From five replicates on, their increments, a
    random walk over depth, moderate the variance (Smyth 2004): the error of one side, 2.5 % at .95, is
    then 1.9 % where increments are independent and at most 3.9 % whatever correlation they share. With
    one replicate the interval is that of the sum of its increments with their long-run variance.

    The word: ``vanishing`` if the interval lies below −3 nats, ``exploding`` above 3, ``preserved``
    inside (``flat`` inside ±ln 2), otherwise ``inconclusive``.

    Exact zeros are left-censored: they stand for values below the dtype's smallest number. If already
    that bound gives Δ < −3, the verdict is ``vanishing``. An infinite value is ``exploding``.

    ::

        print(gradscope.verdict(record))
        gradscope.verdict(record, "act_mean_square").word

    Args:
        source: a `Record`, a `Profile`, or an array [R, P] of values from the input to the loss.
        quantity: a name in `gradscope.analysis.QUANTITIES` that has a logarithm.
        trunk: the trunk, where the Record has several.
        step: as in `gradscope.profile`.
        threshold: nats of amplitude.
        confidence: of the interval; a false ``vanishing`` has half the rest, 2.5 % at .95.

    Raises:
        QuantityError: the quantity has no logarithm, or the Record cannot give it.
        ValueError: a threshold that is not positive, or a confidence outside (0, 1).
    """
    _check(threshold)
    curve = as_curve(source, quantity, trunk=trunk, step=step)
    return _judged(curve, "", threshold, confidence)


def verdicts(
    sources: Mapping[str, Source],
    quantities: str | Iterable[str] = ("grad_l2", "act_mean_square"),
    *,
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
) -> Verdicts:
    """Verdicts on several models and quantities, with Holm's correction over all of them.

    Among many comparisons some look clear by chance. Each verdict's p-value is adjusted by Holm's
    step-down rule (Holm 1979, Scandinavian Journal of Statistics 6:65), which keeps the probability of
    *any* false word at (1 − confidence)/2; a word that does not survive becomes ``inconclusive``.

    ::

        print(gradscope.verdicts({"pre": pre_record, "post": post_record}))

    Args:
        sources: name → `Record`, `Profile` or array; every trunk of a Record is judged for itself.
        quantities: names of the quantities; forward and backward by default.
        threshold: nats of amplitude.
        confidence: of the intervals.

    Raises:
        QuantityError: as `verdict`.
        ValueError: no model or no quantity at all.
    """
    if not isinstance(sources, Mapping):
        raise TypeError(
            "verdicts() takes a mapping name → Record, such as {'pre': pre, 'post': post}; got an object "
            f"of type {type(sources).__name__}. One alone: gradscope.verdict(record)."
        )
    _check(threshold)
    check_coverage(confidence)
    if not isinstance(quantities, Iterable):
        raise TypeError(f"quantities= is a quantity's name, or several; got {quantities!r}")
    asked = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    if not sources or not asked:
        raise ValueError("verdicts() was given no model or no quantity: there is nothing to judge")
    raw: list[Verdict] = []
    for i, quantity in enumerate(asked):
        for name, source in sources.items():
            if i > 0 and not isinstance(source, Record):
                continue  # a Profile or an array is one quantity already
            asked_of = source.quantity if isinstance(source, Profile) else quantity
            raw += [_judged(c, name, threshold, confidence) for c in _curves(source, asked_of)]
    order = sorted(range(len(raw)), key=lambda i: raw[i].p_value)
    judged = list(raw)
    highest, level = 0.0, (1 - confidence) / 2
    for rank, i in enumerate(order):
        v = raw[i]
        highest = max(highest, min(1.0, (len(raw) - rank) * v.p_value))
        changed = replace(v, adjusted_p_value=highest, comparisons=len(raw))
        if v.word != "inconclusive" and highest > level:
            changed = replace(
                changed,
                word="inconclusive",
                detail="",
                reason=f"{v.word} alone (p = {v.p_value:.2g}), but not among {len(raw)} comparisons "
                f"(Holm: {highest:.2g} > {level:g}). Measure more replicates.",
            )
        judged[i] = changed
    return Verdicts(items=tuple(judged))


def _check(threshold: float) -> None:
    if not isinstance(threshold, Real):
        raise TypeError(f"threshold= is a positive number of nats; got {threshold!r}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold= is a positive number of nats; got {threshold}")


def _curves(source: Source, quantity: str) -> list[Curve]:
    """One for each trunk that has values; an error where none has."""
    if not isinstance(source, Record) or len(source.trunks) < 2:
        return [as_curve(source, quantity)]
    found: list[Curve] = []
    refused: QuantityError | None = None
    for trunk in source.trunks:
        try:
            found.append(as_curve(source, quantity, trunk=trunk))
        except QuantityError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return found


#: What a verdict can be about: amplitudes of a signal that a pass carries from one end to the other.
_SIGNALS: Final = (
    "grad_l2",
    "grad_rms",
    "act_mean_square",
    "act_rms",
    "act_var",
    "act_variance",
    "param_grad",
)


def _judged(curve: Curve, model: str, threshold: float, confidence: float) -> Verdict:
    if curve.quantity not in _SIGNALS:
        raise QuantityError(
            f"{curve.quantity!r} is no signal that vanishes or explodes; a verdict is about one of "
            f"{', '.join(_SIGNALS)}. For its shape over depth: gradscope.fit_decay."
        )
    bounded = not_finite(curve, confidence) or by_bound(curve, threshold, confidence)
    change = end_to_end(curve, confidence)
    if bounded is not None:
        word, detail, reason, delta, length, p = bounded
        increment = Interval(
            estimate=delta.estimate / length,
            low=delta.low / length,
            high=delta.high / length,
            confidence=confidence,
            count=delta.count,
        )
        scale = DepthScale.of(increment)
    elif change is None or curve.layer_count < MINIMUM_LAYERS:
        word, detail, p = "inconclusive", "", 1.0
        why = "; ".join(curve.dropped())
        reason = (
            f"Not enough layers: {curve.layer_count} have a value in every replicate, and a verdict "
            f"needs {MINIMUM_LAYERS}." + (f" Left out: {why}." if why else "")
        )
        nothing = Interval(
            estimate=math.nan,
            low=math.nan,
            high=math.nan,
            confidence=confidence,
            count=curve.replicates,
        )
        delta = change.delta if change else nothing
        length = change.length if change else math.nan
        scale = change.depth_scale if change else DepthScale.of(nothing)
    else:
        word, detail, reason, delta, length, p = by_interval(curve, change, threshold)
        scale = change.depth_scale
    return Verdict(
        word=word,
        detail=detail,
        reason=reason,
        model=model,
        quantity=curve.quantity,
        forward=curve.forward,
        trunk=curve.trunk,
        kind=curve.kind,
        replicates=curve.replicates,
        delta=delta,
        length=length,
        depth_scale=scale,
        threshold=threshold,
        p_value=p,
        adjusted_p_value=p,
        comparisons=1,
        curve=curve,
    )
