"""What training loops do: where a step ends, and which gradient is the step's.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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
        if a["statistic"][i] == "sample_dot":
            continue  # samples meet those of their own micro-batch only
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
    assert [s.learning_rate for s in scope.record.steps] == [0.5] * 3  # the first one's


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


def test_forwards_that_all_come_first_are_steps_of_their_own() -> None:
    """Only biases are trained: a backward pass needs none of what the steps before it have changed."""
    model = stack()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    optimizer = sgd(model)
    expected = [truth(model, batch(i)) for i in range(3)]
    with gradscope.watch(model, layers="**") as scope:
        for loss in [square_loss(model, batch(i)) for i in range(3)]:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [s.step for s in scope.record.steps] == [0, 1, 2]
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [36 + 8] * 3


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
    assert status(scope.record, "head.weight", "param_grad") == (
        "not supported: no backward pass wrote to .grad"
    )


def test_a_head_that_gets_a_gradient_in_some_micro_batches_only() -> None:
    """Both heads run in each micro-batch, and each task's loss is of one of them."""

    class TwoHeads(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            return self.head(h), self.second(h)

    def loss(m: nn.Module, pair: tuple[int, Tensor]) -> Tensor:
        return m(pair[1])[pair[0]].square().mean()

    torch.manual_seed(0)
    model = TwoHeads().double()
    optimizer = sgd(model)
    pairs = [(0, batch(0)), (1, batch(1))]
    expected = truth(model, *pairs, loss=loss)
    with gradscope.watch(model, layers="**") as scope:
        for pair in pairs:
            loss(model, pair).backward()
        optimizer.step()
    assert assert_true(scope.record, expected, skip=["head", "second"]) == 50
    for head in ("head", "second"):
        assert status(scope.record, head, "output_grad") == (
            "not supported: a gradient in some micro-batches only"
        )


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


@pytest.mark.parametrize("before_the_closure", [0, 2])
@pytest.mark.parametrize("zeroed", ["before the forward", "after it"])
def test_micro_batches_in_a_closure_are_all_of_the_step(before_the_closure: int, zeroed: str) -> None:
    """Lightning's loop puts the last micro-batch into the optimizer's closure, others all of them."""
    model = stack()
    optimizer = sgd(model)
    expected = []

    def evaluate(i: int, js: range) -> Tensor:
        losses = []
        for j in js:
            if j == 0 and zeroed == "before the forward":
                optimizer.zero_grad()
            losses.append(square_loss(model, batch(10 * i + j)))
            if j == 0 and zeroed == "after it":
                optimizer.zero_grad()
            losses[-1].backward()
        return torch.stack(losses).sum()

    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            expected.append(truth(model, *(batch(10 * i + j) for j in range(3))))
            for j in range(before_the_closure):
                evaluate(i, range(j, j + 1))
            optimizer.step(lambda i=i: evaluate(i, range(before_the_closure, 3)).item())
    assert [s.step for s in scope.record.steps] == [0, 1, 2]
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 3


def test_lbfgs_over_micro_batches_records_all_of_the_first_evaluation() -> None:
    model = stack()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            micro = [batch(10 * i), batch(10 * i + 1)]
            expected.append(truth(model, *micro))

            def closure(micro: list[Tensor] = micro) -> Tensor:
                optimizer.zero_grad()
                losses = []
                for x in micro:
                    losses.append(square_loss(model, x))
                    losses[-1].backward()
                return torch.stack(losses).sum()

            optimizer.step(closure)
    assert len(scope.record.steps) == 3
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 3


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


def test_another_optimizer_takes_over_after_one_that_raised() -> None:
    model = stack()
    first, second = sgd(model), sgd(model)
    first.register_step_pre_hook(lambda *a: 1 / 0)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch(0)).backward()
        with pytest.raises(ZeroDivisionError):
            first.step()
        first.zero_grad()
        for i in range(1, 4):
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            second.step()
            second.zero_grad()
    assert len(scope.record.steps) == 3
    for step, t in zip(scope.record.steps, expected, strict=True):
        assert assert_true(scope.record, t, step=step.step) == 52


@pytest.mark.parametrize("how", ["None", "zero", "data"])
def test_gradients_thrown_away_are_of_no_step(how: str) -> None:
    model = stack()
    optimizer = sgd(model)

    def clear() -> None:
        if how == "data":  # as code from before zero_grad(set_to_none) has it: no write is counted
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.data.zero_()
        else:
            optimizer.zero_grad(set_to_none=how == "None")

    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, 100 * batch(0)).backward()
        clear()  # the user saw a bad batch
        expected = truth(model, batch(1))
        square_loss(model, batch(1)).backward()
        optimizer.step()
        clear()
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


def test_two_steps_of_an_optimizer_are_one_by_the_users_word() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        scope.step()
        for i in range(2):
            for j in range(2):  # gradients add up over both
                square_loss(model, batch(10 * i + j)).backward()
                norms = {
                    n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None
                }
                optimizer.step()
            optimizer.zero_grad()
            scope.step()
            for name, norm in norms.items():
                assert_equal(value(scope.record, name, "param_grad", step=i), norm)
    assert [s.step for s in scope.record.steps] == [0, 1]


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
    with gradscope.watch(model) as scope:  # of micro-batches, the mean
        both = [model(batch(i))["loss"] for i in range(2)]
        sum(both).backward()  # type: ignore[union-attr]
        optimizer.step()
    (step,) = scope.record.steps
    assert step.loss is not None
    assert_equal(step.loss, (both[0].item() + both[1].item()) / 2)


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
