"""What training loops do: where a step ends, and which gradient is the step's.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before the step.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import (
    Block,
    Stack,
    assert_equal,
    assert_true,
    batch,
    square_loss,
    stack,
    status,
    truth,
    value,
)
from torch import Tensor, nn

import gradscope
from gradscope.record import Record


@pytest.fixture(autouse=True)
def no_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gradscope hides its own errors from the training; here they are heard."""
    from gradscope.collect.recorder import Recorder

    heard: list[BaseException] = []
    original = Recorder._fault

    def fault(self: Recorder, site: int, error: Exception, *others: Any) -> None:
        heard.append(error)
        original(self, site, error, *others)

    monkeypatch.setattr(Recorder, "_fault", fault)
    yield
    assert not heard, heard


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate)


# -- accumulation, zero_grad, clipping -----------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_equal_the_oracle_one_by_one(set_to_none: bool) -> None:
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert [s.step for s in scope.record.steps] == [0, 1, 2, 3]
    # 1 + 1 + 3 x (1 + 1 + 3) + 1 modules twice, 2 + 3 x 4 + 2 parameters.
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 4


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_are_pooled_as_one_batch(set_to_none: bool) -> None:
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            micro = [batch(10 * i + j, size=2 + j) for j in range(3)]
            expected.append(truth(model, *micro))
            for x in micro:
                square_loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52
    everything = torch.cat([batch(20 + j, size=2 + j) for j in range(3)])
    elements = everything.shape[0] * everything.shape[1] * 6
    assert value(scope.record, "blocks.1", "activation", "count") == elements
    assert value(scope.record, "blocks.1", "output_grad", "tokens") == elements / 6


