"""The residual stream of models whose code says where it runs, and of decoys that only look like one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope import reference
from gradscope.errors import MeasureError
from gradscope.experiment.architecture import Architecture, architecture

WIDTH = 8
TOKENS = torch.randint(3, 29, (2, 6), generator=torch.Generator().manual_seed(0))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def kinds(found: Architecture) -> list[tuple[str, tuple[str, ...], float]]:
    return [(s.kind, s.branches, s.skip_coefficient) for s in found.sublayers]


def every_block(
    blocks: tuple[str, ...], *parts: tuple[str, str | tuple[str, ...]]
) -> list[tuple[str, tuple[str, ...], float]]:
    """What `kinds` gives where all blocks are alike and all skips are plain."""
    return [
        (kind, tuple(f"{b}.{n}" for n in ([names] if isinstance(names, str) else names)), 1.0)
        for b in blocks
        for kind, names in parts
    ]


# -- models whose code says it ---------------------------------------------------------------


@pytest.mark.parametrize("name", reference.VARIANTS)
def test_every_reference_variant(name: str) -> None:
    variant = reference.VARIANTS[name]
    torch.manual_seed(0)
    model = reference.Transformer(name, depth=3, width=16, heads=2).double()
    found = architecture(model, torch.randint(256, (2, 7)))
    assert found.status == "ok"
    assert found.trunk == "blocks"
    assert found.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert found.branches == model.branches
    place = {"none": "no-norm", "pre": "pre-norm", "post": "post-norm", "peri": "peri-norm"}
    for number, sublayer in enumerate(found.sublayers):
        assert (sublayer.block, sublayer.call) == (f"blocks.{number // 2}", 0)
        assert sublayer.index == number % 2
        if variant.skip == "none":
            assert (sublayer.kind, sublayer.skip, sublayer.skip_coefficient) == ("none", False, 0)
            continue
        scaled = variant.deepnorm or variant.branch_scale != "none"
        assert sublayer.norm == place[variant.norm]
        assert sublayer.kind == ("scaled" if scaled else place[variant.norm])
        assert sublayer.skip
        alpha = reference.deepnorm_constants(3)[0] if variant.deepnorm else 1.0
        assert sublayer.skip_coefficient == pytest.approx(alpha, rel=1e-14)


BRANCHES = {
    "gpt2": [("pre-norm", "attn"), ("pre-norm", "mlp")],
    "llama": [("pre-norm", "self_attn"), ("pre-norm", "mlp")],
    # In BERT the attention module ends in x + dense(...) and a norm: the branch is that dense.
    "bert": [("post-norm", "attention.output.dense"), ("post-norm", "output.dense")],
    "encoder": [("post-norm", "self_attn"), ("post-norm", "linear2")],
    "encoder_sequence_first": [("post-norm", "self_attn"), ("post-norm", "linear2")],
    "encoder_norm_first": [("pre-norm", "self_attn"), ("pre-norm", "linear2")],
    "encoder_norm_first_sequence_first": [("pre-norm", "self_attn"), ("pre-norm", "linear2")],
    "classic": [("post-norm", "attention"), ("post-norm", "linear2")],
    "loop": [("pre-norm", "attn"), ("pre-norm", "mlp")],
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", BRANCHES)
def test_small_models_of_the_kinds_that_people_watch(name: str, dropout: float) -> None:
    example = models.EXAMPLES[name]
    model = example.build(dropout)
    found = architecture(model, None, lambda model, batch: example.run(model))
    assert found.trunk == example.trunk
    assert kinds(found) == every_block(example.blocks, *BRANCHES[name])
    assert found.status == "ok"
    assert model.training


def test_a_chain_has_no_skips() -> None:
    found = architecture(models.mlp(0.0), rows(3, 10))
    assert [(s.kind, s.skip, s.status) for s in found.sublayers] == [("none", False, "ok")] * 4
    assert found.branches == found.blocks == ("1", "4", "6", "7")
    assert str(found).splitlines()[1] == "  1 to 7 (4 blocks): no skip, the whole block"


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    text = sizes | {"vocab_size": 29, "max_position_embeddings": 32, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=29, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3,
                num_heads=2, decoder_start_token_id=0, pad_token_id=0,
            )
        )  # fmt: skip
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    if kind == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**text, **ends))
    if kind == "gptj":
        return transformers.GPTJForCausalLM(
            transformers.GPTJConfig(
                vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4, **ends
            )
        )
    if kind == "modernbert":
        return transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(**text, **ends, cls_token_id=1, sep_token_id=2)
        )
    if kind == "gemma2":
        return transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**text, **ends, num_key_value_heads=1, head_dim=8)
        )
    if kind == "olmo2":
        return transformers.Olmo2ForCausalLM(
            transformers.Olmo2Config(**text, **ends, num_key_value_heads=1)
        )
    assert kind == "albert"
    return transformers.AlbertModel(transformers.AlbertConfig(**text, embedding_size=8))


DECODER = ("layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense")
LABELLED = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.mark.parametrize(
    ("kind", "batch", "trunk", "blocks", "parts"),
    [
        ("t5", LABELLED, None, "decoder.block.{}", [("pre-norm", name) for name in DECODER]),
        (
            "t5",
            LABELLED,
            "encoder.block",
            "encoder.block.{}",
            [("pre-norm", "layer.0.SelfAttention"), ("pre-norm", "layer.1.DenseReluDense")],
        ),
        (
            "vit",
            {"pixel_values": rows(2, 3, 8, 8)},
            None,
            "layers.{}",
            [("pre-norm", "attention"), ("pre-norm", "mlp")],
        ),
        ("gpt_neox", LABELLED, None, "gpt_neox.layers.{}", [("pre-norm", ("attention", "mlp"))]),
        ("gptj", LABELLED, None, "transformer.h.{}", [("pre-norm", ("attn", "mlp"))]),
        (
            "gemma2",
            LABELLED,
            None,
            "model.layers.{}",
            [("peri-norm", "self_attn"), ("peri-norm", "mlp")],
        ),
        (
            "olmo2",
            LABELLED,
            None,
            "model.layers.{}",
            [("res-post-norm", "self_attn"), ("res-post-norm", "mlp")],
        ),
    ],
)
def test_hugging_face_models(
    kind: str, batch: Any, trunk: str | None, blocks: str, parts: list[Any]
) -> None:
    model = hugging_face(kind)
    found = architecture(model, batch, trunk=trunk)
    count = 3 if (kind, trunk) == ("t5", None) else 2
    assert kinds(found) == every_block(tuple(blocks.format(i) for i in range(count)), *parts)
    assert found.status == "ok"
    if kind == "t5":
        assert set(found.trunks) == {"encoder.block", "decoder.block"}


def test_modernbert_whose_first_block_has_no_norm_in_front_of_its_attention() -> None:
    found = architecture(hugging_face("modernbert"), LABELLED)
    assert [s.kind for s in found.sublayers] == ["no-norm", "pre-norm", "pre-norm", "pre-norm"]


def test_a_block_that_is_called_again_and_again() -> None:
    found = architecture(hugging_face("albert"), {"input_ids": TOKENS})
    assert [s.call for s in found.sublayers] == [0, 0, 1, 1]
    assert len(set(found.blocks)) == 1
    assert [s.kind for s in found.sublayers] == ["post-norm"] * 4
    assert "(2 calls)" in str(found)


# -- blocks of one line ------------------------------------------------------------------------


class OneLine(nn.Module):
    def __init__(self, line: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.line = line

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self, x)


class Net(nn.Module):
    def __init__(self, line: Callable[[Any, Tensor], Tensor], blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(OneLine(line) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).clone()  # not a view
        for block in self.blocks:
            x = block(x)
        return x


def in_place(m: Any, x: Tensor) -> Tensor:
    x += m.w(x.clone())
    return x


def onto_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.w(x)  # a linear layer's output for three axes is a view
    y += x
    return y


def part_of_it_in_place(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., :4] += m.w(x.clone())[..., :4]
    return x


def used_twice(m: Any, x: Tensor) -> Tensor:
    a = m.w(x)
    return x + a + m.v(torch.tanh(x + a))


class Fused(torch.autograd.Function):
    """x + f in a function of its own, as a fused kernel has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0]


SKIPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, tuple[str, ...], float]] = {
    "plain": (lambda m, x: x + m.w(x), "no-norm", ("w",), 1),
    "the other way round": (lambda m, x: m.w(x) + x, "no-norm", ("w",), 1),
    "less": (lambda m, x: x - m.w(x), "no-norm", ("w",), 1),
    "in place": (in_place, "no-norm", ("w",), 1),
    "onto a view": (onto_a_view, "no-norm", ("",), 1),
    "a part in place": (part_of_it_in_place, "no-norm", ("w",), 1),
    "parallel": (lambda m, x: x + m.w(m.norm(x)) + m.v(m.norm(x)), "pre-norm", ("w", "v"), 1),
    "parallel, branches first": (
        lambda m, x: m.v(m.norm(x)) + m.w(m.norm(x)) + x,
        "pre-norm",
        ("v", "w"),
        1,
    ),
    "flattened": (
        lambda m, x: (x.view(-1, WIDTH) + m.w(x.view(-1, WIDTH))).view(x.shape),
        "no-norm",
        ("w",),
        1,
    ),
    "in another precision": (
        lambda m, x: (x.double() + m.w(x).double()).to(x.dtype),
        "no-norm",
        ("w",),
        1,
    ),
    "added twice": (lambda m, x: x + x + m.w(x), "scaled", ("w",), 2),
    "alpha on the branch": (lambda m, x: torch.add(x, m.w(x), alpha=0.3), "no-norm", ("w",), 1),
    "alpha on the skip": (lambda m, x: torch.add(m.w(x), x, alpha=0.25), "scaled", ("w",), 0.25),
    "a diagonal on the skip": (lambda m, x: x * m.scale + m.w(x), "scaled", ("w",), math.nan),
    "a nonlinear skip": (lambda m, x: torch.tanh(x) + m.w(x), "gated", ("w",), math.nan),
    "a scaled sum": (lambda m, x: (x + m.w(x)) * 0.5, "scaled", ("w",), 1),
    "an activation behind": (lambda m, x: F.relu(x + m.w(x)), "no-norm", ("w",), 1),
    "a norm behind the branch": (lambda m, x: x + m.norm(m.w(x)), "res-post-norm", ("w",), 1),
    "a written-out norm": (
        lambda m, x: x + m.w(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
        "pre-norm",
        ("w",),
        1,
    ),
    "low-rank update": (lambda m, x: x + F.silu(m.w(x)) * m.v(x), "no-norm", ("",), 1),
    "a skip and a norm inside of the branch": (
        lambda m, x: x + m.norm(x + m.w(x)),
        "res-post-norm",
        ("norm",),
        1,
    ),
    "a product in place inside of the branch": (
        lambda m, x: x + m.w(x).mul_(torch.tanh(m.v(x))),
        "no-norm",
        ("",),
        1,
    ),
    "a skip inside of the branch": (lambda m, x: x + (x + m.w(x)) * 0.5, "scaled", ("w",), 1.5),
    "convolution": (lambda m, x: x + m.conv(x), "no-norm", ("conv",), 1),
    "checkpointed": (lambda m, x: x + checkpoint(m.w, x, use_reentrant=False), "no-norm", ("w",), 1),
}


@pytest.mark.parametrize("name", SKIPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_skips(name: str, dtype: torch.dtype) -> None:
    line, kind, names, coefficient = SKIPS[name]
    found = architecture(Net(line).to(dtype), rows(3, 4, WIDTH).to(dtype))
    assert len(found.sublayers) == 2
    for k, sublayer in enumerate(found.sublayers):
        assert sublayer.status == "ok", sublayer.proof
        assert sublayer.skip
        assert sublayer.kind == kind
        assert sublayer.branches == tuple(n and f"blocks.{k}.{n}" for n in names)
        tolerance = 1e-3 if dtype == torch.bfloat16 else 1e-6
        assert sublayer.skip_coefficient == pytest.approx(coefficient, rel=tolerance, nan_ok=True)


DECOYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a gate": (lambda m, x: x * torch.sigmoid(m.w(x)), "MulBackward0 joins"),
    "the mean": (lambda m, x: m.w(x) + x.mean(-1, keepdim=True), "neither as it was nor"),
    "a gate beside": (lambda m, x: m.w(x) + x * torch.sigmoid(m.v(x)), "AddBackward0 joins"),
    "highway": (
        lambda m, x: torch.sigmoid(m.v(x)) * m.w(x) + (1 - torch.sigmoid(m.v(x))) * x,
        "AddBackward0 joins",
    ),
    "another order": (lambda m, x: x.flip(-1) + m.w(x), "neither as it was nor"),
    "the neighbour": (lambda m, x: x.roll(1, 1) + m.w(x), "neither as it was nor"),
    "a norm on the skip": (lambda m, x: m.norm(x) + m.w(x), "neither as it was nor"),
    "the batch's mean": (lambda m, x: x.mean(0, keepdim=True) + m.w(x), "neither as it was nor"),
    "a product in place": (lambda m, x: m.w(x).mul_(x), "not by an addition"),
    "a branch's output in another branch": (used_twice, "output of blocks.0.w is used elsewhere"),
    "fused": (lambda m, x: Fused.apply(x, m.w(x)), "FusedBackward is a fused kernel"),
    "fused with a matrix product": (
        lambda m, x: torch.addmm(x.flatten(0, 1), m.v(x).flatten(0, 1), m.w.weight).view(x.shape),
        "AddmmBackward0 joins",
    ),
    "joined": (lambda m, x: torch.cat([x, m.w(x)], -1)[..., ::2], "CatBackward0 joins"),
    "stacked": (lambda m, x: torch.stack([x, m.w(x)]).sum(0), "StackBackward0 joins"),
}


@pytest.mark.parametrize("name", DECOYS)
def test_decoys_are_not_taken_for_skips(name: str) -> None:
    line, said = DECOYS[name]
    found = architecture(Net(line), rows(3, 4, WIDTH))
    assert found.status == "unproved"
    assert found.sublayers
    for sublayer in found.sublayers:
        assert (sublayer.status, sublayer.kind, sublayer.skip) == ("unproved", "none", False)
    assert said in found.sublayers[0].proof
    assert "no skip is known" in str(found)
    assert "no skip was proved" in str(found)


def test_a_view_that_is_changed_in_place_is_refused_with_words() -> None:
    """Its own past is not on the graph's path through the view, so that no skip is to be seen."""

    class Views(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x.view(x.shape))
            return x

    found = architecture(Views(in_place), rows(3, 4, WIDTH))
    assert [s.status for s in found.sublayers] == ["unproved", "unproved"]
    assert "a view of the stream is changed in place (CopySlices)" in str(found)


@pytest.mark.parametrize(
    "line",
    [
        lambda m, x: m.v(F.gelu(m.w(m.norm(x)))),
        lambda m, x: m.w(x) + m.v(x),
        lambda m, x: F.silu(m.w(x)) * m.v(x),
        lambda m, x: m.norm(torch.tanh(m.w(x))),
    ],
)
def test_layers_without_a_skip(line: Callable[[Any, Tensor], Tensor]) -> None:
    found = architecture(Net(line), rows(3, 4, WIDTH))
    assert [(s.kind, s.status, s.branches) for s in found.sublayers] == [
        ("none", "ok", ("blocks.0",)),
        ("none", "ok", ("blocks.1",)),
    ]


def test_a_detached_branch_is_none() -> None:
    found = architecture(Net(lambda m, x: x + m.w(x.detach())), rows(3, 4, WIDTH))
    assert found.sublayers == ()
    assert "no branch that a gradient crosses" in str(found)


# -- whole models --------------------------------------------------------------------------------


class Around(Net):
    """The first block's input is added again behind the last block but one."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](x + first)


class ValueResidual(Net):
    """What the first block computes is used inside of the branches of later ones."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        value = self.blocks[0].v(x)
        for block in self.blocks:
            x = x + block.w(torch.tanh(x) * value)
        return self.blocks[0](x)


def test_a_skip_around_several_blocks_is_not_proved() -> None:
    found = architecture(Around(SKIPS["plain"][0], 3), rows(3, 4, WIDTH))
    assert [s.status for s in found.sublayers] == ["ok", "ok", "unproved"]
    assert "around the input of blocks.2" in found.sublayers[2].proof


def test_a_blocks_skip_may_come_in_two_runs() -> None:
    """The encoder of a pair of towers ran twice: no path leads from one run to the other."""

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(-x)

    found = architecture(Twice(SKIPS["plain"][0]), rows(3, 4, WIDTH))
    assert found.status == "unproved"
    assert any("no path leads" in s.proof for s in found.sublayers)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True),
                2,
                enable_nested_tensor=False,
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.left(x) * self.right(x)).sum()


