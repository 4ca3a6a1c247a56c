"""Names, the depth axis, and selection, on module trees of many makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gradscope
from gradscope import errors
from gradscope.layers import callable_layers, find_branches, find_trunks, named_layers, select


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x)[..., :4])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


NAMES = [n for n, _ in Model().named_modules()]


# -- names ---------------------------------------------------------------------------------------------


def test_names_are_those_of_named_modules() -> None:
    model = Model()
    assert list(named_layers(model).items()) == list(model.named_modules())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        checkpoint_wrapper,
        compiled,
        lambda m: nn.DataParallel(checkpoint_wrapper(m)),
        lambda m: compiled(nn.DataParallel(compiled(m))),
    ],
    ids=["DataParallel", "checkpoint_wrapper", "compile", "two", "three"],
)
def test_names_do_not_show_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Model()
    wrapped = named_layers(wrap(model))
    assert sorted(wrapped) == sorted(NAMES)
    assert wrapped[""] is model
    assert wrapped["layers.1.attn"] is model.layers[1].attn
    assert find_trunks(wrap(model)) == find_trunks(model)


def test_names_do_not_show_wrapped_blocks() -> None:
    model = Model()
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    model.layers[2] = compiled(model.layers[2])
    assert sorted(named_layers(model)) == sorted(NAMES)
    assert find_trunks(model) == find_trunks(Model())


@pytest.mark.parametrize("attribute", ["module", "_orig_mod", "_checkpoint_wrapped_module", "base_model"])
def test_an_attribute_of_that_name_survives_in_a_module_that_is_no_wrapper(attribute: str) -> None:
    model = nn.Module()
    model.add_module(attribute, Model())
    assert f"{attribute}.layers.0.attn" in named_layers(model)
    wrapped = named_layers(nn.DataParallel(model))
    assert f"{attribute}.layers.0.attn" in wrapped
    assert find_trunks(model)[0].name == f"{attribute}.layers"


def test_parameters_have_clean_names() -> None:
    model = Model()
    wrapper = nn.DataParallel(model)  # without a GPU, it calls its module as it is
    with gradscope.watch(wrapper) as scope:
        wrapper(torch.tensor([[1, 2]])).sum().backward()
    t = scope.record.table(type="Parameter", signal="param_grad", statistic="l2")
    assert t["layer"].tolist() == [n for n, _ in model.named_parameters()]
    assert (t["status"] == "ok").all()


def test_a_shared_module_has_one_name() -> None:
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    assert list(named_layers(model)) == ["", "first"]


def test_containers_that_are_never_called_are_no_layers() -> None:
    model = nn.Module()
    model.items = nn.ModuleDict({"a": nn.Linear(1, 1)})
    model.numbers = nn.ParameterList([torch.zeros(1)])

    class Called(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    model.called = Called([nn.Linear(1, 1)])
    assert list(callable_layers(model)) == ["", "items.a", "called", "called.0"]


# -- the depth axis ------------------------------------------------------------------------------------


def axis(model: nn.Module) -> list[tuple[str, list[str], list[str]]]:
    """For each trunk: its name, its blocks, and the branches of its last block."""
    return [(t.name, list(t.blocks), list(t.branches[-1])) for t in find_trunks(model)]


def blocks(prefix: str, *numbers: int) -> list[str]:
    return [f"{prefix}.{n}" for n in numbers or (0, 1)]


SIZE: dict[str, Any] = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=31
)
GROUPED: dict[str, Any] = dict(SIZE, num_key_value_heads=1)
GPT: dict[str, Any] = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=31, bos_token_id=0, eos_token_id=0)
SEQUENCE: dict[str, Any] = dict(
    d_model=16,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    vocab_size=31,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
    forced_eos_token_id=0,
)

# Class of the model and of its configuration, its sizes, and its trunks.
REAL: dict[str, tuple[str, str, dict[str, Any], list[tuple[str, list[str], list[str]]]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT,
        [("transformer.h", blocks("transformer.h"), ["transformer.h.1.attn", "transformer.h.1.mlp"])],
    ),
    "GPT-J": (
        "GPTJForCausalLM",
        "GPTJConfig",
        dict(GPT, rotary_dim=4),
        [("transformer.h", blocks("transformer.h"), ["transformer.h.1.attn", "transformer.h.1.mlp"])],
    ),
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SIZE,
        [
            (
                "gpt_neox.layers",
                blocks("gpt_neox.layers"),
                ["gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"],
            )
        ],
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=31),
        [
            (
                "model.decoder.layers",
                blocks("model.decoder.layers"),
                ["model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc2"],
            )
        ],
    ),
    "Llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        GROUPED,
        [("model.layers", blocks("model.layers"), ["model.layers.1.self_attn", "model.layers.1.mlp"])],
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        dict(GROUPED, num_local_experts=2),
        [("model.layers", blocks("model.layers"), ["model.layers.1.self_attn", "model.layers.1.mlp"])],
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        dict(hidden_size=16, num_hidden_layers=2, vocab_size=31, state_size=4),
        [("backbone.layers", blocks("backbone.layers"), ["backbone.layers.1.mixer"])],
    ),
    "BERT": (
        "BertForMaskedLM",
        "BertConfig",
        SIZE,
        [
            (
                "bert.encoder.layer",
                blocks("bert.encoder.layer"),
                ["bert.encoder.layer.1.attention.output.dropout", "bert.encoder.layer.1.output.dropout"],
            )
        ],
    ),
    # One layer, called again and again: depth is counted in calls.
    "ALBERT": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        dict(SIZE, embedding_size=8),
        [
            (
                "albert.encoder.albert_layer_groups.0.albert_layers",
                ["albert.encoder.albert_layer_groups.0.albert_layers.0"],
                [
                    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
                    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
                ],
            )
        ],
    ),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=31),
        [
            (
                "distilbert.transformer.layer",
                blocks("distilbert.transformer.layer"),
                ["distilbert.transformer.layer.1.attention", "distilbert.transformer.layer.1.ffn"],
            )
        ],
    ),
    # Its inner list of attention and feed-forward is no trunk.
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=31),
        [
            ("encoder.block", blocks("encoder.block"), []),
            ("decoder.block", blocks("decoder.block"), []),
        ],
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQUENCE,
        [
            (
                "model.encoder.layers",
                blocks("model.encoder.layers"),
                ["model.encoder.layers.1.self_attn", "model.encoder.layers.1.fc2"],
            ),
            (
                "model.decoder.layers",
                blocks("model.decoder.layers", 0, 1, 2),
                [
                    "model.decoder.layers.2.self_attn",
                    "model.decoder.layers.2.encoder_attn",
                    "model.decoder.layers.2.fc2",
                ],
            ),
        ],
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        dict(SIZE, image_size=16, patch_size=4),
        [("vit.layers", blocks("vit.layers"), ["vit.layers.1.attention", "vit.layers.1.mlp"])],
    ),
    # Stages of different widths are trunks of their own.
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        dict(embed_dim=8, depths=[2, 2], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4),
        [
            (
                f"swin.encoder.layers.{s}.blocks",
                blocks(f"swin.encoder.layers.{s}.blocks"),
                [
                    f"swin.encoder.layers.{s}.blocks.1.attention",
                    f"swin.encoder.layers.{s}.blocks.1.mlp",
                ],
            )
            for s in (0, 1)
        ],
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"),
        [
            (f"resnet.encoder.stages.{s}.layers", blocks(f"resnet.encoder.stages.{s}.layers"), [])
            for s in (0, 1)
        ],
    ),
    # The convolutions in front are a decoy.
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        dict(
            SIZE,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        [
            (
                "wav2vec2.encoder.layers",
                blocks("wav2vec2.encoder.layers"),
                ["wav2vec2.encoder.layers.1.attention", "wav2vec2.encoder.layers.1.feed_forward"],
            )
        ],
    ),
}


def real(name: str) -> nn.Module:
    import transformers

    model, config, sizes, _ = REAL[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


@pytest.mark.parametrize("name", REAL)
def test_the_axis_of_real_architectures(name: str) -> None:
    assert axis(real(name)) == REAL[name][3]


def test_two_towers_are_two_trunks() -> None:
    model = nn.Module()
    model.image, model.text = Model(2), Model(3)
    assert [(t.name, len(t.blocks)) for t in find_trunks(model)] == [
        ("image.layers", 2),
        ("text.layers", 3),
    ]


def test_numbered_attributes_are_blocks() -> None:
    model = nn.Module()
    for k in (1, 2, 10):
        model.add_module(f"block_{k}", Block())
    model.head = nn.Linear(4, 2)
    assert axis(model) == [
        ("block", ["block_1", "block_2", "block_10"], ["block_10.attn", "block_10.mlp"])
    ]


def test_a_sequential_may_hold_an_embedding_and_a_head_besides_blocks() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 9))
    assert axis(model) == [("Sequential", ["1", "2"], ["2.attn", "2.mlp"])]


def test_a_plain_stack_is_read_behind_its_activations() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2)
    )
    (trunk,) = find_trunks(model)
    assert (trunk.name, trunk.blocks) == ("Sequential", ("4", "5"))
    assert trunk.parts == (("1", "2", "3", "4"), ("5",))
    assert trunk.branches == ((), ())


def test_a_plain_stack_starts_at_the_input_of_its_first_weights() -> None:
    """h_0 is what the first linear layer reads, not what its activation reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(4, 2, 3, requires_grad=True)
    with gradscope.watch(model) as scope:
        (model(x) ** 2).sum().backward()
    t = scope.record.table(type="Stream", statistic="l2")
    found = dict(zip(t["signal"], t["value"], strict=True))
    assert found["activation"] == pytest.approx(x.norm().item(), rel=1e-6)
    assert found["output_grad"] == pytest.approx(x.grad.norm().item(), rel=1e-6)
    t = scope.record.table(type="Parameter", signal="param_grad", statistic="l2")
    assert dict(zip(t["layer"], t["depth"], strict=True)) == {
        "1.weight": 1,
        "1.bias": 1,
        "3.weight": 2,
        "3.bias": 2,
    }


