"""Effective depth and path spectra of unmodified models, against deleting one branch after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
import torch
from reference import depth_by_deletion
from test_architecture import DECOYS, SKIPS, TOKENS, WIDTH, Around, Net, Towers, hugging_face, rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gradscope.errors import MeasureError
from gradscope.experiment.effective_depth import effective_depth
from gradscope.experiment.paths import path_spectrum
from gradscope.reference import Transformer, next_token_loss


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """In the model's own precision; the losses of Hugging Face are float32."""
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    found = output.logits if "logits" in output else output[0]
    if "labels" not in batch:
        return found.pow(3).mean()
    return cross_entropy(found.flatten(0, 1), batch["labels"].flatten())


TEXT = {"input_ids": TOKENS, "labels": TOKENS.flip(1)}
PAIR = TEXT | {"decoder_input_ids": TOKENS.flip(0)}

# Model, batch, trunk, first block, branches by reading the code: all of their outputs are added.
MODELS: list[Any] = [
    ("gpt2", TEXT, None, "transformer.h.{}", ("attn", "mlp")),
    ("llama", TEXT, None, "model.layers.{}", ("self_attn", "mlp")),
    ("bert", TEXT, None, "bert.encoder.layer.{}", ("attention.output.dense", "output.dense")),
    ("t5", PAIR, None, "decoder.block.{}", ("layer.0.SelfAttention", "layer.1.EncDecAttention",
                                            "layer.2.DenseReluDense")),
    ("t5", PAIR, "encoder.block", "encoder.block.{}", ("layer.0.SelfAttention",
                                                       "layer.1.DenseReluDense")),
    ("vit", {"pixel_values": rows(2, 3, 8, 8)}, None, "layers.{}", ("attention", "mlp")),
    ("gpt_neox", TEXT, None, "gpt_neox.layers.{}", ("attention", "mlp")),
    ("gptj", TEXT, None, "transformer.h.{}", ("attn", "mlp")),
    ("gemma2", TEXT, None, "model.layers.{}", ("self_attn", "mlp")),
    ("olmo2", TEXT, None, "model.layers.{}", ("self_attn", "mlp")),
    ("modernbert", TEXT, None, "model.layers.{}", ("attn", "mlp")),
    ("albert", {"input_ids": TOKENS}, None, "encoder.albert_layer_groups.0.albert_layers.0",
     ("attention.dense", "ffn_output")),
]  # fmt: skip


def build(name: str) -> nn.Module:
    if name in models.EXAMPLES:
        return models.EXAMPLES[name].build().double().eval()
    model = hugging_face(name).double().eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that every branch weighs something
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(("name", "batch", "trunk", "block", "parts"), MODELS)
def test_hugging_face_models_as_they_are(
    name: str, batch: Any, trunk: str | None, block: str, parts: tuple[str, ...]
) -> None:
    model = build(name)
    batch = {key: v.double() if v.is_floating_point() else v for key, v in batch.items()}
    count = 1 if name == "albert" else sum(1 for n, _ in model.named_modules() if _is_block(n, block))
    branches = [f"{block.format(i)}.{part}" for i in range(count) for part in parts]
    expected, n = depth_by_deletion(model, lambda m: own_loss(m, batch), block.format(0), branches)
    found = effective_depth(model, batch, own_loss, trunk=trunk)
    assert found.branches == n
    # Their norms compute in float32, whatever the model's dtype is.
    assert found.value == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert abs(found.value) > 1e-3
    assert found.reading_point == f"input of {block.format(0)}"
    assert found.trunk == block.format(0).rpartition(".")[0]
    spectrum = path_spectrum(model, batch, own_loss, trunk=trunk)
    assert spectrum.effective_depth == pytest.approx(found.value, rel=1e-5, abs=1e-6)