def test_pooled_statistics_are_those_of_the_concatenated_batch() -> None:
    # A summed loss has the same gradient per sample whether the batch is split or not.
    def total(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    def run(*batches: Tensor) -> Record:
        model = stack()
        optimizer = sgd(model, 0.0)
        with gradscope.watch(model, layers="**") as scope:
            for x in batches:
                total(model, x).backward()
            optimizer.step()
        return scope.record

    parts = [batch(0, size=3), batch(1, size=5), batch(2, size=1)]
    split, whole = run(*parts), run(torch.cat(parts))
    a, b = split.table(), whole.table()
    assert a["layer"].tolist() == b["layer"].tolist()
    compared = 0
    for i, (x, y) in enumerate(zip(a["value"], b["value"], strict=True)):
        assert a["status"][i] == b["status"][i]
        if a["status"][i] == "ok":
            assert_equal(x, y, 1e-8)
            compared += 1
    assert compared > 300


def test_clipping_shows_only_in_the_value_at_the_step() -> None:
    model = stack()
    optimizer = sgd(model)
    expected = truth(model, batch())
    with gradscope.watch(model) as scope:
        square_loss(model, batch()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
        optimizer.step()
    assert_true(scope.record, expected)
    whole = math.sqrt(sum(g * g for g in expected.param_grad.values() if g is not None))
    assert_equal(norm, whole)
    for name, g in expected.param_grad.items():
        assert g is not None
        found = value(scope.record, name, "param_grad", "l2_at_step")
        assert_equal(found, g * 1e-3 / (norm + 1e-6))


def test_weight_and_update_are_those_of_the_step() -> None:
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    expected = truth(model, batch())
    before = {n: p.detach().norm().item() for n, p in model.named_parameters()}
    with gradscope.watch(model) as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, g in expected.param_grad.items():
        assert g is not None
        assert_equal(value(scope.record, name, "weight"), before[name])
        assert_equal(value(scope.record, name, "update"), 0.25 * g)


# -- several optimizers, several models ----------------------------------------------------------


def test_several_optimizers_without_a_forward_between_them_are_one_step() -> None:
    model = stack()
    first = torch.optim.SGD(model.blocks.parameters(), lr=0.5)
    second = torch.optim.SGD([*model.embed.parameters(), *model.head.parameters()], lr=0.125)
    expected = []
    with gradscope.watch(model, layers="**", slow_every=1) as scope:
        for i in range(3):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            first.step()
            second.step()
            first.zero_grad()
            second.zero_grad()
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52
        for name, g in t.param_grad.items():
            assert g is not None
            rate = 0.5 if name.startswith("blocks") else 0.125
            assert_equal(value(scope.record, name, "update", step=i), rate * g)


def test_an_optimizer_of_another_model_ends_no_step() -> None:
    model, other = stack(), stack(seed=1)
    optimizer, stranger = sgd(model), sgd(other)
    micro = [batch(0), batch(1)]
    expected = truth(model, *micro)
    with gradscope.watch(model, layers="**") as scope:
        for x in micro:
            square_loss(model, x).backward()
            square_loss(other, x).backward()
            stranger.step()
            stranger.zero_grad()
        optimizer.step()
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected) == 52


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


@pytest.mark.parametrize("together", [True, False], ids=["one backward", "two backwards"])
def test_two_models_in_alternation(together: bool) -> None:
    torch.manual_seed(0)
    generator, discriminator = stack(), Discriminator().double()
    of_generator, of_discriminator = sgd(generator), sgd(discriminator)

    def judge(d: nn.Module, samples: Any) -> Tensor:
        real, fake = samples
        return d(real).square().mean() - d(fake).mean()

    def fool(g: nn.Module, z: Tensor) -> Tensor:
        return copy.deepcopy(discriminator)(g(z)).square().mean()

    expected_d, expected_g = [], []
    with (
        gradscope.watch(generator, layers="**") as scope_g,
        gradscope.watch(discriminator, layers="**") as scope_d,
    ):
        for i in range(3):
            real, z = torch.randn(5, 4, 2, dtype=torch.float64), batch(i)
            fake = generator(z).detach()
            if together:
                # Both forwards of one loss are one step: a call of the model per sample.
                expected_d.append(truth(discriminator, (real, fake), loss=judge).param_grad)
                judge(discriminator, (real, fake)).backward()
            else:
                losses = [
                    (lambda d, x: d(x).square().mean(), real),
                    (lambda d, x: -d(x).mean(), fake),
                ]
                expected_d.append(_pooled(discriminator, losses))
                for loss, x in losses:
                    loss(discriminator, x).backward()
            of_discriminator.step()
            of_discriminator.zero_grad()
            with torch.no_grad():
                expected_g.append(None)
            expected_g[-1] = truth(generator, batch(i + 50), loss=fool)
            discriminator(generator(batch(i + 50))).square().mean().backward()
            of_generator.step()
            of_generator.zero_grad()
            of_discriminator.zero_grad()  # throws away what the generator's loss left behind
    assert len(scope_g.record.steps) == 3
    assert len(scope_d.record.steps) == 3
    for i in range(3):
        assert assert_true(scope_g.record, expected_g[i], step=i) == 52
        if together:
            for name, g in expected_d[i].items():
                assert_equal(value(scope_d.record, name, "param_grad", step=i), g)
        else:
            assert assert_true(scope_d.record, expected_d[i], step=i) == 38


def _pooled(model: nn.Module, losses: list[tuple[Callable[[nn.Module, Any], Tensor], Any]]) -> Any:
    def loss(twin: nn.Module, pair: Any) -> Tensor:
        return pair[0](twin, pair[1])

    return truth(model, *losses, loss=loss)


# -- gradient scaling and half precision ---------------------------------------------------------


def test_the_scale_is_divided_out_and_an_overflow_is_a_skipped_step() -> None:
    model = stack(dtype=torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            x = batch(i, dtype=torch.float32)
            expected.append(truth(model, batch(i, dtype=torch.float32).double()))
            loss = square_loss(model, x)
            if i == 2:
                loss = loss * torch.tensor(1e38) * 1e3  # overflows the gradients
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    record = scope.record
    assert [s.step for s in record.steps] == [0, 1, 2, 3]
    assert [s.loss_scale for s in record.steps] == [1024.0, 1024.0, 1024.0, 512.0]
    for i in (0, 1, 3):
        assert assert_true(record, expected[i], step=i, relative=1e-4) == 52
    assert status(record, "blocks.1", "output_grad", step=2) == "skipped step"
    assert status(record, "head.weight", "param_grad", step=2) == "skipped step"
    assert record.steps[2].finding is None
    forward = expected[2].activation["blocks.1"][0]
    assert_equal(value(record, "blocks.1", "activation", step=2), forward, 1e-5)


def test_second_moments_of_scaled_gradients_are_divided_twice() -> None:
    def run(scale: float) -> Record:
        model = stack()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        with gradscope.watch(model) as scope:
            scaler.scale(square_loss(model, batch())).backward()
            scaler.step(optimizer)
            scaler.update()
        return scope.record

    a, b = run(1.0).table(signal="output_grad"), run(4096.0).table(signal="output_grad")
    for name, x, y in zip(a["statistic"], a["value"], b["value"], strict=True):
        assert x == y or math.isclose(x, y, rel_tol=1e-12) or (math.isnan(x) and math.isnan(y)), name


def test_scaler_with_unscale_and_clip() -> None:
    model = stack()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    expected = truth(model, batch())
    with gradscope.watch(model, layers="**") as scope:
        scaler.scale(square_loss(model, batch())).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
        scaler.step(optimizer)
        scaler.update()
    assert assert_true(scope.record, expected) == 52
    g = expected.param_grad["head.weight"]
    assert g is not None
    assert_equal(
        value(scope.record, "head.weight", "param_grad", "l2_at_step"), g * 1e-3 / (norm + 1e-6), 1e-6
    )


@pytest.mark.parametrize("overflow", [False, True])
def test_fused_optimizers_that_unscale_by_themselves(overflow: bool) -> None:
    model = stack(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = truth(model, batch(dtype=torch.float32).double())
    before = copy.deepcopy(model.state_dict())
    with gradscope.watch(model, layers="**") as scope:
        loss = square_loss(model, batch(dtype=torch.float32))
        scaler.scale(loss * 1e38 * 1e3 if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    record = scope.record
    assert len(record.steps) == 1
    if overflow:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert status(record, "blocks.1", "output_grad") == "skipped step"
        assert status(record, "head.weight", "param_grad", "l2_at_step") == "skipped step"
        assert status(record, "head.weight", "update") == "skipped step"
        return
    assert assert_true(record, expected, relative=1e-4) == 52
    g = expected.param_grad["head.weight"]
    assert g is not None
    assert_equal(value(record, "head.weight", "param_grad", "l2_at_step"), g, 1e-4)


def test_an_overflow_is_a_skipped_step_when_the_user_ends_steps() -> None:
    model = stack(dtype=torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradscope.watch(model) as scope:
        for i in range(3):
            loss = square_loss(model, batch(i, dtype=torch.float32))
            scaler.scale(loss * 1e38 * 1e3 if i == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scope.step()
    assert [status(scope.record, "blocks.1", "output_grad", step=i) for i in range(3)] == [
        "ok",
        "skipped step",
        "ok",
    ]


def test_a_scaler_of_another_model_changes_nothing() -> None:
    model, other = stack(), stack(seed=1)
    optimizer, of_other = sgd(model), sgd(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            expected.append(truth(model, batch(i)))
            loss = square_loss(model, batch(i))
            scaler.scale(square_loss(other, batch(i))).backward()
            scaler.step(of_other)
            scaler.update()
            of_other.zero_grad()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52
        assert scope.record.steps[i].loss_scale is None


def test_autocast_to_bfloat16() -> None:
    model = stack(dtype=torch.float32)
    x = batch(dtype=torch.float32)
    optimizer = sgd(model)

    def cast(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().mean()

    # The oracle: the same casts, differentiated by hooks of its own on an unwatched copy.
    twin = copy.deepcopy(model)
    outputs: dict[str, Tensor] = {}
    for name, module in twin.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    loss = cast(twin, x)
    names = list(outputs)
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    with gradscope.watch(model, layers="**") as scope:
        cast(model, x).backward()
        optimizer.step()
    for name, g in zip(names, gradients, strict=True):
        assert_equal(value(scope.record, name, "output_grad"), g.double().norm().item(), 1e-5)
        assert_equal(
            value(scope.record, name, "activation"), outputs[name].detach().double().norm().item(), 1e-5
        )


# -- evaluation between steps --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "grad", "grad, kept alive"])
def test_evaluation_between_steps_is_of_no_step(how: str) -> None:
    model = stack()
    optimizer = sgd(model)
    expected = []
    kept = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            for j in range(3):
                if how == "no_grad":
                    with torch.no_grad():
                        model(100 * batch(j + 7))
                elif how == "inference_mode":
                    with torch.inference_mode():
                        model(100 * batch(j + 7))
                else:
                    out = model(100 * batch(j + 7))
                    if "kept" in how:
                        kept.append(out)
            model.train()
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52


def test_a_long_evaluation_with_grad_holds_no_memory() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model) as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
        for i in range(200):
            model(batch(i))
        assert len(scope._recorder.passes) < 10
        optimizer.zero_grad()
        expected = truth(model, batch(3))
        square_loss(model, batch(3)).backward()
        optimizer.step()
    assert [s.step for s in scope.record.steps] == [0, 1]
    assert_true(scope.record, expected)


def test_forwards_before_backwards_of_a_pipeline_are_all_pooled() -> None:
    model = stack()
    optimizer = sgd(model)
    micro = [batch(i) for i in range(4)]
    expected = truth(model, *micro)
    with gradscope.watch(model, layers="**") as scope:
        losses = [square_loss(model, x) for x in micro]
        for loss in losses:
            loss.backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52


def test_a_gradient_of_something_else_is_of_no_step() -> None:
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            x = batch(i + 7).requires_grad_(True)
            torch.autograd.grad(model(x).sum() * 100, x)  # a saliency map, say
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.autograd.grad(model(x).sum() * 100, x)
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52


def test_training_by_torch_autograd_grad_is_recorded() -> None:
    model = stack()
    expected = truth(model, batch())
    with gradscope.watch(model) as scope:
        gradients = torch.autograd.grad(square_loss(model, batch()), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.1 * g
        scope.step()
    assert_equal(value(scope.record, "blocks.1", "output_grad"), expected.output_grad["blocks.1"][0] or 0)


# -- checkpointing -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Checkpoints a module, or what it is made of."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


class CheckpointedStack(Stack):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


class TwicePerBlock(nn.Module):
    """A block that calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpointed_blocks_are_counted_once(reentrant: bool, micro_batches: int) -> None:
    torch.manual_seed(0)
    model = CheckpointedStack().double()
    model.reentrant = reentrant
    plain = Stack().double()
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        for i in range(2):
            micro = [batch(10 * i + j) for j in range(micro_batches)]
            plain.load_state_dict(model.state_dict())
            expected = truth(plain, *micro)
            for x in micro:
                square_loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert assert_true(scope.record, expected, step=i) == 52
    assert len(scope.record.steps) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_blocks(reentrant: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Checkpointed(Block().mlp, reentrant)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    model = stack(Part(), Part())
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.mlp = block.mlp.inner  # type: ignore[union-attr]
    expected = truth(plain, batch())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    for signal in ("activation", "output_grad"):
        for layer, (norm,) in getattr(expected, signal).items():
            inner = layer.replace("mlp", "mlp.inner")
            assert_equal(value(scope.record, inner, signal), norm)
    for name, g in expected.param_grad.items():
        assert g is not None
        assert_equal(value(scope.record, name.replace("mlp", "mlp.inner"), "param_grad"), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_called_twice_in_a_checkpointed_block(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = CheckpointedStack(TwicePerBlock(), TwicePerBlock()).double()
    model.reentrant = reentrant
    plain = Stack(TwicePerBlock(), TwicePerBlock()).double()
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(model)
    expected = truth(plain, batch())
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    assert len(expected.output_grad["blocks.0.linear"]) == 2
    # Right, or absent with a reason: never the values of the other call.
    for layer, calls in expected.output_grad.items():
        for call, norm in enumerate(calls):
            if status(scope.record, layer, "output_grad", call=call) == "ok":
                assert norm is not None
                assert_equal(value(scope.record, layer, "output_grad", call=call), norm)
            else:
                assert reentrant and "linear" in layer
    for name, g in expected.param_grad.items():
        assert g is not None
        assert_equal(value(scope.record, name, "param_grad"), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_shared_checkpointed_block(reentrant: bool) -> None:
    block = Block()
    torch.manual_seed(0)
    model = CheckpointedStack(block, block, block).double()
    model.reentrant = reentrant
    plain = Stack(*[block] * 3).double()
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(model)
    expected = truth(plain, batch())
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    assert len(expected.output_grad["blocks.0"]) == 3
    assert assert_true(scope.record, expected) == 2 * (3 + 3 * 5) + 8


# -- several backward passes ---------------------------------------------------------------------


def test_two_backward_passes_through_one_forward() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        out = model(batch())
        out.square().mean().backward(retain_graph=True)
        out.sum().backward()
        gradient = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    for layer in ("embed", "blocks.0", "blocks.2.mlp", "head"):
        said = status(scope.record, layer, "output_grad")
        assert said.startswith("not supported") and "several backward passes" in said
        assert value(scope.record, layer, "activation") > 0
    for name, g in gradient.items():
        assert_equal(value(scope.record, name, "param_grad"), g)


def test_two_losses_added_are_one_backward() -> None:
    model = stack()
    optimizer = sgd(model)

    def both(m: nn.Module, x: Tensor) -> Tensor:
        out = m(x)
        return out.square().mean() + 0.1 * out.abs().sum()

    expected = truth(model, batch(), loss=both)
    with gradscope.watch(model, layers="**") as scope:
        both(model, batch()).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52


def test_two_losses_on_different_parts() -> None:
    class TwoHeads(Stack):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.embed(x)
            h = self.blocks[0](h)
            early = h.detach()
            for block in self.blocks[1:]:
                early = block(early)
            return h, self.head(early)

    torch.manual_seed(0)
    model = TwoHeads().double()
    optimizer = sgd(model)

    def both(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m(x)
        return a.square().mean() + b.abs().mean()

    expected = truth(model, batch(), loss=both)
    with gradscope.watch(model, layers="**") as scope:
        a, b = model(batch())
        a.square().mean().backward()
        b.abs().mean().backward()
        optimizer.step()
    assert_true(scope.record, expected, skip=[""])


def test_gradient_penalty_is_right_or_absent() -> None:
    model = stack()
    optimizer = sgd(model)

    def penalised(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        out = m(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square().mean() + g.square().sum()

    expected = truth(model, batch(), loss=penalised)
    with gradscope.watch(model, layers="**") as scope:
        penalised(model, batch()).backward()
        optimizer.step()
    compared = 0
    for name, g in expected.param_grad.items():
        if g is None:
            assert status(scope.record, name, "param_grad") == "no gradient path"
        else:
            assert_equal(value(scope.record, name, "param_grad"), g)
            compared += 1
    assert compared == 16
    for layer in ("embed", "blocks.0", "blocks.1.mlp.1"):
        assert "several backward passes" in status(scope.record, layer, "output_grad")


def test_forces_inside_the_forward() -> None:
    class Energy(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_(True)
            energy = super().forward(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return force

    torch.manual_seed(0)
    model = Energy().double()
    optimizer = sgd(model)
    twin = copy.deepcopy(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    square_loss(twin, batch()).backward()
    for name, p in twin.named_parameters():
        if p.grad is None:
            assert status(scope.record, name, "param_grad") == "no gradient path"
        else:
            assert_equal(value(scope.record, name, "param_grad"), p.grad.norm().item())
    assert "several backward passes" in status(scope.record, "blocks.1.mlp.0", "output_grad")


# -- unusual optimizers --------------------------------------------------------------------------


@pytest.mark.parametrize("clearing", ["none", "zero"])
def test_optimizer_steps_inside_the_backward(clearing: str) -> None:
    model = stack()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none=clearing == "none")

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52


def test_lbfgs_records_the_first_evaluation() -> None:
    model = stack()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    expected = []
    evaluations = 0
    with gradscope.watch(model, layers="**", slow_every=1) as scope:
        for i in range(3):
            expected.append(truth(model, batch(i)))

            def closure(i: int = i) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                loss = square_loss(model, batch(i))
                loss.backward()
                return loss

            optimizer.step(closure)
    assert evaluations > 6
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52
        assert status(scope.record, "head.weight", "param_grad", "l2_at_step", step=i) == "not sampled"
        assert status(scope.record, "head.weight", "update", step=i) == "not sampled"


def test_a_step_of_the_optimizer_that_raises_spoils_only_itself() -> None:
    model = stack()
    optimizer = sgd(model)
    fail = optimizer.register_step_pre_hook(lambda *a: 1 / 0)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch(0)).backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        fail.remove()
        optimizer.zero_grad()
        expected = truth(model, batch(1))
        square_loss(model, batch(1)).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52


def test_gradients_thrown_away_are_of_no_step() -> None:
    model = stack()
    optimizer = sgd(model)
    for set_to_none in (True, False):
        with gradscope.watch(model, layers="**") as scope:
            square_loss(model, 100 * batch(0)).backward()
            optimizer.zero_grad(set_to_none=set_to_none)  # the user saw a bad batch
            expected = truth(model, batch(1))
            square_loss(model, batch(1)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert len(scope.record.steps) == 1
        assert assert_true(scope.record, expected) == 52


# -- who ends a step -----------------------------------------------------------------------------


def test_the_users_word_wins_over_optimizers() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        scope.step()  # before anything: from now on only this ends steps
        for i in range(3):
            expected = []
            for j in range(2):
                expected.append(batch(10 * i + j))
                if j == 0:
                    pooled_at = copy.deepcopy(model)
                square_loss(model, batch(10 * i + j)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step(loss=float(i))
            assert assert_true(scope.record, truth(pooled_at, *expected), step=i) == 52
    assert [s.loss for s in scope.record.steps] == [0.0, 1.0, 2.0]


def test_a_step_is_not_ended_twice() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model) as scope:
        for i in range(3):
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
            scope.step(loss=-1.0)  # nothing is open: belongs to no step
    assert [s.step for s in scope.record.steps] == [0, 1, 2]
    assert [s.loss for s in scope.record.steps] == [None] * 3


def test_without_an_optimizer_one_warning_and_bounded_memory() -> None:
    model = stack()
    parameters = list(model.parameters())
    with pytest.warns(gradscope.GradscopeWarning, match=r"scope\.step\(\)") as caught:
        with gradscope.watch(model, max_bytes=60_000) as scope:
            for i in range(200):
                for p in parameters:
                    p.grad = None
                square_loss(model, batch(i)).backward()
                assert len(scope._recorder.passes) <= 51
                with torch.no_grad():
                    for p in parameters:
                        p -= 0.01 * p.grad  # type: ignore[operator]
    assert len(caught) == 1
    assert "50 backward passes" in str(caught[0].message)
    record = scope.record
    assert sum(s.nbytes for s in record.steps) <= 60_000
    assert len(record.steps) > 2


def test_every_and_slow_every() -> None:
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**", every=3, slow_every=2) as scope:
        for i in range(10):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert [s.step for s in record.steps] == [0, 3, 6, 9]
    for s in record.steps:
        assert assert_true(record, expected[s.step], step=s.step) == 52
    slow = [status(record, "blocks.0", "activation", "token_variance", step=s) for s in (0, 3, 6, 9)]
    assert slow == ["ok", "not sampled", "ok", "not sampled"]
    assert [status(record, "head.weight", "update", step=s) for s in (0, 3, 6, 9)] == slow
    assert [status(record, "head.weight", "weight", step=s) for s in (0, 3, 6, 9)] == slow
    assert [s.learning_rate for s in record.steps] == [0.1] * 4


def test_loss_and_learning_rate_stand_beside_steps() -> None:
    class WithLoss(Stack):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            out = super().forward(x)
            return {"logits": out, "loss": out.square().mean()}

    torch.manual_seed(0)
    model = WithLoss().double()
    groups = [
        {"params": model.blocks.parameters(), "lr": 0.5},
        {"params": [*model.embed.parameters(), *model.head.parameters()], "lr": 0.25},
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    losses = []
    with gradscope.watch(model) as scope:
        for i in range(3):
            loss = model(batch(i))["loss"]
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    record = scope.record
    assert [s.loss for s in record.steps] == losses
    assert [s.learning_rate for s in record.steps] == [(0.5, 0.25), (0.25, 0.125), (0.125, 0.0625)]


def test_a_logged_loss_belongs_to_the_open_step() -> None:
    model = stack()
    optimizer = sgd(model)
    losses = []
    with gradscope.watch(model) as scope:
        for i in range(3):
            loss = square_loss(model, batch(i))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.log(loss=loss)
            losses.append(loss.item())
        assert [s.loss for s in scope.record.steps] == losses
    assert [s.loss for s in scope.record.steps] == losses


# -- frozen, unfrozen, zero by construction ------------------------------------------------------


def test_frozen_layers_are_absent_until_they_are_unfrozen() -> None:
    model = stack()
    for p in [*model.embed.parameters(), *model.blocks[0].parameters()]:
        p.requires_grad_(False)
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            if i == 2:
                model.requires_grad_(True)
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert [assert_true(record, t, step=i) for i, t in enumerate(expected)] == [40, 40, 52, 52]
    assert status(record, "blocks.0", "output_grad", step=0) == "no gradient path"
    assert status(record, "embed.weight", "param_grad", step=0) == "frozen"
    assert status(record, "embed.weight", "update", step=0) == "frozen"


def test_only_the_head_trains_on_frozen_blocks() -> None:
    model = stack()
    for p in [*model.embed.parameters(), *model.blocks.parameters()]:
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    expected = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradscope.watch(model) as scope:
            for i in range(3):
                expected.append(truth(model, batch(i)))
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
    record = scope.record
    assert [s.step for s in record.steps] == [0, 1, 2]
    for i, t in enumerate(expected):
        assert status(record, "blocks.1", "output_grad", step=i) == "no gradient path"
        g = t.param_grad["head.weight"]
        assert g is not None
        assert_equal(value(record, "head.weight", "param_grad", step=i), g)
    assert len(caught) == 1 and "watched layer" in str(caught[0].message)


def test_zero_by_construction_is_a_value_and_no_alarm() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(6, 6)
            self.base.requires_grad_(False)
            self.down = nn.Linear(6, 2, bias=False)
            self.up = nn.Linear(2, 6, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.base(x) + self.up(self.down(x))

    model = stack(Adapted(), Adapted())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:  # a warning would be an error
        for i in range(3):
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert value(record, "blocks.1.down.weight", "param_grad", step=0) == 0.0
    assert value(record, "blocks.1.down", "output_grad", step=0) == 0.0
    assert value(record, "blocks.1.up.weight", "param_grad", step=0) > 0
    assert value(record, "blocks.1.down.weight", "param_grad", step=1) > 0
    assert status(record, "blocks.1.base.weight", "param_grad", step=0) == "frozen"
    assert all(s.finding is None for s in record.steps)


# -- what is worth a warning ---------------------------------------------------------------------


def test_the_first_culprit_of_a_nonfinite_step_is_named() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model.blocks[1].mlp[2].weight[0, 0] = math.nan  # type: ignore[index, union-attr]
        square_loss(model, batch(3)).backward()
        optimizer.step()
        with pytest.warns(gradscope.GradscopeWarning, match=r"step 3.*blocks\.1\.mlp\.2\b"):
            model(batch(4))
    assert scope.record.steps[3].finding is not None
    assert [s.finding for s in scope.record.steps[:3]] == [None] * 3


def test_the_first_culprit_of_a_nonfinite_backward_is_named() -> None:
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * math.nan

    class Bad(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + Poison.apply(self.mlp(x))

    model = stack(Block(), Bad(), Block())
    optimizer = sgd(model)
    with pytest.warns(gradscope.GradscopeWarning, match=r"gradient at.*blocks\.1\.mlp\b"):
        with gradscope.watch(model, layers="**"):
            square_loss(model, batch()).backward()
            optimizer.step()


def test_a_layer_that_dies_is_named_once() -> None:
    class Gate(Block):
        open = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.open * self.mlp(x)

    gate = Gate()
    model = stack(Block(), gate, Block())
    optimizer = sgd(model)
    with pytest.warns(gradscope.GradscopeWarning, match=r"dead layer.*blocks\.1\.mlp") as caught:
        with gradscope.watch(model, layers="blocks.*.mlp") as scope:
            for i in range(8):
                gate.open = 1.0 if i < 4 else 0.0
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
                assert scope.record.steps  # reading changes nothing
    assert len(caught) == 1
    assert [i for i, s in enumerate(scope.record.steps) if s.finding] == [4]


def test_warnings_as_errors_do_not_stop_the_training() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model) as scope:
        for i in range(4):
            x = batch(i)
            if i == 2:
                x = x * math.inf
            square_loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 4


def test_warn_false_is_silent_but_the_finding_stays() -> None:
    model = stack()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradscope.watch(model, warn=False) as scope:
            square_loss(model, batch() * math.inf).backward()
            optimizer.step()
    assert not caught
    finding = scope.record.steps[0].finding
    assert finding is not None and "non-finite" in finding


# -- exceptions ----------------------------------------------------------------------------------


class Fragile(Block):
    """Raises what it is told to, in the forward or in the backward."""

    forward_error: BaseException | None = None
    backward_error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.forward_error is not None:
            raise self.forward_error
        out = super().forward(x)
        if self.backward_error is not None:
            error = self.backward_error

            def fail(grad: Tensor) -> None:
                raise error

            out.register_hook(fail)
        return out


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward_error", "backward_error"])
def test_half_a_step_is_dropped_and_the_next_one_is_exact(where: str, kind: type[BaseException]) -> None:
    fragile = Fragile()
    model = stack(Block(), fragile, Block())
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            if i == 2:
                setattr(fragile, where, kind("now"))
                with pytest.raises(kind, match="now"):
                    square_loss(model, 100 * batch(9)).backward()
                setattr(fragile, where, None)
                optimizer.zero_grad()
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 4
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52


def test_ctrl_c_inside_a_hook_of_gradscope(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope import statistics

    model = stack()
    optimizer = sgd(model)
    real = statistics.measure
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for after in (2, 25):  # in the forward, in the backward
            calls = 0

            def interrupted(*args: Any, after: int = after, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == after:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            monkeypatch.setattr(statistics, "measure", interrupted)
            with pytest.raises(KeyboardInterrupt):
                square_loss(model, 100 * batch(1)).backward()
            monkeypatch.setattr(statistics, "measure", real)
            optimizer.zero_grad()
        expected = truth(model, batch(2))
        square_loss(model, batch(2)).backward()
        optimizer.step()
    assert len(scope.record.steps) == 2
    assert assert_true(scope.record, expected) == 52


# -- memory --------------------------------------------------------------------------------------


def _tensors() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) is Tensor)


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Everything that is there already is out of the collector's sight, and so of a count's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
def test_no_tensor_outlives_its_step() -> None:
    model = stack()
    optimizer = sgd(model)
    for slow_every in (1, 1000):
        square_loss(model, batch()).backward()
        # Python's wrapper of a gradient is made at the first look and stays: look before counting.
        assert all(p.grad is not None for p in model.parameters())
        before = _tensors()
        with gradscope.watch(model, layers="**", slow_every=slow_every) as scope:
            for i in range(3):
                loss = square_loss(model, batch(i))
                loss.backward()
                del loss
                assert _tensors() == before  # already after the backward pass
                optimizer.step()
                assert _tensors() == before
                optimizer.zero_grad(set_to_none=False)
            assert scope.record.steps
            model(batch())
            assert _tensors() <= before + 1  # one stream position of a forward without backward
        assert _tensors() == before


def test_the_graph_of_an_abandoned_forward_is_freed() -> None:
    class Canary:
        def __call__(self, grad: Tensor) -> None: ...

    model = stack()
    with gradscope.watch(model, layers="**"):
        canary = Canary()
        freed = weakref.ref(canary)
        x = batch().requires_grad_(True) * 1
        x.register_hook(canary)
        del canary
        out = model(x)
        assert freed() is not None
        del out, x
        gc.collect()
        assert freed() is None
        square_loss(model, batch()).backward()