def test_a_list_of_bare_linear_layers_is_a_stack() -> None:
    model = nn.Module()
    model.hidden = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    assert axis(model) == [("hidden", blocks("hidden", 0, 1, 2, 3), [])]


@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.Linear(2, 2), lambda: nn.Embedding(2, 2)])
def test_no_axis_is_no_trunk(make: Callable[[], nn.Module]) -> None:
    assert find_trunks(make()) == ()


def test_a_list_of_heads_is_not_preferred_to_the_blocks() -> None:
    model = Model(2)
    model.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, 400), nn.ReLU()) for _ in range(9))
    model.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    assert [t.name for t in find_trunks(model)] == ["layers"]


def test_branches_of_torch_layers_are_read_behind_their_dropout() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    assert find_branches(layer) == ("dropout1", "dropout2")
    assert find_branches(nn.TransformerDecoderLayer(4, 2, 8)) == ("dropout1", "dropout2", "dropout3")

    class Mine(nn.TransformerEncoderLayer):
        pass

    assert find_branches(Mine(4, 2, 8)) == ("dropout1", "dropout2")


def test_norms_and_dropouts_are_no_branches() -> None:
    block = nn.Module()
    for name, module in {
        "attn_norm": nn.LayerNorm(4),
        "attention": Attention(),
        "attn_dropout": nn.Dropout(),
        "ffn_norm": nn.LayerNorm(4),
        "feed_forward": nn.Sequential(nn.Linear(4, 4)),
    }.items():
        block.add_module(name, module)
    assert find_branches(block) == ("attention", "feed_forward")


