"""measure: one forward and backward per initialisation or batch, and nothing of the caller's touched."""

from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_models import (
    Stack,
    assert_equal,
    assert_true,
    batch,
    hooks_of,
    square_loss,
    stack,
    truth,
    value,
)
from torch import Tensor, nn

import gradscope
from gradscope.errors import LayerError, MeasureError
from gradscope.record import Record


def make() -> Stack:
    return Stack().double()


def replicate(record: Record, r: int) -> Record:
    return Record(record.header, tuple(s for s in record.steps if s.replicate == r))


def test_replicates_are_initialisations_and_equal_the_oracle() -> None:
    record = gradscope.measure(make, batch(), square_loss, replicates=3, layers="**", seed=7)
    assert [(s.step, s.replicate) for s in record.steps] == [(0, 0), (0, 1), (0, 2)]
    for r in range(3):
        torch.manual_seed(7 + r)
        model = make()
        one = replicate(record, r)
        assert assert_true(one, truth(model, batch())) == 52
        assert one.steps[0].loss == square_loss(model, batch()).item()
        for name, p in model.named_parameters():
            assert_equal(value(one, name, "weight"), p.detach().norm().item())


def test_every_slow_statistic_is_there() -> None:
    record = gradscope.measure(make, batch(), square_loss, replicates=1)
    words = set(record.table()["status"])
    assert "not sampled" not in {
        w
        for w, s, n in zip(*(record.table()[k] for k in ("status", "signal", "statistic")), strict=True)
        if n != "l2_at_step" and s != "update"
    }, words
    assert value(record, "blocks.0", "activation", "token_variance") > 0


def test_replicates_are_batches_of_one_model() -> None:
    model = stack()
    batches = [batch(i) for i in range(3)]
    record = gradscope.measure(model, batches, square_loss, layers="**")
    assert [s.replicate for s in record.steps] == [0, 1, 2]
    for r, x in enumerate(batches):
        assert assert_true(replicate(record, r), truth(model, x)) == 52


def test_batches_may_be_an_iterator_of_which_so_many_are_taken() -> None:
    taken = []

    def endless() -> Any:
        i = 0
        while True:
            taken.append(i)
            yield batch(i)
            i += 1

    record = gradscope.measure(stack(), endless(), square_loss, replicates=2)
    assert len(record.steps) == 2
    assert len(taken) <= 3
    assert len(gradscope.measure(stack(), batch(), square_loss).steps) == 1


class Mapping(Stack):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return (
            {"logits": out} if labels is None else {"logits": out, "loss": (out - labels).square().mean()}
        )


def test_the_default_loss_is_the_models() -> None:
    torch.manual_seed(0)
    model = Mapping().double()
    given = {"x": batch(), "labels": torch.zeros(5, 4, 2, dtype=torch.float64)}
    record = gradscope.measure(model, given)
    expected = truth(model, given, loss=lambda m, b: m(**b)["loss"])
    expected.activation.pop("", None)
    assert_true(record, expected)


class Pair(NamedTuple):
    x: Tensor
    weight: Tensor


def test_float64_converts_model_and_batch() -> None:
    def single() -> Stack:
        return Stack()

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        assert isinstance(pair, Pair) and pair.x.dtype == torch.float64
        assert pair.weight.dtype == torch.int64
        return (model(pair.x) * pair.weight).square().mean()

    pair = Pair(batch(dtype=torch.float32), torch.tensor([2, 3]))
    record = gradscope.measure(single, pair, loss, replicates=2, dtype=torch.float64, layers="**")
    assert record.header["dtype"] == "float64"
    torch.manual_seed(0)
    expected = truth(single(), Pair(pair.x.double(), pair.weight), loss=loss)
    assert assert_true(replicate(record, 0), expected) == 52
    assert pair.x.dtype == torch.float32


# -- depth 0 -------------------------------------------------------------------------------------


def stream(record: Record, signal: str) -> Any:
    return record.table(signal=signal, statistic="l2", type="Stream")


def test_depth_0_has_the_gradient_of_the_trunks_input() -> None:
    model = stack()
    record = gradscope.measure(model, batch(), square_loss)
    expected = truth(model, batch(), layers=["embed"])
    rows = stream(record, "output_grad")
    assert rows["depth"].tolist() == [0.0] and rows["layer"].tolist() == ["blocks.0"]
    assert_equal(rows["value"][0], expected.output_grad["embed"][0] or 0)