def _is_block(name: str, pattern: str) -> bool:
    prefix, _, number = name.rpartition(".")
    return prefix == pattern.removesuffix(".{}") and number.isdigit()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_forms_of_effective_depth_agree_on_twelve_layers_of_gpt2(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=8, n_embd=24, n_layer=12, n_head=2, initializer_range=0.15,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    branches = [f"transformer.h.{i}.{part}" for i in range(12) for part in ("attn", "mlp")]
    deleted, n = depth_by_deletion(
        model.double(), lambda m: own_loss(m, TEXT), "transformer.h.0", branches
    )
    model.to(dtype)
    found = effective_depth(model, TEXT, own_loss, spectrum=True)
    assert found.branches == n == 24
    assert found.spectrum is not None
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert found.value == pytest.approx(found.spectrum.effective_depth, rel=tolerance)
    assert found.value == pytest.approx(deleted, rel=tolerance)
    assert 0.5 < found.value < 24


@pytest.mark.parametrize("name", ["encoder", "encoder_norm_first", "encoder_sequence_first", "classic"])
def test_torchs_own_layers_as_they_are(name: str) -> None:
    example = models.EXAMPLES[name]
    model = example.build().double().eval()
    if name == "classic":
        batch, loss = TEXT, _classic_loss
        parts = ("attention", "linear2")
    else:
        batch, parts = rows(3, 5, 16).double(), ("dropout1", "dropout2")

        def loss(m: nn.Module, b: Any) -> Tensor:
            return (m(b) - b.flip(-1)).abs().pow(3).mean()

    branches = [f"layers.{i}.{part}" for i in range(3) for part in parts]
    expected, n = depth_by_deletion(model, lambda m: loss(m, batch), "layers.0", branches)
    found = effective_depth(model, batch, loss, batch_dim=int(name == "encoder_sequence_first"))
    assert found.value == pytest.approx(expected, rel=1e-11)
    assert found.branches == n == 6
    assert len(found.per_sample) == (5 if name == "encoder_sequence_first" else len(found.per_sample))


def _classic_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("variant", ["deepnorm", "layerscale", "depth_scaled", "peri_norm"])
def test_scaled_skips_and_branches(variant: str) -> None:
    torch.manual_seed(0)
    model = Transformer(variant, depth=3, width=16, heads=2, vocabulary=29).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale.scale"):
                parameter.uniform_(0.3, 1.5)
    batch = TOKENS, TOKENS.flip(1)
    expected, n = depth_by_deletion(
        model, lambda m: next_token_loss(m, batch), "blocks.0", list(model.branches)
    )
    found = effective_depth(model, batch, next_token_loss)
    assert found.value == pytest.approx(expected, rel=1e-11)
    assert found.branches == n


@pytest.mark.parametrize(
    "name", [name for name, case in SKIPS.items() if len(case[2]) == 1 and case[2][0]]
)
def test_blocks_of_one_line(name: str) -> None:
    line, _, (module,), _ = SKIPS[name]
    model, x = Net(line, 3).double(), rows(3, 4, WIDTH).double()
    branches = [f"blocks.{i}.{module}" for i in range(3)]
    expected, _ = depth_by_deletion(model, lambda m: square(m, x), "blocks.0", branches)
    assert effective_depth(model, x, square).value == pytest.approx(expected, rel=1e-10)


def test_an_in_place_sum_onto_a_view() -> None:
    model, x = Net(SKIPS["onto a view"][0], 3).double(), rows(3, 4, WIDTH).double()
    plain = Net(SKIPS["plain"][0], 3).double()
    plain.load_state_dict(model.state_dict())
    assert effective_depth(model, x, square).value == pytest.approx(
        effective_depth(plain, x, square).value, rel=1e-12
    )


@pytest.mark.parametrize("name", DECOYS)
def test_what_is_no_skip_is_refused(name: str) -> None:
    model, x = Net(DECOYS[name][0]).double(), rows(3, 4, WIDTH).double()
    for measure in (effective_depth, path_spectrum):
        with pytest.raises(MeasureError, match=r"not known what is a residual branch.*modules="):
            measure(model, x, square)


def test_a_skip_around_blocks_is_refused() -> None:
    model = Around(SKIPS["plain"][0], 3).double()
    with pytest.raises(MeasureError, match=r"around the input of blocks\.2"):
        effective_depth(model, rows(3, 4, WIDTH).double(), square)


def test_chains_are_as_deep_as_they_are_long() -> None:
    found = effective_depth(
        models.mlp(0.0).double(), rows(6, 10).double(), lambda m, b: m(b).pow(2).sum()
    )
    assert found.value == pytest.approx(4, rel=1e-12)
    np.testing.assert_allclose(found.per_sample, 4, rtol=1e-12)
    line: Callable[[Any, Tensor], Tensor] = lambda m, x: m.v(torch.tanh(m.w(m.norm(x))))  # noqa: E731
    model, x = Net(line, 5).double(), rows(3, 4, WIDTH).double()
    assert effective_depth(model, x, square).value == pytest.approx(5, rel=1e-12)
    assert path_spectrum(model, x, square).weight.tolist() == [0, 0, 0, 0, 0, 1]


def test_a_branch_of_zero_adds_nothing() -> None:
    model, x = Net(lambda m, x: x + 0 * m.w(x), 4).double(), rows(3, 4, WIDTH).double()
    assert effective_depth(model, x, square).value == 0
    assert path_spectrum(model, x, square).weight.tolist() == [1, 0, 0, 0, 0]


def test_which_of_several_trunks() -> None:
    with pytest.raises(MeasureError, match=r'trunk="left\.layers"'):
        effective_depth(Towers().double(), rows(2, 3, WIDTH).double(), lambda m, b: m(b))
    model, x = Towers().double(), rows(2, 3, WIDTH).double()
    found = effective_depth(model, x, lambda m, b: m(b), trunk="right.layers")
    branches = [f"right.layers.{i}.{part}" for i in range(2) for part in ("dropout1", "dropout2")]
    expected, _ = depth_by_deletion(model, lambda m: m(x), "right.layers.0", branches)
    assert found.value == pytest.approx(expected, rel=1e-11)
    assert found.trunk == "right.layers"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    x = rows(3, 4, WIDTH).double()
    line: Callable[[Any, Tensor], Tensor] = lambda m, x: x + m.v(torch.tanh(m.w(x)))  # noqa: E731
    model = Checkpointed(line, 3).double()
    plain = Net(line, 3).double()
    plain.load_state_dict(model.state_dict())
    if reentrant:
        with pytest.raises(MeasureError, match="use_reentrant=False"):
            effective_depth(model, x, square)
        return
    expected = effective_depth(plain, x, square).value
    assert effective_depth(model, x, square).value == pytest.approx(expected, rel=1e-12)
    assert path_spectrum(model, x, square).effective_depth == pytest.approx(expected, rel=1e-12)
