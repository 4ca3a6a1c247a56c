"""What models do: shared blocks, structured outputs, in-place operations, masks, transforms."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from small_models import (
    WIDTH,
    Block,
    Stack,
    assert_equal,
    assert_true,
    batch,
    cell,
    sgd,
    square_loss,
    stack,
    status,
    truth,
    value,
)
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import gradscope
from gradscope import statistics
from gradscope.record import OUTSIDE, Record


def one_step(model: nn.Module, layers: str | None = "**", **options: Any) -> Record:
    optimizer = sgd(model)
    with gradscope.watch(model, layers=layers, **options) as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    return scope.record


def depths(record: Record, layer: str) -> list[float]:
    rows = record.table(layer=layer, signal="activation", statistic="l2", step=record.steps[-1].step)
    return [d for d, kind in zip(rows["depth"].tolist(), rows["type"], strict=True) if kind != "Stream"]


# -- modules called n times, or not at all -------------------------------------------------------


def test_a_shared_block_has_one_entry_and_one_depth_per_call_in_forward_order() -> None:
    block = Block()
    model = stack(block, block, block)
    expected = truth(model, batch())
    record = one_step(model)
    assert len(expected.output_grad["blocks.0"]) == 3
    # embed, head and the model; 5 modules of the block three times; 8 parameters.
    assert assert_true(record, expected) == 2 * (3 + 15) + 8
    assert depths(record, "blocks.0") == [1.0, 2.0, 3.0]
    assert depths(record, "blocks.0.mlp") == [1.0, 2.0, 3.0]
    a = expected.activation["blocks.0"]
    assert a[0] != a[1] != a[2]
    rows = record.table(layer="blocks.0.mlp.0.weight", signal="param_grad", statistic="l2")
    assert math.isnan(rows["depth"][0])  # a parameter used at three depths has none


def test_the_number_of_calls_may_change_from_step_to_step() -> None:
    class Loop(Stack):
        turns = 1

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for _ in range(self.turns):
                for block in self.blocks:
                    h = block(h)
            return self.head(h)

    torch.manual_seed(0)
    model = Loop(Block(), Block()).double()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for turns in (1, 3, 2):
            model.turns = turns
            expected.append(truth(model, batch()))
            square_loss(model, batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for i, t in enumerate(expected):
        assert_true(scope.record, t, step=i)
    rows = scope.record.table(step=1, layer="blocks.1", signal="activation", statistic="l2")
    assert rows["depth"].tolist() == [2.0, 4.0, 6.0]


def test_layers_left_out_are_absent_and_the_others_keep_their_depth() -> None:
    class Drop(Stack):
        left_out = -1

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for i, block in enumerate(self.blocks):
                if i != self.left_out:
                    h = block(h)
            return self.head(h)

    torch.manual_seed(0)
    model = Drop(*(Block() for _ in range(4))).double()
    optimizer = sgd(model)
    expected = []
    left_out = [-1, 1, 0, 3, 2, 1]
    with gradscope.watch(model, layers="**") as scope:
        for i, model.left_out in enumerate(left_out):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    for i, t in enumerate(expected):
        assert_true(record, t, step=i)
        for k in range(4):
            rows = record.table(step=i, layer=f"blocks.{k}", signal="output_grad", statistic="l2")
            keep = [d for d, kind in zip(rows["depth"], rows["type"], strict=True) if kind == "Block"]
            assert keep == [k + 1.0]
        if left_out[i] >= 0:
            dropped = f"blocks.{left_out[i]}"
            assert status(record, dropped, "activation", step=i) == "not called"
            assert status(record, f"{dropped}.mlp.0", "output_grad", step=i) == "not called"
            assert status(record, f"{dropped}.mlp.0.weight", "param_grad", step=i) == "no gradient path"
    # One row table serves all steps: memory is bounded by the steps' own bytes.
    assert len({id(s.rows) for s in record.steps}) <= 3


def test_left_out_in_one_micro_batch_only() -> None:
    class Drop(Stack):
        left_out = -1

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for i, block in enumerate(self.blocks):
                if i != self.left_out:
                    h = block(h)
            return self.head(h)

    torch.manual_seed(0)
    model = Drop().double()
    optimizer = sgd(model)

    def loss(m: Any, pair: Any) -> Tensor:
        m.left_out, x = pair
        return m(x).square().mean()

    pairs = [(1, batch(0)), (-1, batch(1)), (2, batch(2))]
    expected = truth(model, *pairs, loss=loss)
    with gradscope.watch(model, layers="**") as scope:
        for pair in pairs:
            loss(model, pair).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52


class Ordered(Stack):
    """Runs its blocks in the order that it is told."""

    order: tuple[int, ...] = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i in self.order:
            h = self.blocks[i](h)
        return self.head(h)


def ordered(m: Any, pair: Any) -> Tensor:
    m.order, x = pair
    return m(x).square().mean()


def depths_of(record: Record) -> dict[str, float]:
    rows = record.table(signal="activation", statistic="dot_next")
    called = rows["status"] != "not called"
    at = zip(rows["layer"], rows["type"], rows["depth"], called, strict=True)
    return {layer: float(depth) for layer, kind, depth, ran in at if ran and kind != "Stream"}


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (2, 0)])
def test_blocks_in_another_order_have_their_depths_in_forward_order(order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Ordered().double()
    optimizer = sgd(model)
    model.order = order
    hidden: list[Tensor] = []
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.register_forward_hook(lambda m, a, out: hidden.append(out))
    ordered(twin, (order, batch()))
    with gradscope.watch(model) as scope:
        ordered(model, (order, batch())).backward()
        optimizer.step()
    assert depths_of(scope.record) == {f"blocks.{b}": n + 1.0 for n, b in enumerate(order)}
    for n, b in enumerate(order[:-1]):
        dot = (hidden[n] * hidden[n + 1]).sum().item()
        assert_equal(value(scope.record, f"blocks.{b}", "activation", "dot_next"), dot)
        branch = scope.record.table(layer=f"blocks.{b}.mlp", signal="activation", statistic="l2")
        assert branch["depth"].tolist() == [n + 1.0]
    # What did not run stands in nobody's place.
    rows = scope.record.table(signal="activation", statistic="dot_next")
    there = [float(d) for d in rows["depth"] if not math.isnan(d)]
    assert len(there) == len(set(there))


def test_positions_that_micro_batches_have_in_different_orders_are_on_no_axis() -> None:
    torch.manual_seed(0)
    model = Ordered().double()
    optimizer = sgd(model)
    pairs = [((0, 1, 2), batch(0)), ((0, 2, 1), batch(1))]
    expected = truth(model, *pairs, loss=ordered)
    with gradscope.watch(model, layers="**") as scope:
        for pair in pairs:
            ordered(model, pair).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52
    depths = depths_of(scope.record)
    assert depths["blocks.0"] == 1.0 and math.isnan(depths["blocks.1"]) and math.isnan(depths["blocks.2"])


def test_pairs_are_of_the_same_two_positions_in_every_micro_batch() -> None:
    """Else an inner product of some micro-batches would stand beside the norms of all."""
    torch.manual_seed(0)
    model = Ordered(*(Block() for _ in range(5))).double()
    optimizer = sgd(model)
    pairs = [((0, 1, 2, 4), batch(0)), ((0, 2, 3, 4), batch(1))]
    with gradscope.watch(model, layers="**", slow_every=1) as scope:
        for pair in pairs:
            ordered(model, pair).backward()
        optimizer.step()
    why = "not supported: not the same two positions in every micro-batch"
    for statistic in ("dot_next", "diff_next_l2", "cosine_next", "unit_skip"):
        found = [status(scope.record, f"blocks.{b}", "activation", statistic) for b in range(4)]
        # 0 goes on to 1 and to 2; 1 to 2, which both have; 2 to 4 and to 3; 3 to 4, which both have.
        assert found == [why] * 4, statistic
    for statistic in ("dot_next", "diff_next_l2"):
        assert status(scope.record, "blocks.1", "output_grad", statistic) == why
    assert status(scope.record, "blocks.1", "output_grad", "l2") == "ok"
    rows = scope.record.table(type="Stream", signal="activation", statistic="dot_next")
    assert rows["status"].tolist() == ["ok"]


# -- outputs -------------------------------------------------------------------------------------


@dataclass
class Out:
    hidden: Tensor
    note: str = "x"


class Named(NamedTuple):
    count: int
    hidden: Tensor


def _pack(kind: str, x: Tensor) -> Any:
    return {
        "tuple": lambda: (x, None),
        "list": lambda: [x],
        "dict": lambda: {"hidden": x, "ids": torch.arange(3)},
        "dataclass": lambda: Out(x),
        "named": lambda: Named(3, x),
        "nested": lambda: ({"a": [x]}, 3),
        "integers first": lambda: (torch.arange(3), x),
    }[kind]()


def _unpack(kind: str, out: Any) -> Tensor:
    return {
        "tuple": lambda: out[0],
        "list": lambda: out[0],
        "dict": lambda: out["hidden"],
        "dataclass": lambda: out.hidden,
        "named": lambda: out.hidden,
        "nested": lambda: out[0]["a"][0],
        "integers first": lambda: out[1],
    }[kind]()


KINDS = ["tuple", "list", "dict", "dataclass", "named", "nested", "integers first"]


class Packed(Block):
    kind = "tuple"
    last: Any = None

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.last = _pack(self.kind, super().forward(x))
        return self.last


class Unpacking(Stack):
    kind = "tuple"

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            out = block(h)
            assert out is block.last  # the very object comes back
            h = _unpack(self.kind, out)
        return self.head(h)


@pytest.mark.parametrize("kind", KINDS)
def test_structured_outputs(kind: str) -> None:
    torch.manual_seed(0)
    model = Unpacking(Packed(), Packed()).double()
    plain = Stack(Block(), Block()).double()
    plain.load_state_dict(model.state_dict())
    model.kind = kind
    for block in model.blocks:
        block.kind = kind
    expected = truth(plain, batch())
    assert assert_true(one_step(model), expected) == 2 * (3 + 10) + 12


class SecondOfTwo(Block):
    """The gradient comes through the second output only."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.mlp[0](x).detach() + self.mlp[0].bias, super().forward(x)