# -- the feature and token axes ------------------------------------------------------------------------


class Residual(nn.Module):
    """A convolutional block, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bn1(self.conv1(x)))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(x))))


def _tokens(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    with gradscope.watch(model, layers="**") as scope:
        model(*inputs).square().sum().backward()
    assert scope.faults == {}
    t = scope.record.table(signal="activation", statistic="tokens", call=0)
    return {n: v for n, v, k in zip(t["layer"], t["value"], t["type"], strict=True) if k != "Stream"}


def test_positions_of_images_are_their_pixels() -> None:
    found = _tokens(Images(), torch.randn(2, 3, 5, 7))
    pixels = 2 * 5 * 7
    assert found == {
        "": 2,
        "blocks": pixels,
        "blocks.0": pixels,
        "blocks.0.conv1": pixels,
        "blocks.0.bn1": pixels,
        "blocks.0.act": pixels,
        "blocks.1": pixels,
        "blocks.1.conv1": pixels,
        "blocks.1.bn1": pixels,
        "blocks.1.act": pixels,
        "pool": 2,
        "flatten": 2,
        "head": 2,
    }


class Mixed(nn.Module):
    """Convolutions beside linear layers: each says for itself where its features are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.pool = nn.MaxPool1d(2)
        self.linear = nn.Linear(4, 6)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.pool(self.norm(self.conv(x))).transpose(1, 2)))


