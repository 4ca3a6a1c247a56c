from __future__ import annotations

import csv
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import gradscope
from gradscope.analysis import Interval, interval
from gradscope.errors import StudyError
from gradscope.record import Record
from gradscope.study import PLANS, load_text, run_study
from gradscope.study import claims_at_initialisation as at_initialisation
from gradscope.study import claims_in_training as in_training
from gradscope.study import store as store_module
from gradscope.study.claims_at_initialisation import Flow, Tokens
from gradscope.study.claims_in_training import Trained
from gradscope.study.outcome import TrainingOutcome
from gradscope.study.plan import Plan, Unit
from gradscope.study.store import _MEASURING, Store
from gradscope.study.text import MINIMUM_BYTES, Text
from gradscope.study.words import factor_text, interval_text, number_text

TINY = PLANS["tiny"]
NONE = Interval(estimate=math.nan, low=math.nan, high=math.nan, confidence=0.95, count=0)


def about(estimate: float, half: float = 0.01, count: int = 5) -> Interval:
    return Interval(
        estimate=estimate, low=estimate - half, high=estimate + half, confidence=0.95, count=count
    )


def flow(depth: int, rate: float, half: float = 0.01, zeros: int = 0) -> Flow:
    """A flow whose increment is rate ± half nats per block, and Δ accordingly."""
    return Flow(
        depth=depth,
        delta=about(rate * depth, half * depth),
        increment=about(rate, half),
        zeros=zeros,
        values=5 * (depth + 1),
    )


def flows(*rates: float, half: float = 0.01) -> list[Flow]:
    return [flow(depth, rate, half) for depth, rate in zip((6, 12, 24, 48), rates, strict=False)]


# -- the text ------------------------------------------------------------------------------------


def test_the_two_splits_are_the_whole_text_in_stretches(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, size=100_001).astype(np.uint8).tobytes()
    file = tmp_path / "text.bin"
    file.write_bytes(content)
    text = load_text(file)
    assert text.validation == content[9 * 4096 : 10 * 4096] + content[19 * 4096 : 20 * 4096]
    rest = content[: 9 * 4096] + content[10 * 4096 : 19 * 4096] + content[20 * 4096 :]
    assert text.train == rest


def test_targets_are_the_next_bytes_and_the_order_depends_on_the_seed_alone() -> None:
    text = Text("ascending", bytes(range(256)) * 40, bytes(range(256)) * 4)
    first = next(text.batches(seed=3, batch=5, context=7))
    inputs, targets = first
    assert inputs.shape == targets.shape == (5, 7)
    assert ((inputs + 1) % 256 == targets).all()
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    again = next(text.batches(seed=3, batch=5, context=7))
    assert (again[0] == inputs).all()
    other = next(text.batches(seed=4, batch=5, context=7))
    assert (other[0] != inputs).any()
    windows, next_bytes = text.validation_windows(windows=9, context=16)
    assert windows.shape == (9, 16)
    assert windows[0, 0] == 0
    assert next_bytes[-1, -1] == 255  # the last byte of the split


def test_unigram_cross_entropy_of_two_equally_frequent_bytes() -> None:
    text = Text("ab", b"ab" * 100_000, b"ab" * 100)
    # One count is added to each of 256 bytes.
    assert text.unigram_nats(windows=3, context=8) == pytest.approx(
        -math.log(100_001 / 200_256), rel=1e-12
    )


