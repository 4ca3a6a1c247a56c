"""LoRA through peft, and mixtures of experts as transformers builds them.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before each step.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from models import BLOCKS, VOCABULARY, gpt2, labelled, llama
from small_models import assert_equal, assert_true, sgd, status, truth, value
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn

import gradscope
from gradscope.layers import named_layers


def loss_of(model: nn.Module, _: Any) -> Tensor:
    return labelled(model)


def adapted(base: Any, targets: list[str]) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's layers are Conv1D, which peft says it has noticed
        return peft.get_peft_model(base(0.0), config).double()


def clean(name: str) -> str:
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize(("base", "targets"), [(gpt2, ["c_attn"]), (llama, ["q_proj", "v_proj"])])
def test_lora_by_peft(base: Any, targets: list[str]) -> None:
    model = adapted(base, targets)
    optimizer = sgd(model)
    trained = [clean(n) for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * BLOCKS * len(targets) and all("lora_" in n for n in trained)
    expected = []
    with gradscope.watch(model) as scope:  # a warning would be an error
        for _ in range(3):
            expected.append(truth(model, None, loss=loss_of))
            labelled(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert [s.finding for s in record.steps] == [None] * 3
    names = set(record.table()["layer"].tolist())
    assert not any("base_model" in n for n in names)
    for i, t in enumerate(expected):
        compared = 0
        for name, g in t.param_grad.items():
            assert g is not None
            assert_equal(value(record, clean(name), "param_grad", step=i), g)
            compared += 1
        assert compared == len(trained)
        for layer, calls in t.output_grad.items():
            if clean(layer) in names and calls[0] is not None:
                assert_equal(value(record, clean(layer), "output_grad", step=i), calls[0])
                compared += 1
        assert compared > len(trained) + BLOCKS
    # B starts at zero: so does A's gradient, exactly, in the first step and in no other.
    a = next(n for n in trained if "lora_A" in n)
    assert value(record, a, "param_grad", step=0) == 0.0
    assert value(record, a, "param_grad", step=1) > 0.0
    frozen = next(clean(n) for n, p in model.named_parameters() if not p.requires_grad)
    assert status(record, frozen, "param_grad", step=0) == "frozen"


def test_adapters_that_are_injected_during_the_watch() -> None:
    torch.manual_seed(3)
    model = llama(0.0).double()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with gradscope.watch(model) as scope:
        for i in range(4):
            if i == 2:
                peft.inject_adapter_in_model(config, model)
                model.double()
            expected = truth(model, None, loss=loss_of)
            optimizer = sgd(model)
            labelled(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert value(record, "model.layers.0.self_attn.q_proj.weight", "param_grad", step=1) > 0
    assert sum("lora_" in n for n in expected.param_grad) == 2 * BLOCKS
    for name, g in expected.param_grad.items():
        assert g is not None
        assert_equal(value(record, name, "param_grad", step=3), g)
    assert status(record, "model.layers.0.mlp.up_proj.weight", "param_grad", step=3) == "frozen"


# -- mixtures of experts -------------------------------------------------------------------------


def mixture(kind: str) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(4)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**common, num_local_experts=8)
        return transformers.MixtralForCausalLM(config)
    config = transformers.Qwen2MoeConfig(
        **common, num_experts=8, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    return transformers.Qwen2MoeForCausalLM(config)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_stacked_experts_of_real_mixtures(kind: str, experts: str) -> None:
    model = mixture(kind)
    model.config._experts_implementation = experts  # type: ignore[union-attr, assignment]
    plain = experts == "eager"
    if plain:
        model.double()  # the grouped kernel has no float64
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for _ in range(2):
            twin = copy.deepcopy(model).double()
            twin.config._experts_implementation = "eager"  # type: ignore[union-attr, assignment]
            expected.append(truth(twin, None, loss=loss_of))
            labelled(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    stacked = [n for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    assert len(stacked) == 2 * BLOCKS  # all experts of a layer are one parameter
    for i, t in enumerate(expected):
        # One call for all experts there, one for each expert in the twin.
        skip = [] if plain else [n for n, _ in model.named_modules() if n.endswith("experts.act_fn")]
        relative = 1e-9 if plain else 1e-3
        assert assert_true(scope.record, t, step=i, relative=relative, skip=skip) > 80
    assert all(value(scope.record, n, "param_grad") > 0 for n in stacked)
    assert [s.finding for s in scope.record.steps] == [None] * 2


def test_an_expert_that_no_token_goes_to_is_not_called() -> None:
    class Experts(nn.Module):
        """The layout with one module per expert."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.choice = 0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.experts[self.choice](x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Experts() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Net().double()
    optimizer = sgd(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            for block in model.blocks:
                block.choice = i % 2
            expected.append(truth(copy.deepcopy(model), x))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 2 * (1 + 2 + 2) + 4
        for never in (2, 1 - i % 2):
            name = f"blocks.0.experts.{never}"
            assert status(scope.record, name, "activation", step=i) == "not called"
            assert status(scope.record, f"{name}.weight", "param_grad", step=i) == "no gradient path"


def test_names_of_an_adapted_model_are_those_of_the_model() -> None:
    model = adapted(llama, ["q_proj"])
    names = set(named_layers(model))
    assert {"model.layers.0.self_attn.q_proj.lora_A.default", "lm_head"} <= names
