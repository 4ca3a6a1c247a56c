"""Real models, watched: every value against plain autograd on an unwatched float64 copy."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import EXAMPLES, Example, optimizer_of
from reference import Key, Twin, twin
from torch import Tensor, nn

import gradscope
from gradscope.record import STATISTICS

LAST = "not supported: the last position has no next"
HIDDEN = "not supported: the graph between the positions is not visible"
LR, CLIP = 0.125, 0.5


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


# -- every number ----------------------------------------------------------------------------------


def _watched_step(model: nn.Module, example: Example) -> gradscope.Record:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with gradscope.watch(model, layers="**") as scope:
        example.run(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    assert scope.faults == {}
    return scope.record


def _twin(model: nn.Module, example: Example, dtype: torch.dtype = torch.float64) -> Twin:
    found = twin(
        model,
        example.run,
        trunk=example.trunk,
        blocks=list(example.blocks),
        branches=example.branches,
        skips=example.skips,
        sequence_first=example.sequence_first,
        packed=example.packed,
        first=example.first,
        dtype=dtype,
    )
    # One step of SGD after clipping, by hand.
    norms = {
        key[0]: value
        for key, value in found.value.items()
        if key[1:] == ("Parameter", 0, "param_grad", "l2")
    }
    factor = min(1.0, CLIP / (math.sqrt(sum(n * n for n in norms.values())) + 1e-6))
    for name, parameter in model.named_parameters():
        size = parameter.detach().double().norm().item()
        row = (name, "Parameter", 0)
        found.value[*row, "weight", "l2"] = size
        found.value[*row, "param_grad", "l2_at_step"] = norms[name] * factor
        found.value[*row, "update", "l2"] = norms[name] * factor * LR
        # The change of a parameter is known to the last digit of the parameter itself.
        found.scale[*row, "update", "l2"] = norms[name] * factor * LR + 0.01 * size
    return found


def _expected_absences(model: nn.Module, example: Example) -> dict[Key, str]:
    """Every absent value of the record, and why it must be absent."""
    found: dict[Key, str] = {}

    def put(layer: str, kind: str, signal: str, statistics: tuple[str, ...], why: str) -> None:
        found.update({(layer, kind, 0, signal, s): why for s in statistics})

    def kind(layer: str) -> str:
        return type(model.get_submodule(layer)).__name__

    plain = ("l2", "count", "tokens", "mean", "variance", "absmax", "zeros", "nonfinite", "kurtosis")
    pair = ("dot_next", "diff_next_l2")
    slow_pair = ("cosine_next", "angle_next", "relative_contribution", "residual_cosine")
    for layer in example.not_called:
        put(layer, kind(layer), "activation", (*plain, "token_variance"), "not called")
        put(layer, kind(layer), "output_grad", plain, "not called")
    for layer in example.no_gradient:
        put(layer, kind(layer), "output_grad", plain, "no gradient path")
    for layer in example.scalar:
        put(layer, kind(layer), "activation", ("variance", "token_variance"), "one element")
        put(layer, kind(layer), "output_grad", ("variance",), "one element")
    rows = [(example.blocks[0], "Stream"), *((b, kind(b)) for b in example.blocks)]
    put(*rows[-1], "activation", (*pair, *slow_pair, "unit_skip"), LAST)
    put(*rows[-1], "output_grad", pair, LAST)
    for level, row in enumerate(rows[:-1]):
        if level in example.hidden_skip:
            put(*row, "activation", ("unit_skip",), HIDDEN)
        elif level not in example.skips:
            put(*row, "activation", ("unit_skip",), "no unit skip")
    for level, why in example.widths.items():
        put(*rows[level], "activation", (*pair, *slow_pair), why)
        put(*rows[level], "output_grad", pair, why)
    if 0 in example.hidden_skip:  # the input is a constant
        put(*rows[0], "output_grad", (*plain, *pair, "sample_dot"), "no gradient path")
    for level in example.no_tokens:
        tokens = ("token_cosine", "token_centred_l2")
        put(*rows[level], "activation", tokens, "not supported: no token axis")
    for level in example.no_input:
        put(
            *rows[level],
            "activation",
            ("input_cosine",),
            "not supported: the width differs from the input's",
        )
    return found


def _rows(record: gradscope.Record) -> Iterator[tuple[Key, float, str, tuple[str, float]]]:
    t = record.table()
    for i in range(len(t["value"])):
        key = (t["layer"][i], t["type"][i], int(t["call"][i]), t["signal"][i], t["statistic"][i])
        yield key, float(t["value"][i]), t["status"][i], (t["trunk"][i], float(t["depth"][i]))


def _compare(record: gradscope.Record, expected: Twin, example: Example, *, precise: bool) -> int:
    measured = {key: (value, status) for key, value, status, _ in _rows(record)}
    assert len(measured) == len(record), "two rows with one name"
    present = {key: value for key, (value, status) in measured.items() if status == "ok"}
    assert set(present) == set(expected.value)
    largest = max(v for k, v in expected.value.items() if k[3:] == ("param_grad", "l2"))
    wrong: list[str] = []
    for key, value in present.items():
        truth = expected.value[key]
        if (
            key[0] in example.zero
            and key[3] in ("param_grad", "update")
            and key[4] not in ("count", "nonfinite")
        ):
            ok = abs(value) < largest * (1e-14 if precise else 1e-6)
        else:
            # A loss in transformers is float32 whatever the model is.
            exact = precise and key[0] not in example.scalar
            relative = 1e-12 if exact else 1e-5 if key[4] in ("l2", "l2_at_step") else 4e-5
            ok = abs(value - truth) <= relative * expected.scale.get(key, abs(truth))
        if not ok:
            wrong.append(f"{key}: {value!r}, not {truth!r}")
    assert not wrong, "\n".join(wrong)
    return len(present)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_value_is_that_of_plain_autograd_on_an_unwatched_copy(
    example: Example, dtype: torch.dtype
) -> None:
    model = example.build().to(dtype)
    expected = _twin(model, example)
    # Where a derivative is zero but for rounding, which elements are exactly 0 is a matter of the dtype.
    same_dtype = _twin(model, example, dtype).value
    expected.value.update({k: v for k, v in same_dtype.items() if k[4] == "zeros"})
    absences = _expected_absences(model, example)
    record = _watched_step(model, example)
    compared = _compare(record, expected, example, precise=dtype == torch.float64)
    assert {k: status for k, _, status, _ in _rows(record) if status != "ok"} == absences
    assert compared == example.count
    assert len(record) == example.count + len(absences)


def test_the_comparison_can_fail() -> None:
    example = EXAMPLES["mlp"]
    model = example.build()
    expected = _twin(model, example)
    key = ("2", "Linear", 0, "output_grad", "l2")
    expected.value[key] *= 1 + 3e-5
    with pytest.raises(AssertionError, match="output_grad"):
        _compare(_watched_step(model, example), expected, example, precise=False)


def test_depths_are_those_of_blocks_and_branches(example: Example) -> None:
    model = example.build()
    expected = _twin(model, example).depth
    axis = {
        key: place
        for key, _, _, place in _rows(_watched_step(model, example))
        if place[0] and key[1] != "Parameter" and key[4] == "l2"
    }
    missing_gradients = {k for k in axis if k not in expected}
    assert {k: v for k, v in axis.items() if k not in missing_gradients} == expected
    assert missing_gradients == (
        {(example.blocks[0], "Stream", 0, "output_grad", "l2")} if 0 in example.hidden_skip else set()
    )


# -- the watched model never notices -----------------------------------------------------------------


def _train(
    example: Example, *, watched: bool, steps: int = 5
) -> tuple[list[Tensor], nn.Module, Any, Any]:
    model = example.build(dropout=0.1).train()
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    scope = gradscope.watch(model, layers="**") if watched else None
    losses: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = example.run(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if scope is not None:
        assert len(scope.record.steps) == steps
        assert scope.faults == {}
        scope.close()
    return losses, model, optimizer, state


def test_training_is_bit_identical_with_and_without_the_watch(example: Example) -> None:
    losses, model, optimizer, state = _train(example, watched=False)
    seen_losses, seen, seen_optimizer, seen_state = _train(example, watched=True)
    assert torch.stack(losses).unique().numel() > 1
    assert all(torch.equal(a, b) for a, b in zip(losses, seen_losses, strict=True))
    plain, watched = model.state_dict(), seen.state_dict()
    assert list(plain) == list(watched)
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    for p, q in zip(model.parameters(), seen.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, seen_optimizer.state[q][name])
    assert torch.equal(state[0], seen_state[0])
    assert state[1:] == seen_state[1:]


HOOKS = tuple(
    name for name, value in vars(nn.Linear(1, 1)).items() if "hook" in name and isinstance(value, dict)
)


def _traces(model: nn.Module) -> dict[str, Any]:
    """Everything on a model, and of torch, that a hook can leave a trace on."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: attributes"] = sorted(vars(module))
        for hooks in HOOKS:
            found[f"{name}: {hooks}"] = list(getattr(module, hooks).items())
    for name, parameter in model.named_parameters():
        found[name] = (
            list((parameter._backward_hooks or {}).items()),
            list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).items()),
            sorted(vars(parameter)),
        )
    optimizers = sys.modules["torch.optim.optimizer"]
    found["optimizers"] = [
        list(optimizers._global_optimizer_pre_hooks.items()),
        list(optimizers._global_optimizer_post_hooks.items()),
    ]
    scaler = torch.amp.GradScaler
    found["scaler"] = [scaler.scale, scaler.update, sorted(vars(scaler))]
    found["modules"] = [
        list(getattr(torch.nn.modules.module, name).items())
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    ]
    return found