class TakesSecond(Stack):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)[1]
        return self.head(h)


def test_gradient_through_the_second_output_only() -> None:
    torch.manual_seed(0)
    model = TakesSecond(SecondOfTwo(), SecondOfTwo()).double()
    plain = Stack(Block(), Block()).double()
    plain.load_state_dict(model.state_dict())
    expected = truth(plain, batch())
    record = one_step(model, layers=None)
    for k in range(2):
        for signal in ("activation", "output_grad"):
            (norm,) = getattr(expected, signal)[f"blocks.{k}"]
            assert_equal(value(record, f"blocks.{k}", signal), norm)
    # What belongs to the other output must not stand here as a measured NaN.
    rows = record.table(layer=["blocks.0", "blocks.1"])
    for name, word, v in zip(rows["statistic"], rows["status"], rows["value"], strict=True):
        assert word != "ok" or not math.isnan(v), name


def test_outputs_without_any_float_are_absent_with_the_reason() -> None:
    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.integers, self.nothing = Integers(), Nothing()

        def forward(self, x: Tensor) -> Tensor:
            self.integers(x)
            self.nothing(x)
            return super().forward(x)

    torch.manual_seed(0)
    model = Model().double()
    expected = truth(model, batch(), layers=["blocks.0", "head"])
    record = one_step(model)
    assert status(record, "integers", "activation").startswith("not supported: no floating-point")
    assert status(record, "nothing", "output_grad").startswith("not supported: no floating-point")
    assert status(record, "integers.scale", "activation") == "not called"
    assert_true(record, expected, skip=["integers.scale.weight", "integers.scale.bias"])
    assert status(record, "integers.scale.weight", "param_grad") == "no gradient path"