class Bare(nn.Module):
    """Its trunk's input is the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_float_batch_is_made_to_require_grad_on_its_own_copy() -> None:
    torch.manual_seed(0)
    model = Bare().double()
    x = batch()
    record = gradscope.measure(model, x, square_loss)
    twin = copy.deepcopy(model)
    leaf = x.clone().requires_grad_(True)
    first = twin.blocks[0](leaf)
    (g,) = torch.autograd.grad((leaf + first + twin.blocks[1](leaf + first)).square().mean(), leaf)
    del g
    rows = stream(record, "output_grad")
    assert rows["status"].tolist() == ["ok"] and rows["depth"].tolist() == [0.0]
    assert not x.requires_grad and x.grad is None and x._backward_hooks is None


def test_an_input_that_is_changed_in_place_still_runs() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x.clone())
            x += h  # of its input, as memory-saving blocks do
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(InPlace()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Model().double()
    x = batch()
    kept = x.clone()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x.clone()).square().mean()

    record = gradscope.measure(model, x, loss)
    leaf = kept.clone().requires_grad_(True)
    h = leaf + model.blocks[0][0].linear(leaf)  # type: ignore[index, union-attr]
    h = h + model.blocks[1][0].linear(h)  # type: ignore[index, union-attr]
    # Block 0 reads its input twice, before and through the change; both are its input's gradient.
    (g,) = torch.autograd.grad(h.square().mean(), leaf)
    rows = stream(record, "output_grad")
    assert rows["status"].tolist() == ["ok"]
    assert_equal(rows["value"][0], g.norm().item())
    assert torch.equal(x, kept)


# -- the caller's things -------------------------------------------------------------------------


def test_the_callers_random_state_is_unchanged() -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    def noisy() -> Stack:
        random.random()
        np.random.rand()
        return make()

    before = states()
    gradscope.measure(noisy, batch(), square_loss, replicates=2)
    assert states() == before
    with pytest.raises(ZeroDivisionError):
        gradscope.measure(lambda: 1 / 0, batch(), square_loss)  # type: ignore[arg-type, return-value]
    assert states() == before


def test_replicates_do_not_depend_on_the_callers_random_state() -> None:
    torch.manual_seed(1)
    first = gradscope.measure(make, batch(), square_loss, replicates=2)
    torch.manual_seed(2)
    second = gradscope.measure(make, batch(), square_loss, replicates=2)
    shifted = gradscope.measure(make, batch(), square_loss, replicates=2, seed=1)
    values = [[s.value for s in r.steps] for r in (first, second, shifted)]
    for a, b in zip(values[0], values[1], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(values[0][1], values[2][0])
    assert not np.array_equal(values[0][0], values[0][1], equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_untouched(training: bool) -> None:
    model = stack()
    model.blocks[1].mlp.append(nn.BatchNorm1d(4))  # type: ignore[union-attr, operator]
    model.double().train(training)
    square_loss(model, batch(5)).backward()
    gradients = [p.grad for p in model.parameters()]
    kept = [g.clone() for g in gradients if g is not None]
    state = copy.deepcopy(model.state_dict())
    before = hooks_of(model)
    record = gradscope.measure(model, [batch(0), batch(1)], square_loss, dtype=torch.float32)
    assert record.header["mode"] == ("train" if training else "eval")
    assert [p.grad for p in model.parameters()] == gradients or all(
        p.grad is g for p, g in zip(model.parameters(), gradients, strict=True)
    )
    assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True) if g is not None)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert hooks_of(model) == before
    assert model.training == training and all(m.training == training for m in model.modules())


def test_a_watched_model_can_be_measured_beside() -> None:
    model = stack()
    with gradscope.watch(model) as scope:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(2):
            expected = truth(model, batch(i))
            gradscope.measure(model, batch(9), square_loss)
            square_loss(model, batch(i)).backward()
            gradscope.measure(model, batch(9), square_loss)
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 2
    assert_true(scope.record, expected)


def test_gradients_of_a_model_that_the_maker_hands_out_are_kept() -> None:
    model = stack()
    square_loss(model, batch()).backward()
    kept = model.head.weight.grad
    gradscope.measure(lambda: model, batch(1), square_loss, replicates=1)
    assert model.head.weight.grad is kept and hooks_of(model) == [0] * len(hooks_of(model))


# -- the header ----------------------------------------------------------------------------------


def test_header() -> None:
    record = gradscope.measure(make, batch(), square_loss, replicates=3, seed=4, loss_denominator=40)
    header = record.header
    assert header["replicates"] == "initialisation"
    assert header["loss_denominator"] == 40
    assert header["seeds"]["first"] == 4 and header["seeds"]["replicates"] == 3
    assert header["model"] == "Stack" and header["dtype"] == "float64" and header["device"] == "cpu"
    assert header["trunks"]["blocks"] == 3
    assert header["versions"]["torch"] == torch.__version__
    other = gradscope.measure(stack(), [batch()], square_loss).header
    assert other["replicates"] == "batch" and other["loss_denominator"] is None


# -- what cannot be measured ---------------------------------------------------------------------


def test_without_a_loss() -> None:
    with pytest.raises(MeasureError, match=r"mapping.*the batch is a Tensor.*loss=lambda model, batch"):
        gradscope.measure(make, batch())
    with pytest.raises(MeasureError, match=r"dict without a loss.*labels.*loss=lambda model, batch"):
        gradscope.measure(lambda: Mapping().double(), {"x": batch()})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, x: m(x), r"must return a scalar tensor; it returned \(5, 4, 2\)"),
        (lambda m, x: m(x).sum().item(), r"must return a scalar tensor; it returned float"),
        (lambda m, x: m(x).sum().detach(), r"does not require grad.*no_grad.*detached.*frozen"),
        (
            lambda m, x: torch.ones((), dtype=torch.float64, requires_grad=True) * 2,
            r"did not call the model.*first argument",
        ),
        (
            lambda m, x: m(x).detach().sum() * torch.ones((), requires_grad=True),
            r"6 layers measured.*reaches none of them.*detach",
        ),
    ],
)
def test_a_loss_that_cannot_be(loss: Any, words: str) -> None:
    with pytest.raises(MeasureError, match=words):
        gradscope.measure(make, batch(), loss, replicates=1)


def test_a_loss_that_reaches_other_layers_only() -> None:
    class Cut(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            return self.head(h.detach())

    with pytest.raises(MeasureError, match="reaches none of them"):
        gradscope.measure(lambda: Cut().double(), batch(), square_loss, replicates=1)


def test_a_maker_that_makes_no_model() -> None:
    with pytest.raises(TypeError, match=r"make_model\(\) returned an object of type int"):
        gradscope.measure(lambda: 3, batch(), square_loss)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"a function that makes the model, or a model; .* type str"):
        gradscope.measure("model", batch(), square_loss)  # type: ignore[arg-type]


def test_a_maker_that_makes_the_same_model_again() -> None:
    model = stack()
    with pytest.raises(MeasureError, match=r"same model twice.*lambda: Model.*measure\(model, \[batch"):
        gradscope.measure(lambda: model, batch(), square_loss, replicates=2)


def test_no_batch_no_replicate_no_trunk() -> None:
    with pytest.raises(MeasureError, match="no batch"):
        gradscope.measure(stack(), [], square_loss)
    with pytest.raises(ValueError, match="replicates= takes at least 1; got 0"):
        gradscope.measure(make, batch(), square_loss, replicates=0)
    with pytest.raises(LayerError, match="No trunk"):
        gradscope.measure(lambda: nn.Linear(3, 2).double(), batch(), square_loss)


def test_an_error_of_the_loss_comes_through_and_leaves_nothing() -> None:
    model = stack()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gradscope.measure(model, batch(), loss)
    assert not any(hooks_of(model))
    from torch.optim import optimizer as optim

    assert not optim._global_optimizer_pre_hooks


def test_an_empty_batch_has_no_values() -> None:
    record = gradscope.measure(stack(), batch()[:0], lambda m, x: m(x).sum())
    for signal in ("activation", "output_grad"):
        for statistic in ("l2", "count", "mean", "variance", "absmax", "kurtosis"):
            rows = record.table(signal=signal, statistic=statistic)
            assert set(rows["status"]) == {"not supported: empty tensor"}
            assert all(math.isnan(v) for v in rows["value"])


def test_a_failed_measurement_says_one_thing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MeasureError, match="Write loss=lambda"):
            gradscope.measure(stack, torch.ones(2, 3))
