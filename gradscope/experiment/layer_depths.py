"""Depths that are read from the layers' activations: rows of the table in `depth_methods`.

They need no gradient. The logit lens sends the input of a layer through what lies behind the trunk, the
final norm and the head: the model runs again with the output of its last block replaced by it, so that
whatever comes behind is the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.errors import MeasureError
from gradscope.experiment.depth_methods import DepthReading, DepthRequest, depth_method
from gradscope.experiment.stream_run import StreamRun, run_stream

__all__ = ["logits_of"]

_CSORDAS: Final = "Csordás et al. 2025, arXiv:2505.13898"
#: Of how many of the most probable outputs the overlap is taken.
_TOP: Final = 5
#: The overlap from which on the lens shows what the model will return.
_OVERLAP: Final = 0.3
_ZERO: Final = "a position of the stream, or what is added to it, is exactly 0 or not finite"
#: How far the branches' outputs may miss what is added to the stream, relative to that, beside rounding.
_ADDED: Final = 1e-3


@depth_method(
    "lens_kl",
    formula="l + 1 for the first l with KL(p_l‖p) < max KL/2, p_l the lens on the input of block l",
    unit="blocks",
    citation=_CSORDAS,
    activations=True,
)
def lens_kl(request: DepthRequest) -> DepthReading:
    """Where the logit lens comes half-way to the output: as a ratio of the depth, (l + 1)/L.

    L where no block's input is that near. The first crossing is fragile. Evidence: ``kl`` of every
    block's input in nats, and ``last_crossing``, l + 1 for the first l from which on all stay below.
    """
    kl, _, run = _lens(request)
    status = "no block changes the output" if kl.max() <= 0 else "ok"
    return _crossing(kl < kl.max() / 2, {"kl": kl}, _name(run), status)


@depth_method(
    "lens_overlap",
    formula=f"l + 1 for the first l with a top-{_TOP} overlap above .3, the lens on block l's input",
    unit="blocks",
    citation=_CSORDAS,
    activations=True,
)
def lens_overlap(request: DepthRequest) -> DepthReading:
    """Where the lens's most probable outputs become those of the model: as a ratio, (l + 1)/L.

    L where no block's input gets there. Absent with so few classes that two random rankings would.
    Evidence: ``overlap`` of every block's input, and ``last_crossing`` as for ``lens_kl``.
    """
    _, overlap, run = _lens(request)
    classes = logits_of(run.output).shape[-1]
    by_chance = classes * _OVERLAP < _TOP
    status = f"of {classes} classes, any {_TOP} share more than that by chance" if by_chance else "ok"
    return _crossing(overlap > _OVERLAP, {"overlap": overlap}, _name(run), status)


@depth_method(
    "block_influence",
    formula="exp(−Σ p ln p), p = BI/Σ BI, BI = 1 − E cos(h_l, h_l+1)",
    unit="blocks",
    citation="Block Influence: Men et al. 2024, arXiv:2403.03853",
    activations=True,
)
def block_influence(request: DepthRequest) -> DepthReading:
    """How many blocks turn the stream, by the exponential entropy of their Block Influence."""
    run = run_stream(request)
    # 1 − cos = ½‖u − v‖² of unit vectors, which keeps the digits of a small one.
    influence = [float(run.counted(_chords(a, b)[0] ** 2).mean() / 2) for a, b in _pairs(run)]
    return _taking_part(np.array(influence), "block_influence", _name(run))


@depth_method(
    "angular",
    formula="exp(−Σ p ln p), p = d/Σ d, d = E arccos(cos(h_l, h_l+1))/π",
    unit="blocks",
    citation="angular distance: Gromov et al. 2024, arXiv:2403.17887",
    activations=True,
)
def angular(request: DepthRequest) -> DepthReading:
    """How many blocks turn the stream, by the exponential entropy of their angular distances."""
    run = run_stream(request)
    distance = np.array([float(run.counted(_angle(a, b)).mean()) / math.pi for a, b in _pairs(run)])
    return _taking_part(distance, "angular_distance", _name(run))


@depth_method(
    "residual_cosine",
    formula="l + 1 for the last l where the mean of cos(F, h) over attention, MLP and block becomes ≥ 0",
    unit="blocks",
    citation=_CSORDAS,
    activations=True,
)
def residual_cosine(request: DepthRequest) -> DepthReading:
    """Where blocks stop erasing and begin to refine; F what is added, h the stream that it is added to.

    Branches are taken as added one after the other, in the order of their calls, also where they are
    parallel.
    Evidence: ``cosine``, the mean of every block.
    """
    run = run_stream(request)
    means: list[float] = []
    rounding = torch.finfo(run.stream[-1].dtype).eps
    for number, (before, after) in enumerate(_pairs(run)):
        h, found = before, [float(run.counted(_cosine(after - before, before)).mean())]
        for output in run.branches.get(number, []):
            if output.shape != run.stream[number].shape:
                raise MeasureError(_not_added(run, number))
            branch = run.features_last(output)
            found.append(float(run.counted(_cosine(branch, h)).mean()))
            h = h + branch
        allowed = _ADDED * (after - before).norm() + 2 * rounding * after.norm()
        if len(found) < 3 or not (h - after).norm() <= allowed:
            raise MeasureError(_not_added(run, number))
        means.append(sum(found) / len(found))
    cosine = np.asarray(means)
    turns = np.flatnonzero((cosine[:-1] < 0) & (cosine[1:] >= 0)) + 1
    status = "ok" if len(turns) else "the mean cosine never goes from below 0 to 0 or above"
    status = status if np.isfinite(cosine).all() else _ZERO
    return DepthReading(
        value=float(turns[-1] + 1) if status == "ok" else math.nan,
        most=len(cosine),
        evidence={"cosine": cosine},
        reading_point=f"blocks of {run.trunk.name}",
        status=status,
    )


def _not_added(run: StreamRun, number: int) -> str:
    return (
        f"The outputs of the branches of {run.blocks[number]} are not what is added to the stream there, "
        "as residual_cosine needs it: h + attention + MLP."
    )


# -- the logit lens ----------------------------------------------------------------------------------


def _lens(request: DepthRequest) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], StreamRun]:
    """KL(p_l‖p) in nats and the overlap of the most probable outputs, [L] each, means over positions."""
    run = run_stream(request)
    final = logits_of(run.output).log_softmax(-1)
    top = min(_TOP, final.shape[-1])
    best = final.topk(top, -1).indices
    kl: list[float] = []
    overlap: list[float] = []
    for h in run.stream[:-1]:
        found = logits_of(run.ending_with(h)).log_softmax(-1)
        kl.append(float(run.counted((found.exp() * (found - final)).sum(-1)).mean()))
        common = (found.topk(top, -1).indices[..., :, None] == best[..., None, :]).any(-1)
        overlap.append(float(run.counted(common.double().mean(-1)).mean()))
    return np.asarray(kl), np.asarray(overlap), run


def logits_of(output: Any) -> Tensor:
    """The logits [..., classes] that a model returned, float64.

    Raises:
        MeasureError: it returned none.
    """
    if output is None:
        raise MeasureError(
            "The loss does not call the model itself, but a part of it, or the model returned nothing: "
            "its logits are not seen. Write a loss that calls model(...)."
        )
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise MeasureError(
            f"The model returned a {type(output).__name__} without logits [..., classes]: the logit lens "
            "needs a model with a head, whose forward returns its logits or an object with .logits."
        )
    return found.detach().double()


# -- what follows ------------------------------------------------------------------------------------


def _name(run: StreamRun) -> str:
    return f"blocks of {run.trunk.name}"


def _pairs(run: StreamRun) -> list[tuple[Tensor, Tensor]]:
    """Neighbouring positions of the stream, features last, float64."""
    found: list[tuple[Tensor, Tensor]] = []
    for a, b in pairwise(run.stream):
        if a.shape != b.shape:
            raise MeasureError("The stream changes its width: neighbouring positions cannot be compared.")
        found.append((run.features_last(a), run.features_last(b)))
    return found


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each position; NaN where one of them is exactly 0."""
    a, b = (x / x.abs().amax(-1, keepdim=True) for x in (a, b))
    return torch.linalg.vecdot(a, b) / (a.norm(dim=-1) * b.norm(dim=-1))


