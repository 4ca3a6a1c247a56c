r"""What skipping a block does to the blocks behind it, and to the output.

With h_l the stream and F_l = h_{l+1} − h_l what block l adds to it, block s is skipped by handing its
input on, h_{s+1} := h_s. Its effect on a later block is the relative change of what that adds,

    effect[s, l] = max over tokens of ‖F_l − F_l^(s)‖/‖F_l‖,

and its effect on the output the change of the probabilities, ‖p − p^(s)‖_2, the largest over tokens
(Csordás, Manning & Potts 2025, "Do Language Models Use Their Depth Efficiently?", arXiv:2505.13898). In a
causal model the effect on *future* tokens leaves the token itself out: the block is skipped before a
position t only, and the effect is taken from t on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.collect.arguments import Mask
from gradscope.errors import MeasureError
from gradscope.experiment.depth_methods import DepthRequest
from gradscope.experiment.layer_depths import logits_of
from gradscope.experiment.progress import counted
from gradscope.experiment.stream_run import StreamRun, run_stream

__all__ = ["SkipEffects", "skip_effects"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SkipEffects:
    """The effect of skipping each block s on every later block l, and on the output.

    Attributes:
        blocks: names of the block calls, [L].
        effect: effect[s, l], [L, L] float64; NaN for l ≤ s, and where l adds exactly nothing to any
            token; inf where what l adds without s is no longer finite.
        output: the largest change of the output's probabilities over tokens, [L]; NaN where the model has
            no logits, and then ``output_status`` says so.
        future: the same as ``effect`` for tokens behind the skipped ones, the largest over ``positions``;
            None where no positions were given.
        future_output: the same as ``output``.
        positions: the positions t before which blocks were skipped for ``future``.
        output_status: ``ok``, or why there is no effect on the output.
        future_output_status: the same for ``future_output``: there is none where the output is not by
            tokens.
    """

    blocks: tuple[str, ...]
    effect: Array
    output: Array
    future: Array | None
    future_output: Array | None
    positions: tuple[int, ...]
    output_status: str = "ok"
    future_output_status: str = "ok"

    def __str__(self) -> str:
        lines = [f"{'skipped':<28} {'largest effect behind it':>24} {'on the output':>14}"]
        for s, name in enumerate(self.blocks):
            later = self.effect[s, s + 1 :]
            largest = (
                f"{later.max():.3g} on {self.blocks[s + 1 + int(later.argmax())]}" if later.size else "–"
            )
            lines.append(f"{name:<28} {largest:>24} {self.output[s]:>14.3g}")
        return "\n".join(lines)


def skip_effects(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    trunk: str | None = None,
    positions: Sequence[int] = (),
    batch_dim: int = 0,
    mask: Mask | None = None,
    progress: bool = True,
) -> SkipEffects:
    """Skip every block in turn and see what changes behind it; L + 1 forward passes without gradients.

    ::

        from gradscope.experiment.skip_effects import skip_effects

        print(skip_effects(model, batch, loss))

    Args:
        model: the model, in ``model.eval()``; a copy that shares its parameters is run.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)``, which runs the model. None: ``model(**batch).loss``.
        trunk: which trunk, by name; None: the one that runs last.
        positions: for the effect on future tokens of a causal model with a stream [batch, tokens,
            features]: the positions t before which each block is skipped; L further passes each.
        batch_dim: the dimension of the samples.
        mask: tokens of padding to leave out, as in `gradscope.watch`; without it they count.
        progress: whether to say on a terminal how far it is.

    Raises:
        MeasureError: no trunk, a stream that changes its shape or is not finite, active dropout,
            BatchNorm on batch statistics, or positions outside of the sequence.
    """
    run = run_stream(
        DepthRequest(model=model, batch=batch, loss=loss, trunk=trunk, batch_dim=batch_dim, mask=mask)
    )
    shapes = {h.shape for h in run.stream}
    if len(shapes) > 1:
        raise MeasureError("The stream changes its width: a block that is skipped fits no later one.")
    if not all(bool(torch.isfinite(h).all()) for h in run.stream):
        raise MeasureError("The stream is not finite: nothing that a block adds to it can be compared.")
    tokens = run.stream[0].shape[1] if run.stream[0].dim() == 3 and run.tokens_second else 0
    if positions and not tokens:
        raise MeasureError(
            f"positions={list(positions)} takes a stream [batch, tokens, features]; here it has shape "
            f"{tuple(run.stream[0].shape)}{'' if run.tokens_second else ', tokens first'}."
        )
    if any(not 0 < t < tokens for t in positions):
        raise MeasureError(
            f"positions={list(positions)}: each lies between two tokens, from 1 to {tokens - 1}."
        )
    length = len(run.blocks)
    why = future_why = "ok"
    try:
        plain = logits_of(run.output).softmax(-1)
    except MeasureError as error:
        plain, why, future_why = None, str(error), str(error)
    by_token = plain is not None and plain.shape[:2] == run.stream[0].shape[:2]
    if plain is not None and positions and not by_token:
        future_why = f"the logits have shape {tuple(plain.shape)}: they are not of single tokens"
    effect, output = np.full((length, length), np.nan), np.full(length, np.nan)
    future = np.full((length, length), np.nan) if positions else None
    future_output = np.full(length, np.nan) if positions else None
    before = _added(run, run.stream)
    for s in counted(range(length), "skip effects", show=progress):
        stream, result = run.without(s)
        effect[s, s + 1 :] = _effects(run, before, _added(run, stream), s, 0)
        if plain is not None:
            output[s] = _change(run, plain, logits_of(result).softmax(-1), 0)
        for t in positions:
            assert future is not None and future_output is not None
            stream, result = run.without(s, t)
            here = _effects(run, before, _added(run, stream), s, t)
            future[s, s + 1 :] = np.fmax(future[s, s + 1 :], here)
            if plain is not None and by_token:
                change = _change(run, plain, logits_of(result).softmax(-1), t)
                future_output[s] = np.fmax(future_output[s], change)
    return SkipEffects(
        blocks=tuple(run.blocks),
        effect=effect,
        output=output,
        future=future,
        future_output=future_output,
        positions=tuple(positions),
        output_status=why,
        future_output_status=future_why,
    )


def _added(run: StreamRun, stream: list[Tensor]) -> list[Tensor]:
    h = [run.features_last(position) for position in stream]
    return [after - before for before, after in itertools.pairwise(h)]


def _effects(
    run: StreamRun, before: list[Tensor], after: list[Tensor], s: int, start: int
) -> list[float]:
    found: list[float] = []
    for plain, changed in zip(before[s + 1 :], after[s + 1 :], strict=True):
        size = plain.norm(dim=-1)
        # A block that adds exactly nothing to a token has no relative change there.
        change = torch.where(size > 0, (plain - changed).norm(dim=-1) / size, 0.0)
        some = _from(run, size > 0, start).any()
        found.append(_largest(run, change, start) if some else math.nan)
    return found


def _change(run: StreamRun, plain: Tensor, changed: Tensor, start: int) -> float:
    return _largest(run, (plain - changed).norm(dim=-1), start)


def _largest(run: StreamRun, change: Tensor, start: int) -> float:
    """The largest over the tokens from a position on; infinite where it is not finite."""
    rest = _from(run, change, start).nan_to_num(nan=math.inf)
    return float(rest.max()) if rest.numel() else math.nan


def _from(run: StreamRun, values: Tensor, start: int) -> Tensor:
    if not start:
        return run.counted(values)
    behind = torch.arange(values.shape[1], device=values.device) >= start
    counts = behind.expand(values.shape) if run.valid is None else behind & run.valid
    return values[counts]