def test_the_language_reference_is_real_text_and_no_paragraph_stands_twice() -> None:
    text = load_text()
    whole = text.train + text.validation
    assert len(whole) > 300_000
    assert 0.08 < len(text.validation) / len(whole) < 0.11
    assert 2.5 < text.unigram_nats(windows=64, context=64) < 3.6
    inner = [p for p in text.train.split(b"\n\n") if len(p) > 400]
    assert not [p for p in inner if p in text.validation]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: path.write_bytes(b""), "0 bytes are too few"),
        (lambda path: path.write_bytes(b"x" * (MINIMUM_BYTES - 1)), str(MINIMUM_BYTES)),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_with_what_to_do(make, says, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    make(path)
    with pytest.raises(StudyError, match=says) as caught:
        load_text(path)
    assert str(path) in str(caught.value)


# -- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: plan.name)
def test_plans_name_known_variants_and_have_one_file_per_unit(plan: Plan) -> None:
    from gradscope.reference import INITIALIZATIONS, VARIANTS

    assert {*plan.variants, *plan.initialization_variants, *plan.training_variants} <= set(VARIANTS)
    assert set(plan.learning_rates) <= set(plan.training_variants)
    assert set(plan.initializations) <= set(INITIALIZATIONS) - {"torch"}
    losses: dict[Unit, float] = {
        unit: unit.learning_rate
        for variant in plan.training_variants
        for depth in plan.training_depths
        for unit in plan.rate_units(variant, depth)
    }
    units = plan.units(losses)
    assert len({unit.slug for unit in units}) == len(units) == plan.total_units
    assert sum(unit.work for unit in units) == pytest.approx(plan.total_work)
    for variant in plan.training_variants:
        assert list(plan.rates(variant)) == sorted(plan.rates(variant))


def test_the_default_plan_is_the_study_that_was_asked_for() -> None:
    plan = PLANS["default"]
    assert plan.depths == (6, 12, 24, 48)
    assert plan.seeds == 5
    assert plan.training_depths == (12,)
    assert len(plan.training_variants) >= 5
    assert all(len(plan.rates(variant)) == 3 for variant in plan.training_variants)
    assert (plan.rate_seeds, plan.best_seeds) == (1, 3)
    assert not plan.robustness
    full = PLANS["full"]
    assert full.robustness
    assert max(full.depths) == 96
    assert max(full.training_depths) == 48
    assert full.rate_seeds >= 3
    assert not full.learning_rates  # one range for all, or robustness compares different things


def test_the_best_rate_is_the_lowest_mean_loss_and_never_one_that_diverged() -> None:
    plan = replace(TINY, other_rates=(0.1, 0.2, 0.3), rate_seeds=2)
    losses: dict[Unit, float] = {}
    values = {0.1: (3.0, 3.0), 0.2: (1.0, 4.0), 0.3: (0.5, math.inf)}
    for unit in plan.rate_units("no_skip", 2):
        assert plan.best_rate("no_skip", 2, losses) is None
        losses[unit] = values[unit.learning_rate][unit.seed]
    assert plan.best_rate("no_skip", 2, losses) == 0.2
    equal: dict[Unit, float] = {unit: 1.0 for unit in losses}
    assert plan.best_rate("no_skip", 2, equal) == 0.1
    diverged: dict[Unit, float] = {unit: math.nan for unit in losses}
    assert plan.best_rate("no_skip", 2, diverged) == 0.1
    one_left = {unit: 3.0 if unit.learning_rate == 0.3 else math.nan for unit in losses}
    assert plan.best_rate("no_skip", 2, one_left) == 0.3


# -- the sentences: both directions of every claim -------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "half", "verdict"),
    [
        (-1.0, 0.1, "vanishes"),
        (-0.25, 0.001, "is undecided"),  # Δ = −3 at 12 blocks
        (-0.30, 0.1, "is undecided"),
        (0.0, 0.1, "is preserved"),
        (0.2, 0.01, "is preserved"),
        (0.3, 0.1, "is undecided"),
        (1.0, 0.1, "explodes"),
    ],
)
def test_flow_verdicts_need_the_whole_interval(rate: float, half: float, verdict: str) -> None:
    assert at_initialisation.flow_verdict(flow(12, rate, half)) == verdict


def test_without_an_interval_nothing_is_decided_and_zeros_are_underflow() -> None:
    single = interval([-40.0])
    assert (
        at_initialisation.flow_verdict(Flow(depth=12, delta=single, increment=single)) == "is undecided"
    )
    zeros = interval([-math.inf, -math.inf])
    under = Flow(depth=12, delta=zeros, increment=NONE, zeros=3, values=26)
    assert at_initialisation.flow_verdict(under) == "underflows"
    sentence = at_initialisation.flow("x", [under])
    assert "underflows to exact zeros" in sentence
    assert "3 of 26 norms are exactly 0" in sentence
    assert "Nats per block" not in sentence  # no rate through zeros