def test_sequences_beside_linear_layers_have_their_features_last() -> None:
    found = _tokens(Mixed(), torch.randn(2, 3, 10))
    assert found == {"": 10, "conv": 20, "norm": 20, "pool": 10, "linear": 10, "act": 10}


def test_the_conv1d_of_transformers_is_a_linear_layer() -> None:
    model = real("GPT-2")
    with gradscope.watch(model, layers="**") as scope:
        model(input_ids=torch.ones(2, 7, dtype=torch.long)).logits.sum().backward()
    t = scope.record.table(
        type={"Conv1D", "GPT2Block", "GPT2MLP"}, signal="activation", statistic="tokens"
    )
    assert set(t["value"].tolist()) == {14.0}
    assert len(t["value"]) == 2 * 4 + 2 + 2


@pytest.mark.parametrize(("name", "pixels"), [("ResNet", [2 * 64, 2 * 16]), ("Swin", [2 * 64, 2 * 16])])
def test_positions_of_stages(name: str, pixels: list[int]) -> None:
    model = real(name)
    with gradscope.watch(model) as scope:
        model(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    t = scope.record.table(signal="output_grad", statistic="tokens")
    for k, trunk in enumerate(scope.record.trunks):
        found = {
            v
            for v, u, kind in zip(t["value"], t["trunk"], t["type"], strict=True)
            if u == trunk and kind.endswith("Layer")
        }
        assert found == {pixels[k]}, trunk


def test_sequence_first_is_known_beside_the_attention() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = {layer.name: layer.token_axis for layer, _ in select(model, "**")}
    assert {n for n, axis in found.items() if axis == 1} == set()
    batch_first = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    assert {layer.token_axis for layer, _ in select(batch_first, "**")} == {1}


# -- selection -----------------------------------------------------------------------------------------


def chosen(layers: Any, model: nn.Module | None = None) -> list[str]:
    return [layer.name for layer, _ in select(model or Model(), layers)]


def test_the_default_is_every_block_and_its_branches() -> None:
    assert chosen(None) == [
        n for k in range(3) for n in (f"layers.{k}", f"layers.{k}.attn", f"layers.{k}.mlp")
    ]


def test_two_stars_are_every_module() -> None:
    assert chosen("**") == [n for n in NAMES if n != "layers"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("layers.1", ["layers.1"]),
        ("layers.?", ["layers.0", "layers.1", "layers.2"]),
        ("layers.*.attn", ["layers.0.attn", "layers.1.attn", "layers.2.attn"]),
        ("**.out", ["layers.0.attn.out", "layers.1.attn.out", "layers.2.attn.out"]),
        ("layers.0.attn.**", ["layers.0.attn", "layers.0.attn.qkv", "layers.0.attn.out"]),
        ("**.0.**", [n for n in NAMES if n.startswith("layers.0") or n.endswith("mlp.0")]),
        ("*", ["", "embedding", "head"]),
        ("h*d", ["head"]),
        ("", [""]),
        (["head", "layers.0"], ["layers.0", "head"]),
        (nn.LayerNorm, ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
        (lambda n, m: n.endswith("1") and isinstance(m, Block), ["layers.1"]),
        ([nn.Embedding, "head", lambda n, m: n == "layers.2"], ["embedding", "layers.2", "head"]),
    ],
)
def test_selections(pattern: Any, expected: list[str]) -> None:
    assert sorted(chosen(pattern)) == sorted(expected)


def test_a_dot_in_a_pattern_is_a_dot() -> None:
    with pytest.raises(errors.LayerError):
        chosen("layersX0")
    model = nn.Module()
    model.add_module("a+b", nn.Linear(1, 1))
    assert chosen("a+b", model) == ["a+b"]


def test_siblings_named_by_the_user_are_the_blocks() -> None:
    model = nn.Module()
    model.stem = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(3))
    model.layers = Model(2).layers
    found = [(layer.trunk, layer.block, layer.branch) for layer, _ in select(model, "stem.*")]
    assert found == [("stem", 0, None), ("stem", 1, None), ("stem", 2, None)]


