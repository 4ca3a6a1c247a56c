"""Depths that are read from the gradient: rows of the table in `gradscope.experiment.depth_methods`."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import loss_or_own, part_of, sample_count
from gradscope.experiment.branch_shares import BranchContributions
from gradscope.experiment.depth_methods import DepthReading, DepthRequest, depth_method
from gradscope.experiment.effective_depth import EffectiveDepth, effective_depth
from gradscope.experiment.named_branches import named_trunk
from gradscope.experiment.paths import path_spectrum
from gradscope.experiment.products import l2
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.untouched import shared_copy, undisturbed, unwrapped

_VEIT = "Veit et al. 2016, arXiv:1605.06431"
#: How many paths of one length are drawn.
_PATHS: Final = 8


@depth_method(
    "gradient",
    formula="D = Σ k⟨c_k, g⟩/‖g‖²",
    unit="branches",
    citation=f"gradscope; the paths are those of {_VEIT}",
)
def gradient(request: DepthRequest) -> DepthReading:
    """Effective depth D, the mean number of branches that the gradient crosses."""
    found = effective_depth(
        request.model,
        request.batch,
        request.loss,
        trunk=request.trunk,
        modules=request.modules,
        batch_dim=request.batch_dim,
    )
    return DepthReading(
        value=found.value,
        most=found.branches,
        evidence={"per_sample": found.per_sample},
        reading_point=found.reading_point,
        status=found.status,
    )


@depth_method(
    "gradient_energy",
    formula="Σ k‖c_k‖²/Σ‖c_k‖²",
    unit="branches",
    citation=f"gradscope; the paths are those of {_VEIT}",
)
def gradient_energy(request: DepthRequest) -> DepthReading:
    """The mean path length by energy, always in [0, n]: what paths cancel among each other counts too."""
    spectrum = path_spectrum(
        request.model,
        request.batch,
        request.loss,
        trunk=request.trunk,
        modules=request.modules,
        batch_dim=request.batch_dim,
        progress=False,
    )
    return DepthReading(
        value=spectrum.gradient_energy,
        most=spectrum.branches,
        evidence={"norm": spectrum.norm},
        reading_point=spectrum.reading_point,
        status=spectrum.whole_status,
    )


def _shares(request: DepthRequest) -> tuple[EffectiveDepth, BranchContributions | None]:
    found = effective_depth(
        request.model,
        request.batch,
        request.loss,
        trunk=request.trunk,
        modules=request.modules,
        branches=True,
        batch_dim=request.batch_dim,
        progress=False,
    )
    assert isinstance(found, EffectiveDepth)
    return found, found.contributions


@depth_method(
    "participation",
    formula="exp(−Σ p ln p), p = e⁺/Σ e⁺",
    unit="branches",
    citation="gradscope; exponential entropy, Campbell 1966",
)
def participation(request: DepthRequest) -> DepthReading:
    """How many branches take part: the exponential entropy of the e_i, negative ones counted as 0."""
    found, shares = _shares(request)
    value = math.nan if shares is None else shares.participation
    status = found.status
    if status == "ok" and math.isnan(value):
        status = "no branch adds to the gradient"
    return DepthReading(
        value=value,
        most=found.branches,
        evidence={} if shares is None else {"contribution": shares.value},
        reading_point=found.reading_point,
        status=status,
    )


@depth_method(
    "depth_score",
    formula="Σ l·e_l/Σ e_l",
    unit="blocks",
    citation="gradscope",
)
def depth_score(request: DepthRequest) -> DepthReading:
    """Where the branches' contributions lie: the mean number of their block, from 1.

    With negative contributions it may leave [1, L].
    """
    found, shares = _shares(request)
    value = math.nan if shares is None else shares.depth_score
    status = found.status
    if status == "ok" and math.isnan(value):
        status = "the contributions sum to 0"
    return DepthReading(
        value=value,
        most=math.nan if shares is None else max(branch.depth for branch in shares.branches),
        evidence={} if shares is None else {"contribution": shares.value},
        reading_point=found.reading_point,
        status=status,
    )


@depth_method(
    "veit",
    formula=f"Σ k·m_k·C(n,k)/Σ m_k·C(n,k), m_k the mean norm of {_PATHS} random paths of k branches",
    unit="branches",
    citation=_VEIT,
)
def veit(request: DepthRequest) -> DepthReading:
    """The mean path length by the norms of paths, as if they did not cancel.

    Paths of k branches are drawn at random, the same ones at every call; along each, k branches and no
    skip of theirs let the gradient through, and all other skips.
    """
    model = unwrapped(request.model)
    if request.modules is not None:
        raise MeasureError(
            "veit takes paths through skips, and where named branches have them is not known"
        )
    with undisturbed(model):
        run = _passed(request, model)
        run.prove()
        if any(len(item.branches) != 1 for item in run.located):
            raise MeasureError(
                "veit takes one branch or its skip at every step, and this model has layers without a "
                "skip or parallel branches: path_spectrum counts their paths."
            )
        n = len(run.branches)
        draw = np.random.default_rng(0)
        norms = np.zeros(n + 1)
        for k in range(n + 1):
            paths = 1 if k in (0, n) else _PATHS
            norms[k] = sum(
                _along(run, set(draw.choice(n, k, replace=False).tolist())) for _ in range(paths)
            )
            norms[k] /= paths
    # By logarithms: the number of paths leaves the range of floats.
    with np.errstate(divide="ignore"):
        weight = np.log(norms) + [math.log(math.comb(n, k)) for k in range(n + 1)]
    finite = bool(np.isfinite(norms).all() and norms.any())
    weight = np.exp(weight - weight.max()) if finite else np.full(n + 1, math.nan)
    return DepthReading(
        value=float(np.arange(n + 1) @ weight / weight.sum()),
        most=n,
        evidence={"mean_norm": norms, "weight": weight},
        reading_point=run.forward.position_name(0),
        status="ok" if finite else "the gradient there is 0 or not finite",
    )


def _along(run: TrunkPass, crossed: set[int]) -> float:
    """The norm of the gradient along the path that crosses these branches."""
    found = run.gradient(
        at_branch=lambda number, gradient: gradient if number in crossed else None,
        at_skip=lambda number, gradient: None if number in crossed else gradient,
    )
    return 0.0 if found is None else l2(found)


@depth_method(
    "propagation",
    formula="min(L, 6ξ), ξ = 1/(2|r|), r = ln(‖δ_0‖/‖δ_L‖)/L",
    unit="blocks",
    citation="Schoenholz et al. 2017, arXiv:1611.01232",
)
def propagation(request: DepthRequest) -> DepthReading:
    """How many blocks the gradient gets through by the 6ξ rule.

    ξ is the depth scale of one model on one batch. `gradscope.measure` and `gradscope.fit_decay` give
    one with an interval.
    """
    model = unwrapped(request.model)
    norms: dict[int, float] = {}

    def keep(position: int, gradient: Tensor) -> Tensor:
        norms[position] = l2(gradient)
        return gradient

    with undisturbed(model):
        run = _passed(request, model)
        run.gradient(at_position=keep)
    length = run.last
    flow = np.asarray([norms.get(at, 0.0) for at in range(length + 1)])
    status = "ok"
    if not (np.isfinite(flow).all() and flow[0] > 0 and flow[-1] > 0):
        status = "the gradient at one end of the trunk is 0 or not finite"
    rate = math.log(flow[0] / flow[-1]) / length if status == "ok" else math.nan
    return DepthReading(
        # Not finite: absent. At rate 0 the depth scale is infinite.
        value=rate if math.isnan(rate) else min(length, 6 * _depth_scale(rate)),
        most=length,
        evidence={"gradient_l2": flow},
        reading_point=run.forward.position_name(0),
        status=status,
    )


def _passed(request: DepthRequest, model: nn.Module) -> TrunkPass:
    """A forward pass of the whole batch, with its graph."""
    samples = sample_count(request.batch, request.batch_dim)
    return TrunkPass(
        shared_copy(model),
        loss_or_own(request.loss, request.batch),
        part_of(request.batch, request.batch_dim, 0, samples),
        trunk=request.trunk,
        named=named_trunk(model, request.modules),
    )


def _depth_scale(rate: float) -> float:
    return 1 / (2 * abs(rate)) if rate else math.inf
