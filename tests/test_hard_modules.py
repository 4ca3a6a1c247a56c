"""Kinds of modules, parameters and numbers that hooks meet, each against plain autograd.

The oracle is torch.autograd.grad on an unwatched copy, in float64 but where the case is the dtype itself.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from small_models import (
    Block,
    Stack,
    assert_equal,
    assert_true,
    batch,
    sgd,
    square_loss,
    stack,
    status,
    truth,
    value,
)
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn

import gradscope
from gradscope.record import Record


def watched(model: nn.Module, loss: Any = square_loss, x: Any = None, **options: Any) -> Record:
    optimizer = sgd(model)
    with gradscope.watch(model, layers=options.pop("layers", "**"), **options) as scope:
        loss(model, batch() if x is None else x).backward()
        optimizer.step()
    assert len(scope.record.steps) == 1
    return scope.record


# -- parameters ----------------------------------------------------------------------------------


class Words(Stack):
    """Tokens in, through an embedding with sparse gradients or dense ones."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, sparse=sparse)


def test_sparse_gradients_have_the_norm_of_the_summed_rows() -> None:
    torch.manual_seed(0)
    dense, sparse = Words(False).double(), Words(True).double()
    sparse.load_state_dict(dense.state_dict())
    tokens = torch.tensor([[1, 1, 1, 4], [4, 9, 1, 0]])  # rows that come several times
    expected = truth(dense, tokens)
    record = watched(sparse, x=tokens)
    assert assert_true(record, expected) == 51
    rows = sparse.embed.weight.grad
    assert rows is not None and rows.is_sparse  # the user's gradient is as it was


def test_sparse_gradients_of_micro_batches_add_up() -> None:
    torch.manual_seed(0)
    dense, sparse = Words(False).double(), Words(True).double()
    sparse.load_state_dict(dense.state_dict())
    micro = [torch.tensor([[1, 1, 4]]), torch.tensor([[4, 2, 1]])]
    expected = truth(dense, *micro)
    optimizer = sgd(sparse)
    with gradscope.watch(sparse, layers="**") as scope:
        for x in micro:
            square_loss(sparse, x).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 51