def test_later_blocks_alone_keep_their_depth() -> None:
    model = Model(4)
    with gradscope.watch(model, layers=["layers.2", "layers.3"]) as scope:
        model(torch.tensor([[1, 2, 3]])).sum().backward()
    t = scope.record.table(signal="output_grad", statistic="l2")
    assert list(zip(t["type"], t["depth"], strict=True)) == [
        ("Stream", 2.0),
        ("Block", 3.0),
        ("Block", 4.0),
    ]


# -- errors --------------------------------------------------------------------------------------------


def test_a_model_without_a_trunk_says_what_to_write() -> None:
    with pytest.raises(errors.LayerError) as found:
        gradscope.watch(nn.Linear(2, 2))
    message = str(found.value)
    assert "No trunk found in Linear" in message
    assert 'layers="path.to.blocks.*"' in message
    assert 'layers="**"' in message
    assert chosen("**", nn.Linear(2, 2)) == [""]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("layer.*", ["'layer.*'", "'layers.*'"]),
        ("model.layers.*", ["'layers.*'"]),
        ("layers.7", ["none of the model's", "'layers.*'"]),
        ("xyzzy", ["Names look like"]),
        (nn.Conv2d, ["Conv2d", '"**" for any number of parts']),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_there(pattern: Any, words: list[str]) -> None:
    with pytest.raises(errors.LayerError) as found:
        gradscope.watch(Model(), layers=pattern)
    for word in words:
        assert word in str(found.value)


def test_one_of_several_patterns_that_matches_nothing_is_refused() -> None:
    with pytest.raises(errors.LayerError, match="nowhere"):
        gradscope.watch(Model(), layers=["layers.*", "nowhere"])


@pytest.mark.parametrize("pattern", [3, [3], object()])
def test_what_is_no_selection_is_refused(pattern: Any) -> None:
    with pytest.raises(errors.LayerError, match="globs over module names, module classes or predicates"):
        gradscope.watch(Model(), layers=pattern)


@pytest.mark.parametrize("thing", [Model, "model", None, 3])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"watch\(\) takes an nn.Module instance"):
        gradscope.watch(thing)


def test_a_refused_watch_leaves_nothing_behind() -> None:
    model = Model()
    before = copy.deepcopy([sorted(vars(m)) for m in model.modules()])
    with pytest.raises(errors.LayerError):
        gradscope.watch(model, layers="nowhere")
    assert [sorted(vars(m)) for m in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
