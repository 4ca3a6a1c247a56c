"""Wrong arguments to the experiments: the message says what came and what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope.errors import MeasureError
from gradscope.experiment.attention import attention_entropy
from gradscope.experiment.skip_effects import skip_effects

EXPERIMENTS: list[Callable[..., Any]] = [
    gradscope.architecture,
    gradscope.counterfactual,
    gradscope.effective_depth,
    gradscope.path_spectrum,
    skip_effects,
    attention_entropy,
]
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def loss(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda call: call.__name__)
def test_what_is_no_model(experiment: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"got an object of type function\. A maker is called first"):
        experiment(model, X, loss)
    with pytest.raises(TypeError, match="got the class Linear"):
        experiment(nn.Linear, X, loss)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda call: call.__name__)
def test_what_is_no_loss(experiment: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="loss='mse' is no function"):
        experiment(model(), X, "mse")


@pytest.mark.parametrize("experiment", EXPERIMENTS[:-1], ids=lambda call: call.__name__)
def test_an_empty_batch(experiment: Callable[..., Any]) -> None:
    with pytest.raises(MeasureError, match="is empty"):
        experiment(model(), X[:0], loss)


def test_depths_take_what_belongs_to_them() -> None:
    for method in ("lens_kl", "angular"):
        with pytest.raises(ValueError, match="not from modules="):
            gradscope.effective_depth(model(), X, loss, method=method, modules="layers.*")
    for method in ("gradient", "veit"):
        with pytest.raises(ValueError, match="take no mask="):
            gradscope.effective_depth(model(), X, loss, method=method, mask="mask")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("experiment", EXPERIMENTS[:-1], ids=lambda call: call.__name__)
def test_they_bring_their_own_gradients(
    experiment: Callable[..., Any], context: Callable[[], Any]
) -> None:
    net = model()
    with context():
        found = experiment(net, X.clone(), loss)
    assert "layers" in str(found)


def test_samples_along_another_dimension_are_thought_of() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(MeasureError, match="do not lie along batch_dim=0"):
        gradscope.effective_depth(net, X, loss)
    assert gradscope.effective_depth(net, X, loss, batch_dim=1).branches == 4