def test_close_leaves_nothing_behind(example: Example) -> None:
    assert len(HOOKS) >= 8
    model = example.build()
    # Hooks of the user's own keep their places.
    first = next(iter(model.children()))
    first.register_forward_hook(lambda module, args, output: None)
    first.register_forward_pre_hook(lambda module, args: None)
    before = _traces(model)
    scope = gradscope.watch(model, layers="**")
    assert _traces(model) != before
    example.run(model).backward()
    first.register_forward_hook(lambda module, args, output: None)
    added = list(first._forward_hooks.items())[-1]
    scope.close()
    assert list(first._forward_hooks.items())[-1] == added
    del first._forward_hooks[added[0]]
    assert _traces(model) == before


def test_a_watched_model_is_copied_and_saved_unwatched(example: Example) -> None:
    model = example.build()
    plain = example.build()
    with gradscope.watch(model, layers="**") as scope:
        example.run(model).backward()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
        length, state = len(scope.record), model.state_dict()
        assert list(state) == list(plain.state_dict())
        for twin_model in copies:
            twin_model.zero_grad()
            loss = example.run(twin_model)
            loss.backward()
            assert torch.equal(loss, example.run(plain))
        assert len(scope.record) == length
        assert len(scope.record.steps) == 1
        assert scope.faults == {}
        with gradscope.watch(copies[0], layers="**") as other:
            example.run(copies[0]).backward()
        assert len(other.record) == length
        assert len(scope.record.steps) == 1