def test_complex_parameters_have_the_norm_of_their_parts() -> None:
    class Spectral(nn.Module):
        """y = x + Re F^-1(w F x), the layer of a Fourier neural operator."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.fft.ifft(self.weight * torch.fft.fft(x)).real

    torch.manual_seed(0)
    model = Stack(Spectral(), Spectral())
    for p in [*model.embed.parameters(), *model.head.parameters()]:
        p.data = p.data.double()
    loss = square_loss(model, batch())
    parameters = dict(model.named_parameters())
    outputs: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda m, a, out, n=n: outputs.__setitem__(n, out))
        for n, m in model.named_modules()
    ]
    loss = square_loss(model, batch())
    for handle in handles:
        handle.remove()
    wanted = {**parameters, **outputs}
    found = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    record = watched(model)
    for name in parameters:
        g = torch.view_as_real(found[name]) if found[name].is_complex() else found[name]
        assert_equal(value(record, name, "param_grad"), g.square().sum().sqrt().item())
        assert value(record, name, "param_grad", "nonfinite") == 0
    for name in outputs:
        assert_equal(value(record, name, "output_grad"), found[name].norm().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_that_underflow_when_squared(dtype: torch.dtype) -> None:
    """Every gradient is near 1e-5: its square is no number of float16."""
    model = stack(dtype=torch.float32)
    x = batch(dtype=torch.float32)

    def tiny(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).float().sum() * 1e-5

    model, x = model.to(dtype), x.to(dtype)
    # The oracle: the same numbers of the same dtype, squared and summed in float64.
    twin = copy.deepcopy(model)
    outputs: dict[str, Tensor] = {}
    for name, module in twin.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    loss = tiny(twin, x)
    wanted = {**outputs, **dict(twin.named_parameters())}
    gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    record = watched(model, tiny, x)
    smallest = min(g.double().abs()[g != 0].min().item() for g in gradients.values())
    assert smallest**2 < torch.finfo(dtype).smallest_normal or dtype is torch.bfloat16
    compared = 0
    for name, g in gradients.items():
        signal = "output_grad" if name in outputs else "param_grad"
        assert_equal(value(record, name, signal), g.double().norm().item(), 1e-6)
        compared += 1
        if name in outputs:
            activation = outputs[name].detach().double().norm().item()
            assert_equal(value(record, name, "activation"), activation, 1e-6)
    assert compared == 18 + 16


def test_two_dtypes_in_one_model() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block().double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.double()).float()

    torch.manual_seed(0)
    model = Stack(Wide(), Block())
    plain = copy.deepcopy(model)
    plain.blocks[0] = plain.blocks[0].inner  # type: ignore[assignment]
    expected = truth(plain, batch(dtype=torch.float32).double())
    record = watched(model, x=batch(dtype=torch.float32))
    for name, g in expected.param_grad.items():
        assert g is not None
        found = name.replace("blocks.0.", "blocks.0.inner.")
        assert_equal(value(record, found, "param_grad"), g, 1e-5)
    for layer in ("embed", "blocks.1", "head"):
        g = expected.output_grad[layer][0]
        assert g is not None
        assert_equal(value(record, layer, "output_grad"), g, 1e-5)


# -- torch's own layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_whose_output_is_a_tuple(kind: type[nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(6, 6, batch_first=True)
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.cell(x)[0])

    model = stack(Recurrent(), Recurrent())
    expected = truth(model, batch())
    # The cell's own output is the first of its tuple: what the norm read.
    twin = copy.deepcopy(model)
    outputs: list[Tensor] = []
    twin.blocks[0].cell.register_forward_hook(lambda m, a, out: outputs.append(out[0]))  # type: ignore[union-attr]
    loss = square_loss(twin, batch())
    (g,) = torch.autograd.grad(loss, outputs)
    record = watched(model)
    assert assert_true(record, expected) == 2 * 7 + 4 + 2 * 6
    assert_equal(value(record, "blocks.0.cell", "output_grad"), g.norm().item())
    assert_equal(value(record, "blocks.0.cell", "activation"), outputs[0].detach().norm().item())


def test_packed_sequences() -> None:
    class Packed(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(3, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 3, 2, 1]), batch_first=True)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)
            return super().forward(out)

    torch.manual_seed(0)
    model = Packed().double()
    expected = truth(model, batch())
    assert assert_true(watched(model), expected) == 52 + 4


def test_a_convolutional_net_with_batch_norm_and_an_in_place_relu() -> None:
    class Residual(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace)

        def forward(self, x: Tensor) -> Tensor:
            out = self.norm(self.conv(x))
            if self.relu.inplace:
                out += x
            else:
                out = out + x
            return self.relu(out)

    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        blocks = [Residual(inplace) for _ in range(3)]
        return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten(), nn.Linear(4 * 36, 2)).double()

    x = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = truth(net(False), x)
    model = net(True)
    record = watched(model, x=x)
    compared = 0
    for name in ("1.conv", "1.norm", "2.conv", "3.norm", "0", "5"):
        for signal in ("activation", "output_grad"):
            (norm,) = getattr(expected, signal)[name]
            assert norm is not None
            assert_equal(value(record, name, signal), norm)
            compared += 1
    for name, g in expected.param_grad.items():
        assert g is not None
        if not name.endswith("conv.bias"):  # zero but for rounding before a batch norm
            assert_equal(value(record, name, "param_grad"), g, 1e-8)
    plain = net(False)
    square_loss(plain, x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_the_fast_path_of_the_encoder_in_eval_mode() -> None:
    """Any hook makes torch leave its fused path in eval mode: numbers stay, and steps stay exact."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    optimizer = sgd(model)
    model.eval()
    with torch.inference_mode():
        fused = model(x)
    model.train()
    with gradscope.watch(model, layers="**") as scope:
        model.eval()
        with torch.inference_mode():
            assert torch.allclose(model(x), fused, rtol=1e-12, atol=1e-12)
        model.train()
        assert not scope.record.steps
        expected = truth(model, x, layers=["layers.0", "layers.1", "layers.2", "layers.1.linear2"])
        square_loss(model, x).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 8 + 36


def test_data_parallel_without_a_gpu_is_the_module_itself() -> None:
    model = stack()
    expected = truth(model, batch())
    record = watched(nn.DataParallel(model))
    assert assert_true(record, expected) == 52
    assert not any("module." in n for n in record.table()["layer"])


# -- shapes and places -----------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_absent_and_real_afterwards() -> None:
    with torch.device("meta"):
        model = Stack()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradscope.GradscopeWarning)
        with gradscope.watch(model, layers="**") as scope:
            model(torch.zeros(5, 4, 3, device="meta")).square().mean().backward()
            optimizer.zero_grad()
            model.to_empty(device="cpu")
            torch.manual_seed(0)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
            expected = truth(model, batch(dtype=torch.float32).double())
            optimizer = sgd(model)
            square_loss(model, batch(dtype=torch.float32)).backward()
            optimizer.step()
    assert assert_true(scope.record, expected, relative=1e-5) == 52


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4, 3), (5, 1, 3), (3,), (2, 2, 2, 3)])
def test_batches_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model = stack()
    expected = truth(model, x)
    assert assert_true(watched(model, x=x), expected) == 52


def test_one_empty_micro_batch_takes_no_part() -> None:
    model = stack()
    optimizer = sgd(model)
    expected = truth(model, batch(0))
    with gradscope.watch(model, layers="**") as scope:
        model(batch()[:0]).square().sum().backward()
        square_loss(model, batch(0)).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52
    assert value(scope.record, "head", "activation", "count") == 5 * 4 * 2


