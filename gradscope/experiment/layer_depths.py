"""Depths that are read from the layers' activations: rows of the table in `depth_methods`.

They need no gradient. The logit lens sends the input of a layer through what lies behind the trunk, the
final norm and the head: the model runs again with the output of its last block replaced by it, so that
whatever comes behind is the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import first_float, loss_or_own, part_of, replaced, sample_count
from gradscope.experiment.depth_methods import DepthReading, DepthRequest, depth_method
from gradscope.experiment.untouched import shared_copy, undisturbed, unwrapped
from gradscope.layers import Trunk, find_trunks, named_layers

__all__ = ["StreamRun", "logits_of", "run_stream"]

_CSORDAS: Final = "Csordás et al. 2025, arXiv:2505.13898"
#: Of how many of the most probable outputs the overlap is taken.
_TOP: Final = 5
#: How far the branches' outputs may miss what is added to the stream, relative to it.
_ADDED: Final = 1e-3


@depth_method(
    "lens_kl",
    formula="l + 1 for the first l with KL(p_l‖p) < max KL/2, p_l the lens on the input of block l",
    unit="blocks",
    citation=_CSORDAS,
)
def lens_kl(request: DepthRequest) -> DepthReading:
    """Where the logit lens comes half-way to the output: as a ratio of the depth, (l + 1)/L.

    The first crossing is fragile. Evidence: ``kl`` of every block's input in nats, and
    ``last_crossing``, l + 1 for the first l from which on all of them stay below.
    """
    kl, _, name = _lens(request)
    return _crossing(kl < kl.max() / 2, {"kl": kl}, name)


@depth_method(
    "lens_overlap",
    formula=f"l + 1 for the first l with a top-{_TOP} overlap above .3, the lens on block l's input",
    unit="blocks",
    citation=_CSORDAS,
)
def lens_overlap(request: DepthRequest) -> DepthReading:
    """Where the lens's most probable outputs become those of the model: as a ratio, (l + 1)/L.

    Evidence: ``overlap`` of every block's input, and ``last_crossing`` as for ``lens_kl``.
    """
    _, overlap, name = _lens(request)
    return _crossing(overlap > 0.3, {"overlap": overlap}, name)


@depth_method(
    "block_influence",
    formula="exp(−Σ p ln p), p = BI/Σ BI, BI = 1 − E cos(h_l, h_l+1)",
    unit="blocks",
    citation="Block Influence: Men et al. 2024, arXiv:2403.03853",
)
def block_influence(request: DepthRequest) -> DepthReading:
    """How many blocks turn the stream, by the exponential entropy of their Block Influence."""
    stream, name = _stream(request)
    return _taking_part(1 - _cosines(stream), "block_influence", name)


@depth_method(
    "angular",
    formula="exp(−Σ p ln p), p = d/Σ d, d = E arccos(cos(h_l, h_l+1))/π",
    unit="blocks",
    citation="angular distance: Gromov et al. 2024, arXiv:2403.17887",
)
def angular(request: DepthRequest) -> DepthReading:
    """How many blocks turn the stream, by the exponential entropy of their angular distances."""
    stream, name = _stream(request)
    distance = np.array([float(_angle(a, b).mean()) / math.pi for a, b in _pairs(stream)])
    return _taking_part(distance, "angular_distance", name)


@depth_method(
    "residual_cosine",
    formula="l + 1 for the last l where the mean of cos(F, h) over attention, MLP and block becomes ≥ 0",
    unit="blocks",
    citation=_CSORDAS,
)
def residual_cosine(request: DepthRequest) -> DepthReading:
    """Where blocks stop erasing and begin to refine; F what is added, h the stream that it is added to.

    Evidence: ``cosine``, the mean of every block.
    """
    run = run_stream(request)
    means: list[float] = []
    for number, (before, after) in enumerate(_pairs(run.stream)):
        h, found = before, [float(_cosine(after - before, before).mean())]
        for branch in (b.double() for b in run.branches.get(number, [])):
            if branch.shape != h.shape:
                raise MeasureError(_not_added(run, number))
            found.append(float(_cosine(branch, h).mean()))
            h = h + branch
        off = float((h - after).norm() / after.norm())
        if len(found) < 3 or not off <= _ADDED:
            raise MeasureError(_not_added(run, number))
        means.append(sum(found) / len(found))
    cosine = np.asarray(means)
    turns = np.flatnonzero((cosine[:-1] < 0) & (cosine[1:] >= 0)) + 1
    status = "ok" if len(turns) else "the mean cosine never goes from below 0 to 0 or above"
    return DepthReading(
        value=float(turns[-1] + 1) if len(turns) else math.nan,
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


# -- the pass --------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class StreamRun:
    """What a forward pass showed: the stream, [P] tensors, and each block call's branch outputs."""

    model: nn.Module
    again: Callable[[], Any]
    trunk: Trunk
    stream: list[Tensor] = field(default_factory=list[Tensor])
    blocks: list[str] = field(default_factory=list[str])
    branches: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])
    output: Any = None


