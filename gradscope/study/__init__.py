"""The depth study: what skips and norms do to the gradient, measured and trained on this machine.

``gradscope study`` in Python::

    from pathlib import Path
    from gradscope.study import PLANS, run_study

    run_study(PLANS["default"], Path("figures"))

A `Plan` says which variants of `gradscope.reference` are measured at initialisation and trained. Each
finished unit of it is kept as one Record (by `gradscope.measure` or `gradscope.watch`), so that an
interrupted study goes on where it was. The pictures, the table and the text are made of the Records
alone; the rules by which the text is chosen stand in `gradscope.study.claims_at_initialisation` and
`gradscope.study.claims_in_training`.
"""

from __future__ import annotations

from gradscope.study.plan import PLANS, InitialisationUnit, Plan, TrainingUnit
from gradscope.study.run import run_study
from gradscope.study.summary import Study
from gradscope.study.text import Text, load_text

__all__ = [
    "PLANS",
    "InitialisationUnit",
    "Plan",
    "Study",
    "Text",
    "TrainingUnit",
    "load_text",
    "run_study",
]