class Experts(nn.Module):
    """Each token to one of two experts, both of which are called, be it with no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        first = flat[:, 0] > self.limit
        out = torch.zeros_like(flat)
        for where, expert in zip((first, ~first), self.experts, strict=True):
            at = where.nonzero()[:, 0]
            out = out.index_add(0, at, expert(flat[at]))
        return x + out.unflatten(0, x.shape[:2])

    limit = 0.0


def test_an_expert_without_tokens_in_some_micro_batches() -> None:
    model = stack(Experts(), Experts())
    optimizer = sgd(model)

    def loss(m: Any, pair: Any) -> Tensor:
        Experts.limit, x = pair
        return m(x).square().mean()

    pairs = [(0.0, batch(0)), (math.inf, batch(1)), (0.0, batch(2))]
    expected = truth(model, pairs[0], pairs[2], loss=loss, layers=["blocks.0.experts.0"])
    everywhere = truth(model, *pairs, loss=loss, layers=["blocks.0.experts.1", "blocks.1"])
    with gradscope.watch(model, layers="**") as scope:
        for pair in pairs:
            loss(model, pair).backward()
        optimizer.step()
    for signal in ("activation", "output_grad"):
        for t in (expected, everywhere):
            for layer, (norm,) in getattr(t, signal).items():
                assert_equal(value(scope.record, layer, signal), norm)
    mean = value(scope.record, "blocks.0.experts.0", "activation", "tokens")
    assert mean + value(scope.record, "blocks.0.experts.1", "activation", "tokens") == 3 * 5 * 4


def test_outputs_that_are_expanded_or_transposed_views() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.scale(x).expand(-1, -1, 6)
            return (x + torch.tanh(self.linear(x)) * gate).transpose(0, 1).transpose(0, 1)

    model = stack(Views(), Views())
    expected = truth(model, batch())
    assert assert_true(watched(model), expected) == 2 * 9 + 4 + 2 * 4


# -- what is done with a model ---------------------------------------------------------------------


def test_functional_call_with_other_weights_records_their_values() -> None:
    model, other = stack(), stack(seed=3)
    expected = truth(other, batch())
    weights = {n: p.detach().clone().requires_grad_(True) for n, p in other.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradscope.GradscopeWarning)
        with gradscope.watch(model, layers="**") as scope:
            out = torch.func.functional_call(model, weights, (batch(),))
            out.square().mean().backward()
    for signal in ("activation", "output_grad"):
        for layer, (norm,) in getattr(expected, signal).items():
            assert norm is not None
            assert_equal(value(scope.record, layer, signal), norm)
    # No gradient came to the model's own parameters, and none is claimed.
    for name in expected.param_grad:
        assert status(scope.record, name, "param_grad") == (
            "not supported: no backward pass wrote to .grad"
        )
        assert weights[name].grad is not None


def test_a_copy_for_averaging_is_unwatched_and_the_model_goes_on() -> None:
    model = stack()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        late = torch.optim.swa_utils.AveragedModel(model)
        for i in range(3):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            late.update_parameters(model)
            square_loss(late, 100 * batch(i)).backward()
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 3


def test_autograds_own_tools_around_a_watched_model() -> None:
    def packed(x: Tensor) -> Tensor:
        return x.clone()

    model = stack()
    expected = truth(model, batch())
    optimizer = sgd(model)
    for tool in (
        torch.autograd.set_detect_anomaly(True),
        torch.autograd.graph.saved_tensors_hooks(packed, packed),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        model.zero_grad()
        with tool, gradscope.watch(model, layers="**") as scope:
            square_loss(model, batch()).backward()
        assert assert_true(scope.record, expected) == 52
    optimizer.zero_grad()


def test_gradients_by_inputs_of_some_parameters_only() -> None:
    model = stack()
    expected = truth(model, batch())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward(inputs=list(model.blocks.parameters()))
        optimizer.step()
    for name, g in expected.param_grad.items():
        assert g is not None
        if name.startswith("blocks"):
            assert_equal(value(scope.record, name, "param_grad"), g)
        else:
            assert status(scope.record, name, "param_grad") == "no gradient path"
    for layer in ("blocks.1", "blocks.2", "head"):
        g = expected.output_grad[layer][0]
        assert g is not None
        assert_equal(value(scope.record, layer, "output_grad"), g)


def test_a_custom_function_that_returns_no_gradient() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            return None

    class Stopped(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + Stop.apply(self.mlp(x))

    model = stack(Stopped(), Stopped())
    expected = truth(model, batch())
    record = watched(model)
    assert expected.param_grad["blocks.0.mlp.0.weight"] is None
    assert status(record, "blocks.0.mlp", "output_grad") != "ok"
    assert assert_true(record, expected) > 10


def test_a_module_whose_forward_is_called_past_its_hooks() -> None:
    class Direct(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block.forward(h)
            return self.head(h)

    torch.manual_seed(0)
    model = Direct().double()
    expected = truth(model, batch())
    record = watched(model)
    assert status(record, "blocks.1", "activation") == "not called"
    assert_true(record, expected)
    assert not math.isnan(value(record, "blocks.1.mlp.0", "output_grad"))
