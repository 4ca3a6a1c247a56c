"""A diagnosis: causes above symptoms, the order of layers, rules of one's own, and its text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from planted import (
    TEXT,
    WIDTH,
    Chain,
    Massive,
    classified,
    data,
    killed,
    measured,
    only,
    orthogonal,
    reasons,
    residual_chain,
    trained,
    transformer,
)
from synthetic import Builder, flat_record
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import (
    RULES,
    SEVERITIES,
    Finding,
    Limits,
    NotChecked,
    Threshold,
    diagnose,
    rule,
)
from gradscope.analysis.view import Site, View
from gradscope.errors import QuantityError
from gradscope.record import Record, Rows, Step
from gradscope.reference import next_token_loss
from gradscope.show.findings import render


def test_causes_stand_above_their_symptoms() -> None:
    diagnosis = killed(True)
    roots = [f.rule for f in diagnosis.roots]
    assert roots[0] == "dead_layer"
    vanishing = only(diagnosis, "vanishing")
    assert vanishing.because_of is not None
    assert diagnosis.findings[vanishing.because_of].rule == "dead_layer"
    text = str(diagnosis)
    assert text.index("dead_layer") < text.index("because of this: CRITICAL vanishing")
    for i, finding in enumerate(diagnosis.findings):
        assert finding.because_of is None or finding.because_of < i
    assert [SEVERITIES.index(f.severity) for f in diagnosis.roots] == sorted(
        SEVERITIES.index(f.severity) for f in diagnosis.roots
    ) or diagnosis.findings[0].rule == "dead_layer"


def made_rule(
    name: str, step: int, trunk: str = "h", because: tuple[str, ...] = (), **options: Any
) -> Any:
    @rule(
        name=name,
        title=name,
        citation="none",
        thresholds={"t": Threshold(value=1.0, unit="1", source="test")},
        explained_by=because,
        **options,
    )
    def judge(view: View, limits: Limits) -> Iterator[Finding]:
        """A finding at a given step."""
        yield limits.finding(
            "t", value=2.0, message=name, cause="c", remedy="r", steps=(step, step), trunk=trunk
        )

    return judge


def linked(*rules: Any) -> dict[str, str | None]:
    diagnosis = diagnose(flat_record(np.ones((1, 5))), rules=rules)
    return {
        f.rule: None if f.because_of is None else diagnosis.findings[f.because_of].rule
        for f in diagnosis.findings
    }


def test_what_explains_what() -> None:
    # Earlier, on the same trunk, and named: explained.
    assert linked(made_rule("a", 3), made_rule("b", 5, because=("a",))) == {"a": None, "b": "a"}
    # Later: not.
    assert linked(made_rule("a", 7), made_rule("b", 5, because=("a",))) == {"a": None, "b": None}
    # Of another trunk: only what is critical spreads.
    other = made_rule("b", 5, trunk="k", because=("a",))
    assert linked(made_rule("a", 3), other) == {"a": None, "b": None}
    assert linked(made_rule("a", 3, severity="critical"), other) == {"a": None, "b": "a"}
    # A note explains nothing.
    assert linked(made_rule("a", 3, severity="note"), made_rule("b", 5, because=("a",)))["b"] is None
    # Each names the other: no circle.
    assert linked(made_rule("a", 3, because=("b",)), made_rule("b", 3, because=("a",))) == {
        "a": None,
        "b": "a",
    }
    # A chain of three, and the first of two candidates.
    chain = [made_rule("a", 1), made_rule("b", 2, because=("a",)), made_rule("c", 3, because=("b", "a"))]
    assert linked(*chain) == {"a": None, "b": "a", "c": "b"}


class Backwards(nn.Module):
    """x + f(x), then + g(x), with g defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Shared(Chain):
    """One block, called four times."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(4):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("layers", [None, "**"])
@pytest.mark.parametrize("kind", ["backwards", "shared", "transformer"])
def test_modules_come_in_the_order_of_the_forward_pass(kind: str, layers: str | None) -> None:
    torch.manual_seed(0)
    if kind == "transformer":
        model, batch, loss = transformer("pre_norm", 3)(), TEXT, next_token_loss
    else:
        model = (
            Chain(Backwards(), Backwards()) if kind == "backwards" else Shared(orthogonal(), orthogonal())
        )
        batch, loss = next(data()), classified
    record = gradscope.measure(model, [batch], loss, layers=layers)
    came: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: came.append(name))
    loss(model, batch)
    sites = [site for site in View(record).modules if site.type != "Stream"]
    watched = {site.layer for site in sites}
    assert [site.layer for site in sites] == [name for name in came if name in watched]
    streams = [i for i, site in enumerate(View(record).modules) if site.type == "Stream"]
    assert [View(record).modules[i + 1].layer.split(".")[:2] for i in streams] == [["blocks", "0"]]


# -- the interface -------------------------------------------------------------------------------


@rule(
    name="loud",
    title="loud layer",
    citation="my notes",
    thresholds={"high": Threshold(value=50.0, unit="activation", source="my notes")},
    needs=[("activation", "absmax")],
)
def loud(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """A layer with a large activation."""
    grid = view.grid("activation", "absmax")
    for site, column in zip(grid.sites, grid.value.T, strict=True):
        if column.max() > limits["high"]:
            yield limits.finding(
                "high",
                value=float(column.max()),
                sites=[site],
                steps=view.span(range(len(view.steps))),
                message="loud",
                cause="loud",
                remedy="hush",
            )


def test_a_rule_of_ones_own() -> None:
    record = measured(lambda: Chain(*(orthogonal(100.0 if k == 1 else 1.0) for k in range(3))), 1)
    diagnosis = diagnose(record, rules=[*RULES.values(), loud])
    assert diagnosis.of("loud")[0].layers == ("blocks.1",)
    assert diagnosis.of("loud")[0].citation == "my notes"
    assert diagnose(record, rules=[loud]).checked == ("loud",)
    assert not diagnose(record, rules=[loud], thresholds={"loud": {"high": 1e9}}).findings
    assert "loud" not in RULES and not diagnose(record).of("loud")


def test_a_rule_that_could_not_look_says_so() -> None:
    record = measured(residual_chain, 1, statistics=["l2"])
    diagnosis = diagnose(record)
    blind = {item.rule for item in diagnosis.not_checked}
    for name in ("dead_units", "saturation", "massive_activations", "rank_collapse", "underflow"):
        assert name in blind and not diagnosis.of(name)
    assert {"update_ratio", "spike"} <= blind  # one step of a measurement has neither
    assert "statistics=" in reasons(diagnosis, "dead_units")
    assert "not checked:" in str(diagnosis)


def test_no_depth_axis_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    diagnosis = diagnose(trained(model, 3, layers=nn.Linear))
    assert diagnosis.healthy
    if not trained(model, 1, layers=nn.Linear).trunks:
        assert "no depth axis" in reasons(diagnosis, "vanishing")


def test_wrong_arguments() -> None:
    record = measured(residual_chain, 1)
    with pytest.raises(
        ValueError, match=r"names no rule 'vanish'. Did you mean 'vanishing'.* The rules are non_f"
    ):
        diagnose(record, thresholds={"vanish": {"nats": 1}})
    with pytest.raises(ValueError, match=r"has no threshold 'nat'. Did you mean 'nats'. It has nats"):
        diagnose(record, thresholds={"vanishing": {"nat": 1}})
    with pytest.raises(ValueError, match="two rules named 'loud'"):
        diagnose(record, rules=[loud, dataclasses.replace(loud)])
    with pytest.raises(ValueError, match="made by the decorator"):
        diagnose(record, rules=[lambda view, limits: []])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="severity='bad' is none of"):
        rule(name="x", title="x", citation="x", thresholds={}, severity="bad")  # type: ignore[arg-type]
    with pytest.raises(QuantityError, match="no trunk 'decoder'"):
        diagnose(record, trunk="decoder")
    with pytest.raises(QuantityError, match="holds no step"):
        diagnose(Record({}))


def test_only_one_trunk() -> None:
    record = measured(lambda: Chain(*(orthogonal(0.5) for _ in range(8))))
    assert diagnose(record, trunk="blocks").of("vanishing")
    assert diagnose(record, rules=[made_rule("a", 0, trunk="other")], trunk="blocks").findings == ()


def test_a_saved_record_is_judged_the_same(tmp_path: Any) -> None:
    record = measured(lambda: Chain(*(orthogonal(0.5) for _ in range(8))))
    loaded = Record.load(record.save(tmp_path / "run.jsonl"))
    assert diagnose(loaded) == diagnose(record)


def test_scope_diagnose_and_the_text() -> None:
    torch.manual_seed(0)
    model = Chain(*(orthogonal(0.5) for _ in range(8)))
    with gradscope.watch(model, warn=False) as scope:
        classified(model, next(data())).backward()
    diagnosis = scope.diagnose(rules=[RULES["vanishing"]])
    assert not diagnosis.healthy
    text, tree = str(diagnosis), render(diagnosis, 80)
    for shown in (text, tree):
        for word in (
            "Chain, step 0: unhealthy: 1 critical",
            "CRITICAL",
            "cause: ",
            "do: ",
            "arXiv:1611.01232",
        ):
            assert word in shown
    assert max(map(len, text.splitlines())) <= 100
    assert max(map(len, tree.splitlines())) <= 80
    assert repr(diagnosis).startswith("<Diagnosis of Chain")


# -- what could not be looked at -----------------------------------------------------------------


def test_a_record_without_values_is_not_healthy_but_nothing_recorded() -> None:
    empty = Record({"model": "M"}, (Step.of(Rows.of([]), [], {}, step=0, replicate=0),))
    b = Builder()
    b.module(1.0, "h.0", "activation", {"l2": "compiled", "count": "compiled"})
    b.module(1.0, "h.0", "output_grad", {"l2": "compiled"})
    for record in (empty, Record({"model": "M"}, (b.step(),))):
        diagnosis = diagnose(record)
        assert diagnosis.word == "nothing recorded" and not diagnosis.healthy and diagnosis.values == 0
        assert "nothing recorded: no value was measured" in diagnosis.summary
        assert {item.rule for item in diagnosis.not_checked} == set(RULES)
    assert "compiled" in str(diagnosis)


def test_a_record_that_no_rule_can_read_is_not_healthy() -> None:
    b = Builder()
    b.module(1.0, "h.0", "activation", {"mean": 1.0})
    diagnosis = diagnose(Record({"model": "M"}, (b.step(),)))
    assert {item.rule for item in diagnosis.not_checked} == set(RULES)
    assert diagnosis.word == "nothing checked" and not diagnosis.healthy
    # One rule that looks and finds nothing is enough to say something.
    assert diagnose(flat_record(np.ones((3, 9)))).word == "healthy"


def test_without_a_depth_axis_every_rule_that_needs_one_says_so() -> None:
    b = Builder()
    values = {"l2": 1.0, "count": 8.0, "absmax": 0.5, "token_cosine": 0.3}
    b.module(math.nan, "net", "activation", values, trunk="")
    b.module(math.nan, "net", "output_grad", {"l2": 1.0, "count": 8.0}, trunk="")
    b.parameter(math.nan, "net.weight", {("param_grad", "l2"): 1.0}, trunk="")
    diagnosis = diagnose(Record({"replicates": "batch"}, (b.step(),)))
    for rule_ in (
        "no_gradient_path",
        "rank_collapse",
        "starved_attention",
        "one_layer_off",
        "vanishing",
        "exploding",
        "forward_vanishing",
        "forward_exploding",
    ):
        assert "no depth axis" in reasons(diagnosis, rule_), rule_


def test_a_few_steps_are_too_few_for_what_is_judged_over_steps() -> None:
    diagnosis = diagnose(measured(residual_chain, 1))
    assert "needs 3 recorded steps of one run; there is 1" in reasons(diagnosis, "dead_layer")
    assert "a measurement makes no updates" in reasons(diagnosis, "update_ratio")
    assert not reasons(diagnose(trained(residual_chain(), 3)), "dead_layer")


def test_parameters_alone_are_not_enough_to_be_healthy() -> None:
    # A compiled model of which only weights could be read.
    b = Builder()
    for signal in ("activation", "output_grad"):
        b.module(1.0, "h.0", signal, {"l2": "compiled", "count": "compiled", "zeros": "compiled"})
    b.parameter(1.0, "h.0.weight", {("param_grad", "l2"): 1.0, ("weight", "l2"): 2.0})
    diagnosis = diagnose(Record({"replicates": "run"}, (b.step(),)))
    assert diagnosis.values == 2
    assert diagnosis.word == "nothing checked" and not diagnosis.healthy


def test_rules_with_one_reason_share_a_line() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1.5, (3, 9)).cumsum(1))
    diagnosis = diagnose(flat_record(norms))
    said = [names for names, reason in diagnosis.blind_spots if "inconclusive" in reason]
    assert said == ["vanishing, exploding"]
    assert {n for names, _ in diagnosis.blind_spots for n in names.split(", ")} == {
        item.rule for item in diagnosis.not_checked
    }
    for shown in (str(diagnosis), render(diagnosis, 200)):
        assert shown.count("inconclusive") == 1 and "vanishing, exploding: grad_l2 over h" in shown


# -- replicates ----------------------------------------------------------------------------------


def test_a_fault_that_every_replicate_has_is_one_finding() -> None:
    def make() -> nn.Module:
        return Chain(Massive(0), Massive(0), Massive(500.0), Massive(0), width=64)

    record = gradscope.measure(make, next(data(size=256)), classified, 3)
    found = only(diagnose(record), "massive_activations")
    assert found.layers[0] == "blocks.2" and "One of 3 such findings" in found.message
    one = only(
        diagnose(gradscope.measure(make, next(data(size=256)), classified, 1)), "massive_activations"
    )
    assert "such findings" not in one.message


def test_what_differs_between_replicates_stays_apart() -> None:
    @rule(
        name="each",
        title="each",
        citation="none",
        thresholds={"t": Threshold(value=1.0, unit="1", source="test")},
    )
    def each(view: View, limits: Limits) -> Iterator[Finding]:
        """Findings at several layers and steps."""
        for layer, step in (("h.0", 0), ("h.0", 1), ("h.1", 0), ("h.0", 9)):
            site = Site("h", 1.0, layer, "Block", 0)
            yield limits.finding(
                "t", value=2.0, message="m", cause="c", remedy="r", steps=(step, step + 1), sites=[site]
            )

    found = diagnose(flat_record(np.ones((2, 5))), rules=[each]).findings
    assert [(f.layers, f.steps) for f in found] == [
        (("h.0",), (0, 2)),
        (("h.1",), (0, 1)),
        (("h.0",), (9, 10)),
    ]
    # In one run they are different things.
    assert len(diagnose(flat_record(np.ones((1, 5))), rules=[each]).findings) == 4