@pytest.mark.parametrize("name", ["gpt2", "encoder", "mlp"])
def test_a_saved_watched_model_loads_where_gradscope_is_not_installed(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    model = example.build()
    path = tmp_path / "model.pt"
    with gradscope.watch(model, layers="**"):
        example.run(model).backward()
        torch.save(model, path)
    code = f"""
import sys
sys.modules["gradscope"] = None  # any import of it fails
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from models import EXAMPLES
model = torch.load({str(path)!r}, weights_only=False)
example = EXAMPLES[{name!r}]
loss = example.run(model)
loss.backward()
assert torch.equal(loss, example.run(example.build())), loss
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- unit skips ------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks h -> block(h) over an embedding; the formula is the test's."""

    def __init__(self, block: type[nn.Module], *, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Formula(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())


class Plain(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class SkipSecond(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class InPlace(Formula):
    def forward(self, x: Tensor) -> Tensor:
        y = 1.0 * self.inner[0](x)
        y += x
        return y


class InPlaceOnAView(Formula):
    """A linear layer's output is a view in torch, and the graph of adding to one is no add."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner[0](x)
        y += x
        return y


class NegativeBranch(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.inner(x), alpha=-1)


class Minus(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.inner(x)


class TwoAdds(Formula):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x)
        return x + 0.5 * self.inner(x)


class ScaledBranch(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.inner(x), alpha=2)


class Chain(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Twice(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


class TwiceAndMore(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)) + x


class TwiceHidden(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.add(self.inner(x), x + self.inner(x), alpha=2)


class Mean(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.mean(-1, keepdim=True)


class Gate(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.inner(x))


class ScaledSkip(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.inner(x), x, alpha=2)


class Negative(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - x


class HalfSkip(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.inner(x)


class PostNorm(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x + self.inner(x), (4,))


class Shuffled(Formula):
    """An add of the stream in another order of features is no skip."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) + self.inner(x)


def _unit_skips(model: nn.Module, **options: Any) -> list[float | str]:
    with gradscope.watch(model, "blocks.*", **options) as scope:
        for _ in range(2):  # the second step has no proof of its own
            out = model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
            loss = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
            loss.backward()
            scope.step()
    assert scope.faults == {}
    found: list[list[float | str]] = []
    for step in (0, 1):
        t = scope.record.table(step=step, signal="activation", statistic="unit_skip")
        order = np.argsort(t["depth"])
        found.append([t["value"][i] if t["status"][i] == "ok" else t["status"][i] for i in order])
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    "block", [Plain, SkipSecond, InPlace, NegativeBranch, Minus, TwoAdds, ScaledBranch]
)
def test_a_unit_skip_is_seen(block: type[nn.Module]) -> None:
    assert _unit_skips(Stack(block)) == [1.0, 1.0, 1.0, LAST]


@pytest.mark.parametrize(
    "block",
    [
        Chain,
        Twice,
        TwiceAndMore,
        TwiceHidden,
        Mean,
        Gate,
        ScaledSkip,
        Negative,
        HalfSkip,
        PostNorm,
        Shuffled,
        InPlaceOnAView,
    ],
)
def test_what_is_no_unit_skip_is_absent(block: type[nn.Module]) -> None:
    assert _unit_skips(Stack(block)) == ["no unit skip"] * 3 + [LAST]


class WithAuxiliaryHead(Stack):
    """The second position has a consumer besides the next block."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.embedding(tokens)
        early = x
        for k, block in enumerate(self.blocks):
            x = block(x)
            early = x if k == 0 else early
        return self.head(x), self.head(early)


class WithEarlySkip(Stack):
    """The first position goes to the last block's output too."""

    def forward(self, tokens: Tensor) -> Tensor:
        start = x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x + start)


class Untensored(Stack):
    """An output in which nothing can be seen."""

    def forward(self, tokens: Tensor) -> Any:
        class Output:
            pass

        out = Output()
        out.logits = super().forward(tokens)  # type: ignore[attr-defined]
        return out


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen embedding"])
def test_a_second_consumer_takes_the_unit_skip_away(frozen: bool) -> None:
    model = WithAuxiliaryHead(Plain)
    model.embedding.requires_grad_(not frozen)
    first = HIDDEN if frozen else 1.0
    assert _unit_skips(model) == [first, "no unit skip", 1.0, LAST]


def test_a_consumer_behind_the_trunk_takes_the_unit_skip_away() -> None:
    assert _unit_skips(WithEarlySkip(Plain)) == ["no unit skip", 1.0, 1.0, LAST]


def test_an_opaque_output_proves_nothing() -> None:
    model = Untensored(Plain)
    with gradscope.watch(model, "blocks.*") as scope:
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    t = scope.record.table(statistic="unit_skip")
    assert sorted(t["status"].tolist()) == sorted([HIDDEN] * 3 + [LAST])


def test_blocks_called_without_their_model_prove_nothing() -> None:
    model = Stack(Plain)
    with gradscope.watch(model, "blocks.*") as scope:
        x = model.embedding(torch.tensor([[1, 2, 3]]))
        for block in model.blocks:
            x = block(x)
        (model.head(x) + x.sum()).sum().backward()
    t = scope.record.table(statistic="unit_skip")
    assert sorted(t["status"].tolist()) == sorted([HIDDEN] * 3 + [LAST])


class Headless(nn.Module):
    """A float input goes straight into the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MlpFirst() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_an_input_that_is_a_leaf_is_a_position_like_any_other() -> None:
    model, x = Headless(), torch.randn(2, 3, 4, requires_grad=True)
    with gradscope.watch(model) as scope:
        model(x).square().sum().backward()
    t = scope.record.table(statistic="unit_skip")
    skips = dict(zip(t["depth"], t["status"], strict=True))
    assert skips == {0.0: "ok", 1.0: "ok", 2.0: LAST}
    t = scope.record.table(signal="output_grad", statistic="l2")
    found = {
        (n, k): (d, v) for n, k, d, v in zip(t["layer"], t["type"], t["depth"], t["value"], strict=True)
    }
    assert {n: d for (n, _), (d, _) in found.items() if n.count(".") == 2} == {
        "blocks.0.mlp": 0.5,
        "blocks.0.attn": 1.0,
        "blocks.1.mlp": 1.5,
        "blocks.1.attn": 2.0,
    }
    assert x.grad is not None
    assert found["blocks.0", "Stream"] == (0, pytest.approx(x.grad.norm().item(), rel=1e-6))
    assert not x._backward_hooks  # a leaf outlives the pass; the hook on it does not


# -- branches --------------------------------------------------------------------------------------


class DecoyBlock(nn.Module):
    """The module called mlp only gates; what is added is the attention and the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x * self.mlp(x)


class CarryingBlock(nn.Module):
    """attn adds the stream itself: its output is the stream, not a branch of it."""

    class Carrying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.attn = self.Carrying()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        return x + self.mlp(x)


class MlpFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return x + self.attn(x)


def _branch_depths(model: nn.Module) -> dict[str, float]:
    with gradscope.watch(model) as scope:
        model(torch.tensor([[1, 2, 3], [4, 5, 6]])).sum().backward()
    t = scope.record.table(signal="output_grad", statistic="l2")
    rows = zip(t["layer"], t["depth"], strict=True)
    return {n: d for n, d in rows if n.rpartition(".")[2] in ("attn", "mlp") and not math.isnan(d)}


def test_a_decoy_branch_is_off_the_axis() -> None:
    # What comes behind the gate is no sum, so the attention's own place is not proven either.
    assert _branch_depths(Stack(DecoyBlock)) == {}


def test_a_module_that_carries_the_stream_is_off_the_axis() -> None:
    assert _branch_depths(Stack(CarryingBlock)) == {
        "blocks.0.mlp": 1.0,
        "blocks.1.mlp": 2.0,
        "blocks.2.mlp": 3.0,
    }


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen embedding"])
def test_branches_are_numbered_as_they_run(frozen: bool) -> None:
    model = Stack(MlpFirst)
    model.embedding.requires_grad_(not frozen)
    assert _branch_depths(model) == {
        "blocks.0.mlp": 0.5,
        "blocks.0.attn": 1.0,
        "blocks.1.mlp": 1.5,
        "blocks.1.attn": 2.0,
        "blocks.2.mlp": 2.5,
        "blocks.2.attn": 3.0,
    }


@pytest.mark.parametrize("variant", gradscope.reference.VARIANTS)
def test_the_reference_transformer_has_its_branches_on_the_axis(variant: str) -> None:
    torch.manual_seed(0)
    model = gradscope.reference.Transformer(variant, depth=2, width=8, heads=2, vocabulary=11, context=5)
    tokens = torch.randint(11, (2, 5))
    skip = gradscope.reference.VARIANTS[variant].skip != "none"
    post = gradscope.reference.VARIANTS[variant].norm == "post"
    record = gradscope.measure(
        lambda: model, (tokens, tokens), gradscope.reference.next_token_loss, replicates=1
    )
    t = record.table(signal="output_grad", statistic="l2")
    depths = {n: d for n, d in zip(t["layer"], t["depth"], strict=True) if n.endswith(".branch")}
    if not skip:
        assert all(math.isnan(d) for d in depths.values())
    else:
        assert depths == {
            "blocks.0.attention.branch": 0.5,
            "blocks.0.feed_forward.branch": 1.0,
            "blocks.1.attention.branch": 1.5,
            "blocks.1.feed_forward.branch": 2.0,
        }
    t = record.table(statistic="unit_skip")
    seen = sorted(t["status"].tolist())
    assert seen == sorted([*(["ok"] * 2 if skip and not post else ["no unit skip"] * 2), LAST])


def test_every_statistic_of_the_table_is_compared_above() -> None:
    compared = {
        key[4] for name in ("gpt2",) for key in _twin(EXAMPLES[name].build(), EXAMPLES[name]).value
    }
    assert compared == set(STATISTICS)
