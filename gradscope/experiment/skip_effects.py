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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import first_float, loss_or_own, replaced
from gradscope.experiment.depth_methods import DepthRequest
from gradscope.experiment.layer_depths import StreamRun, logits_of, run_stream
from gradscope.experiment.progress import counted
from gradscope.experiment.untouched import refuse_coupled_samples, undisturbed, unwrapped
from gradscope.layers import named_layers

__all__ = ["SkipEffects", "skip_effects"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SkipEffects:
    """The effect of skipping each block s on every later block l, and on the output.

    Attributes:
        blocks: names of the block calls, [L].
        effect: effect[s, l], [L, L] float64; NaN for l ≤ s.
        output: the largest change of the output's probabilities over tokens, [L]; NaN where the model has
            no logits, and then ``output_status`` says so.
        future: the same as ``effect`` for tokens behind the skipped ones, the largest over ``positions``;
            None where no positions were given.
        future_output: the same as ``output``.
        positions: the positions t before which blocks were skipped for ``future``.
        output_status: ``ok``, or why there is no effect on the output.
    """

    blocks: tuple[str, ...]
    effect: Array
    output: Array
    future: Array | None
    future_output: Array | None
    positions: tuple[int, ...]
    output_status: str = "ok"

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
        trunk: which trunk, by name; None: the last one.
        positions: for the effect on future tokens of a causal model with a stream [batch, tokens,
            features]: the positions t before which each block is skipped; L further passes each.
        batch_dim: the dimension of the samples.
        progress: whether to say on a terminal how far it is.

    Raises:
        MeasureError: no trunk, a stream that changes its shape, active dropout, or positions outside of
            the sequence.
    """
    model = unwrapped(model)
    refuse_coupled_samples(model)
    request = DepthRequest(
        model=model, batch=batch, loss=loss_or_own(loss, batch), trunk=trunk, batch_dim=batch_dim
    )
    run = run_stream(request)
    shapes = {h.shape for h in run.stream}
    if len(shapes) > 1:
        raise MeasureError("The stream changes its width: a block that is skipped fits no later one.")
    tokens = run.stream[0].shape[1] if run.stream[0].dim() == 3 else 0
    if any(not 0 < t < tokens for t in positions):
        raise MeasureError(
            f"positions={list(positions)}: each lies between two tokens of a stream [batch, tokens, "
            f"features], from 1 to {max(tokens - 1, 0)}."
        )
    length = len(run.blocks)
    why = "ok"
    try:
        plain = logits_of(run.output).softmax(-1)
    except MeasureError as error:
        plain, why = None, str(error)
    effect, output = np.full((length, length), np.nan), np.full(length, np.nan)
    future = np.full((length, length), np.nan) if positions else None
    future_output = np.full(length, np.nan) if positions else None
    before = _added(run.stream)
    for s in counted(range(length), "skip effects", show=progress):
        stream, result = _without(run, s, None)
        effect[s, s + 1 :] = _effects(before, _added(stream), s, 0)
        if plain is not None:
            output[s] = _change(plain, logits_of(result).softmax(-1), 0)
        for t in positions:
            assert future is not None and future_output is not None
            stream, result = _without(run, s, t)
            here = _effects(before, _added(stream), s, t)
            future[s, s + 1 :] = np.fmax(future[s, s + 1 :], here)
            if plain is not None:
                change = _change(plain, logits_of(result).softmax(-1), t)
                future_output[s] = np.fmax(future_output[s], change)
    return SkipEffects(
        blocks=tuple(run.blocks),
        effect=effect,
        output=output,
        future=future,
        future_output=future_output,
        positions=tuple(positions),
        output_status=why,
    )


def _added(stream: list[Tensor]) -> list[Tensor]:
    return [(b.double() - a.double()) for a, b in itertools.pairwise(stream)]


def _effects(before: list[Tensor], after: list[Tensor], s: int, start: int) -> list[float]:
    found: list[float] = []
    for plain, changed in zip(before[s + 1 :], after[s + 1 :], strict=True):
        size = plain.norm(dim=-1)
        change = (plain - changed).norm(dim=-1) / size
        change = change[:, start:] if start else change
        # A block that adds exactly nothing to a token has no relative change there.
        change = change[torch.isfinite(change)]
        found.append(float(change.max()) if change.numel() else float("nan"))
    return found


def _change(plain: Tensor, changed: Tensor, start: int) -> float:
    change = (plain - changed).norm(dim=-1)
    return float((change[:, start:] if start else change).max())


def _without(run: StreamRun, skipped: int, until: int | None) -> tuple[list[Tensor], Any]:
    """The stream and the output of the model with one block call skipped, before a position or at all."""
    modules = named_layers(run.model)
    stream: list[Tensor] = []
    output: list[Any] = []

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        h = first_float((args, kwargs))
        if h is not None and not stream:
            stream.append(h.detach().clone())

    def left(module: nn.Module, args: Any, value: Any) -> Any:
        h = first_float(value)
        if h is None:
            return None
        if len(stream) - 1 != skipped:
            stream.append(h.detach().clone())
            return None
        kept = stream[-1].clone()
        if until is not None:
            kept[:, until:] = h[:, until:]
        stream.append(kept.clone())
        return replaced(value, h, kept)

    def ended(module: nn.Module, args: Any, value: Any) -> None:
        output.append(value)

    first = run.trunk.parts[0][0] if run.trunk.parts else run.trunk.blocks[0]
    with undisturbed(run.model), torch.no_grad(), ExitStack() as stack:
        stack.callback(modules[first].register_forward_pre_hook(entered, with_kwargs=True).remove)
        for name in run.trunk.blocks:
            stack.callback(modules[name].register_forward_hook(left).remove)
        stack.callback(run.model.register_forward_hook(ended).remove)
        run.again()
    return stream, output[-1]
