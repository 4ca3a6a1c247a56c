"""A residual transformer small enough to read in one sitting, built of standard torch modules.

The line that the depth study is about is in `Sublayer.forward`: ``x + self.branch(x)``, or
``self.branch(x)`` without a skip. A `Variant` decides which of them runs and which norms and scales
exist at all: what a variant does not have is not in the module tree, and nothing is ever multiplied
by 1 or added to 0 in its place.

**Names.** ``blocks.{k}.attention.branch`` and ``blocks.{k}.feed_forward.branch`` are the residual
branches, the function with its norms and scale; `Transformer.branches` lists them.

**Shared weights.** Norms and scales draw no random numbers, so under one seed all variants of one
size draw the same weights in the same order: a model without skips and its twin with them differ in
nothing but the skips. (DeepNorm then multiplies some of them by its β.)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradscope.reference.variants import LAYERSCALE_START, VARIANTS, Variant, deepnorm_constants

__all__ = [
    "ACTIVATIONS",
    "INITIALIZATIONS",
    "Attention",
    "Block",
    "Branch",
    "FeedForward",
    "Sublayer",
    "Transformer",
    "next_token_loss",
]

ACTIVATIONS: Final[Mapping[str, Callable[[], nn.Module]]] = MappingProxyType(
    {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
)


def _keep(weight: Tensor) -> Tensor:
    return weight


def _xavier(weight: Tensor) -> Tensor:
    return nn.init.xavier_uniform_(weight)


def _normal(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.02)


def _he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")


#: How the weight of every nn.Linear is drawn, by name. ``torch``: the default, U(±1/√fan_in), biases
#: too. ``xavier``: Glorot & Bengio 2010, uniform. ``normal``: N(0, .02²), as in GPT-2. ``he``: He et
#: al. 2015 (arXiv:1502.01852), N(0, 2/fan_in). Biases are 0 in the last three.
INITIALIZATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {"torch": _keep, "xavier": _xavier, "normal": _normal, "he": _he}
)


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key, value and output projections.

    [B, T, width] → [B, T, width]. Scores are divided by √(width/heads) (Vaswani et al. 2017,
    arXiv:1706.03762).
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix every token with those it may see."""
        q, k, v = self.query(x), self.key(x), self.value(x)  # [B, T, width] each
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, heads, T, d]
        return self.output(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, on each token alone: [..., width] → same."""

    def __init__(self, width: int, ratio: int, activation: str) -> None:
        super().__init__()
        self.expand = nn.Linear(width, ratio * width)
        self.activation = ACTIVATIONS[activation]()
        self.contract = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, activate, contract."""
        return self.contract(self.activation(self.expand(x)))


class Multiply(nn.Module):
    """x · factor, a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the constant."""
        return x * self.factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"{self.factor:.6g}"


class LearnedScale(nn.Module):
    """x · λ, learned: one scalar (ReZero's α), or one factor per feature (LayerScale's diagonal)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the learned factor."""
        return x * self.scale

    def extra_repr(self) -> str:
        """The shape of the factor."""
        return f"shape={tuple(self.scale.shape)}"


class Branch(nn.Sequential):
    """The residual branch as a whole, one step after the other: norm, function, norm, scale.

    Only the steps that the variant has are there. They are named ``norm``, ``norm_scale`` (LayerNorm
    scaling's 1/√l), ``function`` (the `Attention` or `FeedForward`), ``norm_out`` and ``scale``.

    Args:
        function: the attention or the feed-forward network.
        variant: which steps there are.
        width: number of features of the stream.
        number: the block's number l, from 1.
        depth: the number of blocks.
    """

    def __init__(
        self, function: nn.Module, variant: Variant, *, width: int, number: int, depth: int
    ) -> None:
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        if variant.norm in ("pre", "peri"):
            steps["norm"] = nn.LayerNorm(width)
        if variant.layernorm_scaling:
            steps["norm_scale"] = Multiply(1 / math.sqrt(number))
        steps["function"] = function
        if variant.norm == "peri":
            steps["norm_out"] = nn.LayerNorm(width)
        if variant.branch_scale == "rezero":
            steps["scale"] = LearnedScale(torch.zeros(()))
        elif variant.branch_scale == "layerscale":
            steps["scale"] = LearnedScale(torch.full((width,), LAYERSCALE_START))
        elif variant.branch_scale == "depth":
            steps["scale"] = Multiply(1 / math.sqrt(2 * depth))
        super().__init__(steps)


class Sublayer(nn.Module):
    """One residual branch and the stream around it: ``x + F(x)``.

    ``F(x)`` alone without a skip, ``αx + F(x)`` in DeepNorm; and LN of the result in post-norm.
    """

    def __init__(
        self, function: nn.Module, variant: Variant, *, width: int, number: int, depth: int
    ) -> None:
        super().__init__()
        self.skip = variant.skip
        self.alpha = deepnorm_constants(depth)[0] if variant.deepnorm else None
        self.branch = Branch(function, variant, width=width, number=number, depth=depth)
        self.norm = nn.LayerNorm(width) if variant.norm == "post" else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] → [B, T, width]."""
        if self.skip == "none":
            y = self.branch(x)
        elif self.alpha is None:
            y = x + self.branch(x)
        else:
            y = self.alpha * x + self.branch(x)
        return y if self.norm is None else self.norm(y)

    def extra_repr(self) -> str:
        """The skip, and its factor where it has one."""
        return f"skip={self.skip}" + ("" if self.alpha is None else f", alpha={self.alpha:.6g}")


class Block(nn.Module):
    """One transformer block: an attention sublayer, then a feed-forward sublayer."""

    def __init__(self, attention: Sublayer, feed_forward: Sublayer) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] → [B, T, width]."""
        return self.feed_forward(self.attention(x))


