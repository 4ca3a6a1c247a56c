"""The models that are trained, and one step of training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 512


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A plain pre-norm decoder: tokens [B, T] → logits [B, T, vocabulary]."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt2(depth: int, width: int, heads: int) -> nn.Module:
    """GPT-2 of transformers with its default dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Workload:
    """A model and the size of its batch.

    Attributes:
        what: the model in words.
        make: (depth, width, heads) → model, tokens → logits.
        blocks: the pattern of the names of its blocks.
        sequences: B.
        tokens: T.
    """

    what: str
    make: Callable[[int, int, int], nn.Module]
    blocks: str
    depth: int
    width: int
    heads: int
    tokens: int
    sequences: int

    def __str__(self) -> str:
        return (
            f"{self.what}, {self.depth} blocks, d = {self.width}, T = {self.tokens}, B = {self.sequences}"
        )


WORKLOADS = {
    "w1": Workload("decoder", Decoder, "blocks.*", 12, 256, 4, 128, 8),
    "w2": Workload("GPT-2 of transformers", gpt2, "transformer.h.*", 12, 384, 6, 128, 4),
    "w3": Workload("deep and narrow decoder", Decoder, "blocks.*", 96, 64, 4, 32, 4),
}
# Inductor takes minutes for 96 blocks.
WORKLOADS["w3/4"] = replace(WORKLOADS["w3"], depth=24)
#: For the tests and for a first look.
WORKLOADS["tiny"] = Workload("decoder", Decoder, "blocks.*", 2, 16, 2, 8, 2)


class Training:
    """A model in training: forward, cross-entropy, backward, AdamW.

    Attributes:
        model: the model itself, which is what a watcher gets.
        called: what the loop calls: the model, or its compiled form once `compile` was called.
        after_backward: called with the number of the step between backward and optimizer, if any.
    """

    def __init__(self, workload: Workload, *, bf16: bool = False, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = workload.make(workload.depth, workload.width, workload.heads).to(device)
        self.called: Callable[[Tensor], Any] = self.model
        self.tokens = torch.randint(VOCABULARY, (workload.sequences, workload.tokens + 1), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.after_backward: Callable[[int], object] | None = None
        self.device = device
        self.bf16 = bf16
        self.steps = 0

    def compile(self, backend: str) -> None:
        self.called = torch.compile(self.model, backend=backend)

    def loss(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            output = self.called(self.tokens[:, :-1])
            logits = output if isinstance(output, Tensor) else output.logits
            return F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def step(self) -> None:
        self.loss().backward()
        if self.after_backward is not None:
            self.after_backward(self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def resident_bytes(self) -> int:
        """Parameters and the optimizer's state."""
        state = (v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *state))
