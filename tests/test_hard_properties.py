"""Random models in random loops: every recorded norm is autograd's own, and the training never notices.

A recipe is built twice: as it is, which is watched, and as a plain twin without checkpoints and without
operations in place, with the same numbers, which is differentiated by torch.autograd.grad.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from reference import floats_in
from small_models import Truth, assert_equal, cell, hooks_of, sgd, truth
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn

import gradscope
from gradscope.collect import quick
from gradscope.collect.schedule import Schedule
from gradscope.record import Record

WIDTH = 4
LEAVES = ("linear", "norm", "tanh", "identity", "in place", "dropout")
STRUCTURES = ("tuple", "dict", "dataclass", "named", "nested")
#: What may be absent though a plain twin has it, with the reason that is given then.
#: Under re-entrant checkpointing, a module that hands its input on is hooked in both of its forwards.
ABSENT = (
    "not supported: called several times in one re-entrant checkpoint",
    "not supported: several backward passes through one forward",
)


@dataclass(frozen=True)
class Recipe:
    """One module: its kind, its children, and a number that chooses among variants of the kind."""

    kind: str
    children: tuple[Recipe, ...] = ()
    variant: int = 0


@dataclass
class Out:
    count: int
    hidden: Tensor


class Named(NamedTuple):
    ids: Tensor
    hidden: Tensor


class Node(nn.Module):
    def __init__(self, recipe: Recipe, plain: bool) -> None:
        super().__init__()
        self.kind, self.variant, self.plain = recipe.kind, recipe.variant, plain
        self.parts = nn.ModuleList(build(child, plain) for child in recipe.children)

    def run(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def forward(self, x: Tensor) -> Any:
        match self.kind:
            case "chain":
                return self.run(x)
            case "residual":
                return x + self.run(x)
            case "shared":
                for _ in range(2 + self.variant % 2):
                    x = self.run(x)
                return x
            case "branches":
                return sum((part(x) for part in self.parts), start=torch.zeros_like(x))
            case "detached":
                return x + self.run(x).detach()
            case "no grad":
                with torch.no_grad():
                    fixed = self.run(x)
                return x * 0.5 + fixed
            case "left out":
                return x if self.variant % 2 else self.run(x)
            case "checkpoint":
                x = x * 1  # what is handed through a checkpoint has a gradient of its own there
                if self.plain:
                    return self.run(x)
                reentrant = bool(self.variant % 2)
                return torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=reentrant)
            case _:
                raise AssertionError(self.kind)


class InPlace(nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(WIDTH, WIDTH), plain

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.plain:
            return torch.relu(h + x)
        h += x
        return torch.relu_(h)


class Packs(nn.Module):
    def __init__(self, recipe: Recipe, plain: bool) -> None:
        super().__init__()
        self.form = STRUCTURES[recipe.variant % len(STRUCTURES)]
        self.inner = build(recipe.children[0], plain)

    def forward(self, x: Tensor) -> Any:
        h = self.inner(x)
        match self.form:
            case "tuple":
                return h, None
            case "dict":
                return {"ids": torch.arange(2), "hidden": h}
            case "dataclass":
                return Out(3, h)
            case "named":
                return Named(torch.arange(2), h)
            case _:
                return ({"a": [h]}, True)


class Unpacks(nn.Module):
    """A module whose child gives a structure."""

    def __init__(self, recipe: Recipe, plain: bool) -> None:
        super().__init__()
        self.packed = Packs(recipe, plain)

    def forward(self, x: Tensor) -> Tensor:
        return floats_in(self.packed(x))[0]


def build(recipe: Recipe, plain: bool) -> nn.Module:
    match recipe.kind:
        case "linear":
            return nn.Linear(WIDTH, WIDTH)
        case "norm":
            return nn.LayerNorm(WIDTH)
        case "tanh":
            return nn.Tanh()
        case "identity":
            return nn.Identity()
        case "dropout":
            return nn.Dropout(0.0)
        case "in place":
            return InPlace(plain)
        case "structure":
            return Unpacks(recipe, plain)
        case _:
            return Node(recipe, plain)


class Model(nn.Module):
    """The input always carries gradient: what is not reached is so because the recipe says it."""

    def __init__(self, recipe: Recipe, plain: bool) -> None:
        super().__init__()
        self.body = build(recipe, plain)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.body(x))


INNER = ("chain", "residual", "shared", "branches", "detached", "no grad", "left out", "checkpoint")


def _inner(children: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
    lists = st.lists(children, min_size=1, max_size=3).map(tuple)
    nodes = st.builds(Recipe, st.sampled_from(INNER), lists, st.integers(0, 5))
    return nodes | st.builds(Recipe, st.just("structure"), st.tuples(children), st.integers(0, 5))


RECIPES = st.recursive(st.builds(Recipe, st.sampled_from(LEAVES)), _inner, max_leaves=7)


@dataclass(frozen=True)
class Loop:
    """How the model is trained."""

    steps: int = 3
    micro: tuple[int, ...] = (1,)
    set_to_none: bool = True
    evaluations: int = 0
    clip: bool = False
    frozen: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    tokens: bool = True
    slow_every: int = 1
    seed: int = field(default=0)


LOOPS = st.builds(
    Loop,
    steps=st.integers(1, 3),
    micro=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    set_to_none=st.booleans(),
    evaluations=st.integers(0, 2),
    clip=st.booleans(),
    frozen=st.lists(st.integers(0, 7), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    tokens=st.booleans(),
    slow_every=st.sampled_from([1, 10]),
    seed=st.integers(0, 3),
)


def made(recipe: Recipe, loop: Loop, plain: bool) -> nn.Module:
    torch.manual_seed(loop.seed)
    model = Model(recipe, plain).to(loop.dtype)
    parameters = list(model.parameters())
    for i in loop.frozen:
        parameters[i % len(parameters)].requires_grad_(False)
    return model


def inputs(loop: Loop, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * loop.seed + step)
    shapes = [(size, 3, WIDTH) if loop.tokens else (size, WIDTH) for size in loop.micro]
    made = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [x.to(loop.dtype).requires_grad_(True) for x in made]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def first(output: Any) -> Any:
    found = floats_in(output)
    return found[0] if found else None


def trained(
    recipe: Recipe, loop: Loop, watched: bool
) -> tuple[list[float], dict[str, Tensor], Record | None, list[Truth]]:
    model = made(recipe, loop, plain=False)
    twin = made(recipe, loop, plain=True)
    optimizer = sgd(model)
    losses: list[float] = []
    expected: list[Truth] = []
    before = hooks_of(model), [set(m.__dict__) for m in model.modules()]
    scope = (
        gradscope.watch(model, layers="**", warn=False, slow_every=loop.slow_every) if watched else None
    )
    for step in range(loop.steps):
        if watched:
            twin.load_state_dict(model.state_dict())
            expected.append(
                truth(twin, *inputs(loop, step), loss=loss_of, dtype=loop.dtype, tensor_of=first)
            )
        for x in inputs(loop, step):
            loss = loss_of(model, x)
            loss.backward()
            losses.append(loss.item())
            for _ in range(loop.evaluations):
                with torch.no_grad():
                    model(100 * x)
        if loop.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=loop.set_to_none)
    if scope is not None:
        scope.close()
    assert before == (hooks_of(model), [set(m.__dict__) for m in model.modules()])
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    return losses, copy.deepcopy(model.state_dict()), scope.record if scope else None, expected


def checked(recipe: Recipe, loop: Loop) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradscope.GradscopeWarning)
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        losses, weights, record, expected = trained(recipe, loop, watched=True)
        again, same, _, _ = trained(recipe, loop, watched=False)
    assert losses == again
    assert all(torch.equal(weights[k], same[k]) for k in weights)
    assert record is not None
    if all(g is None for t in expected for g in t.param_grad.values()):
        return  # nothing is trained: there is no step
    assert [s.step for s in record.steps] == list(range(loop.steps))
    relative = 1e-9 if loop.dtype == torch.float64 else 2e-4
    for step, t in enumerate(expected):
        compare(record, t, step, relative)


def compare(record: Record, t: Truth, step: int, relative: float) -> None:
    for signal, by_layer in (("activation", t.activation), ("output_grad", t.output_grad)):
        for layer, calls in by_layer.items():
            for call, norm in enumerate(calls):
                found, said = cell(record, layer, signal, step=step, call=call)
                if norm is None:
                    assert said != "ok", (layer, signal, call, found)
                elif said == "ok":
                    near(found, norm, relative)
                else:
                    assert said in ABSENT and signal == "output_grad", (layer, signal, call, said)
    for name, norm in t.param_grad.items():
        found, said = cell(record, name, "param_grad", step=step)
        # After zero_grad(set_to_none=False) a gradient that does not come is a zero that does.
        if norm is None:
            assert said == "no gradient path" or found == 0.0, (name, said, found)
        else:
            assert said == "ok", (name, said)
            near(found, norm, relative)


def near(found: float, expected: float, relative: float) -> None:
    if max(abs(found), abs(expected)) > (1e-15 if relative < 1e-6 else 1e-6):
        assert_equal(found, expected, relative)


QUIET: dict[str, Any] = {
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
    "deadline": None,
}


@settings(max_examples=50, **QUIET)
@given(RECIPES, LOOPS)
def test_random_models_in_random_loops(recipe: Recipe, loop: Loop) -> None:
    checked(recipe, loop)


@pytest.mark.skipif(not quick.available(), reason="the extension module was not built")
def test_random_models_in_ordinary_steps() -> None:
    """The same where the quick way takes what it can: float32, without slow statistics."""
    taken = {"forward": 0, "gradient": 0}

    @settings(max_examples=60, **QUIET)
    @given(RECIPES, LOOPS)
    def check(recipe: Recipe, loop: Loop) -> None:
        checked(recipe, replace(loop, dtype=torch.float32))

    class Counted:
        def __init__(self, **options: Any) -> None:
            self._way = made_by(**options)

        def __getattr__(self, name: str) -> Any:
            method = getattr(self._way, name)

            def counted(*args: Any) -> Any:
                found = method(*args)
                if found and name in taken:
                    taken[name] += 1
                return found

            return counted

    made_by = quick._native.Quick
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "slow", lambda self, step: False)
        patch.setattr(quick, "_native", SimpleNamespace(Quick=Counted))
        check()
    assert taken["forward"] > 200 and taken["gradient"] > 200, taken


@pytest.mark.slow
@settings(max_examples=3000, **QUIET)
@given(RECIPES, LOOPS)
def test_many_random_models_in_random_loops(recipe: Recipe, loop: Loop) -> None:
    checked(recipe, loop)