def test_flow_says_one_verdict_for_all_depths_or_each_where_it_holds() -> None:
    vanishing = at_initialisation.flow("net", flows(-2.8, -2.8, -2.8, -2.8))
    assert "vanishes towards the input at every depth measured" in vanishing
    assert "−2.80 [−2.81, −2.79] at 6" in vanishing
    assert "4e−59 times" in vanishing  # e^(−2.8 · 48) = 4.2e−59
    mixed = at_initialisation.flow("net", flows(0.01, 0.01, 0.5, 0.5))
    assert "keeps its norm" in mixed and "at 6 and 12 blocks" in mixed
    assert "explodes towards the input at 24 and 48 blocks" in mixed


def test_overflow_is_said_and_no_rate_is_taken_through_it() -> None:
    broken = Flow(depth=48, delta=NONE, increment=about(47.0), nonfinite=4, values=245)
    assert at_initialisation.flow_verdict(broken) == "overflows"
    sentence = at_initialisation.flow("net", [flow(6, 2.0), broken])
    assert "explodes towards the input at 6 blocks; overflows" in sentence
    assert "4 of 280 norms are NaN or infinite" in sentence
    assert "47" not in sentence
    assert "reverses under He" in at_initialisation.initialisation_dependence(
        "net", {"torch": [flow(6, -2.0), flow(48, -2.0)], "He": [flow(6, 2.0), broken]}
    )


def test_contrast_holds_somewhere_everywhere_or_nowhere() -> None:
    steep, flat = flows(-2.0, -2.0, -2.0, -2.0), flows(0.03, 0.03, 0.02, 0.01)
    assert "holds at every depth measured" in at_initialisation.contrast("a", steep, "b", flat)
    swapped = at_initialisation.contrast("b", flat, "a", steep)
    assert "does not show at any depth" in swapped
    partly = at_initialisation.contrast("a", flows(-2.0, -2.0, -0.5, -2.0), "b", flat)
    assert "holds at 6, 12 and 48 blocks only" in partly
    touching = at_initialisation.contrast("a", flows(-1.005, half=0.01), "b", flows(0.0))
    assert "does not show" in touching  # the interval reaches above −1


def test_initialisation_dependence_reverses_agrees_or_differs() -> None:
    falls, rises, stays = flows(-2.0, -2.0), flows(2.0, 2.0), flows(0.01, 0.01)
    reverses = at_initialisation.initialisation_dependence("net", {"torch": falls, "He": rises})
    assert "reverses under He" in reverses
    assert "under torch it vanishes towards the input at every depth measured" in reverses
    same = at_initialisation.initialisation_dependence("net", {"torch": falls, "Xavier": falls})
    assert "does the same under every initialisation" in same
    differs = at_initialisation.initialisation_dependence("net", {"torch": falls, "Xavier": stays})
    assert "depends on the initialisation" in differs
    assert "reverses" not in differs


def test_a_net_is_dead_only_with_both_signs_and_preserved_only_with_the_norm() -> None:
    collapsed = Tokens(
        token_cosine=about(0.9999, 1e-5), qk_first=about(0.003, 1e-4), qk_last=about(6e-5, 1e-6)
    )
    alive = Tokens(token_cosine=about(0.3), qk_first=about(0.4), qk_last=about(0.5))
    half_dead = replace(collapsed, qk_last=about(0.5))
    kept, lost = flows(0.09, 0.05), flows(-3.0, -3.0)
    assert (
        "keeps the norm of its gradient at every depth measured, and the net is dead"
        in at_initialisation.dead_net("net", kept, [collapsed, collapsed])
    )
    both = at_initialisation.dead_net("net", [kept[0], lost[1]], [collapsed, collapsed])
    assert (
        "at 6 blocks, and the net is dead there by rank collapse** (and is dead at 12 blocks, too)"
        in both
    )
    assert "at 12 blocks, and the net is dead there" in at_initialisation.dead_net(
        "net", kept, [alive, collapsed]
    )
    assert "no rank collapse" in at_initialisation.dead_net("net", kept, [alive, alive])
    assert "no rank collapse" in at_initialisation.dead_net("net", kept, [half_dead, half_dead])
    gone = at_initialisation.dead_net("net", lost, [collapsed, collapsed])
    assert "is dead by rank collapse at 6 and 12 blocks" in gone
    assert "keeps the norm" not in gone