def test_which_of_several_trunks() -> None:
    with pytest.raises(MeasureError, match=r'2 trunks.*left\.layers, right\.layers.*trunk="left'):
        architecture(Towers(), rows(2, 3, WIDTH))
    found = architecture(Towers(), rows(2, 3, WIDTH), trunk="right.layers")
    assert found.blocks == ("right.layers.0", "right.layers.1")
    assert [s.kind for s in found.sublayers] == ["post-norm"] * 4
    assert "other trunks: left.layers" in str(found)
    with pytest.raises(MeasureError, match=r"none of the trunks of Towers: left\.layers"):
        architecture(Towers(), rows(2, 3, WIDTH), trunk="middle")


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (nn.Linear(WIDTH, WIDTH), None, "No trunk found in Linear"),
        (
            Net(lambda m, x: x + checkpoint(m.w, x, use_reentrant=True)),
            None,
            "use_reentrant=False, or turn",
        ),
        (Net(lambda m, x: checkpoint(m.w, x, use_reentrant=True)), None, "use_reentrant=False, or turn"),
        (Net(SKIPS["plain"][0]), lambda m, b: m(b), "not a scalar"),
        (Net(SKIPS["plain"][0]), lambda m, b: m.embed(b).sum(), "None of the blocks of blocks"),
        (Net(lambda m, x: (x + m.w(x)).detach()), lambda m, b: m(b).sum(), "No gradient path"),
    ],
)
def test_what_cannot_be_looked_at_says_why(model: nn.Module, loss: Any, said: str) -> None:
    with pytest.raises(MeasureError, match=said):
        architecture(model, rows(3, 4, WIDTH), loss)


