"""Knowing things from a Record: derived quantities and what follows from them over depth. No torch.

- `profile`: one quantity over depth at one step, with its increments and their intervals.
- `history`: one quantity over depth for every step and replicate.
- `fit_decay`: the family of decay that a profile follows, its rate and depth scale.
- `verdict`, `verdicts`: vanishing, exploding, preserved or inconclusive, with the evidence.
- `predict`, `depth_limit`: the gradient at a depth not built; how deep the architecture can go.
- `QUANTITIES`, `FAMILIES`: what there is, with formula and source.
"""

from __future__ import annotations

from gradscope.analysis.change import DepthScale
from gradscope.analysis.decay import DecayFit, fit_decay
from gradscope.analysis.families import FAMILIES, Family, family
from gradscope.analysis.history import History, history
from gradscope.analysis.predict import DepthLimit, Prediction, depth_limit, predict
from gradscope.analysis.profile import Interval, Profile, interval, profile
from gradscope.analysis.quantities import QKV_NAMES, QUANTITIES, Quantity, find_quantity
from gradscope.analysis.verdict import Verdict, Verdicts, verdict, verdicts

__all__ = [
    "FAMILIES",
    "QKV_NAMES",
    "QUANTITIES",
    "DecayFit",
    "DepthLimit",
    "DepthScale",
    "Family",
    "History",
    "Interval",
    "Prediction",
    "Profile",
    "Quantity",
    "Verdict",
    "Verdicts",
    "depth_limit",
    "family",
    "find_quantity",
    "fit_decay",
    "history",
    "interval",
    "predict",
    "profile",
    "verdict",
    "verdicts",
]