def test_dead_outputs_have_an_activation_and_no_gradient() -> None:
    class Dead(Stack):
        def forward(self, x: Tensor) -> Tensor:
            self.blocks[1](self.embed(x))
            return self.head(self.blocks[0](self.embed(x)))

    torch.manual_seed(0)
    model = Dead(Block(), Block()).double()
    expected = truth(model, batch())
    record = one_step(model)
    assert expected.output_grad["blocks.1"] == [None]
    assert status(record, "blocks.1", "output_grad") == "no gradient path"
    assert_true(record, expected)


def test_one_element_outputs() -> None:
    class Tiny(Stack):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1)), width=1)
            self.embed, self.head = nn.Linear(3, 1), nn.Linear(1, 1)

    torch.manual_seed(0)
    model = Tiny().double()
    x = batch(size=1, tokens=1)[0, 0]
    expected = truth(model, x)
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, x).backward()
        optimizer.step()
    record = scope.record
    assert_true(record, expected)
    assert status(record, "head", "activation", "variance") == "one element"
    assert status(record, "blocks.0", "output_grad", "variance") == "one element"
    assert status(record, "blocks.0", "activation", "token_variance") == "one element"


def test_zero_dimensional_outputs() -> None:
    class Scalar(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Module()
            self.mean.forward = lambda x: x.square().mean()  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return self.mean(super().forward(x))

    torch.manual_seed(0)
    model = Scalar().double()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        loss = model(batch())
        loss.backward()
        optimizer.step()
    record = scope.record
    assert_equal(value(record, "mean", "activation"), loss.item())
    assert value(record, "mean", "output_grad") == 1.0
    assert record.steps[0].loss == loss.item()  # a scalar output is the loss


def test_empty_batches_are_absent_and_the_next_step_is_exact() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        model(batch()[:0]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = truth(model, batch())
        square_loss(model, batch()).backward()
        optimizer.step()
    record = scope.record
    assert status(record, "blocks.0", "activation", step=0) == "not supported: empty tensor"
    assert status(record, "blocks.0", "output_grad", step=0) == "not supported: empty tensor"
    for signal in ("activation", "output_grad"):  # an inner product of nothing with nothing is no 0
        for statistic in ("dot_next", "diff_next_l2"):
            assert status(record, "blocks.0", signal, statistic, step=0) == "not supported: empty tensor"
    assert value(record, "head.weight", "param_grad", step=0) == 0.0
    assert assert_true(record, expected, step=1) == 52


def test_complex_values_are_absent_with_the_reason() -> None:
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x)

    class Mixed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.fourier = Fourier()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.fourier(x).real)

    model = stack(Mixed(), Mixed())
    expected = truth(model, batch())
    record = one_step(model)
    for k in range(2):
        for signal in ("activation", "output_grad"):
            said = status(record, f"blocks.{k}.fourier", signal)
            assert said == "not supported: complex values"
        del expected.activation[f"blocks.{k}.fourier"], expected.output_grad[f"blocks.{k}.fourier"]
    assert_true(record, expected)