def test_not_flat_needs_zero_outside_every_interval() -> None:
    power = at_initialisation.not_flat("net", flows(0.08, 0.06, 0.04, 0.02, half=0.002))
    assert "is not flat" in power and "grows towards the input" in power
    assert "rate itself shrinks" in power
    exponential = at_initialisation.not_flat("net", flows(0.05, 0.05, half=0.002))
    assert "is not flat" in exponential and "shrinks" not in exponential
    falling = at_initialisation.not_flat("net", flows(-0.08, -0.02, half=0.002))
    assert "falls towards the input" in falling and "shrinks" in falling
    flat = at_initialisation.not_flat("net", flows(0.001, 0.06, half=0.002))
    assert "cannot be told from flat at 6 blocks" in flat


def trained(label: str, *curves: tuple[float, ...], rate: float = 2.0) -> Trained:
    return Trained(
        label=label,
        rate=rate,
        rates=(1.0, 2.0, 3.0),
        steps=(0, 10, 20, 30),
        losses=dict(enumerate(curves)),
        final=interval(c[-1] if len(c) == 4 else math.inf for c in curves),
    )


QUICK = trained("with", (5, 3, 2.5, 2.0), (5, 3, 2.4, 2.01), (5, 3, 2.6, 1.99))
SLOW = trained("without", (5, 4, 3.5, 3.3), (5, 4, 3.5, 3.31), (5, 4, 3.5, 3.29))


def test_learned_context_or_only_frequencies_or_less_or_undecided_or_diverged() -> None:
    assert "has learned from the context" in in_training.learned_context(QUICK, 3.3)
    assert "no better than byte frequencies alone" in in_training.learned_context(SLOW, 3.3)
    assert "not even learned" in in_training.learned_context(SLOW, 2.3)
    wide = trained("wide", (5, 4, 3, 2.0), (5, 4, 3, 3.3), (5, 4, 3, 4.0))
    assert "not told from byte frequencies" in in_training.learned_context(wide, 3.3)
    broken = trained("broken", (5, 4), (5, 4, 3, 2.0), (5, 4, 3, 2.0))
    assert "diverged in 1 of 3 runs" in in_training.learned_context(broken, 3.3)


def test_post_norm_alone_vanishes_is_kept_or_neither() -> None:
    assert "does not vanish by itself" in at_initialisation.post_norm_alone("post", flows(-0.02, -0.02))
    vanishing = at_initialisation.post_norm_alone("post", flows(-0.2, -0.2, -0.2, -0.2))
    assert "vanishes at 24 and 48 blocks" in vanishing and "by itself" not in vanishing
    undecided = at_initialisation.post_norm_alone("post", flows(0.02, 0.25, half=0.02))
    assert "not shown to vanish, nor" in undecided


def test_variants_that_do_the_same_stand_together() -> None:
    sentence = at_initialisation.grouped_flows(
        {"a": flows(0.0, 0.0), "b": flows(-2.0, -2.0), "c": flows(0.01, 0.01), "d": flows(0.0, 2.0)}
    )
    assert "of “a” and “c” keeps its norm (Δ within ±3 nats) at every depth measured" in sentence
    assert "of “b” vanishes towards the input at every depth measured" in sentence
    assert "of “d” keeps its norm (Δ within ±3 nats) at 6 blocks; explodes" in sentence


def test_effective_depths_from_many_to_few() -> None:
    sentence = at_initialisation.effective_depths(
        {
            "some": about(1.5),
            "more": about(2.5),
            "chain": about(96.0),
            "silent": about(0.0),
            "gone": NONE,
        },
        48,
        96,
    )
    assert "of 96 branches" in sentence
    assert "all of them in “chain”; 2.50 [2.49, 2.51] in “more”; 1.50" in sentence
    assert sentence.endswith("none in “silent”.")
    assert "gone" not in sentence
    assert "No effective depth" in at_initialisation.effective_depths({"gone": NONE}, 48, 96)


