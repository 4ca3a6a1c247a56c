"""Healthy networks are called healthy: at initialisation, and while they learn.

A diagnosis that cries wolf is switched off. Every architecture below is in use and learns its task here;
none may get a finding worse than a note, at any seed. The short form runs by default, the long one
(200 steps, three seeds) with ``--slow``.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import Diagnosis, diagnose
from gradscope.reference import Transformer

VOCABULARY, CONTEXT, BATCH, WIDTH = 128, 24, 8, 32
TEXT = torch.tensor(
    [b for b in "".join(pydoc_data.topics.topics.values()).encode() if b < VOCABULARY], dtype=torch.long
)

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Any], Tensor]


# -- data --------------------------------------------------------------------------------------


def text(seed: int) -> Batches:
    """Bytes of the language reference and the bytes that follow them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(len(TEXT) - CONTEXT - 1, (BATCH,), generator=generator)
        window = TEXT[at[:, None] + torch.arange(CONTEXT + 1)]
        yield window[:, :-1], window[:, 1:]


def masked_text(seed: int) -> Batches:
    """Text with 15 % of the bytes replaced by byte 0, and the bytes that stood there (else ignored)."""
    generator = torch.Generator().manual_seed(seed)
    for tokens, _ in text(seed):
        hidden = torch.rand(tokens.shape, generator=generator) < 0.15
        yield torch.where(hidden, 0, tokens), torch.where(hidden, tokens, -100)


def same_text(seed: int) -> Batches:
    """Text whose target is the byte itself: for encoders that see the whole sequence."""
    for tokens, _ in text(seed):
        yield tokens, tokens


def vectors(seed: int) -> Batches:
    """Random vectors, to be classified as a fixed random network does."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    while True:
        x = torch.randn(64, 20, generator=generator)
        yield x, (x @ teacher).argmax(-1)


def images(seed: int) -> Batches:
    """Noise with a bright quadrant: which one?"""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 3, 16, 16, generator=generator)
        y = torch.randint(4, (16,), generator=generator)
        for i, k in enumerate(y.tolist()):
            x[i, :, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 0.7
        yield x, y


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    out = model(x)
    out = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


# -- models ------------------------------------------------------------------------------------


def reference(variant: str, depth: int = 8) -> Callable[[], nn.Module]:
    return lambda: Transformer(
        variant, depth=depth, width=WIDTH, heads=2, vocabulary=VOCABULARY, context=CONTEXT
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=8, n_head=2)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=8,
            num_attention_heads=2,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=CONTEXT,
        )
    )


def llama(width: int = WIDTH, depth: int = 8) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=3 * width,
            max_position_embeddings=CONTEXT,
        )
    )


class T5Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=4 * WIDTH, num_layers=8, num_heads=2
            )
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=tokens).last_hidden_state)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=WIDTH,
            num_hidden_layers=8,
            num_attention_heads=2,
            intermediate_size=4 * WIDTH,
            num_labels=4,
        )
    )


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, norm_first=True, batch_first=True)
            for _ in range(8)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embed(tokens)
        for layer in self.encoder:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


class ResidualMlpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Chain(nn.Module):
    """stem -> blocks -> norm -> head, over vectors."""

    def __init__(self, block: Callable[[], nn.Module], norm: nn.Module, depth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(20, 64)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = norm
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def residual_mlp() -> nn.Module:
    return Chain(lambda: ResidualMlpBlock(64), nn.LayerNorm(64))


def he_mlp() -> nn.Module:
    def block() -> nn.Module:
        linear = nn.Linear(64, 64)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        return nn.Sequential(linear, nn.ReLU())

    return Chain(block, nn.Identity())


class ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(16) for _ in range(8)))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A healthy network: how it is made, what it learns, and at which rate."""

    make: Callable[[], nn.Module]
    data: Callable[[int], Batches]
    learning_rate: float = 1e-3
    layers: str | None = None


CASES = {
    "pre-norm": Case(reference("pre_norm"), text),
    "post-norm": Case(reference("post_norm", 4), text),
    "peri-norm": Case(reference("peri_norm"), text),
    "DeepNorm": Case(reference("deepnorm"), text),
    "ReZero": Case(reference("rezero"), text),
    "LayerScale": Case(reference("layerscale"), text),
    "depth-scaled": Case(reference("depth_scaled"), text),
    "LayerNorm scaling": Case(reference("layernorm_scaling"), text),
    "every module": Case(reference("pre_norm", 3), text, layers="**"),
    "GPT-2": Case(gpt2, text),
    "BERT": Case(bert, masked_text),
    "Llama": Case(llama, text),
    "T5 encoder": Case(T5Tagger, same_text),
    "ViT": Case(vit, images),
    "torch encoder": Case(TorchEncoder, text),
    "residual MLP": Case(residual_mlp, vectors),
    "He MLP": Case(he_mlp, vectors),
    "He MLP, every module": Case(he_mlp, vectors, layers="**"),
    "ResNet": Case(ResNet, images),
}


def initialised(case: Case, seed: int, replicates: int = 3) -> gradscope.Record:
    batch = next(case.data(seed))
    return gradscope.measure(
        case.make, batch, cross_entropy, replicates, seed=100 * seed, layers=case.layers
    )


def trained(case: Case, seed: int, steps: int) -> tuple[gradscope.Record, list[float]]:
    torch.manual_seed(seed)
    model = case.make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.learning_rate)
    losses: list[float] = []
    with gradscope.watch(model, layers=case.layers, warn=False) as scope:
        for _, batch in zip(range(steps), case.data(seed), strict=False):
            loss = cross_entropy(model, batch)
            scope.log(loss=loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert not scope.faults
    return scope.record, losses


def alarms(diagnosis: Diagnosis) -> list[str]:
    return [f"{f.severity} {f.rule}: {f.message}" for f in diagnosis.findings if f.severity != "note"]


# -- the claims --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_healthy_at_initialisation(name: str) -> None:
    diagnosis = diagnose(initialised(CASES[name], seed=1))
    assert diagnosis.healthy, alarms(diagnosis)


def test_a_wide_llama_has_a_small_embedding_and_is_healthy() -> None:
    # N(0, .02) embeddings are fifty times smaller than unit variance, which the first norm makes of them:
    # at real widths the first block alone exceeds the 3 nats of a whole trunk.
    record = initialised(Case(lambda: llama(768, depth=5), text), seed=1)
    assert gradscope.verdict(record).word == "exploding"
    diagnosis = diagnose(record)
    assert diagnosis.healthy, alarms(diagnosis)
    assert [f.layers for f in diagnosis.of("one_layer_off")] == [("model.layers.0",)]


@pytest.mark.parametrize("name", CASES)
def test_healthy_while_it_learns(name: str) -> None:
    record, losses = trained(CASES[name], seed=1, steps=60)
    diagnosis = diagnose(record)
    assert diagnosis.healthy, alarms(diagnosis)
    assert all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_healthy_over_200_steps(name: str, seed: int) -> None:
    start = diagnose(initialised(CASES[name], seed))
    assert start.healthy, alarms(start)
    record, losses = trained(CASES[name], seed, steps=200)
    diagnosis = diagnose(record)
    assert diagnosis.healthy, alarms(diagnosis)
    # It is a fair test only of a network that does learn.
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20]), name
