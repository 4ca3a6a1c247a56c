"""Every architecture of the transformers library, with few layers and on the meta device.

A model on the meta device has shapes but no values, so that the library's own sizes cost nothing. Only
the numbers of layers are made small, each another one, so that the length of a list of modules says which
of them it is. Nothing here asks gradscope.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

__all__ = ["MODEL_TYPES", "build", "containers", "observe"]

MODEL_TYPES = tuple(sorted(MODEL_MAPPING_NAMES))

#: What configurations call the number of blocks of a stack, and of each stage.
_COUNTS = re.compile(
    r"((decoder_|encoder_|text_encoder_|pred_|conf_)?num_(hidden_)?layers|n_layers?|layers|depth|num_blocks"
    r"|((de|en)coder|decoder_depth|speech_encoder|t2u_(en|de)coder|[lxr]|query_dec)_(layers|depth)|decoder_depth"
    r"|num_(decoder|encoder|global|spatial|temporal|sparse_encoder|sparse_decoder|pooler|auxiliary|attention)"
    r"_layers|memory_attention_num_layers|perceiver_resampler_num_layers|resampler_depth"
    r"|memory_fuser_num_layers|num_mel_attn_blocks|prompt_layers|num_layers_per_stack)"
)
_STAGES = re.compile(r"depths|blocks_per_stage|n_attn_blocks|block_sizes|stage_num_blocks|num_blocks")
_LAYERS = range(11, 30)


def _resnet() -> dict[str, Any]:
    stages = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    return {"backbone_config": stages, "use_timm_backbone": False, "backbone": None}


#: Options without which a configuration is not complete, or asks for a package that is no dependency.
_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(
        ("conditional_detr", "dab-detr", "deformable_detr", "detr", "omdet-turbo", "table-transformer"),
        _resnet,
    ),
    **dict.fromkeys(
        ("autoformer", "informer", "time_series_transformer"), lambda: {"prediction_length": 8}
    ),
}


def build(model_type: str) -> tuple[nn.Module, dict[str, int]]:
    """The model of a type, on the meta device, and the counts of its blocks by their names.

    Where a configuration with few layers is refused, the library's own is taken, and its counts.
    """
    config = CONFIG_MAPPING[model_type](**_OPTIONS.get(model_type, dict)())
    classes = MODEL_MAPPING_NAMES[model_type]
    cls = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    try:
        counts: dict[str, int] = {}
        model = _on_meta(cls, _with_few_layers(config, list(_LAYERS), "", counts))
    except Exception:
        counts = {}
        model = _on_meta(cls, config)
        _read_counts(config, "", counts)
    return model.bfloat16().eval(), counts


def _on_meta(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(type(config)):
        # Some attributes raise: they are another one for each layer.
        with contextlib.suppress(Exception):
            if field.init:
                found[field.name] = getattr(config, field.name)
    return found


def _is_count(name: str, value: Any) -> bool:
    return bool(_COUNTS.fullmatch(name)) and type(value) is int and value > 1


def _is_stages(name: str, value: Any) -> bool:
    return (
        bool(_STAGES.fullmatch(name))
        and isinstance(value, (list, tuple))
        and all(type(x) is int for x in value)
    )


def _read_counts(config: PreTrainedConfig, where: str, counts: dict[str, int]) -> None:
    for name, value in _fields(config).items():
        if isinstance(value, PreTrainedConfig):
            _read_counts(value, f"{where}{name}.", counts)
        elif _is_count(name, value):
            counts[where + name] = value
        elif _is_stages(name, value):
            counts.update({f"{where}{name}[{i}]": n for i, n in enumerate(value)})


def _with_few_layers(
    config: PreTrainedConfig, free: list[int], where: str, counts: dict[str, int]
) -> PreTrainedConfig:
    options = _fields(config)
    changed: dict[int, int] = {}
    for name, value in options.items():
        if isinstance(value, PreTrainedConfig):
            options[name] = _with_few_layers(value, free, f"{where}{name}.", counts)
        elif _is_count(name, value):
            changed[value] = options[name] = counts[where + name] = free.pop(0)
        elif _is_stages(name, value):
            few = [n if n == 1 else 9 + i % 2 for i, n in enumerate(value)]
            options[name] = type(value)(few)
            counts.update({f"{where}{name}[{i}]": n for i, n in enumerate(few)})
    for name, value in options.items():
        if isinstance(value, (list, tuple)) and len(value) in changed and not _is_stages(name, value):
            options[name] = type(value)(_shortened(list(value), changed[len(value)]))
    return type(config)(**options)


def _shortened(values: list[Any], length: int) -> list[Any]:
    """A list with an entry per layer, for fewer layers: every kind of layer stays."""
    if all(type(x) is int for x in values) and values == sorted(set(values)):
        return [x for x in values if x < length]  # indices of layers
    kept = values[:length]
    lost = [x for i, x in enumerate(values) if x not in kept and x not in values[:i]]
    return [*kept[: length - len(lost[:length])], *lost[:length]]


def containers(model: nn.Module, counts: dict[str, int]) -> dict[str, int]:
    """The lists of modules whose length is one of the counts, by name; not those inside of a block."""
    lengths = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) in {*counts.values()} - {1}
    }
    return {name: n for name, n in lengths.items() if not any(name.startswith(f"{o}.") for o in lengths)}


# -- one forward pass under plain hooks ----------------------------------------------------------------


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


@dataclasses.dataclass
class Calls:
    """The calls of some modules: which of them, what went in and what came out."""

    numbers: list[int] = dataclasses.field(default_factory=list)
    links: list[bool] = dataclasses.field(default_factory=list)
    last: list[Tensor] = dataclasses.field(default_factory=list)

    def hook(self, number: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = list(_tensors((args, kwargs)))
            if self.numbers:
                self.links.append(any(a is b for a in given for b in self.last))
            self.numbers.append(number)
            self.last = list(_tensors(output))

        return note

    @property
    def in_order(self) -> bool:
        """Whether the modules ran one after the other, all of them, as they are listed."""
        steps = list(zip(self.numbers, self.numbers[1:], strict=False))
        wanted = max(self.numbers) + 1
        return (
            self.numbers[0] == 0
            and set(self.numbers) == set(range(wanted))
            and all(b in (a, a + 1, 0) for a, b in steps)
        )


@contextlib.contextmanager
def _decided() -> Iterator[None]:
    """Tensors without values answer every question with yes, and every number with 1."""

    def answer(old: Any, value: Any) -> Any:
        return lambda self, *args: value if self.is_meta else old(self, *args)

    with contextlib.ExitStack() as stack:
        for name, value in (("__bool__", True), ("item", 1), ("__int__", 1), ("__index__", 1)):
            changed = answer(getattr(Tensor, name), value)
            stack.enter_context(mock.patch.object(Tensor, name, changed))
        yield


def observe(model: nn.Module, blocks: tuple[str, ...]) -> Calls | None:
    """The calls of blocks in a forward pass of the innermost module around them that takes plain inputs.

    None where none could be run: this is no full set of inputs for every architecture.
    """
    modules = dict(model.named_modules())
    inner = blocks[0]
    path = [inner.rsplit(".", k)[0] for k in range(1, inner.count(".") + 1)] + [""]
    path = [name for name in path if not isinstance(modules[name], (nn.ModuleList, nn.Sequential))]
    models = [name for name in path if isinstance(modules[name], PreTrainedModel)]
    for name in [*models, *(n for n in path if n not in models)]:
        around = path[path.index(name) :]
        config = next(modules[n].config for n in around if hasattr(modules[n], "config"))
        for inputs in _inputs(modules[name], config):
            calls = Calls()
            handles = [
                modules[block].register_forward_hook(calls.hook(k), with_kwargs=True)
                for k, block in enumerate(blocks)
            ]
            # Everything is in bfloat16: the product of grouped experts takes no other dtype there.
            half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
            try:
                with torch.no_grad(), torch.device("meta"), _decided():
                    modules[name](**half)
            except Exception:
                continue
            finally:
                for handle in handles:
                    handle.remove()
            if calls.numbers:
                return calls
    return None


def _inputs(module: nn.Module, config: Any) -> Iterator[dict[str, Tensor]]:
    def number(*names: str, default: int) -> int:
        for name in names:
            value = getattr(config, name, None) if name in _fields(config) else None
            if type(value) is int:
                return value
        return default

    size = getattr(config, "image_size", 64)
    height, wide = (size, size) if isinstance(size, int) else (64, 64)
    if isinstance(size, (list, tuple)):
        height, wide = size[:2]
    channels = number("num_channels", "in_channels", "in_chans", default=3)
    mel = number("num_mel_bins", "feature_size", "input_dim", "n_mels", default=80)
    width = number("hidden_size", "d_model", "embed_dim", default=64)
    frames = number("num_frames", default=4)
    long = 2 * number("max_source_positions", default=1500)
    ids = torch.zeros(2, 16, dtype=torch.long)
    known: dict[str, list[Tensor]] = {
        "input_ids": [ids],
        "decoder_input_ids": [ids],
        "pixel_values": [
            torch.zeros(2, channels, height, wide),
            torch.zeros(2, frames, channels, height, wide),
            torch.zeros(2, 3, 224, 224),
        ],
        "input_values": [
            torch.zeros(2, 16000),
            torch.zeros(2, 1, 16000),
            torch.zeros(2, 1024, mel),
            torch.zeros(2, 24, mel),
        ],
        "input_features": [
            torch.zeros(2, mel, long),
            torch.zeros(2, 64, mel),
            torch.zeros(2, mel, 64),
        ],
        "inputs_embeds": [torch.zeros(2, 16, width)],
        "hidden_states": [torch.zeros(2, 16, width), torch.zeros(2, channels, height, wide)],
        "encoder_hidden_states": [torch.zeros(2, 16, width)],
        "past_values": [torch.zeros(2, 64, number("num_input_channels", default=1))],
        "audio_values": [torch.zeros(2, 1, 16000)],
        "bbox": [torch.zeros(2, 16, 4, dtype=torch.long)],
    }
    taken = inspect.signature(module.forward).parameters
    required = [n for n, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    also = [n for n in ("bbox", "decoder_input_ids") if n in taken]
    mains = [n for n in known if n in taken and n not in also and n != "encoder_hidden_states"]
    pairs = [("input_ids", "pixel_values")] if {"input_ids", "pixel_values"} <= set(taken) else []
    for names in [*pairs, *((n,) for n in mains)]:
        wanted = list(dict.fromkeys([*names, *required, *also]))
        if all(n in known for n in wanted):
            for option in range(max(len(known[n]) for n in wanted)):
                yield {n: known[n][min(option, len(known[n]) - 1)].to("meta") for n in wanted}
