"""How spread out attention is: the entropy of its weights, where they can be had with nothing changed.

Fused kernels never form the weights; asking for another kernel would measure another computation. So the
weights are read where the model forms them itself: a transformers model with
``attn_implementation="eager"``, or an ``nn.MultiheadAttention`` called with ``need_weights=True``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.batches import loss_or_own
from gradscope.experiment.untouched import shared_copy, undisturbed, unwrapped
from gradscope.layers import named_layers

__all__ = ["AttentionEntropy", "attention_entropy"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionEntropy:
    """Entropy of attention by layer and head.

    Attributes:
        layers: names of the attention modules, in forward order, [A].
        entropy: for each of them, −Σ A ln A divided by ln(visible keys), the mean over queries, one value
            a head: 1 for even attention, 0 where every query looks at one key. NaN where none sees two.
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
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None
) -> AttentionEntropy:
    """The entropy of every attention whose weights the model forms, in one forward pass.

    −Σ_k A_qk ln A_qk over the visible keys k (weight above 0), divided by the logarithm of their number.
    Low values, entropy collapse, go with unstable training (Zhai et al. 2023, arXiv:2303.06296).

    ::

        from gradscope.experiment.attention import attention_entropy

        print(attention_entropy(model, batch))

    Args:
        model: the model; a copy that shares its parameters is run.
        batch: what ``loss`` takes.
        loss: ``loss(model, batch)``, which runs the model. None: ``model(**batch).loss``.

    Raises:
        MeasureError: no attention returns weights, with the line that makes it.
    """
    model = unwrapped(model)
    twin = shared_copy(model)
    loss = loss_or_own(loss, batch)
    seen: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = _weights(output)
            if weights is not None:
                seen.append((name, weights.detach()))

        return hook

    with undisturbed(twin), torch.no_grad(), ExitStack() as stack:
        for name, module in named_layers(twin).items():
            if "attention" in type(module).__name__.lower() or "attn" in name.rpartition(".")[2].lower():
                stack.callback(module.register_forward_hook(note(name)).remove)
        loss(twin, batch)
    # An outer attention module hands on the weights of the one inside of it.
    kept = [
        (name, weights)
        for i, (name, weights) in enumerate(seen)
        if not any(weights is other for _, other in seen[:i])
        and not any(n.startswith(f"{name}.") and w.data_ptr() == weights.data_ptr() for n, w in seen[:i])
    ]
    if not kept:
        raise MeasureError(_none_came(model))
    found = [_entropy(weights) for _, weights in kept]
    return AttentionEntropy(
        layers=tuple(name for name, _ in kept),
        entropy=tuple(mean for mean, _ in found),
        least=tuple(least for _, least in found),
    )


def _weights(output: Any) -> Tensor | None:
    """The attention weights [..., queries, keys] that an attention module returned behind its output."""
    if not isinstance(output, tuple):
        return None
    for item in output[1:]:
        if isinstance(item, Tensor) and item.is_floating_point() and item.dim() in (3, 4):
            sums = item.double().sum(-1)
            one = (sums - 1).abs() < 1e-2
            # A row that sees no key at all is zeros; nothing but such rows is no attention.
            if bool((one | (sums == 0)).all() and one.any() and (item >= 0).all()):
                return item
    return None


def _entropy(weights: Tensor) -> tuple[Array, Array]:
    a = weights.double()
    a = a[:, None] if a.dim() == 3 else a  # averaged over heads: one head
    visible = (a > 0).sum(-1)
    entropy = -torch.special.xlogy(a, a).sum(-1) / visible.clamp(min=2).double().log()
    entropy = torch.where(visible >= 2, entropy, math.nan)
    heads = entropy.transpose(0, 1).reshape(a.shape[1], -1)
    least = torch.where(heads.isnan(), math.inf, heads).amin(-1)
    least = torch.where(least.isinf(), math.nan, least)
    return heads.nanmean(-1).numpy(), least.numpy()


def _none_came(model: nn.Module) -> str:
    said = "No attention of the model returned its weights: a fused kernel does not form them. "
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation == "eager":
        return f"No attention of {type(model).__name__} returned weights: it has none that forms them."
    if implementation is not None:
        return said + (
            f'It runs attn_implementation="{implementation}". Write '
            'model.set_attn_implementation("eager"), which computes the same by another kernel.'
        )
    return said + "Call nn.MultiheadAttention with need_weights=True, average_attn_weights=False."
