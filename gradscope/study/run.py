"""The command's work: measure what is missing, then draw and write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.console import Console

from gradscope.errors import StudyError
from gradscope.study.outcome import InitialisationOutcome, Outcome, TrainingOutcome
from gradscope.study.plan import InitialisationUnit, Plan, TrainingUnit, Unit
from gradscope.study.progress import Reporter
from gradscope.study.store import Store
from gradscope.study.summary import AtInitialisation, InTraining, Run, Study
from gradscope.study.text import Text, load_text
from gradscope.study.workers import Done, Workers, available_cores

__all__ = ["run_study"]

POLL_S: Final = 0.5


def run_study(
    plan: Plan,
    out: Path,
    *,
    text: Path | None = None,
    jobs: int | None = None,
    console: Console | None = None,
    again: str = "gradscope study",
) -> Study:
    """Run a plan, or what is missing of it, and write pictures, report, table and Records.

    Args:
        plan: what to run.
        out: the folder to write to; finished units are kept in its subfolder ``records``.
        text: a file to train on; None for Python's language reference.
        jobs: number of worker processes; None for the number of cores.
        console: where to say what happens; None for standard error.
        again: the command line that resumes, for the message after Ctrl-C.

    Raises:
        StudyError: the text or the folder cannot be used, or a unit failed.
        KeyboardInterrupt: passed on after the workers have ended and a message was printed.
    """
    console = console or Console(stderr=True)
    split = load_text(text)
    store = Store(out / "records", split.digest)
    store.prepare()
    reporter = Reporter(console, plan.total_units, plan.total_work)
    workers = Workers(jobs or available_cores(), split, store)
    try:
        with reporter:
            try:
                outcomes = _finish_all(plan, store, workers, reporter)
            finally:
                workers.stop()
        reporter.say("drawing")
        study = _assemble(plan, split, store, outcomes)
        _write(study, out)
    except KeyboardInterrupt:
        reporter.say(
            f"\nInterrupted: {reporter.done_units} of {plan.total_units} parts of the study are finished "
            f"and kept in {store.folder}.\nResume with the same command: {again}"
        )
        raise
    except StudyError:
        reporter.say(
            f"\n{reporter.done_units} of {plan.total_units} parts of the study are finished and kept in "
            f"{store.folder}."
        )
        raise
    reporter.say(f"Wrote {out / 'study.md'}, {out / 'table.csv'} and the pictures beside them.")
    return study


def _finish_all(plan: Plan, store: Store, workers: Workers, reporter: Reporter) -> dict[Unit, Outcome]:
    """Load what is done and run what is not, until nothing is left."""
    outcomes: dict[Unit, Outcome] = {}
    looked_up: set[Unit] = set()
    reporter.say(f"{plan.total_units} parts: {plan.name} plan; results go to {store.folder}")
    while True:
        losses = _final_losses(outcomes)
        known = plan.units(losses)
        for unit in known:
            if unit in looked_up:
                continue
            looked_up.add(unit)
            outcome = store.load(unit)
            if outcome is not None:
                outcomes[unit] = outcome
                reporter.found(unit)
        if _final_losses(outcomes) != losses:
            continue  # what was found may decide which units come next
        running = set(workers.running)
        todo = [unit for unit in known if unit not in outcomes and unit not in running]
        while todo and workers.free:
            unit = todo.pop(0)
            workers.submit(unit)
            reporter.started(unit)
        if not workers.running:
            return outcomes
        for event in workers.wait(POLL_S):
            if isinstance(event, Done):
                outcome = store.load(event.unit)
                if outcome is None:
                    raise StudyError(
                        f"{event.unit.title}: its file {store.outcome_path(event.unit)} was changed or "
                        "removed meanwhile. Is a second study writing to the same folder? Give it its "
                        "own: --out DIR"
                    )
                outcomes[event.unit] = outcome
                reporter.finished(event.unit, _in_words(event.unit, outcome))
            else:
                reporter.progressed(event.unit, event.share)


def _final_losses(outcomes: Mapping[Unit, Outcome]) -> dict[Unit, float]:
    return {u: o.final_loss for u, o in outcomes.items() if isinstance(o, TrainingOutcome)}


def _in_words(unit: Unit, outcome: Outcome) -> str:
    if isinstance(outcome, TrainingOutcome):
        if outcome.diverged_at is not None:
            return f"diverged at step {outcome.diverged_at}"
        return f"validation loss {outcome.final_loss:.3f}"
    return f"{unit.seeds if isinstance(unit, InitialisationUnit) else 1} seeds"


def _assemble(plan: Plan, text: Text, store: Store, outcomes: Mapping[Unit, Outcome]) -> Study:
    from gradscope.reference import VARIANTS

    labels = {v: VARIANTS[v].label for v in (*plan.variants, *plan.training_variants)}
    initialisation: dict[tuple[str, str, int], AtInitialisation] = {}
    for unit in plan.initialisation_units:
        outcome = outcomes[unit]
        assert isinstance(outcome, InitialisationOutcome)
        key = (unit.variant, unit.initialization, unit.depth)
        initialisation[key] = AtInitialisation.of(unit, outcome, store.record(unit))
    losses = _final_losses(outcomes)
    training: dict[tuple[str, int], InTraining] = {}
    for variant in plan.training_variants:
        for depth in plan.training_depths:
            best = plan.best_rate(variant, depth, losses)
            assert best is not None
            units = dict.fromkeys(
                (*plan.rate_units(variant, depth), *plan.best_units(variant, depth, best))
            )
            runs: dict[float, tuple[Run, ...]] = {
                rate: tuple(
                    _run(unit, outcomes[unit], store) for unit in units if unit.learning_rate == rate
                )
                for rate in plan.rates(variant)
            }
            training[variant, depth] = InTraining.of(labels[variant], runs, best)
    return Study(
        plan=plan,
        text=text,
        code=store.code,
        labels=labels,
        initialisation=initialisation,
        training=training,
    )


def _run(unit: TrainingUnit, outcome: Outcome, store: Store) -> Run:
    assert isinstance(outcome, TrainingOutcome)
    return Run(unit=unit, outcome=outcome, record=store.record(unit))


def _write(study: Study, out: Path) -> None:
    from gradscope.study.pictures import draw_all
    from gradscope.study.report import report
    from gradscope.study.table import table

    captions = draw_all(study, out)
    for name, content in (("table.csv", table(study)), ("study.md", report(study, captions))):
        temporary = out / f"{name}.part"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(out / name)