# -- in-place operations, identities, views ------------------------------------------------------


@pytest.mark.parametrize("how", ["relu_", "+=", "view"])
def test_in_place_operations_after_a_module(how: str) -> None:
    class InPlace(Block):
        inner = True

        def forward(self, x: Tensor) -> Tensor:
            # The twin does the same out of place.
            h = self.mlp[0](x)
            if how == "view":
                h = h.view(-1, h.shape[-1])
            if self.inner:
                if how == "relu_" or how == "view":
                    torch.relu_(h)
                else:
                    h += 1.5
            else:
                h = torch.relu(h) if how != "+=" else h + 1.5
            out = self.mlp[2](h).view_as(x)
            if self.inner:
                out += x
                return out
            return out + x

    model = stack(InPlace(), InPlace())
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.inner = False  # type: ignore[assignment]
    expected = truth(plain, batch())
    record = one_step(model)
    for layer in ("embed", "blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.0", "blocks.1.mlp.0", "head"):
        assert_equal(value(record, layer, "activation"), expected.activation[layer][0])
        norm = expected.output_grad[layer][0]
        assert norm is not None
        found, word = cell(record, layer, "output_grad")
        if word == "ok":
            assert_equal(found, norm)
        else:
            assert how == "view" and "mlp.0" in layer  # absent, never wrong
    for name, g in expected.param_grad.items():
        assert_equal(value(record, name, "param_grad"), g or 0.0)


