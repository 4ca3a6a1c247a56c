"""Depths that are read from the gradient: rows of the table in `gradscope.experiment.depth_methods`."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from gradscope.experiment.batches import loss_or_own, part_of, sample_count
from gradscope.experiment.depth_methods import DepthReading, DepthRequest, depth_method
from gradscope.experiment.effective_depth import effective_depth
from gradscope.experiment.named_branches import named_trunk
from gradscope.experiment.paths import path_spectrum
from gradscope.experiment.products import l2
from gradscope.experiment.trunk_pass import TrunkPass
from gradscope.experiment.untouched import shared_copy, undisturbed, unwrapped

_VEIT = "Veit et al. 2016, arXiv:1605.06431"


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
    loss = loss_or_own(request.loss, request.batch)
    norms: dict[int, float] = {}

    def keep(position: int, gradient: Tensor) -> Tensor:
        norms[position] = l2(gradient)
        return gradient

    with undisturbed(model):
        single = part_of(
            request.batch, request.batch_dim, 0, sample_count(request.batch, request.batch_dim)
        )
        run = TrunkPass(
            shared_copy(model),
            loss,
            single,
            trunk=request.trunk,
            named=named_trunk(model, request.modules),
        )
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


def _depth_scale(rate: float) -> float:
    return 1 / (2 * abs(rate)) if rate else math.inf
