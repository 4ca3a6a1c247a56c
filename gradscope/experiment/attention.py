"""How spread out attention is: the entropy of its weights, where they can be had with nothing changed.

Fused kernels never form the weights; asking for another kernel would measure another computation. So the
weights are read where the model forms them itself: a transformers model with
``attn_implementation="eager"``, or an ``nn.MultiheadAttention`` called with ``need_weights=True``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.collect.arguments import Mask, valid_positions
from gradscope.errors import MeasureError
from gradscope.experiment.batches import loss_or_own, own_batch
from gradscope.experiment.untouched import (
    refuse_coupled_samples,
    shared_copy,
    undisturbed,
    unwrapped,
)
from gradscope.layers import Trunk, find_trunks, named_layers

__all__ = ["AttentionEntropy", "attention_entropy"]

#: What modules call the number of their heads.
_HEADS: Final = ("num_heads", "num_attention_heads", "n_heads", "n_head")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionEntropy:
    """Entropy of attention by layer and head.

    Attributes:
        layers: names of the attention modules, in forward order, [A].
        entropy: for each of them, −Σ A ln A divided by ln(visible keys), the mean over queries, one value
            a head: 1 for even attention, 0 where every query looks at one key. NaN where none sees two.
            One value for all heads where the model returns the mean of their weights: the entropy of
            that mean.
        least: the same, the smallest over queries.
    """

    layers: tuple[str, ...]
    entropy: tuple[Array, ...]
    least: tuple[Array, ...]

    def __str__(self) -> str:
        lines = [f"{'attention':<40} {'entropy / ln(keys), by head'}"]
        for name, values in zip(self.layers, self.entropy, strict=True):
            lines.append(f"{name:<40} {'  '.join(f'{v:.3f}' for v in values.tolist())}")
        return "\n".join(lines)


def attention_entropy(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    mask: Mask | None = None,
) -> AttentionEntropy:
    """The entropy of every attention whose weights the model forms, in one forward pass.

    −Σ_k A_qk ln A_qk over the visible keys k, divided by the logarithm of their number. A key is visible
    to a query where a head gives it a weight above 0: masks are taken to be the same for all heads.
    Queries that see one key have no entropy and are left out. Low values, entropy collapse, go with
    unstable training (Zhai et al. 2023, arXiv:2303.06296).

    ::

        from gradscope.experiment.attention import attention_entropy

        print(attention_entropy(model, batch))

    Args:
        model: the model, in ``model.eval()``; a copy that shares its parameters is run.
        batch: what ``loss`` takes; a copy of it is used.
        loss: ``loss(model, batch)``, which runs the model. None: ``model(**batch).loss``.
        mask: queries to leave out, those of padding, [batch, tokens], as in `gradscope.watch`. Without it
            they count like all others; one that sees no key at all may have even weights.

    Raises:
        MeasureError: no attention returns weights, with the line that makes it; weights that are not
            finite; active dropout; or a mask that does not fit the queries.
        ValueError: a mask that is not [batch, tokens].
    """
    model = unwrapped(model)
    refuse_coupled_samples(model)
    twin = shared_copy(model)
    loss = loss_or_own(loss, batch)
    seen: list[tuple[str, Tensor]] = []
    valid: list[Tensor] = []
    refused: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights, why = _weights(module, output)
            if weights is not None:
                seen.append((name, weights.detach()))
            elif why:
                refused.append(f"{name} {why}")

        return hook

    def masked(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = None if mask is None else valid_positions(mask, module, args, kwargs)
        if found is not None:
            valid.append(found)

    with undisturbed(twin), torch.no_grad(), ExitStack() as stack:
        stack.callback(twin.register_forward_pre_hook(masked, with_kwargs=True).remove)
        for name, module in named_layers(twin).items():
            if "attention" in type(module).__name__.lower() or "attn" in name.rpartition(".")[2].lower():
                stack.callback(module.register_forward_hook(note(name)).remove)
        loss(twin, own_batch(batch))
    # An outer attention module hands on the weights of the one inside of it.
    kept = [
        (name, weights)
        for i, (name, weights) in enumerate(seen)
        if not any(weights is other for _, other in seen[:i])
        and not any(n.startswith(f"{name}.") and w.data_ptr() == weights.data_ptr() for n, w in seen[:i])
    ]
    if not kept:
        raise MeasureError(_none_came(model, refused))
    queries = _queries(mask, valid, kept, find_trunks(twin))
    found = [_entropy(name, weights, queries) for name, weights in kept]
    return AttentionEntropy(
        layers=tuple(name for name, _ in kept),
        entropy=tuple(mean for mean, _ in found),
        least=tuple(least for _, least in found),
    )


def _weights(module: nn.Module, output: Any) -> tuple[Tensor | None, str]:
    """The weights [batch, heads, queries, keys] that an attention returned, or why there are none."""
    if not isinstance(output, tuple):
        return None, ""
    outer: Any = output[0] if output else None
    batched = not isinstance(outer, Tensor) or outer.dim() != 2
    why = ""
    for item in output[1:]:
        if not (isinstance(item, Tensor) and item.is_floating_point() and item.dim() in (2, 3, 4)):
            continue
        if item.dim() == 2 and batched:
            continue
        sums = item.double().sum(-1)
        one = (sums - 1).abs() < 1e-2
        # A row that sees no key at all is zeros, or not a number; nothing but such rows is no attention.
        rows = one | (sums == 0) | item.isnan().all(-1)
        if bool(rows.all() and one.any() and not (item < 0).any()):
            if item.dim() == 4 and item.shape[1] in (_heads(module) or (item.shape[1],)):
                return item, ""
            if item.dim() < 4 and batched:
                return item[:, None], ""  # averaged over heads: one head
            if item.dim() < 4:
                return (item[None] if item.dim() == 3 else item[None, None]), ""
        if not item.numel():
            return None, f"returned empty weights, {tuple(item.shape)}: give a batch that is not empty"
        why = (
            f"returned a tensor {tuple(item.shape)} that is not weights [batch, heads, queries, keys] "
            "with a sum of 1 over the keys: it has another layout, or an attention sink"
        )
    return None, why


def _heads(module: nn.Module) -> tuple[int, ...]:
    """How many heads the module, or one inside of it, says it has; () where none does."""
    owners = [owner for m in module.modules() for owner in (m, getattr(m, "config", None))]
    said = (getattr(owner, name, None) for owner in owners for name in _HEADS)
    return tuple(number for number in said if isinstance(number, int))


def _queries(
    mask: Mask | None, valid: list[Tensor], kept: list[tuple[str, Tensor]], trunks: Sequence[Trunk]
) -> Tensor | None:
    """Which queries count, [batch, queries]; None: all."""
    if mask is None:
        return None
    if not valid:
        raise MeasureError("There is no mask in the forward pass of the loss: leave out mask=.")
    if len(trunks) > 1:
        raise MeasureError(
            f"The model has the trunks {', '.join(t.name for t in trunks)}, and of which of them the "
            "mask is cannot be told. Give a batch without padding."
        )
    for name, weights in kept:
        shape = (weights.shape[0], weights.shape[2])
        if shape != tuple(valid[-1].shape):
            raise MeasureError(
                f"The mask is {tuple(valid[-1].shape)}, and {name} has queries {shape} [batch, queries]. "
                "Give a batch without padding."
            )
    return valid[-1]


def _entropy(name: str, weights: Tensor, queries: Tensor | None) -> tuple[Array, Array]:
    a = weights.double()
    if queries is not None:
        a = torch.where(queries[:, None, :, None], a, 0.0)
    if not bool(torch.isfinite(a).all()):
        raise MeasureError(
            f"The weights of {name} are not finite. Where these are queries of padding that see no key, "
            'leave them out: mask="attention_mask".'
        )
    a = a / torch.where(a.sum(-1, keepdim=True) > 0, a.sum(-1, keepdim=True), 1.0)  # rounded weights
    # A weight may be rounded to 0 in one head: what is masked is 0 in all of them.
    visible = (a > 0).any(1, keepdim=True).sum(-1)
    entropy = -torch.special.xlogy(a, a).sum(-1) / visible.clamp(min=2).double().log()
    entropy = torch.where(visible >= 2, entropy, math.nan)
    heads = entropy.transpose(0, 1).reshape(a.shape[1], -1)
    least = torch.where(heads.isnan(), math.inf, heads).amin(-1)
    least = torch.where(least.isinf(), math.nan, least)
    return heads.nanmean(-1).cpu().numpy(), least.cpu().numpy()


def _none_came(model: nn.Module, refused: list[str]) -> str:
    kind = type(model).__name__
    if refused:
        return f"No attention of {kind} returned weights that can be read: {refused[0]}."
    said = "No attention of the model returned its weights: a fused kernel does not form them. "
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation == "eager":
        return (
            f"No attention of {kind} returned weights: it has none that forms them, or returns them only "
            "when asked, with output_attentions=True in the batch."
        )
    if implementation is not None:
        return said + (
            f'It runs attn_implementation="{implementation}". Write '
            'model.set_attn_implementation("eager"), which computes the same by another kernel.'
        )
    return said + "Call nn.MultiheadAttention with need_weights=True, average_attn_weights=False."
