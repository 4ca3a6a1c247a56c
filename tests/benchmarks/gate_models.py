"""The models that a gradient baseline is studied on, and what is planted in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.reference import Transformer, next_token_loss

DEPTH, WIDTH, HEADS, BLOCK = 12, 64, 4, 5
MODELS = ("pre-norm", "post-norm", "MLP", "MLP, gain 5/3", "GPT-2")


# -- models --------------------------------------------------------------------------------------


def text(rows: int = 4, length: int = 32, start: int = 0) -> tuple[Tensor, Tensor]:
    """Real prose as bytes: inputs and targets [rows, length]."""
    prose = "".join(topics[key] for key in sorted(topics)).encode()[start : start + rows * (length + 1)]
    tokens = torch.tensor(list(prose)).view(rows, length + 1)
    return tokens[:, :-1], tokens[:, 1:]


def transformer(variant: str, **options: Any) -> Transformer:
    return Transformer(variant, depth=DEPTH, width=WIDTH, heads=HEADS, context=32, **options)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=32, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def mlp() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(24)])


def critical_mlp() -> nn.Module:
    """Weights so large that samples stay apart, where PyTorch's default makes them alike."""
    model = mlp()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, gain=nn.init.calculate_gain("tanh"))
            nn.init.zeros_(module.bias)
    return model


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def subject(name: str) -> tuple[Callable[[], nn.Module], Any, Any]:
    """Maker, batch and loss."""
    if name.startswith("MLP"):
        make = mlp if name == "MLP" else critical_mlp
        return make, torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3)), square
    inputs, targets = text()
    if name == "GPT-2":
        return gpt2, {"input_ids": inputs, "labels": inputs}, None
    variant = name.replace("-", "_")
    return functools.partial(transformer, variant), (inputs, targets), next_token_loss


# -- planted regressions -------------------------------------------------------------------------


class ForgetsTheFirst(torch.autograd.Function):
    """The identity, whose backward pass forgets the first features: those of the first head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: int) -> Tensor:
        ctx.features = features
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient[..., : ctx.features] = 0
        return gradient, None


def _sublayers(block: Any) -> tuple[Any, Any]:
    return block.attention, block.feed_forward


def no_skip(block: Any) -> None:
    for sublayer in _sublayers(block):
        sublayer.skip = "none"


def scale(factor: float, block: Any) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def detach(block: Any) -> None:
    block.feed_forward.branch.register_forward_hook(lambda module, args, output: output.detach())


def half_detach(block: Any) -> None:
    block.feed_forward.branch.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


def move_norm(block: Any) -> None:
    for sublayer in _sublayers(block):
        if sublayer.norm is None:
            sublayer.norm = sublayer.branch.norm
            del sublayer.branch.norm
        else:
            steps = dict(sublayer.branch.named_children())
            norm, sublayer.norm = sublayer.norm, None
            for name in steps:
                delattr(sublayer.branch, name)
            for name, module in {"norm": norm, **steps}.items():
                sublayer.branch.add_module(name, module)


def freeze(block: Any) -> None:
    block.attention.requires_grad_(False)


def zero_head(block: Any) -> None:
    function = block.attention.branch.function
    for projection in (function.query, function.key, function.value):
        projection.register_forward_hook(
            lambda module, args, output: ForgetsTheFirst.apply(output, WIDTH // HEADS)
        )


def to_tanh(block: Any) -> None:
    block.feed_forward.branch.function.activation = nn.Tanh()


def sharp(block: Any) -> None:
    factor = (WIDTH // HEADS) ** -0.5
    block.attention.branch.function.query.register_forward_hook(
        lambda module, args, output: output * factor
    )


PLANTED: dict[str, tuple[Callable[[Any], None], bool]] = {
    "skip removed": (no_skip, False),
    "initialisation × 1.3": (functools.partial(scale, 1.3), False),
    "initialisation × 1.1": (functools.partial(scale, 1.1), False),
    "branch detached": (detach, False),
    "branch's input detached": (half_detach, False),
    "norm moved, one block": (move_norm, False),
    "norm moved, all blocks": (move_norm, True),
    "frozen layer": (freeze, False),
    "one head's gradient 0": (zero_head, False),
    "GELU → tanh, one block": (to_tanh, False),
    "GELU → tanh, all blocks": (to_tanh, True),
    "scale 1/√d → 1/d, one block": (sharp, False),
    "scale 1/√d → 1/d, all blocks": (sharp, True),
}


def planted(make: Callable[[], nn.Module], name: str, *, later: bool = False) -> Callable[[], nn.Module]:
    """A maker of the model with one regression; ``later``: drawn later in the random order."""
    fault, everywhere = PLANTED[name]

    def maker() -> nn.Module:
        if later:
            torch.rand(3)
        model: Any = make()
        for block in model.blocks if everywhere else [model.blocks[BLOCK]]:
            fault(block)
        return model

    return maker