class Embedding(nn.Module):
    """Token embedding plus learned position: int [B, T] → [B, T, width].

    Both are torch's `nn.Embedding`, N(0, 1), whatever the initialisation of the linear layers: the
    stream starts at variance 2 per feature in every variant and every model size.
    """

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """The first tensor of the stream, h_0."""
        length, context = tokens.shape[-1], self.positions.num_embeddings
        if length > context:
            raise ValueError(
                f"sequences of {length} tokens, but the model has {context} positions: "
                f"Transformer(..., context={length})"
            )
        return self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))


class Transformer(nn.Module):
    """A residual transformer with a chosen placement of skips and norms.

    Tokens, int [B, T] → logits [B, T, vocabulary]. The modules stand in the order of the forward
    pass: ``embed``, ``blocks``, ``final_norm`` and ``head``. No dropout, no tied weights.

    Args:
        variant: a name from `VARIANTS`, or a `Variant` of your own.
        depth: number of blocks L; each has two branches, attention and feed-forward.
        width: number of features of the stream.
        heads: number of attention heads; divides the width.
        vocabulary: number of different tokens.
        context: the longest sequence, in tokens.
        causal: whether a token sees only itself and those before it; else all see all.
        initialization: of every `nn.Linear`, a name from `INITIALIZATIONS`; the embedding is N(0, 1)
            in all of them.
        feed_forward_ratio: hidden features of the feed-forward network per feature of the stream.
        final_norm: whether a LayerNorm stands before the head; None: exactly where the variant's
            stream is not normalised by itself, that is for pre-norm and peri-norm.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``.

    Raises:
        ValueError: an unknown name, a size below 1, or a width that the heads do not divide.
    """

    def __init__(
        self,
        variant: str | Variant = "pre_norm",
        *,
        depth: int = 12,
        width: int = 64,
        heads: int = 4,
        vocabulary: int = 256,
        context: int = 64,
        causal: bool = True,
        initialization: str = "torch",
        feed_forward_ratio: int = 4,
        final_norm: bool | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if isinstance(variant, str):
            variant = VARIANTS[_known("variant", variant, VARIANTS)]
        _known("initialization", initialization, INITIALIZATIONS)
        _known("activation", activation, ACTIVATIONS)
        for name, size in (
            ("depth", depth),
            ("width", width),
            ("heads", heads),
            ("vocabulary", vocabulary),
            ("context", context),
            ("feed_forward_ratio", feed_forward_ratio),
        ):
            if size < 1:
                raise ValueError(f"{name}={size}: it is 1 or more")
        if width % heads:
            raise ValueError(f"width={width} cannot be divided among heads={heads}")
        if final_norm is None:
            final_norm = variant.norm in ("pre", "peri")

        self.variant = variant
        self.embed = Embedding(vocabulary, context, width)
        self.blocks = nn.ModuleList()
        for number in range(1, depth + 1):
            attention = Attention(width, heads, causal=causal)
            feed_forward = FeedForward(width, feed_forward_ratio, activation)
            self.blocks.append(
                Block(
                    Sublayer(attention, variant, width=width, number=number, depth=depth),
                    Sublayer(feed_forward, variant, width=width, number=number, depth=depth),
                )
            )
        self.final_norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        self.head = nn.Linear(width, vocabulary)
        _initialize(self, initialization, variant, depth)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the residual branches, in the order of the forward pass."""
        return tuple(
            f"blocks.{k}.{sublayer}.branch"
            for k in range(len(self.blocks))
            for sublayer in ("attention", "feed_forward")
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens, int [B, T] → logits [B, T, vocabulary]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))

    def extra_repr(self) -> str:
        """The variant's name."""
        return f"variant={self.variant.name}"


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the model's logits: batch = (inputs, targets), int64 [B, T] each → []."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def _initialize(model: nn.Module, initialization: str, variant: Variant, depth: int) -> None:
    draw = INITIALIZATIONS[initialization]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight)
            if initialization != "torch":
                nn.init.zeros_(module.bias)
    if variant.deepnorm:
        beta = deepnorm_constants(depth)[1]
        for module in model.modules():
            if isinstance(module, Attention):
                scaled = (module.value, module.output)
            elif isinstance(module, FeedForward):
                scaled = (module.expand, module.contract)
            else:
                continue
            for linear in scaled:
                linear.weight.mul_(beta)


def _known(argument: str, word: str, words: Mapping[str, object]) -> str:
    if word not in words:
        raise ValueError(f"{argument}={word!r} is none of {', '.join(words)}")
    return word