def test_better_worse_or_no_difference() -> None:
    assert "Trains better with skips" in in_training.better_with(QUICK, SLOW, about(-1.0, 0.5))
    assert "Trains worse with skips" in in_training.better_with(QUICK, SLOW, about(1.0, 0.5))
    assert "No difference shown" in in_training.better_with(QUICK, SLOW, about(-1.0, 1.5))
    open_end = interval([-math.inf, -1.0])
    assert "No difference shown" in in_training.better_with(QUICK, SLOW, open_end)


def test_faster_slower_never_or_mixed() -> None:
    faster = in_training.faster_with(QUICK, SLOW)
    assert "Trains faster with skips" in faster
    assert (
        "came at step 30, 30 and 30 (by seed), with skips it was reached at step 10, 10 and 10" in faster
    )
    assert "Not faster" in in_training.faster_with(SLOW, QUICK)
    late = trained("late", (5, 4, 4, 3.0), (5, 4, 4, 3.0))
    early = trained("early", (5, 3.2, 3.3, 3.3), (5, 3.2, 3.3, 3.3))
    assert "Trains slower with skips" in in_training.faster_with(late, early)
    mixed = trained("mixed", (5, 3, 2.5, 2.0), (5, 4, 4, 3.31))
    assert "Not shown to train faster" in in_training.faster_with(mixed, SLOW)


def test_rates_on_the_edge_are_named() -> None:
    inside = trained("inside", (1, 1, 1, 1.0))
    assert "lies inside" in in_training.rate_edges([inside])
    sentence = in_training.rate_edges(
        [inside, replace(inside, label="low", rate=1.0), replace(inside, label="high", rate=3.0)]
    )
    assert "smallest for “low”" in sentence and "largest for “high”" in sentence
    assert "inside" not in sentence


def test_robustness_follows_the_interval() -> None:
    assert "“pre” is the more robust" in in_training.robustness("pre", "post", about(-1.0, 0.5), 48)
    assert "“post” is the more robust" in in_training.robustness("pre", "post", about(1.0, 0.5), 48)
    assert "neither" in in_training.robustness("pre", "post", about(-1.0, 1.5), 48)


def test_zeros_in_training_are_said_only_where_they_are() -> None:
    clean = flow(12, -1.0)
    assert in_training.zeros_in_training("net", clean, clean) is None
    sentence = in_training.zeros_in_training("net", replace(clean, zeros=7), clean)
    assert sentence is not None
    assert "7 of 65" in sentence and "0 of 65" in sentence and "underflow" in sentence


def test_a_changed_verdict_after_training_is_said_and_nothing_else() -> None:
    kept, gone = flow(12, -0.1), flow(12, -1.5)
    sentence = in_training.flow_change("net", kept, gone)
    assert sentence is not None
    assert "at the first step it is preserved, at the last recorded one it vanishes" in sentence
    assert in_training.flow_change("net", kept, kept) is None
    assert in_training.flow_change("net", kept, flow(12, -0.25, 0.1)) is None  # undecided


def test_numbers_in_prose() -> None:
    assert number_text(-2.268) == "−2.27"
    assert number_text(4.2e-59) == "4.2e−59"
    assert number_text(0.0) == "0"
    assert number_text(math.nan) == "not known"
    assert number_text(math.inf) == "∞"
    assert factor_text(0.5) == "1.65"
    assert factor_text(math.log(956)) == "956"
    assert factor_text(-134.4) == "4e−59"
    assert factor_text(-700.0) == "1e−304"
    assert factor_text(math.log(9.99e10)) == "1e11"
    assert factor_text(-math.inf) == "0"
    assert factor_text(math.nan) == "not known"
    assert interval_text(NONE) == "not known"
    assert interval_text(interval([1.0])) == "1.00"


# -- files ---------------------------------------------------------------------------------------


OUTCOME = TrainingOutcome(
    train_loss=(5.5, math.nan, math.inf),
    validation_step=(0, 3),
    validation_loss=(5.5, 4.0),
    diverged_at=None,
    flush_denormal=True,
    cpu_time_s=1.5,
)


