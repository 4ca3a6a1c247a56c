"""Renamed, added and removed blocks, layers and parameters: in a gradient baseline and in `compare`."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope import gate
from gradscope.analysis.renaming import paired_off, renames

NAMES = {"blocks": "blocks", "norm": "norm", "up": "up", "down": "down", "gain": "gain", "head": "head"}
BLOCK = 3
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, names: dict[str, str], extra: str) -> None:
        super().__init__()
        self.names = names
        setattr(self, names["norm"], nn.LayerNorm(12))
        setattr(self, names["up"], nn.Linear(12, 12))
        setattr(self, names["down"], nn.Linear(12, 12, bias=extra != "no bias"))
        owner, _, gain = names["gain"].rpartition(".")
        holder = self
        if owner:
            holder = nn.Module()
            self.add_module(owner, holder)
        holder.register_parameter(gain, nn.Parameter(torch.randn(12)))
        self.extra = nn.LayerNorm(12) if extra == "norm" else None

    def forward(self, x: Tensor) -> Tensor:
        part = {key: attrgetter(self.names[key])(self) for key in ("norm", "up", "down", "gain")}
        y = part["down"](torch.tanh(part["up"](part["norm"](x)))) * part["gain"]
        return x + (y if self.extra is None else self.extra(y))


class Net(nn.Module):
    def __init__(self, depth: int, names: dict[str, str], extra: str) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 12)
        self.names = names
        blocks = [Block(names, extra if k == BLOCK else "") for k in range(depth)]
        setattr(self, names["blocks"], nn.ModuleList(blocks))
        setattr(self, names["head"], nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in getattr(self, self.names["blocks"]):
            x = block(x)
        return getattr(self, self.names["head"])(x)


def maker(
    *, later: bool = False, depth: int = 6, extra: str = "", **renamed: str
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        if later:
            torch.rand(3)
        return Net(depth, NAMES | renamed, extra)

    return make


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logsumexp(-1).mean()


@pytest.fixture(scope="module")
def baseline() -> gate.Baseline:
    return gate.take(maker(), X, loss)


RENAMED = [
    ({"blocks": "layers"}, ["blocks → layers"]),
    (
        {"up": "expand", "down": "contract"},
        ["blocks.*.up → blocks.*.expand, blocks.*.down → blocks.*.contract"],
    ),
    ({"gain": "scale"}, ["blocks.*.gain → blocks.*.scale"]),
    ({"head": "classifier"}, ["head → classifier"]),
    ({"blocks": "h", "norm": "ln", "gain": "g"}, ["blocks.*.norm → h.*.ln", "blocks.*.gain → h.*.g"]),
]


@pytest.mark.parametrize("later", [False, True], ids=["same seeds", "other seeds"])
@pytest.mark.parametrize(("renamed", "says"), RENAMED, ids=[",".join(r) for r, _ in RENAMED])
def test_a_baseline_matches_new_names(baseline, renamed, says, later) -> None:
    outcome = gate.check(baseline, maker(later=later, **renamed), X, loss)
    assert (outcome.status, outcome.tier) == ("passed", "other seeds" if later else "same seeds"), outcome
    text = " ".join(str(outcome).split())
    assert "renamed: " in text and all(word in text for word in says)


@pytest.mark.parametrize(("renamed", "says"), RENAMED, ids=[",".join(r) for r, _ in RENAMED])
def test_a_change_under_a_new_name_is_found(baseline, renamed, says) -> None:
    def make() -> nn.Module:
        model = maker(**renamed)()
        names = NAMES | renamed
        block = getattr(model, names["blocks"])[BLOCK]
        with torch.no_grad():
            getattr(block, names["down"]).weight.mul_(1.2)
        return model

    outcome = gate.check(baseline, make, X, loss)
    assert outcome.failed and outcome.where == f"blocks.{BLOCK}", outcome
    assert f"blocks.{BLOCK}.down.weight" in outcome.layers


def test_the_same_values_are_the_same_parameter_under_any_name(baseline) -> None:
    outcome = gate.check(baseline, maker(gain="scale.value"), X, loss)
    assert (outcome.status, outcome.tier) == ("passed", "same seeds"), outcome
    assert "blocks.*.gain → blocks.*.scale.value" in " ".join(str(outcome).split())


@pytest.mark.parametrize(
    ("extra", "names", "word"),
    [("norm", ["extra.weight", "extra.bias"], "added"), ("no bias", ["down.bias"], "removed")],
)
def test_parameters_that_came_or_went_are_named(baseline, extra, names, word) -> None:
    outcome = gate.check(baseline, maker(extra=extra), X, loss)
    assert (outcome.status, outcome.tier, outcome.where) == ("failed", "exact facts", f"blocks.{BLOCK}")
    said = {change.layer: change.obtained for change in outcome.changes if change.feature == "parameter"}
    assert set(said) == {f"blocks.{BLOCK}.{name}" for name in names}
    assert all(text.startswith(word) for text in said.values())


@pytest.mark.parametrize(("depth", "word"), [(7, "added"), (5, "removed")])
def test_blocks_that_came_or_went_are_named(baseline, depth, word) -> None:
    outcome = gate.check(baseline, maker(depth=depth), X, loss)
    assert outcome.status == "not applicable"
    assert {c.layer: c.obtained for c in outcome.changes}[f"blocks.{max(depth, 6) - 1}"] == word


# -- two Records -----------------------------------------------------------------------------------


def measured(**changes: object) -> gradscope.Record:
    return gradscope.measure(maker(**changes), X, loss, 3)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def record() -> gradscope.Record:
    return measured()


@pytest.mark.parametrize(("renamed", "says"), RENAMED, ids=[",".join(r) for r, _ in RENAMED])
def test_two_records_match_new_names(record, renamed, says) -> None:
    found = gradscope.compare(measured(**renamed), record)
    assert found.same, found
    assert (found.added, found.removed) == ((), ())
    text = " ".join(str(found).split())
    assert "renamed, matched by depth: " in text and all(word in text for word in says)


@pytest.mark.parametrize(
    ("extra", "names"), [("norm", ["extra.weight", "extra.bias"]), ("no bias", ["down.bias"])]
)
def test_two_records_name_parameters_that_came_or_went(record, extra, names) -> None:
    names = tuple(f"blocks.{BLOCK}.{name}" for name in names)
    other = measured(extra=extra)
    here, gone = gradscope.compare(other, record), gradscope.compare(record, other)
    added = here.added if extra == "norm" else gone.added
    removed = gone.removed if extra == "norm" else here.removed
    assert added == removed == names
    assert not here.same and not gone.same


def test_two_records_match_new_names_beside_a_new_block(record) -> None:
    found = gradscope.compare(measured(depth=7, blocks="layers"), record)
    assert ("blocks.2", "layers.2") in found.renamed
    assert found.added == ("layers.6",)  # its parameters are not listed again
    back = gradscope.compare(record, measured(depth=7, blocks="layers"))
    assert back.removed == ("layers.6",)


# -- the parts -------------------------------------------------------------------------------------


def test_the_surest_test_goes_first() -> None:
    def first(old: str, new: str) -> bool:
        return (old, new) == ("a", "y")

    assert paired_off(["a", "b", "c"], ["x", "y", "z"], first, lambda old, new: new != "z") == {
        "y": "a",
        "x": "b",
    }


def test_new_names_in_words() -> None:
    blocks = [(f"h.{k}.{w}", f"layers.{k}.{w}") for k in range(9) for w in ("q.weight", "k.weight")]
    assert renames(blocks) == "h → layers"
    assert renames([("a.b", "a.c"), ("weight", "w")]) == "a.b → a.c, weight → w"
    assert renames([("h.3.q", "h.3.k")]) == "h.3.q → h.3.k"
    assert renames([(f"{k}a", f"{k}b") for k in range(6)]).endswith("3a → 3b and 2 more")