def test_the_printed_lines() -> None:
    def line(m: Any, x: Tensor) -> Tensor:
        return m.norm(2 * x + m.w(x))

    model = Net(line, 3)
    model.blocks[1].line = SKIPS["parallel"][0]
    assert str(architecture(model, rows(3, 4, WIDTH))).splitlines() == [
        "Net, trunk blocks: 3 blocks, 4 branches",
        "  blocks.0: scaled post-norm w, skip × 2 proved",
        "  blocks.1: pre-norm w + v, skip × 1 proved",
        "  blocks.2: scaled post-norm w, skip × 2 proved",
        "proved: without the branches, a random gradient came back as the skip says",
    ]


class RootMeanSquare(torch.autograd.Function):
    """A norm in a function of its own, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.square().mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x * r, r)
        return x * r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, r = ctx.saved_tensors
        return (grads[0] - y * (grads[0] * y).mean(-1, keepdim=True)) * r


class FusedNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return RootMeanSquare.apply(x)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (lambda m, x: m.norm(x + m.w(x)), "post-norm"),
        (lambda m, x: x + m.w(m.norm(x)), "pre-norm"),
        (lambda m, x: x + m.norm(m.w(m.norm(x))), "peri-norm"),
        (lambda m, x: m.norm(m.w(x)), "none"),
    ],
)
def test_norms_in_functions_of_their_own(line: Callable[[Any, Tensor], Tensor], kind: str) -> None:
    model = Net(line).double()
    for block in model.blocks:
        block.norm = FusedNorm()
    found = architecture(model, rows(3, 4, WIDTH).double())
    assert [(s.kind, s.status) for s in found.sublayers] == [(kind, "ok")] * 2


def test_a_norm_that_is_none() -> None:
    """A module called a norm on the stream is run on its own, and must act alike."""

    class OddNorm(nn.LayerNorm):
        def __init__(self, *shape: int) -> None:
            super().__init__(*shape)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    model = Net(lambda m, x: m.norm(x + m.w(x)))
    for block in model.blocks:
        block.norm = OddNorm(WIDTH)
    found = architecture(model, rows(3, 4, WIDTH))
    assert found.status == "unproved"
    assert "does not act as that norm alone" in found.sublayers[0].proof


def test_nothing_of_the_model_changes() -> None:
    model = Net(SKIPS["plain"][0])
    before, dice = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = rows(3, 4, WIDTH)
    found = gradscope.architecture(model, x)
    assert isinstance(found, Architecture)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.no_grad():
        assert gradscope.architecture(model, x).sublayers == found.sublayers
    model.requires_grad_(False)
    assert gradscope.architecture(model, x).sublayers == found.sublayers