def test_the_store_gives_back_what_it_was_given_and_only_under_the_same_key(tmp_path: Path) -> None:
    unit = TINY.training_unit("no_skip", 2, 1e-3, 0)
    store = Store(tmp_path, "text", "code")
    assert store.load(unit) is None
    store.save(unit, Record({"model": "m"}), OUTCOME)
    found = store.load(unit)
    assert isinstance(found, TrainingOutcome)
    assert found.train_loss[0] == 5.5
    assert math.isnan(found.train_loss[1]) and found.train_loss[2] == math.inf
    assert replace(found, train_loss=()) == replace(OUTCOME, train_loss=())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{unit.slug}.json", f"{unit.slug}.jsonl"]
    # The same files, but of another text, another code, another configuration.
    assert Store(tmp_path, "other text", "code").load(unit) is None
    assert Store(tmp_path, "text", "other code").load(unit) is None
    assert store.load(replace(unit, steps=unit.steps + 1)) is None


def test_every_module_that_influences_a_number_is_in_the_key() -> None:
    package = Path(gradscope.__file__).parent
    for part in _MEASURING:
        assert (package / part).exists(), part
    code = (
        "import sys, gradscope, gradscope.study.initialisation, gradscope.study.training; "
        "gradscope.watch, gradscope.measure, gradscope.effective_depth; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'gradscope'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    covered = tuple(str(package / part).removesuffix(".py") for part in _MEASURING)
    loaded = [path for path in run.stdout.split() if not path.startswith(covered)]
    # What is left: errors, analysis and drawing, and the study's own bookkeeping.
    left = {Path(path).relative_to(package).parts[0] for path in loaded}
    assert left <= {"__init__.py", "errors.py", "analysis", "show", "study"}
    bookkeeping = {Path(path).stem for path in loaded if Path(path).parent.name == "study"}
    assert not bookkeeping & {"initialisation", "training", "text"}


def test_a_changed_source_is_another_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "gradscope"
    shutil.copytree(Path(gradscope.__file__).parent, copy)
    monkeypatch.setattr(store_module.resources, "files", lambda _: copy)
    before = store_module.code_version()
    with (copy / "show" / "plots.py").open("a", encoding="utf-8") as file:
        file.write("\n# another picture\n")
    assert store_module.code_version() == before
    with (copy / "study" / "training.py").open("a", encoding="utf-8") as file:
        file.write("\n# another training\n")
    assert store_module.code_version() != before
    assert f"gradscope {gradscope.__version__} " in before


def test_a_damaged_or_lonely_file_counts_as_not_done(tmp_path: Path) -> None:
    unit = TINY.training_unit("no_skip", 2, 1e-3, 0)
    store = Store(tmp_path, "text", "code")
    store.save(unit, Record({"model": "m"}), OUTCOME)
    whole = store.outcome_path(unit).read_bytes()
    for length in range(0, len(whole) - 2, 40):
        store.outcome_path(unit).write_bytes(whole[:length])
        assert store.load(unit) is None
    store.outcome_path(unit).write_bytes(whole)
    assert store.load(unit) is not None
    store.record_path(unit).unlink()
    assert store.load(unit) is None


# -- the whole -----------------------------------------------------------------------------------


def tiny_command(out: Path) -> list[str]:
    return [sys.executable, "-m", "gradscope.cli", "study", "--tiny", "--jobs", "2", "--out", str(out)]


def rerun(out: Path) -> str:
    """Run the tiny study in this process; what it said."""
    said = io.StringIO()
    run_study(TINY, out, jobs=2, console=Console(file=said, width=200))
    return said.getvalue()


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "records").iterdir()}


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny study."""
    out = tmp_path_factory.mktemp("tiny")
    said = rerun(out)
    assert f"[{TINY.total_units:>3}/{TINY.total_units}]" in said
    return out


@pytest.mark.xdist_group("tiny study")
def test_the_study_writes_every_picture_the_table_the_text_and_the_records(tiny_study: Path) -> None:
    names = {path.name for path in tiny_study.iterdir()}
    pictures = {
        "activation_variance.png",
        "depth_gradient.png",
        "effective_depth.png",
        "gradient_ratio.png",
        "heatmap.png",
        "loss_curves.png",
    }
    assert names == {*pictures, "records", "study.md", "table.csv"}
    text = (tiny_study / "study.md").read_text(encoding="utf-8")
    for picture in pictures:
        assert f"]({picture})" in text
        content = (tiny_study / picture).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) < 300_000
    for label in ("no skip, no norm", "pre-norm"):
        assert f"| {label} |" in text
    assert "more robust" not in text  # no claim that this plan has no data for
    units = sorted(path.name for path in (tiny_study / "records").iterdir())
    assert len(units) == 2 * TINY.total_units

    # The Records say how they were made.
    trained_record = Record.load(next((tiny_study / "records").glob("training-pre_norm-*.jsonl")))
    assert trained_record.header["flush_denormal"] is True
    assert trained_record.header["replicates"] == "run"
    assert {s.step for s in trained_record.steps} >= {0, 2, 4}
    assert all(s.loss is not None and math.isfinite(s.loss) for s in trained_record.steps)
    fresh = Record.load(tiny_study / "records" / "initialisation-pre_norm-torch-depth3.jsonl")
    assert not fresh.header.get("flush_denormal")
    assert fresh.header["dtype"] == "float64"
    assert fresh.header["replicates"] == "initialisation"
    assert {s.replicate for s in fresh.steps} == set(range(TINY.seeds))


@pytest.mark.xdist_group("tiny study")
def test_the_table_agrees_with_a_gradient_taken_by_hand(tiny_study: Path) -> None:
    import torch

    from gradscope.reference import Transformer, next_token_loss

    rows = rows_of(tiny_study)
    inputs, targets = next(load_text().batches(seed=0, batch=TINY.measure_batch, context=TINY.context))
    for variant, initialization in (("no_skip", "torch"), ("pre_norm", "torch"), ("no_skip", "he")):
        for seed in range(TINY.seeds):
            torch.manual_seed(seed)
            model = Transformer(
                variant, depth=3, width=8, heads=2, context=16, initialization=initialization
            ).double()
            stream: list[torch.Tensor] = []
            model.blocks[0].register_forward_pre_hook(lambda _, args, kept=stream: kept.append(args[0]))
            model.blocks[-1].register_forward_hook(lambda _, args, out, kept=stream: kept.append(out))
            loss = next_token_loss(model, (torch.from_numpy(inputs), torch.from_numpy(targets)))
            first, last = torch.autograd.grad(loss, stream)
            (value,) = (
                float(row["value"])
                for row in rows
                if (row["variant"], row["initialization"], row["depth"], row["seed"], row["quantity"])
                == (variant, initialization, "3", str(seed), "delta")
            )
            assert value == pytest.approx(math.log(first.norm() / last.norm()), rel=1e-9)


@pytest.mark.xdist_group("tiny study")
def test_every_number_of_the_table_is_there_or_says_why_not(tiny_study: Path) -> None:
    rows = rows_of(tiny_study)
    for row in rows:
        assert (row["status"] == "ok") == (row["value"] != ""), row
        if row["status"] == "ok":
            assert not math.isnan(float(row["value"]))
    depths = {
        (r["variant"], r["depth"]): float(r["value"])
        for r in rows
        if r["quantity"] == "effective_depth" and r["status"] == "ok"
    }
    assert depths["no_skip", "2"] == pytest.approx(4)
    assert depths["no_skip", "3"] == pytest.approx(6)
    runs = {
        (r["variant"], r["learning_rate"], r["seed"])
        for r in rows
        if r["quantity"] == "final_validation_loss"
    }
    for variant in TINY.training_variants:
        of_variant = [key for key in runs if key[0] == variant]
        assert len(of_variant) == len(TINY.rates(variant)) + TINY.best_seeds - TINY.rate_seeds


@pytest.mark.xdist_group("tiny study")
def test_a_rerun_measures_nothing_again_but_what_is_missing(tiny_study: Path) -> None:
    before = stamps(tiny_study)
    missing = "initialisation-no_skip-torch-depth2.json"
    damaged = "training-no_skip-depth2-rate0.001-seed0.json"
    (tiny_study / "records" / missing).unlink()
    record = tiny_study / "records" / f"{damaged}l"
    record.write_bytes(record.read_bytes()[:-20])  # half of its last line is gone
    (tiny_study / "study.md").unlink()
    said = rerun(tiny_study)
    after = stamps(tiny_study)
    again = {missing, f"{missing}l", damaged, f"{damaged}l"}
    assert {name for name in before if after[name] != before[name]} == again
    assert "no_skip, 2 blocks, torch initialisation" in said
    assert "training no_skip, 2 blocks, rate 0.001, seed 0" in said
    assert (tiny_study / "study.md").exists()


def test_robustness_is_spoken_of_only_with_every_rate_and_seed_and_several_depths(tmp_path: Path) -> None:
    plan = replace(
        TINY,
        name="small full",
        depths=(2,),
        variants=("post_norm", "pre_norm"),
        initializations=(),
        training_variants=("post_norm", "pre_norm"),
        training_depths=(2, 3),
        other_rates=(1e-3, 1e4),  # one of them makes no sense
        rate_seeds=2,
        robustness=True,
    )
    study = run_study(plan, tmp_path, console=Console(file=io.StringIO()))
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "With 3 blocks" in text and "more robust" in text
    assert "With 2 blocks" not in text
    assert "At 2 blocks. " in text and "At 3 blocks. " in text
    assert "### Training at 3 blocks" in text
    assert "the smallest for “post-norm” and “pre-norm”" in text
    assert study.training["pre_norm", 3].trained.rate == 1e-3
    assert len(study.training["pre_norm", 3].by_rate[1e4]) == 2


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is a signal on POSIX only")
@pytest.mark.xdist_group("tiny study")
def test_ctrl_c_keeps_what_is_done_and_a_rerun_ends_as_if_nothing_had_happened(
    tiny_study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        tiny_command(out),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores Ctrl-C, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while len(list((out / "records").glob("*.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Interrupted" in said and f"of {TINY.total_units} parts" in said
    assert f"gradscope study --tiny --jobs 2 --out {out}" in said
    assert "Traceback" not in said

    kept = stamps(out)
    assert not [name for name in kept if name.endswith(".part")]
    done = [name for name in kept if name.endswith(".json")]
    assert 2 <= len(done) < TINY.total_units
    rerun(out)
    after = stamps(out)
    assert len(after) == 2 * TINY.total_units
    for name in done:
        assert after[name] == kept[name]
        assert after[f"{name}l"] == kept[f"{name}l"]
    for name in ("table.csv", "study.md", "depth_gradient.png"):
        assert (out / name).read_bytes() == (tiny_study / name).read_bytes()


def test_a_worker_that_dies_is_named_and_what_is_done_is_kept(tmp_path: Path) -> None:
    from gradscope.study.workers import Workers

    unit = TINY.training_unit("no_skip", 2, 1e-3, 0)
    text = Text("ab", b"ab" * 1000, b"ab" * 100)
    workers = Workers(1, text, Store(tmp_path, text.digest, "code"))
    try:
        workers.submit(replace(unit, steps=10**9))
        (process,) = (worker.process for worker in workers._workers)
        process.kill()
        with pytest.raises(StudyError, match="training no_skip, 2 blocks") as caught:
            for _ in range(100):
                workers.wait(1.0)
    finally:
        workers.stop()
    assert "exit code -9" in str(caught.value)


def test_a_unit_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    from gradscope.study.workers import Workers

    text = Text("ab", b"ab" * 1000, b"ab" * 100)
    unit = replace(TINY.training_unit("no_skip", 2, 1e-3, 0), heads=3)  # does not divide the width
    workers = Workers(1, text, Store(tmp_path, text.digest, "code"))
    try:
        workers.submit(unit)
        with pytest.raises(StudyError, match="training no_skip, 2 blocks"):
            for _ in range(100):
                workers.wait(1.0)
    finally:
        workers.stop()
    assert not list(tmp_path.iterdir())
