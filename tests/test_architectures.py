"""The depth axis by itself: on every architecture of the transformers library, and on plain models."""

from __future__ import annotations

import architectures
import pytest
import torch
import transformers
from architecture_axes import NO_AXIS, expected
from torch import Tensor, nn

import gradscope
from gradscope.errors import LayerError
from gradscope.layers import find_trunks

#: In every run; all others with --slow.
COMMON = """
albert audio-spectrogram-transformer bamba bart beit bert big_bird bigbird_pegasus blip bloom canine
clip cohere convbert convnext ctrl data2vec-audio deberta-v2 deepseek_v3 deit detr dinov2 distilbert
electra encodec falcon falcon_mamba flaubert fnet focalnet funnel gemma2 gemma4_audio glm4_moe gpt2
gpt_neox gpt_oss gptj granite_speech hubert idefics3 jamba lfm2 lfm3_vl llama llava longformer mamba
mamba2 mbart mixtral mllama mobilevit modernbert mpt mt5 olmo2 olmoe opt pegasus perceiver phi3
poolformer pvt_v2 qwen2_vl qwen3_moe qwen3_next recurrent_gemma reformer regnet resnet roberta rwkv
segformer siglip swiftformer swin switch_transformers t5 udop videomae vilt vit vit_mae wav2vec2
whisper xlm xlnet xlstm yolos zamba2
""".split()

#: Blocks that the stream does not go to straight from the one before.
BETWEEN = {
    "mllama": "without an image, the blocks with cross-attention are left out",
    "yolos": "position embeddings are added between the blocks",
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.logging.set_verbosity_error()


def built(model_type: str) -> tuple[nn.Module, dict[str, int]]:
    try:
        return architectures.build(model_type)
    except Exception as error:  # of any kind: the library's own, at its own default configuration
        pytest.skip(f"transformers does not build it: {type(error).__name__}: {str(error)[:120]}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [n if n in COMMON else pytest.param(n, marks=pytest.mark.slow) for n in architectures.MODEL_TYPES],
)
def test_the_axis_is_what_the_configuration_says(model_type: str) -> None:
    model, counts = built(model_type)
    trunks = find_trunks(model)
    assert {t.name: len(t.blocks) for t in trunks} == expected(model_type, model, counts)
    for trunk in trunks:
        calls = architectures.observe(model, trunk.blocks)
        if calls is None or model_type in BETWEEN:
            continue  # no input at hand that it takes: the tree and the configuration are what there is
        assert calls.in_order and len(set(calls.numbers)) == len(trunk.blocks), calls.numbers
        assert all(calls.links), trunk.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", NO_AXIS)
def test_blocks_that_are_no_modules_are_asked_for(model_type: str) -> None:
    model, _ = built(model_type)
    with pytest.raises(LayerError, match=r"parts of its blocks stand in lists beside each other.*ffns"):
        gradscope.watch(model)
    gradscope.watch(model, layers="layer_norm2.*").close()


# -- plain models --------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, width: int, into: int) -> None:
        super().__init__()
        stride = 1 if width == into else 2
        self.conv1 = nn.Conv2d(width, into, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(into), nn.BatchNorm2d(into)
        self.conv2 = nn.Conv2d(into, into, 3, 1, 1, bias=False)
        self.downsample = nn.Identity() if stride == 1 else nn.Conv2d(width, into, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class SmallResNet(nn.Module):
    """Stages ``layer1`` to ``layer3`` of 2, 3 and 4 blocks, named as torchvision names them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        for stage, (width, into, blocks) in enumerate(((4, 4, 2), (4, 8, 3), (8, 16, 4)), 1):
            rest = (ResidualBlock(into, into) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(ResidualBlock(width, into), *rest))
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("layer2")(self.get_submodule("layer1")(self.conv1(x)))
        return self.fc(self.get_submodule("layer3")(x).mean((2, 3)))


class UNet(nn.Module):
    """Down and up again, with the outputs of the way down joined on the way up."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 4), (4, 8), (8, 16))
        self.down = nn.ModuleList(self._block(a, b) for a, b in widths)
        self.up = nn.ModuleList(self._block(a, b) for a, b in ((16 + 8, 8), (8 + 4, 4)))
        self.head = nn.Conv2d(4, 1, 1)

    @staticmethod
    def _block(width: int, into: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, into, 3, padding=1), nn.BatchNorm2d(into), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = block(torch.cat([x, kept.pop()], 1))
        return self.head(x)


class Loop(nn.Module):
    """One block, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = self.blocks[0](x)
        return x


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 3)


def _mlp() -> nn.Module:
    parts = (p for _ in range(4) for p in (nn.Linear(6, 6), nn.Tanh()))
    return nn.Sequential(*parts, nn.Linear(6, 2))


TOKENS, IMAGES = (2, 5, 8), (2, 3, 8, 8)
#: Maker, shapes of the inputs, trunks with their blocks, and how often these are called.
PLAIN = {
    "Transformer": (
        lambda: nn.Transformer(8, 2, 3, 4, 16, batch_first=True),
        (TOKENS, TOKENS),
        {"encoder.layers": 3, "decoder.layers": 4},
    ),
    "TransformerEncoder": (_encoder, (TOKENS,), {"layers": 4}),
    "TransformerDecoder": (_decoder, (TOKENS, TOKENS), {"layers": 3}),
    "residual network": (SmallResNet, (IMAGES,), {"layer1": 2, "layer2": 3, "layer3": 4}),
    "U-Net": (UNet, (IMAGES,), {"down": 3, "up": 2}),
    "multilayer perceptron": (_mlp, ((2, 6),), {"Sequential": 5}),
    "loop": (Loop, (TOKENS,), {"blocks": 1}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_axis_of_plain_models(name: str) -> None:
    make, shapes, trunks = PLAIN[name]
    model = make()
    with gradscope.watch(model) as scope:
        model(*(torch.randn(shape) for shape in shapes)).square().mean().backward()
    assert scope.faults == {}
    record = scope.record
    found = {t.name: len(t.blocks) for t in find_trunks(model)}
    assert found == trunks
    for trunk, blocks in trunks.items():
        t = record.table(trunk=trunk, signal="activation", statistic="l2")
        depths = sorted({d for d, b in zip(t["depth"], t["type"], strict=True) if b != "Stream"} - {0.0})
        assert [d for d in depths if d == int(d)] == list(range(1, (5 if name == "loop" else blocks) + 1))