def run_stream(request: DepthRequest) -> StreamRun:
    """Run a copy of the model without gradients."""
    model = unwrapped(request.model)
    twin = shared_copy(model)
    trunks = find_trunks(twin)
    names = [trunk.name for trunk in trunks]
    if not trunks:
        raise MeasureError(f"No trunk found in {type(model).__name__}: no container of repeated blocks.")
    if request.trunk is not None and request.trunk not in names:
        raise MeasureError(f'trunk="{request.trunk}" is none of the trunks: {", ".join(names)}.')
    trunk = trunks[-1] if request.trunk is None else trunks[names.index(request.trunk)]
    loss = loss_or_own(request.loss, request.batch)
    samples = sample_count(request.batch, request.batch_dim)
    batch = part_of(request.batch, request.batch_dim, 0, samples)
    run = StreamRun(twin, lambda: loss(twin, batch), trunk)
    modules = named_layers(twin)
    with undisturbed(twin), torch.no_grad(), ExitStack() as stack:

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            h = first_float((args, kwargs))
            if h is not None and not run.stream:
                run.stream.append(h.detach().clone())

        def left(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                h = first_float(output)
                if h is not None:
                    run.stream.append(h.detach().clone())
                    run.blocks.append(name)

            return hook

        def added(module: nn.Module, args: Any, output: Any) -> None:
            value = first_float(output)
            if value is not None:
                run.branches.setdefault(len(run.blocks), []).append(value.detach().clone())

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            run.output = output

        first = trunk.parts[0][0] if trunk.parts else trunk.blocks[0]
        stack.callback(modules[first].register_forward_pre_hook(entered, with_kwargs=True).remove)
        for name, branches in zip(trunk.blocks, trunk.branches, strict=True):
            for branch in branches:
                stack.callback(modules[branch].register_forward_hook(added).remove)
            stack.callback(modules[name].register_forward_hook(left(name)).remove)
        stack.callback(twin.register_forward_hook(ended).remove)
        run.again()
    if len(run.stream) < 2:
        raise MeasureError(f"The blocks of {trunk.name} were not called in the forward pass of the loss.")
    return run


def _stream(request: DepthRequest) -> tuple[list[Tensor], str]:
    run = run_stream(request)
    return run.stream, f"blocks of {run.trunk.name}"


def _lens(request: DepthRequest) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], str]:
    """KL(p_l‖p) in nats and the overlap of the most probable outputs, [L] each, means over positions."""
    run = run_stream(request)
    final = logits_of(run.output).log_softmax(-1)
    last = named_layers(run.model)[run.blocks[-1]]
    top = min(_TOP, final.shape[-1])
    best = final.topk(top, -1).indices
    kl: list[float] = []
    overlap: list[float] = []
    for h in run.stream[:-1]:
        found = logits_of(_with_last(run, last, h)).log_softmax(-1)
        kl.append(float((found.exp() * (found - final)).sum(-1).mean()))
        common = (found.topk(top, -1).indices[..., :, None] == best[..., None, :]).any(-1)
        overlap.append(float(common.double().mean()))
    return np.asarray(kl), np.asarray(overlap), f"blocks of {run.trunk.name}"


def _with_last(run: StreamRun, last: nn.Module, h: Tensor) -> Any:
    """The model's output with this at the end of its trunk."""
    calls = 0
    of_last = run.blocks.count(run.blocks[-1])
    output: list[Any] = []

    def swap(module: nn.Module, args: Any, value: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < of_last:
            return None
        end = first_float(value)
        if end is None or end.shape != h.shape:
            raise MeasureError(
                "The stream changes its width: its inner positions fit no final norm and head."
            )
        return replaced(value, end, h.clone())

    def ended(module: nn.Module, args: Any, value: Any) -> None:
        output.append(value)

    with undisturbed(run.model), torch.no_grad(), ExitStack() as stack:
        stack.callback(last.register_forward_hook(swap).remove)
        stack.callback(run.model.register_forward_hook(ended).remove)
        run.again()
    return output[-1]


def logits_of(output: Any) -> Tensor:
    """The logits [..., classes] that a model returned, float64.

    Raises:
        MeasureError: it returned none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise MeasureError(
            f"The model returned a {type(output).__name__} without logits [..., classes]: the logit lens "
            "needs a model with a head, whose forward returns its logits or an object with .logits."
        )
    return found.detach().double()


# -- what follows ------------------------------------------------------------------------------------


def _pairs(stream: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor]] = []
    for a, b in pairwise(stream):
        if a.shape != b.shape:
            raise MeasureError("The stream changes its width: neighbouring positions cannot be compared.")
        found.append((a.double(), b.double()))
    return found


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each position; NaN where one of them is exactly 0."""
    a, b = (x / x.abs().amax(-1, keepdim=True) for x in (a, b))
    return torch.linalg.vecdot(a, b) / (a.norm(dim=-1) * b.norm(dim=-1))


def _cosines(stream: list[Tensor]) -> npt.NDArray[np.float64]:
    return np.array([float(_cosine(a, b).mean()) for a, b in _pairs(stream)])


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle of each position; by the chords, which keep the digits of a small one."""
    u, v = (x / x.norm(dim=-1, keepdim=True) for x in (a, b))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def _crossing(
    crossed: npt.NDArray[np.bool_], evidence: dict[str, npt.NDArray[np.float64]], name: str
) -> DepthReading:
    length = len(crossed)
    first = int(np.argmax(crossed)) + 1 if crossed.any() else length
    staying = np.flatnonzero(~crossed)
    last = min(int(staying[-1]) + 2, length) if len(staying) else 1
    evidence = {**evidence, "last_crossing": np.array([float(last)])}
    values = next(iter(evidence.values()))
    status = "ok" if np.isfinite(values).all() else "the logits are not finite"
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
        status = "a position of the stream is exactly 0 or not finite"
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