def _chords(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """‖u − v‖ and ‖u + v‖ of the unit vectors of each position; NaN where one of them is exactly 0."""
    a, b = (x / x.abs().amax(-1, keepdim=True) for x in (a, b))
    u, v = (x / x.norm(dim=-1, keepdim=True) for x in (a, b))
    return (u - v).norm(dim=-1), (u + v).norm(dim=-1)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle of each position; by the chords, which keep the digits of a small one."""
    apart, together = _chords(a, b)
    return 2 * torch.atan2(apart, together)


def _crossing(
    crossed: npt.NDArray[np.bool_], evidence: dict[str, npt.NDArray[np.float64]], name: str, status: str
) -> DepthReading:
    length = len(crossed)
    first = int(np.argmax(crossed)) + 1 if crossed.any() else length
    staying = np.flatnonzero(~crossed)
    last = min(int(staying[-1]) + 2, length) if len(staying) else 1
    evidence = {**evidence, "last_crossing": np.array([float(last)])}
    values = next(iter(evidence.values()))
    status = status if np.isfinite(values).all() else "the logits are not finite"
    return DepthReading(
        value=float(first) if status == "ok" else math.nan,
        most=length,
        evidence=evidence,
        reading_point=name,
        status=status,
    )


def _taking_part(weights: npt.NDArray[np.float64], what: str, name: str) -> DepthReading:
    status = "ok"
    if not np.isfinite(weights).all():
        status = _ZERO
    elif not weights.max() > 0:
        status = "no block turns the stream"
    p = np.maximum(weights, 0.0)
    p = p[p > 0] / p.sum() if status == "ok" else p
    return DepthReading(
        value=float(np.exp(-np.sum(p * np.log(p)))) if status == "ok" else math.nan,
        most=len(weights),
        evidence={what: weights},
        reading_point=name,
        status=status,
    )
