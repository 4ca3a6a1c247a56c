"""Small models of the kinds that people watch, and what is known of each by reading its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TOKENS, BATCH, VOCABULARY, BLOCKS = 16, 6, 3, 29, 3


class ClassicLayer(nn.Module):
    """The post-norm layer of 2017, as a textbook writes it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(WIDTH, 32)
        self.linear2 = nn.Linear(32, WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class Classic(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(ClassicLayer(dropout) for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


class SelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(2, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))


class LoopBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        # Defined in another order than they run in.
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH), nn.Dropout(dropout)
        )
        self.attn = SelfAttention(dropout)
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Loop(nn.Module):
    """A hand-written loop over blocks."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(LoopBlock(dropout) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(WIDTH, 24),
        nn.Tanh(),
        nn.Linear(24, 5),
    )


def encoder(norm_first: bool, batch_first: bool) -> Callable[[float], nn.Module]:
    def make(dropout: float) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 32, dropout, norm_first=norm_first, batch_first=batch_first
        )
        # The encoder copies one layer, which would give all of them the same weights.
        model = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        return model

    return make


def gpt2(dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=TOKENS,
            n_embd=WIDTH,
            n_layer=BLOCKS,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert(dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.2,
        )
    )


def llama(dropout: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=TOKENS,
            attention_dropout=dropout,
            initializer_range=0.2,
        )
    )


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(5))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def labelled(model: nn.Module) -> Tensor:
    return model(input_ids=_tokens(), labels=_tokens()).loss


def next_token(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(_tokens()).flatten(0, 1), _tokens().roll(-1, 1).flatten())


def weighted_sum(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, weight = _normal(BATCH, TOKENS, WIDTH).to(dtype), _normal(BATCH, TOKENS, WIDTH).flip(0).to(dtype)
    return (model(x).tanh() * weight).sum()


def classified(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(_normal(7, 10).to(dtype)), torch.arange(7) % 5)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A model, and what its code says about it.

    Attributes:
        make: dropout -> model.
        run: model -> loss.
        trunk: the name of its trunk.
        blocks: the names of its blocks.
        parts: branches of a block by name, with the fraction of a block at which they end.
        skips: positions l for which h_{l+1} = h_l + something, as the graph shows.
        not_called: modules that the forward pass leaves out.
        no_gradient: modules whose output is a constant.
        hidden_skip: positions whose graph cannot be seen: the input is a constant.
        scalar: modules whose output is one number.
        zero: parameters whose gradient is exactly zero but for rounding (a key bias shifts all scores
            of a query alike).
        packed: parameters that hold query, key and value.
        sequence_first: whether sequences are [T, B, d].
        first: the module whose input is the trunk's, where that is not the first block.
        widths: positions whose next position has another width, and what is said about it.
        no_tokens: positions without a token axis.
        no_input: positions of another width than the trunk's input.
        count: how many values there are to compare.
    """

    make: Callable[[float], nn.Module]
    run: Callable[[nn.Module], Tensor]
    trunk: str
    blocks: tuple[str, ...]
    parts: Mapping[str, float] = field(default_factory=dict)
    skips: tuple[int, ...] = ()
    not_called: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()
    hidden_skip: tuple[int, ...] = ()
    scalar: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    packed: Mapping[str, int] = field(default_factory=dict)
    sequence_first: bool = False
    first: str | None = None
    widths: Mapping[int, str] = field(default_factory=dict)
    no_tokens: tuple[int, ...] = ()
    no_input: tuple[int, ...] = ()
    count: int

    @property
    def branches(self) -> dict[str, float]:
        return {f"{b}.{n}": k + x for k, b in enumerate(self.blocks) for n, x in self.parts.items()}

    def build(self, dropout: float = 0.0) -> nn.Module:
        torch.manual_seed(11)
        return self.make(dropout)


def _each(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(k) for k in range(BLOCKS))


def _encoder(norm_first: bool, batch_first: bool, count: int) -> Example:
    return Example(
        make=encoder(norm_first, batch_first),
        run=weighted_sum,
        trunk="layers",
        blocks=_each("layers.{}"),
        parts={"dropout1": 0.5, "dropout2": 1.0},
        skips=(1, 2) if norm_first else (),
        hidden_skip=(0,),
        # torch calls the function behind it, with its weights as arguments.
        not_called=_each("layers.{}.self_attn.out_proj"),
        packed=dict.fromkeys(_each("layers.{}.self_attn.in_proj_weight"), 0),
        sequence_first=not batch_first,
        count=count,
    )


EXAMPLES: dict[str, Example] = {
    "gpt2": Example(
        make=gpt2,
        run=labelled,
        trunk="transformer.h",
        blocks=_each("transformer.h.{}"),
        parts={"attn": 0.5, "mlp": 1.0},
        skips=(0, 1, 2),
        not_called=_each("transformer.h.{}.attn.attn_dropout"),
        scalar=("",),
        packed=dict.fromkeys(_each("transformer.h.{}.attn.c_attn.weight"), 1),
        count=1217,
    ),
    "bert": Example(
        make=bert,
        run=labelled,
        trunk="bert.encoder.layer",
        blocks=_each("bert.encoder.layer.{}"),
        parts={"attention.output.dropout": 0.5, "output.dropout": 1.0},
        not_called=_each("bert.encoder.layer.{}.attention.self.dropout"),
        scalar=("",),
        zero=_each("bert.encoder.layer.{}.attention.self.key.bias"),
        count=1805,
    ),
    "llama": Example(
        make=llama,
        run=labelled,
        trunk="model.layers",
        blocks=_each("model.layers.{}"),
        parts={"self_attn": 0.5, "mlp": 1.0},
        skips=(0, 1, 2),
        no_gradient=("model.rotary_emb",),
        scalar=("",),
        count=1157,
    ),
    "encoder": _encoder(False, True, 888),
    "encoder_sequence_first": _encoder(False, False, 888),
    "encoder_norm_first": _encoder(True, True, 890),
    "encoder_norm_first_sequence_first": _encoder(True, False, 890),
    "classic": Example(
        make=Classic,
        run=next_token,
        trunk="layers",
        blocks=_each("layers.{}"),
        parts={"attention": 0.5, "linear2": 1.0},
        not_called=_each("layers.{}.attention.out_proj"),
        packed=dict.fromkeys(_each("layers.{}.attention.in_proj_weight"), 0),
        count=810,
    ),
    "loop": Example(
        make=Loop,
        run=next_token,
        trunk="blocks",
        blocks=_each("blocks.{}"),
        parts={"attn": 0.5, "mlp": 1.0},
        skips=(0, 1, 2),
        count=1162,
    ),
    "mlp": Example(
        make=mlp,
        run=classified,
        trunk="Sequential",
        blocks=("1", "4", "6", "7"),
        first="0",
        hidden_skip=(0,),
        widths=dict.fromkeys((0, 2, 3), "not supported: the width changes"),
        no_tokens=(0, 1, 2, 3, 4),
        no_input=(1, 2, 3, 4),
        count=258,
    ),
}


def optimizer_of(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)