def test_identity_and_eval_dropout_hand_on_the_same_object(monkeypatch: pytest.MonkeyPatch) -> None:
    class Passing(Block):
        def __init__(self) -> None:
            super().__init__()
            self.identity, self.dropout = nn.Identity(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.identity(x)
            assert y is x
            z = self.dropout(y)
            assert z is y
            return x + self.mlp(z)

    model = stack(Passing(), Passing()).eval()
    expected = truth(model, batch())
    measured: list[bool] = []
    measure = statistics.measure

    def counted(x: Tensor, columns: Any, **options: Any) -> Any:
        measured.append(columns is statistics.GRADIENT)
        return measure(x, columns, **options)

    monkeypatch.setattr(statistics, "measure", counted)
    record = one_step(model)
    assert assert_true(record, expected) == 2 * (3 + 2 * 7) + 12
    # The embedding's output is also the stream's input; in each block, the identity's and the dropout's
    # output is its input, and that of the sequence is its last layer's. Of those one sample each.
    samples = 2 + 2 * (3 + 1) + 1
    assert (measured.count(False), measured.count(True)) == (samples, samples)
    assert value(record, "blocks.1.identity", "output_grad") == value(record, "blocks.0", "output_grad")


def test_training_is_bit_identical_and_random_state_untouched() -> None:
    class Noisy(Block):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(self.mlp(self.norm(x)))

    def run(watched: bool) -> tuple[list[float], dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        model = stack(Noisy(), Noisy(), dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scope = gradscope.watch(model, layers="**", slow_every=2) if watched else None
        torch.manual_seed(1)
        losses = []
        for i in range(5):
            loss = square_loss(model, batch(i, dtype=torch.float32))
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        if scope is not None:
            scope.close()
        return losses, model.state_dict(), torch.get_rng_state()

    (a, b, c), (x, y, z) = run(False), run(True)
    assert a == x
    assert b.keys() == y.keys() and all(torch.equal(b[k], y[k]) for k in b)
    assert torch.equal(c, z)


# -- masks ---------------------------------------------------------------------------------------


class Masked(Stack):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize("how", ["name", "positional", "tensor", "function"])
def test_a_mask_leaves_padding_out_of_every_value(how: str) -> None:
    torch.manual_seed(0)
    model = Masked().double()
    x = batch(size=4, tokens=5)
    lengths = [5, 3, 1, 4]
    mask = torch.zeros(4, 5, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        x[row, length:] = 1000.0
    given: Any = {
        "name": "attention_mask",
        "positional": "attention_mask",
        "tensor": mask,
        "function": lambda args, kwargs: kwargs["attention_mask"].bool(),
    }[how]
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**", mask=given, slow_every=1) as scope:
        out = model(x, mask) if how == "positional" else model(x, attention_mask=mask)
        (out.square() * mask[..., None]).sum().backward()
        optimizer.step()
    # The oracle never sees padding: the valid tokens alone, in one long sequence.
    plain = Stack().double()
    torch.manual_seed(0)
    plain = Masked().double()
    tokens = x[mask.bool()]
    outputs: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    loss = plain(tokens).square().sum()
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    compared = 0
    for name, t in outputs.items():
        for signal, tensor in (("activation", t.detach()), ("output_grad", gradients[name])):
            expect = {
                "l2": tensor.norm(),
                "count": torch.tensor(float(tensor.numel())),
                "tokens": torch.tensor(13.0),
                "mean": tensor.mean(),
                "variance": tensor.var(),
                "absmax": tensor.abs().max(),
            }
            if signal == "activation":
                expect["token_variance"] = tensor.var(-1, correction=0).mean()
            for statistic, v in expect.items():
                found = value(scope.record, name, signal, statistic)
                where = (name, signal, statistic)
                assert math.isclose(found, v.item(), rel_tol=1e-8, abs_tol=1e-12), where
                compared += 1
    assert compared == 18 * (6 + 7)


def test_a_mask_with_tokens_first() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
            self.layers = nn.ModuleList([self.layer, copy.deepcopy(self.layer)])
            del self.layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=~mask)
            return x

    torch.manual_seed(0)
    model = TokensFirst().double()
    x = torch.randn(4, 4, 8, dtype=torch.float64)  # as many tokens as sequences: no shape can tell
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    outputs: list[Tensor] = []
    handle = model.layers[0].register_forward_hook(lambda m, a, out: outputs.append(out.detach()))
    with gradscope.watch(model, mask="mask") as scope:
        model(x, mask).sum().backward()
    handle.remove()
    valid = outputs[0].transpose(0, 1)[mask]
    assert value(scope.record, "layers.0", "activation", "tokens") == 10
    assert_equal(value(scope.record, "layers.0", "activation"), valid.norm().item())


# -- transforms, tracing, compiling --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jacfwd scripts its decompositions
def test_functional_calls_and_transforms_do_not_raise() -> None:
    model = stack()
    parameters = dict(model.named_parameters())
    x = batch(size=2)
    optimizer = sgd(model)

    def call(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x,))

    plain = [
        torch.func.vmap(call, in_dims=(None, 0))(parameters, x),
        torch.func.grad(lambda p: call(p, x).sum())(parameters)["head.weight"],
        torch.func.jacrev(lambda x: call(parameters, x).sum(-1))(x),
        torch.func.jacfwd(lambda x: call(parameters, x).sum(-1))(x),
    ]
    with gradscope.watch(model, layers="**") as scope:
        watched = [
            torch.func.vmap(call, in_dims=(None, 0))(parameters, x),
            torch.func.grad(lambda p: call(p, x).sum())(parameters)["head.weight"],
            torch.func.jacrev(lambda x: call(parameters, x).sum(-1))(x),
            torch.func.jacfwd(lambda x: call(parameters, x).sum(-1))(x),
        ]
        call(parameters, x).sum().backward()
        optimizer.zero_grad()
        expected = truth(model, batch())
        square_loss(model, batch()).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected) == 52


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_and_exporting_a_watched_model() -> None:
    model = stack(dtype=torch.float32)
    x = batch(dtype=torch.float32)

    def forms() -> list[Any]:
        traced = torch.jit.trace(model, x)
        exported = torch.export.export(model, (x,))
        symbolic = torch.fx.symbolic_trace(model)
        made = make_fx(model)(x)
        return [
            [n.kind() for n in traced.inlined_graph.nodes()],
            [str(n.target) for n in exported.graph.nodes],
            [str(n.target) for n in symbolic.graph.nodes],
            [str(n.target) for n in made.graph.nodes],
        ]

    before = forms()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        assert forms() == before
        expected = truth(model, x.double())
        square_loss(model, x).backward()
        optimizer.step()
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected, relative=1e-5) == 52


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["watch first", "compile first", "in place"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_trains_the_same_and_is_right_or_said_to_be_absent(
    backend: str, order: str
) -> None:
    def run(watched: bool) -> tuple[list[float], Record | None, list[str]]:
        import warnings

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = stack(dtype=torch.float32)
        optimizer = sgd(model)
        losses: list[float] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scope = None
            if watched and order == "watch first":
                scope = gradscope.watch(model, layers="**")
            if order == "in place":
                model.compile(backend=backend)
                compiled: Any = model
            else:
                compiled = torch.compile(model, backend=backend)
            if watched and order != "watch first":
                scope = gradscope.watch(compiled, layers="**")
            for i in range(4):
                loss = square_loss(compiled, batch(i, dtype=torch.float32))
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
                if i == 1:
                    with torch.no_grad():
                        compiled(batch(dtype=torch.float32))
            if scope is not None:
                scope.close()
        said = [str(w.message) for w in caught if isinstance(w.message, gradscope.GradscopeWarning)]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return losses, scope.record if scope is not None else None, said

    graphs: list[int] = []
    plain, _, _ = run(False)
    watched, record, said = run(True)
    assert plain == watched
    assert record is not None
    assert graphs[1] <= graphs[0] + 1
    names = set(record.table()["layer"].tolist())
    assert not any("_orig_mod" in n for n in names)
    if not record.steps:
        assert len(said) == 1 and "compiled" in said[0]
        return
    rows = record.table(signal=["activation", "output_grad"], layer=["blocks.1", "head"], statistic="l2")
    expected = truth(stack(dtype=torch.float32), batch(0, dtype=torch.float32).double())
    if set(rows["status"]) == {"compiled"}:
        assert len(said) == 1 and "compiled" in said[0]
        assert len(record.steps) == 4
        expected.activation, expected.output_grad = {}, {}
    assert_true(record, expected, step=0, relative=1e-5)


def test_under_selective_checkpointing_the_recomputed_values_are_the_models_own() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE  # every operation: also those that a watch would add

    class Selective(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = torch.utils.checkpoint.checkpoint(
                    block,
                    h,
                    use_reentrant=False,
                    context_fn=lambda: create_selective_checkpoint_contexts(policy),
                )
            return self.head(h)

    class Sums(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.mlp[0](x)
            h = h * h.sum() * h.mean() * h.abs().square().sum()
            return x + self.mlp[2](h)

    torch.manual_seed(0)
    model = Selective(Sums(), Sums()).double()
    plain = Stack(Sums(), Sums()).double()
    plain.load_state_dict(model.state_dict())
    expected = truth(plain, batch())
    record = one_step(model)
    for name, g in expected.param_grad.items():
        assert_equal(value(record, name, "param_grad"), g or 0.0)
    for layer in ("embed", "blocks.0", "blocks.1.mlp.0", "blocks.1", "head"):
        assert_equal(value(record, layer, "output_grad"), expected.output_grad[layer][0] or 0.0)


class _Outside(Stack):
    """Blocks in a loop, with the skip in the model, in the block, or with something added in between."""

    def __init__(self, how: str) -> None:
        torch.manual_seed(0)
        inner = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
        super().__init__(*(inner if how == "outside" else [Residual(block) for block in inner]))
        self.double()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, block in enumerate(self.blocks):
            out = block(h)
            h = h + out if self.how == "outside" else out + i if self.how == "between" else out
        return self.head(h)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("how", ["outside", "inside", "between"])
def test_outputs_that_are_added_outside_of_their_block_are_no_stream(how: str) -> None:
    model = _Outside(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, layers="blocks.*") as scope:
        for i in range(2):  # a step with slow statistics, and one without
            model(batch(i)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    for n, names in ((0, ("cosine_next", "relative_contribution", "dot_next")), (1, ("dot_next",))):
        for name in names:
            for layer in ("blocks.0", "blocks.1", "blocks.2"):
                word = status(record, layer, "activation", name, step=n)
                assert word == (OUTSIDE if how == "outside" else "ok"), (n, name, layer)
        # Of gradients the two are one: dL/dF = dL/dh where h is a sum with F.
        assert status(record, "blocks.1", "output_grad", "dot_next", step=n) == "ok"
    for name in ("input_cosine", "token_cosine"):
        word = status(record, "blocks.3", "activation", name, step=0)
        assert word == (OUTSIDE if how == "outside" else "ok")
    value(record, "blocks.3", "activation", "variance")  # of the output, whatever it is
    for name in ("act_var", "act_rms", "grad_l2"):
        profile = gradscope.profile(record, name, step=0)
        absent = how == "outside" and name != "grad_l2"
        assert [math.isnan(v) for v in profile.value[0]] == [False, *[absent] * 4], name
