"""The command's work: measure what is missing, then draw and write."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final

from rich.console import Console

from gradscope.errors import StudyError
from gradscope.study.outcome import InitialisationOutcome, TrainingOutcome
from gradscope.study.plan import InitialisationUnit, Plan, Unit
from gradscope.study.progress import Reporter
from gradscope.study.store import Store
from gradscope.study.summary import AtInitialisation, InTraining, Run, Study
from gradscope.study.text import Text, load_text
from gradscope.study.words import interval_text
from gradscope.study.workers import Done, Workers, available_cores

__all__ = ["run_study"]

POLL_S: Final = 0.5

Part = AtInitialisation | Run


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
                parts = _finish_all(plan, store, workers, reporter)
            finally:
                workers.stop()
        reporter.say("drawing")
        study = _assemble(plan, split, store, parts)
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


def _finish_all(plan: Plan, store: Store, workers: Workers, reporter: Reporter) -> dict[Unit, Part]:
    """Load what is done and run what is not, until nothing is left."""
    parts: dict[Unit, Part] = {}
    looked_up: set[Unit] = set()
    reporter.say(f"{plan.total_units} parts: {plan.name} plan; results go to {store.folder}")
    while True:
        losses = _final_losses(parts)
        known = plan.units(losses)
        for unit in known:
            if unit not in looked_up:
                looked_up.add(unit)
                part = _load(store, unit)
                if part is not None:
                    parts[unit] = part
                    reporter.found(unit)
        if _final_losses(parts) != losses:
            continue  # what was found may decide which units come next
        running = set(workers.running)
        todo = [unit for unit in known if unit not in parts and unit not in running]
        while todo and workers.free:
            unit = todo.pop(0)
            workers.submit(unit)
            reporter.started(unit)
        if not workers.running:
            return parts
        _import_for_later()
        for event in workers.wait(POLL_S):
            if isinstance(event, Done):
                part = _load(store, event.unit)
                if part is None:
                    raise StudyError(
                        f"{event.unit.title}: its file {store.outcome_path(event.unit)} was changed or "
                        "removed meanwhile. Is a second study writing to the same folder? Give it its "
                        "own: --out DIR"
                    )
                parts[event.unit] = part
                reporter.finished(event.unit, _in_words(part))
            else:
                reporter.progressed(event.unit, event.share)


def _load(store: Store, unit: Unit) -> Part | None:
    """What a finished unit says, or None where it is not done."""
    outcome = store.load(unit)
    if outcome is None:
        return None
    record = store.record(unit)
    if isinstance(unit, InitialisationUnit):
        assert isinstance(outcome, InitialisationOutcome)
        return AtInitialisation.of(unit, outcome, record)
    assert isinstance(outcome, TrainingOutcome)
    return Run.of(unit, outcome, record)


def _import_for_later() -> None:
    """Load what drawing needs while the workers are busy and this process is not."""
    import_module("gradscope.reference")
    import_module("gradscope.study.pictures")


def _final_losses(parts: Mapping[Unit, Part]) -> dict[Unit, float]:
    return {unit: part.outcome.final_loss for unit, part in parts.items() if isinstance(part, Run)}


def _in_words(part: Part) -> str:
    if isinstance(part, AtInitialisation):
        return f"Δ {interval_text(part.flow.delta)} nats"
    if part.outcome.diverged_at is not None:
        return f"diverged at step {part.outcome.diverged_at}"
    return f"validation loss {part.outcome.final_loss:.3f}"


def _assemble(plan: Plan, text: Text, store: Store, parts: Mapping[Unit, Part]) -> Study:
    from gradscope.reference import VARIANTS

    labels = {v: VARIANTS[v].label for v in (*plan.variants, *plan.training_variants)}
    initialisation = {
        (part.unit.variant, part.unit.initialization, part.unit.depth): part
        for part in (parts[unit] for unit in plan.initialisation_units)
        if isinstance(part, AtInitialisation)
    }
    losses = _final_losses(parts)
    training: dict[tuple[str, int], InTraining] = {}
    for variant in plan.training_variants:
        for depth in plan.training_depths:
            best = plan.best_rate(variant, depth, losses)
            assert best is not None
            units = dict.fromkeys(
                (*plan.rate_units(variant, depth), *plan.best_units(variant, depth, best))
            )
            runs = [part for part in map(parts.get, units) if isinstance(part, Run)]
            by_rate = {
                rate: tuple(run for run in runs if run.unit.learning_rate == rate)
                for rate in plan.rates(variant)
            }
            training[variant, depth] = InTraining.of(labels[variant], by_rate, best)
    return Study(
        plan=plan,
        text=text,
        code=store.code,
        labels=labels,
        initialisation=initialisation,
        training=training,
    )


def _write(study: Study, out: Path) -> None:
    from gradscope.study.pictures import draw_all
    from gradscope.study.report import report
    from gradscope.study.table import table

    captions = draw_all(study, out)
    for name, content in (("table.csv", table(study)), ("study.md", report(study, captions))):
        temporary = out / f"{name}.part"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(out / name)
