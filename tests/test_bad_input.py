"""Bad input: what was seen, where, the likely cause, and the line to write; nothing recorded is lost."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Stack, assert_true, batch, hooks_of, square_loss, stack, status, truth, value
from torch import Tensor, nn

import gradscope
from gradscope.errors import GradscopeError, LayerError, RecordError
from gradscope.record import Record

#: Of parameters, where the backward passes went elsewhere.
UNWRITTEN = "not supported: no backward pass wrote to .grad"


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, gradscope.GradscopeWarning)]


def has(text: str, *words: str) -> bool:
    missing = [w for w in words if w not in text]
    assert not missing, f"{missing} not in {text!r}"
    return True


def train(model: nn.Module, steps: range = range(1)) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in steps:
        square_loss(model, batch(i)).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- what is watched -----------------------------------------------------------------------------


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def test_no_trunk() -> None:
    with pytest.raises(LayerError) as error:
        gradscope.watch(Flat())
    assert has(
        str(error.value), "No trunk", "Flat", "2 modules", 'layers="path.to.blocks.*"', 'layers="**"'
    )


def test_a_model_without_trunk_can_be_watched_by_name() -> None:
    torch.manual_seed(0)
    model = Flat().double()
    expected = truth(model, batch())
    with gradscope.watch(model, layers="**") as scope:
        train(model)
    assert assert_true(scope.record, expected) == 6
    assert scope.record.trunks == ()


@pytest.mark.parametrize("model", [nn.Module(), nn.ModuleList(), nn.Sequential(), nn.Identity()])
def test_a_model_without_layers(model: nn.Module) -> None:
    with pytest.raises(LayerError, match="No trunk"):
        gradscope.watch(model)


def test_an_unknown_pattern() -> None:
    model = stack()
    before = hooks_of(model)
    with pytest.raises(LayerError) as error:
        gradscope.watch(model, layers="block.*")
    assert has(str(error.value), "'block.*'", "none of", "'blocks.*'", '"**"')
    with pytest.raises(LayerError, match="none of"):
        gradscope.watch(model, layers=["blocks.*", "nothing"])
    with pytest.raises(LayerError, match="none of"):
        gradscope.watch(model, layers=nn.Conv2d)
    with pytest.raises(LayerError, match="none of"):
        gradscope.watch(model, layers=lambda name, module: False)
    with pytest.raises(LayerError, match="globs over module names"):
        gradscope.watch(model, layers=3)  # type: ignore[arg-type]
    assert hooks_of(model) == before
    with gradscope.watch(model) as scope:  # a refused watch leaves the model free to be watched
        train(model)
    assert len(scope.record.steps) == 1


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"instance; got the class Stack"):
        gradscope.watch(Stack)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got an object of type function"):
        gradscope.watch(square_loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["every", "slow_every"])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None])
def test_a_cadence_that_is_no_whole_number(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}= .*at least 1; got {re.escape(repr(wrong))}"):
        gradscope.watch(stack(), **{name: wrong})


def test_an_unknown_statistic() -> None:
    with pytest.raises(GradscopeError) as error:
        gradscope.watch(stack(), statistics=["l2", "norm"])
    assert has(str(error.value), "'norm'", "choose from", "token_variance")
    with pytest.raises(GradscopeError, match="'norm'"):
        gradscope.watch(stack(), statistics="norm")


def test_chosen_statistics_are_kept_with_what_everything_needs() -> None:
    model = stack()
    with gradscope.watch(model, statistics=["variance"]) as scope:
        train(model)
    assert set(scope.record.table()["statistic"]) == {"variance", "l2", "count", "tokens"}


# -- masks ---------------------------------------------------------------------------------------


class Masked(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, **others: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def masked() -> Masked:
    torch.manual_seed(0)
    return Masked().double()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(5), ("mask", "[batch, tokens]", "(5,)")),
        (lambda args, kwargs: 3, ("mask", "[batch, tokens]", "int")),
        (lambda args, kwargs: kwargs["nothing"], ("KeyError", "nothing")),
        (torch.ones(7, 9), ("[7, 9]", "no watched layer", 'mask="attention_mask"')),
    ],
)
def test_a_bad_mask_is_said_and_its_step_is_absent(mask: Any, words: tuple[str, ...]) -> None:
    model = masked()
    scopes = []

    def run() -> None:
        with gradscope.watch(model, mask=mask) as scope:
            scopes.append(scope)
            train(model, range(2))

    (text,) = said(run)
    assert has(text, *words)
    record = scopes[0].record
    assert len(record.steps) == 2
    assert status(record, "blocks.0", "activation").startswith("error: ")
    assert "mask" in status(record, "blocks.0", "output_grad")
    assert value(record, "head.weight", "param_grad") > 0


def test_a_mask_that_the_forward_does_not_know() -> None:
    model = stack()
    (text,) = said(lambda: _watched(model, mask="attention_mask"))
    assert has(text, "Stack.forward has no argument 'attention_mask'", "it has x")


def test_a_mask_that_never_came() -> None:
    (text,) = said(lambda: _watched(masked(), mask="mask"))
    assert has(text, "mask='mask'", "none of 1 forward call", "padding")


def _watched(model: nn.Module, **options: Any) -> None:
    with gradscope.watch(model, **options):
        train(model)


def test_everything_masked() -> None:
    model = masked()
    with gradscope.watch(model, mask="mask") as scope:
        model(batch(), mask=torch.zeros(5, 4)).sum().backward()
    assert status(scope.record, "blocks.0", "activation") == "not supported: everything is masked"
    assert status(scope.record, "blocks.0", "output_grad") == "not supported: everything is masked"


# -- what is run ---------------------------------------------------------------------------------


def test_a_model_never_called() -> None:
    def run() -> None:
        with gradscope.watch(stack()) as scope:
            pass
        assert scope.record.steps == ()

    (text,) = said(run)
    assert has(
        text,
        "6 layers watched, 0 forward calls",
        "never called",
        "no_grad",
        "compiled",
        "with gradscope.watch(",
    )


def test_a_model_only_evaluated() -> None:
    model = stack()

    def run() -> None:
        with gradscope.watch(model) as scope, torch.no_grad():
            model(batch())
        assert scope.record.steps == ()

    (text,) = said(run)
    assert has(text, "0 forward calls in grad mode", "no_grad")


def test_backward_never_run() -> None:
    model = stack()
    scopes = []

    def run() -> None:
        with gradscope.watch(model) as scope:
            scopes.append(scope)
            model(batch())

    (text,) = said(run)
    assert has(text, "1 forward call, 0 backward passes", "loss.backward()", "detached")
    record = scopes[0].record
    assert len(record.steps) == 1  # the forward is kept, and says what is missing
    assert value(record, "blocks.1", "activation") > 0
    assert status(record, "blocks.1", "output_grad") == "no gradient path"
    assert status(record, "head.weight", "param_grad") == UNWRITTEN


@pytest.mark.parametrize("how", ["detached", "another model", "other layers"])
def test_a_loss_that_reaches_no_watched_layer(how: str) -> None:
    class Cut(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            return self.head(h.detach() if how == "other layers" else h)

    torch.manual_seed(0)
    model = Cut().double()
    other = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    scopes = []

    def run() -> None:
        with gradscope.watch(model) as scope:
            scopes.append(scope)
            for i in range(3):
                out = model(batch(i))
                loss = out.sum() if how == "other layers" else other(out.detach()).sum()
                if how == "another model":
                    loss = other(torch.ones(1, 2, dtype=torch.float64)).sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    (text,) = said(run)
    assert has(text, "6 layers watched, 3 forward calls, 0 backward passes through", "any watched layer")
    record = scopes[0].record
    assert [s.step for s in record.steps] == [0, 1, 2]
    assert status(record, "blocks.1", "output_grad") == "no gradient path"
    word = status(record, "head.weight", "param_grad")
    assert word == ("ok" if how == "other layers" else UNWRITTEN)
    inner = status(record, "blocks.1.mlp.0.weight", "param_grad")
    assert inner == ("no gradient path" if how == "other layers" else UNWRITTEN)


def test_nan_from_the_first_step() -> None:
    model = stack()
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    scopes = []

    def run() -> None:
        with gradscope.watch(model, layers="**") as scope:
            scopes.append(scope)
            train(model, range(3))

    (text,) = said(run)
    assert has(text, "step 0", "non-finite", "the activation of embed")
    record = scopes[0].record
    assert [s.step for s in record.steps] == [0, 1, 2]
    assert all(s.finding for s in record.steps)
    assert math.isnan(value(record, "blocks.0", "activation", step=0))  # measured, and NaN
    assert value(record, "blocks.0", "activation", "nonfinite", step=0) == 5 * 4 * 6
    assert value(record, "head.weight", "param_grad", "nonfinite", step=0) == 12


def test_infinities_are_infinite_and_not_nan() -> None:
    model = stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradscope.watch(model, layers="**") as scope:
            x = batch()
            x[0, 0, 0] = math.inf
            square_loss(model, x).backward()
    assert value(scope.record, "embed", "activation") == math.inf
    assert value(scope.record, "embed", "activation", "nonfinite") == 6


# -- records -------------------------------------------------------------------------------------


def test_a_path_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    model = stack()
    with pytest.raises(RecordError, match=r"notes\.txt is not a gradscope Record.*my notes"):
        gradscope.watch(model, path=path)
    assert path.read_text() == "my notes\n"
    assert not any(hooks_of(model))
    with pytest.raises(RecordError, match="is a folder"):
        gradscope.watch(model, path=tmp_path)
    with gradscope.watch(model, path=tmp_path / "new" / "run.jsonl"):
        train(model)
    assert len(Record.load(tmp_path / "new" / "run.jsonl").steps) == 1


def test_a_half_written_record_is_continued_and_loses_its_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = stack()
    with gradscope.watch(model, path=path):
        train(model, range(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])

    def resume() -> None:
        with gradscope.watch(model, path=path):
            train(model, range(2))

    (text,) = said(resume)
    assert has(text, "half-written", "cut off", "2 whole steps")
    assert [s.step for s in Record.load(path).steps] == [0, 1, 2, 3]


def test_a_record_damaged_in_the_middle_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = stack()
    with gradscope.watch(model, path=path):
        train(model, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:50] + b"\n"
    path.write_bytes(b"".join(lines))
    damaged = path.read_bytes()
    with pytest.raises(RecordError, match=r"damaged at line 3.*0 steps before it are intact.*Restore"):
        gradscope.watch(model, path=path)
    assert path.read_bytes() == damaged


def test_what_was_recorded_survives_every_later_mistake() -> None:
    model = stack()
    with gradscope.watch(model) as scope:
        train(model, range(3))
        with pytest.raises(RuntimeError):
            model(batch()[..., :1])
        with pytest.raises(RuntimeError):
            model(batch()).backward()
        scope.step(loss="none")  # type: ignore[arg-type]
        scope.log(loss=None)  # type: ignore[arg-type]
        warnings.simplefilter("ignore")
    assert [s.step for s in scope.record.steps][:3] == [0, 1, 2]
    assert all(status(scope.record, "blocks.1", "output_grad", step=i) == "ok" for i in range(3))
